//! `writes:` in proxy.yaml, but for what is rehearsed ([`super::rehearse`]).

use std::time::Duration;

use serde::Deserialize;

use super::Rehearse;
use super::reads::RawShadowRule;
use super::rehearse::RawRehearse;
use super::value::{Percent, Seconds, Text};

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Writes {
    pub acknowledge: Acknowledge,
    /// How long a commit waits for the secondary, where both sides acknowledge it.
    pub both_timeout: Duration,
    pub when_late: WhenLate,
    /// How often a round is tried again after an error of the secondary that is neither clearly
    /// transient nor clearly permanent, before it is taken as permanent.
    pub retry_attempts: u32,
    /// Per cent of the transactions of `error_window`, above which mirroring stops rather than
    /// fill the quarantine; 100 never stops.
    pub error_threshold: f64,
    pub error_window: Duration,
}

impl Default for Writes {
    fn default() -> Self {
        Self {
            acknowledge: Acknowledge::Primary,
            both_timeout: Duration::from_secs(5),
            when_late: WhenLate::Degrade,
            retry_attempts: 5,
            error_threshold: 5.0,
            error_window: Duration::from_secs(300),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acknowledge {
    Primary,
    Both,
}

/// What becomes of a commit that has waited for [`Writes::both_timeout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenLate {
    /// It is acknowledged by the primary, and so are others until the secondary has caught up.
    Degrade,
    /// The client gets an error that says that the primary has committed.
    Error,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawWrites {
    acknowledge: RawAcknowledge,
    both_timeout: Seconds,
    when_late: RawWhenLate,
    retry_attempts: u32,
    error_threshold: Percent,
    error_window: Seconds,
    rehearse_percent: Percent,
    rehearse_key: Text,
    rehearse_rules: Vec<RawShadowRule>,
    rehearse_max_concurrency: usize,
    rehearse_queue: usize,
    rehearse_timeout: Seconds,
}

impl RawWrites {
    pub(super) fn rehearse(&mut self) -> Result<Rehearse, String> {
        let raw = RawRehearse {
            percent: Percent(self.rehearse_percent.0),
            key: Text(std::mem::take(&mut self.rehearse_key.0)),
            rules: std::mem::take(&mut self.rehearse_rules),
            max_concurrency: self.rehearse_max_concurrency,
            queue: self.rehearse_queue,
            timeout: Seconds(self.rehearse_timeout.0),
        };
        raw.check()
    }
}

impl Default for RawWrites {
    fn default() -> Self {
        let usual = Writes::default();
        let rehearse = Rehearse::default();
        Self {
            acknowledge: RawAcknowledge::Primary,
            both_timeout: Seconds(usual.both_timeout),
            when_late: RawWhenLate::Degrade,
            retry_attempts: usual.retry_attempts,
            error_threshold: Percent(usual.error_threshold),
            error_window: Seconds(usual.error_window),
            rehearse_percent: Percent(rehearse.percent),
            rehearse_key: Text("statement".into()),
            rehearse_rules: Vec::new(),
            rehearse_max_concurrency: rehearse.max_concurrency,
            rehearse_queue: rehearse.queue,
            rehearse_timeout: Seconds(rehearse.timeout),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawWhenLate {
    Degrade,
    Error,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "snake_case")]
enum RawAcknowledge {
    #[default]
    Primary,
    Both,
}

impl From<RawWrites> for Writes {
    fn from(raw: RawWrites) -> Self {
        Self {
            acknowledge: match raw.acknowledge {
                RawAcknowledge::Primary => Acknowledge::Primary,
                RawAcknowledge::Both => Acknowledge::Both,
            },
            both_timeout: raw.both_timeout.0,
            when_late: match raw.when_late {
                RawWhenLate::Degrade => WhenLate::Degrade,
                RawWhenLate::Error => WhenLate::Error,
            },
            retry_attempts: raw.retry_attempts,
            error_threshold: raw.error_threshold.0,
            error_window: raw.error_window.0,
        }
    }
}
