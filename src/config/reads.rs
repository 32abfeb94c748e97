//! `reads:` of proxy.yaml: which reads are shadowed, how their answers are compared, and what is
//! ignored.

use std::time::Duration;

use serde::Deserialize;
use time::macros::format_description;
use time::{Date, OffsetDateTime};

use super::canary::{Canary, RawBudget};
use super::value::{Percent, Seconds, Text};
use crate::sql::FingerprintId;

/// `reads:` as used.
#[derive(Debug, Clone, PartialEq)]
pub struct Reads {
    /// Of the reads that no rule is about, 0 to 100.
    pub shadow_percent: f64,
    /// What decides whether a read is in that share.
    pub shadow_key: SampleKey,
    /// The first that fits a read decides about it.
    pub shadow_rules: Vec<ShadowRule>,
    /// Shadows at once on a database's secondary.
    pub shadow_max_concurrency: usize,
    /// Reads of a database that may wait for their shadow.
    pub shadow_queue: usize,
    /// How long a shadow may run on the secondary.
    pub shadow_timeout: Duration,
    /// A statement this many times as slow on new as on legacy is named.
    pub slower_ratio: f64,
    /// Notices are part of the answer.
    pub compare_notices: bool,
    pub columns: Vec<ColumnRule>,
    pub ignores: Vec<Ignore>,
    pub canary: Canary,
}

impl Default for Reads {
    fn default() -> Self {
        Self {
            shadow_percent: 10.0,
            shadow_key: SampleKey::Statement,
            shadow_rules: Vec::new(),
            shadow_max_concurrency: 4,
            shadow_queue: 1024,
            shadow_timeout: Duration::from_secs(30),
            slower_ratio: 2.0,
            compare_notices: false,
            columns: Vec::new(),
            ignores: Vec::new(),
            canary: Canary::default(),
        }
    }
}

impl Reads {
    /// Whether any read may be shown to the shadow.
    pub fn shows_any(&self) -> bool {
        self.shadows_any() || self.canary.any()
    }

    fn shadows_any(&self) -> bool {
        self.shadow_percent > 0.0 || self.shadow_rules.iter().any(|rule| rule.percent > 0.0)
    }
}

/// What a sample is drawn by: the same key is always in it or never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleKey {
    /// Text and parameters.
    Statement,
    User,
    ApplicationName,
    /// The bytes of `$n`, so that one tenant can be followed through all its statements; reads
    /// without it go by text and parameters.
    Parameter(usize),
}

/// Which reads; conditions that are absent hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Which {
    pub fingerprint: Option<FingerprintId>,
    /// `name` or `schema.name`, of a table or view that the statement names.
    pub table: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ShadowRule {
    pub which: Which,
    pub user: Option<String>,
    pub application_name: Option<String>,
    pub percent: f64,
    pub key: SampleKey,
}

/// How the values of an output column are compared.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnRule {
    /// The output column's name.
    pub column: String,
    pub which: Which,
    pub how: How,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum How {
    /// Numbers may differ by this share of the greater one.
    FloatTolerance(f64),
    /// Times may differ by less than this.
    TimestampPrecision(Duration),
    /// JSON by what it says: order of keys, blanks and how a number is written are of no
    /// consequence; numbers are compared as doubles.
    Json,
    /// Rows sorted by this column may come in another order.
    Collation,
}

/// A difference that is known and borne for a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ignore {
    pub which: Which,
    /// An output column; without one the whole read.
    pub column: Option<String>,
    pub owner: String,
    pub reason: String,
    /// The last day on which it is in force, UTC.
    pub expires: Date,
}

impl Ignore {
    /// Whether its last day is over.
    pub fn expired(&self, now: OffsetDateTime) -> bool {
        now.date() > self.expires
    }

