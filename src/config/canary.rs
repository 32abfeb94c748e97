//! `reads: canary_…` of proxy.yaml: which reads the secondary really answers, and when that ends by
//! itself.

use std::time::Duration;

use serde::Deserialize;

use super::reads::{SampleKey, ShadowRule};
use super::value::{Percent, Seconds};

/// Canary reads as used.
#[derive(Debug, Clone, PartialEq)]
pub struct Canary {
    /// Of the reads that no rule is about, 0 to 100.
    pub percent: f64,
    pub key: SampleKey,
    /// The first that fits a read decides about it.
    pub rules: Vec<ShadowRule>,
    /// How long a read may wait for the session's own writes to arrive, and for a connection.
    pub wait: Duration,
    /// Where the secondary is further behind, the primary answers.
    pub max_lag: Duration,
    pub budget: Budget,
}

/// What a canary may cost; beyond it no more reads go to the secondary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// What is looked at.
    pub window: Duration,
    /// Fewer reads in the window prove nothing.
    pub min_reads: u64,
    /// Per cent of the canary reads that failed on the secondary alone.
    pub errors: f64,
    /// Per cent of those compared that were confirmed mismatches.
    pub mismatches: f64,
    /// How many times as long as the primary the secondary may take for the same reads.
    pub latency_ratio: f64,
}

impl Default for Canary {
    fn default() -> Self {
        Self {
            percent: 0.0,
            key: SampleKey::Statement,
            rules: Vec::new(),
            wait: Duration::from_millis(200),
            max_lag: Duration::from_secs(5),
            budget: Budget::default(),
        }
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(300),
            min_reads: 50,
            errors: 1.0,
            mismatches: 0.1,
            latency_ratio: 3.0,
        }
    }
}

impl Canary {
    /// Whether any read may go to the secondary.
    pub fn any(&self) -> bool {
        self.percent > 0.0 || self.rules.iter().any(|rule| rule.percent > 0.0)
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawBudget {
    window: Option<Seconds>,
    min_reads: Option<u64>,
    errors: Option<Percent>,
    mismatches: Option<Percent>,
    latency_ratio: Option<f64>,
}

impl RawBudget {
    pub(super) fn check(self) -> Result<Budget, String> {
        let usual = Budget::default();
        let budget = Budget {
            window: self.window.map_or(usual.window, |window| window.0),
            min_reads: self.min_reads.unwrap_or(usual.min_reads),
            errors: self.errors.map_or(usual.errors, |share| share.0),
            mismatches: self.mismatches.map_or(usual.mismatches, |share| share.0),
            latency_ratio: self.latency_ratio.unwrap_or(usual.latency_ratio),
        };
        if budget.latency_ratio.is_nan() || budget.latency_ratio <= 0.0 {
            return Err("reads: canary_budget: latency_ratio: more than 0, such as 3.0".into());
        }
        if budget.window.is_zero() || budget.min_reads == 0 {
            return Err("reads: canary_budget: window and min_reads: more than 0".into());
        }
        Ok(budget)
    }
}
