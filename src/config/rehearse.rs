//! `rehearse_…` of `writes:` in proxy.yaml: which writes are tried on the secondary.

use std::time::Duration;

use super::reads::{RawShadowRule, SampleKey, ShadowRule, key};
use super::value::{Percent, Seconds, Text};

/// Clients' writes that are also run on the secondary, in transactions that are rolled back.
#[derive(Debug, Clone, PartialEq)]
pub struct Rehearse {
    /// Of the transactions whose first write no rule is about, 0 to 100.
    pub percent: f64,
    /// What decides whether a transaction is in that share.
    pub key: SampleKey,
    /// The first that fits a transaction's first write decides about it.
    pub rules: Vec<ShadowRule>,
    /// Rehearsals at once on a database's secondary.
    pub max_concurrency: usize,
    /// Transactions of a database that may wait for their rehearsal.
    pub queue: usize,
    /// How long a statement may run on the secondary.
    pub timeout: Duration,
}

impl Default for Rehearse {
    fn default() -> Self {
        Self {
            percent: 0.0,
            key: SampleKey::Statement,
            rules: Vec::new(),
            max_concurrency: 2,
            queue: 256,
            timeout: Duration::from_secs(10),
        }
    }
}

impl Rehearse {
    /// Whether any write may be in a sample.
    pub fn any(&self) -> bool {
        self.percent > 0.0 || self.rules.iter().any(|rule| rule.percent > 0.0)
    }
}

/// These keys as they stand in `writes:`.
pub(super) struct RawRehearse {
    pub(super) percent: Percent,
    pub(super) key: Text,
    pub(super) rules: Vec<RawShadowRule>,
    pub(super) max_concurrency: usize,
    pub(super) queue: usize,
    pub(super) timeout: Seconds,
}

impl RawRehearse {
    pub(super) fn check(self) -> Result<Rehearse, String> {
        if self.max_concurrency == 0 || self.queue == 0 {
            return Err(
                "writes: rehearse_max_concurrency and rehearse_queue: at least 1; rehearse_percent: 0 turns rehearsals off"
                    .into(),
            );
        }
        if self.timeout.0.is_zero() {
            return Err("writes: rehearse_timeout: more than 0".into());
        }
        let usual = key(&self.key).map_err(|why| format!("writes: rehearse_key: {why}"))?;
        let rules = self.rules.into_iter().enumerate().map(|(at, rule)| {
            rule.check(usual)
                .map_err(|why| format!("writes: rehearse_rules: entry {}: {why}", at + 1))
        });
        Ok(Rehearse {
            percent: self.percent.0,
            key: usual,
            rules: rules.collect::<Result<_, _>>()?,
            max_concurrency: self.max_concurrency,
            queue: self.queue,
            timeout: self.timeout.0,
        })
    }
}
