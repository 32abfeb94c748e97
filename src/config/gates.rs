//! `switchover.gates:` of proxy.yaml: what must have been measured before a flip may begin.

use std::time::Duration;

use serde::Deserialize;

use super::raw::{Percent, Seconds};

/// Thresholds of the gates. What is `None` is measured and shown, and closes nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gates {
    /// The last round, under which clients wait, takes about as long.
    pub lag: Duration,
    /// A transaction prepared for longer is taken for one that nobody will end in time.
    pub prepared: Duration,
    /// Every table was proved equal so lately.
    pub verified_within: Option<Duration>,
    /// Per cent of the reads since the proxy started that were compared.
    pub shadow_coverage: Option<f64>,
    /// Per cent of the compared reads that were alike.
    pub shadow_match_rate: Option<f64>,
    /// The secondary has not seen a writer that is not pgtandem for so long.
    pub no_strays_for: Option<Duration>,
    /// Canary reads have been on for so long, in all, since they last turned themselves off.
    pub canary: Option<Duration>,
    /// Of any proxy's clock from the primary's.
    pub clock_offset: Option<Duration>,
}

impl Default for Gates {
    fn default() -> Self {
        Self {
            lag: Duration::from_secs(2),
            prepared: Duration::from_secs(60),
            verified_within: None,
            shadow_coverage: None,
            shadow_match_rate: None,
            no_strays_for: None,
            canary: None,
            clock_offset: None,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawGates {
    lag: Option<Seconds>,
    prepared: Option<Seconds>,
    verified_within: Option<Seconds>,
    shadow_coverage: Option<Percent>,
    shadow_match_rate: Option<Percent>,
    no_strays_for: Option<Seconds>,
    canary: Option<Seconds>,
    clock_offset: Option<Seconds>,
}

impl From<RawGates> for Gates {
    fn from(raw: RawGates) -> Self {
        let usual = Self::default();
        Self {
            lag: raw.lag.map_or(usual.lag, |lag| lag.0),
            prepared: raw.prepared.map_or(usual.prepared, |age| age.0),
            verified_within: raw.verified_within.map(|age| age.0),
            shadow_coverage: raw.shadow_coverage.map(|share| share.0),
            shadow_match_rate: raw.shadow_match_rate.map(|share| share.0),
            no_strays_for: raw.no_strays_for.map(|age| age.0),
            canary: raw.canary.map(|time| time.0),
            clock_offset: raw.clock_offset.map(|offset| offset.0),
        }
    }
}