    /// What it covers, in words.
    pub fn covers(&self) -> String {
        let mut words = Vec::new();
        words.extend(self.column.as_ref().map(|column| format!("column {column}")));
        words.extend(self.which.table.as_ref().map(|table| format!("table {table}")));
        words.extend(self.which.fingerprint.map(|id| format!("fingerprint {id}")));
        words.join(", ")
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawReads {
    shadow_percent: Percent,
    canary_percent: Percent,
    canary_key: Text,
    canary_rules: Vec<RawShadowRule>,
    canary_wait: Seconds,
    canary_max_lag: Seconds,
    canary_budget: RawBudget,
    shadow_key: Text,
    shadow_rules: Vec<RawShadowRule>,
    shadow_max_concurrency: usize,
    shadow_queue: usize,
    shadow_timeout: Seconds,
    slower_ratio: f64,
    compare_notices: bool,
    columns: Vec<RawColumnRule>,
    ignores: Vec<RawIgnore>,
}

impl Default for RawReads {
    fn default() -> Self {
        let usual = Reads::default();
        Self {
            shadow_percent: Percent(usual.shadow_percent),
            canary_percent: Percent(usual.canary.percent),
            canary_key: Text("statement".into()),
            canary_rules: Vec::new(),
            canary_wait: Seconds(usual.canary.wait),
            canary_max_lag: Seconds(usual.canary.max_lag),
            canary_budget: RawBudget::default(),
            shadow_key: Text("statement".into()),
            shadow_rules: Vec::new(),
            shadow_max_concurrency: usual.shadow_max_concurrency,
            shadow_queue: usual.shadow_queue,
            shadow_timeout: Seconds(usual.shadow_timeout),
            slower_ratio: usual.slower_ratio,
            compare_notices: usual.compare_notices,
            columns: Vec::new(),
            ignores: Vec::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawShadowRule {
    #[serde(default)]
    fingerprint: Option<Text>,
    #[serde(default)]
    table: Option<Text>,
    #[serde(default)]
    user: Option<Text>,
    #[serde(default)]
    application_name: Option<Text>,
    percent: Percent,
    #[serde(default)]
    key: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawColumnRule {
    column: Text,
    #[serde(default)]
    fingerprint: Option<Text>,
    #[serde(default)]
    table: Option<Text>,
    #[serde(default)]
    float_tolerance: Option<f64>,
    #[serde(default)]
    timestamp_precision: Option<Seconds>,
    #[serde(default)]
    json: Option<RawJson>,
    #[serde(default)]
    collation: Option<RawCollation>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawJson {
    Semantic,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawCollation {
    Ignore,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawIgnore {
    #[serde(default)]
    fingerprint: Option<Text>,
    #[serde(default)]
    table: Option<Text>,
    #[serde(default)]
    column: Option<Text>,
    owner: Text,
    reason: Text,
    expires: Text,
}

impl RawReads {
    pub(super) fn check(self) -> Result<Reads, String> {
        if self.shadow_max_concurrency == 0 || self.shadow_queue == 0 {
            return Err(
                "reads: shadow_max_concurrency and shadow_queue: at least 1; shadow_percent: 0 turns shadow reads off"
                    .into(),
            );
        }
        if self.slower_ratio.is_nan() || self.slower_ratio <= 1.0 {
            return Err("reads: slower_ratio: more than 1, such as 2.0".into());
        }
        let shadow_key = key(&self.shadow_key).map_err(|why| format!("reads: shadow_key: {why}"))?;
        let canary_key = key(&self.canary_key).map_err(|why| format!("reads: canary_key: {why}"))?;
        let canary = Canary {
            percent: self.canary_percent.0,
            key: canary_key,
            rules: each("canary_rules", self.canary_rules, |rule| rule.check(canary_key))?,
            wait: self.canary_wait.0,
            max_lag: self.canary_max_lag.0,
            budget: self.canary_budget.check()?,
        };
        Ok(Reads {
            canary,
            shadow_percent: self.shadow_percent.0,
            shadow_key,
            shadow_rules: each("shadow_rules", self.shadow_rules, |rule| rule.check(shadow_key))?,
            shadow_max_concurrency: self.shadow_max_concurrency,
            shadow_queue: self.shadow_queue,
            shadow_timeout: self.shadow_timeout.0,
            slower_ratio: self.slower_ratio,
            compare_notices: self.compare_notices,
            columns: each("columns", self.columns, RawColumnRule::check)?,
            ignores: each("ignores", self.ignores, RawIgnore::check)?,
        })
    }
}

fn each<R, T>(list: &str, raw: Vec<R>, check: impl Fn(R) -> Result<T, String>) -> Result<Vec<T>, String> {
    raw.into_iter()
        .enumerate()
        .map(|(at, one)| check(one).map_err(|why| format!("reads: {list}: entry {}: {why}", at + 1)))
        .collect()
}

impl RawShadowRule {
    pub(super) fn check(self, usual: SampleKey) -> Result<ShadowRule, String> {
        let which = which(self.fingerprint, self.table)?;
        if which == Which::default() && self.user.is_none() && self.application_name.is_none() {
            return Err("names no reads; give fingerprint, table, user or application_name".into());
        }
        Ok(ShadowRule {
            which,
            user: self.user.map(|text| text.0),
            application_name: self.application_name.map(|text| text.0),
            percent: self.percent.0,
            key: self.key.map_or(Ok(usual), |text| key(&text))?,
        })
    }
}

impl RawColumnRule {
    fn check(self) -> Result<ColumnRule, String> {
        let hows = [
            self.float_tolerance.map(How::FloatTolerance),
            self.timestamp_precision
                .map(|precision| How::TimestampPrecision(precision.0)),
            self.json.map(|RawJson::Semantic| How::Json),
            self.collation.map(|RawCollation::Ignore| How::Collation),
        ];
        let mut hows = hows.into_iter().flatten();
        let (Some(how), None) = (hows.next(), hows.next()) else {
            return Err(
                "exactly one of float_tolerance, timestamp_precision, json: semantic and collation: ignore".into(),
            );
        };
        match how {
            How::FloatTolerance(share) if !(share > 0.0 && share < 1.0) => {
                return Err("float_tolerance: a share between 0 and 1, such as 1e-9".into());
            }
            How::TimestampPrecision(precision) if precision.is_zero() => {
                return Err("timestamp_precision: more than 0, such as 1ms".into());
            }
            _ => {}
        }
        Ok(ColumnRule {
            column: self.column.0,
            which: which(self.fingerprint, self.table)?,
            how,
        })
    }
}

impl RawIgnore {
    fn check(self) -> Result<Ignore, String> {
        let which = which(self.fingerprint, self.table)?;
        if which == Which::default() && self.column.is_none() {
            return Err("covers nothing; give fingerprint, table or column".into());
        }
        for (name, text) in [("owner", &self.owner), ("reason", &self.reason)] {
            if text.0.trim().is_empty() {
                return Err(format!("{name}: must be given; it is printed in the report"));
            }
        }
        let expires = Date::parse(&self.expires.0, format_description!("[year]-[month]-[day]"))
            .map_err(|_| "expires: expected a date such as 2027-01-31".to_owned())?;
        Ok(Ignore {
            which,
            column: self.column.map(|text| text.0),
            owner: self.owner.0,
            reason: self.reason.0,
            expires,
        })
    }
}

fn which(fingerprint: Option<Text>, table: Option<Text>) -> Result<Which, String> {
    let fingerprint = fingerprint.map(|text| text.0.parse()).transpose()?;
    Ok(Which {
        fingerprint,
        table: table.map(|text| text.0),
    })
}

pub(super) fn key(text: &Text) -> Result<SampleKey, String> {
    let parameter = |text: &str| {
        text.strip_prefix('$')?
            .parse()
            .ok()
            .filter(|&number: &usize| number > 0)
    };
    match text.0.as_str() {
        "statement" => Ok(SampleKey::Statement),
        "user" => Ok(SampleKey::User),
        "application_name" => Ok(SampleKey::ApplicationName),
        text => parameter(text)
            .map(SampleKey::Parameter)
            .ok_or_else(|| "expected statement, user, application_name, or a parameter such as $1".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use time::macros::{date, datetime};

    use super::*;

    fn read(yaml: &str) -> Result<Reads, String> {
        let raw: RawReads = serde_saphyr::from_str(yaml).map_err(|error| error.to_string())?;
        raw.check()
    }

    #[test]
    fn everything_that_can_be_said() {
        let reads = read(
            "shadow_percent: 5
shadow_key: $1
shadow_rules:
- {table: public.orders, percent: 100, key: $2}
- {user: batch, application_name: nightly, percent: 0}
- {fingerprint: 00000000000000ff, percent: 50, key: statement}
shadow_max_concurrency: 2
shadow_queue: 10
shadow_timeout: 5s
slower_ratio: 1.5
compare_notices: true
canary_percent: 5
canary_key: user
canary_rules: [{table: orders, percent: 50}]
canary_wait: 1s
canary_max_lag: 2s
canary_budget: {window: 1min, min_reads: 10, errors: 2, mismatches: 0, latency_ratio: 1.5}
columns:
- {column: total, table: orders, float_tolerance: 1e-9}
- {column: at, timestamp_precision: 1ms}
- {column: document, json: semantic}
- {column: name, collation: ignore}
ignores:
- {column: seen, table: orders, owner: ann, reason: known, expires: 2027-01-31}
",
        )
        .unwrap();
        assert_eq!(reads.shadow_key, SampleKey::Parameter(1));
        assert_eq!(reads.shadow_rules[0].key, SampleKey::Parameter(2));
        assert_eq!(reads.shadow_rules[1].key, SampleKey::Parameter(1));
        assert_eq!(reads.shadow_rules[2].which.fingerprint, Some(FingerprintId(255)));
        let canary = &reads.canary;
        assert_eq!(
            (canary.percent, canary.key, canary.rules.len()),
            (5.0, SampleKey::User, 1)
        );
        assert_eq!(
            (canary.wait, canary.max_lag),
            (Duration::from_secs(1), Duration::from_secs(2))
        );
        assert_eq!(canary.rules[0].key, SampleKey::User);
        let budget = canary.budget;
        assert_eq!((budget.window, budget.min_reads), (Duration::from_secs(60), 10));
        assert_eq!(
            (budget.errors, budget.mismatches, budget.latency_ratio),
            (2.0, 0.0, 1.5)
        );
        assert_eq!(reads.columns[1].how, How::TimestampPrecision(Duration::from_millis(1)));
        let ignore = &reads.ignores[0];
        assert_eq!(ignore.expires, date!(2027 - 01 - 31));
        assert_eq!(ignore.covers(), "column seen, table orders");
        assert!(!ignore.expired(datetime!(2027-01-31 23:59 UTC)));
        assert!(ignore.expired(datetime!(2027-02-01 00:00 UTC)));
        assert_eq!(read("{}").unwrap(), Reads::default());
    }

    #[test]
    fn what_is_refused() {
        for (yaml, expected) in [
            ("shadow_rules: [{percent: 5}]", "names no reads"),
            ("shadow_rules: [{user: a, percent: 5, key: $0}]", "such as $1"),
            ("shadow_rules: [{user: a, percent: 5, share: 1}]", "share"),
            ("shadow_rules: [{fingerprint: xyz, percent: 5}]", "16 hex digits"),
            ("shadow_key: tenant", "shadow_key"),
            ("canary_key: tenant", "canary_key"),
            ("canary_rules: [{percent: 5}]", "names no reads"),
            ("canary_percent: 101", "0 to 100"),
            ("canary_budget: {latency_ratio: 0}", "latency_ratio"),
            ("canary_budget: {min_reads: 0}", "min_reads"),
            ("canary_budget: {share: 1}", "share"),
            ("shadow_queue: 0", "at least 1"),
            ("slower_ratio: 1", "slower_ratio"),
            ("columns: [{column: a}]", "exactly one"),
            (
                "columns: [{column: a, json: semantic, collation: ignore}]",
                "exactly one",
            ),
            ("columns: [{column: a, json: exact}]", "semantic"),
            ("columns: [{column: a, float_tolerance: 0}]", "between 0 and 1"),
            ("columns: [{column: a, timestamp_precision: 0ms}]", "more than 0"),
            ("ignores: [{column: a, owner: b, reason: c}]", "expires"),
            (
                "ignores: [{column: a, owner: b, reason: ' ', expires: 2027-01-01}]",
                "reason",
            ),
            (
                "ignores: [{column: a, owner: b, reason: c, expires: soon}]",
                "a date such as",
            ),
            (
                "ignores: [{owner: b, reason: c, expires: 2027-01-01}]",
                "covers nothing",
            ),
        ] {
            let error = read(yaml).unwrap_err();
            assert!(error.contains(expected), "{yaml}: {error}");
        }
    }
}
