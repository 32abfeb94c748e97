//! `switchover.gates:` of proxy.yaml: what must have been measured before a flip may begin.

use std::time::Duration;

use serde::Deserialize;

use super::value::{Bytes, Percent, Seconds};

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
    /// Connections that the new primary has left when all sessions are there.
    pub spare_connections: u32,
    /// Clients' connections past the proxies, to either side.
    pub direct_sessions: Option<u32>,
    pub disk: Capacity,
}

/// Bytes that the database may take on each side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capacity {
    pub legacy: Option<u64>,
    pub new: Option<u64>,
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
            spare_connections: 0,
            direct_sessions: None,
            disk: Capacity::default(),
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
    spare_connections: Option<u32>,
    direct_sessions: Option<u32>,
    disk: RawCapacity,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawCapacity {
    legacy: Option<Bytes>,
    new: Option<Bytes>,
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
            spare_connections: raw.spare_connections.unwrap_or(usual.spare_connections),
            direct_sessions: raw.direct_sessions,
            disk: Capacity {
                legacy: raw.disk.legacy.map(|bytes| bytes.0),
                new: raw.disk.new.map(|bytes| bytes.0),
            },
        }
    }
}
