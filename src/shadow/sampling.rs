//! What share of the traffic is compared, as the mismatch log tells it: at the proxy's start, and after
//! a reload that changed it. Counts say what was compared; this says what was asked for.

use serde::{Deserialize, Serialize};

use super::rules::Rules;
use super::stats::IgnoreReport;
use crate::config::{Config, SampleKey, ShadowRule};

/// The keys of a line `sampling`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// `reads.shadow_percent` and its rules, `reads.canary_percent`, `writes.rehearse_percent`.
    pub shadow: Share,
    pub canary: Share,
    pub rehearse: Share,
    /// `reads.columns`: by so many rules values may differ and still match.
    pub column_rules: usize,
    pub ignores: Vec<IgnoreReport>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// Of what no rule is about, 0 to 100.
    pub percent: f64,
    /// What decides whether one is in it: `statement`, `user`, `application_name`, `$1`.
    pub key: String,
    /// The first that fits decides.
    pub rules: Vec<ShareRule>,
}

/// A rule of proxy.yaml; conditions that are absent hold.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ShareRule {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application_name: Option<String>,
    pub percent: f64,
    pub key: String,
}

impl Sampling {
    pub fn of(config: &Config) -> Self {
        let (reads, canary, rehearse) = (&config.reads, &config.reads.canary, &config.rehearse);
        Self {
            shadow: Share::of(reads.shadow_percent, reads.shadow_key, &reads.shadow_rules),
            canary: Share::of(canary.percent, canary.key, &canary.rules),
            rehearse: Share::of(rehearse.percent, rehearse.key, &rehearse.rules),
            column_rules: reads.columns.len(),
            ignores: Rules::new(reads).ignores(),
        }
    }
}

impl Share {
    fn of(percent: f64, by: SampleKey, rules: &[ShadowRule]) -> Self {
        Self {
            percent,
            key: key(by),
            rules: rules
                .iter()
                .map(|rule| ShareRule {
                    fingerprint: rule.which.fingerprint.map(|id| id.to_string()),
                    table: rule.which.table.clone(),
                    user: rule.user.clone(),
                    application_name: rule.application_name.clone(),
                    percent: rule.percent,
                    key: key(rule.key),
                })
                .collect(),
        }
    }
}

fn key(of: SampleKey) -> String {
    match of {
        SampleKey::Statement => "statement".into(),
        SampleKey::User => "user".into(),
        SampleKey::ApplicationName => "application_name".into(),
        SampleKey::Parameter(n) => format!("${n}"),
    }
}
