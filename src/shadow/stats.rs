//! What became of the reads, counted: for `status`, the admin API, the report and Prometheus.
//!
//! Every read of a shadowing phase has exactly one outcome, which is counted once for its
//! database and once for its fingerprint; so the executions of a statement are the sum of its
//! outcomes, and what was never compared has its reasons beside it.
//!
//! Metrics go through the `metrics` facade; a recorder must be installed before the first
//! [`Counters`] is made.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use metrics::Counter;
use serde::{Deserialize, Serialize};

use super::canary::{CanaryCounters, FingerprintCanary};
use super::fingerprints::{Entry, Fingerprints};
pub use super::histogram::Durations;
use crate::control::Side;
use crate::sql::{Fingerprint, NotComparable};

/// What became of one read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    Matched,
    /// Equal but for the order of rows with equal ORDER BY keys, which is left open.
    OrderTies,
    /// Equal by a rule of proxy.yaml (a tolerance, semantic JSON, …), not to the letter.
    Tolerated,
    /// Equal in all that the statement determines, or that is not ignored.
    Partly(NotComparable),
    Mismatched,
    /// Different at first, equal at a cut.
    Transient,
    NotComparable(NotComparable),
    Skipped(Skipped),
    Dropped(Dropped),
    Failed(Failed),
}

/// Not wanted, as configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Skipped {
    /// Not in the sample of `reads.shadow_percent` and its rules.
    NotSampled,
    /// The phase or the primary changed before the shadow ran.
    Flip,
    /// The primary's own answer was a cancellation, a shutdown or the like.
    PrimaryError,
    /// The answer was cut off: the session ended in the middle of it.
    CutOff,
    /// Another read of the same batch was being digested.
    Pipelined,
}

/// Wanted, but there was no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dropped {
    QueueFull,
    /// Text and parameters are larger than the queue takes.
    TooLarge,
}

/// Tried in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Failed {
    /// No connection as the client's user, or it broke.
    Connection,
    /// The secondary did not answer within the deadline.
    Timeout,
    /// No cut was to be had: the applier is stopped or behind, or definitions change all the time.
    NoCut,
}

const REASONS: usize = NotComparable::ALL.len();
/// Those that need no reason of [`NotComparable`].
const SIMPLE: [Outcome; 15] = [
    Outcome::Matched,
    Outcome::OrderTies,
    Outcome::Tolerated,
    Outcome::Mismatched,
    Outcome::Transient,
    Outcome::Skipped(Skipped::NotSampled),
    Outcome::Skipped(Skipped::Flip),
    Outcome::Skipped(Skipped::PrimaryError),
    Outcome::Skipped(Skipped::CutOff),
    Outcome::Skipped(Skipped::Pipelined),
    Outcome::Dropped(Dropped::QueueFull),
    Outcome::Dropped(Dropped::TooLarge),
    Outcome::Failed(Failed::Connection),
    Outcome::Failed(Failed::Timeout),
    Outcome::Failed(Failed::NoCut),
];
const OUTCOMES: usize = SIMPLE.len() + 2 * REASONS;

impl Outcome {
    /// Every outcome there is: of each of them reads are counted.
    pub fn all() -> impl Iterator<Item = Self> {
        SIMPLE
            .into_iter()
            .chain(NotComparable::ALL.map(Self::Partly))
            .chain(NotComparable::ALL.map(Self::NotComparable))
    }

    /// Its place in [`Self::all`].
    const fn index(self) -> usize {
        match self {
            Self::Matched => 0,
            Self::OrderTies => 1,
            Self::Tolerated => 2,
            Self::Mismatched => 3,
            Self::Transient => 4,
            Self::Skipped(skipped) => 5 + skipped as usize,
            Self::Dropped(dropped) => 10 + dropped as usize,
            Self::Failed(failed) => 12 + failed as usize,
            Self::Partly(reason) => SIMPLE.len() + reason as usize,
            Self::NotComparable(reason) => SIMPLE.len() + REASONS + reason as usize,
        }
    }

    /// Labels `outcome` and `reason`.
    pub const fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::Matched => ("matched", ""),
            Self::OrderTies => ("matched", "order_ties"),
            Self::Tolerated => ("matched", "tolerated"),
            Self::Partly(reason) => ("partly", reason.as_str()),
            Self::Mismatched => ("mismatched", ""),
            Self::Transient => ("transient", ""),
            Self::NotComparable(reason) => ("not_comparable", reason.as_str()),
            Self::Skipped(Skipped::NotSampled) => ("skipped", "not_sampled"),
            Self::Skipped(Skipped::Flip) => ("skipped", "flip"),
            Self::Skipped(Skipped::PrimaryError) => ("skipped", "primary_error"),
            Self::Skipped(Skipped::CutOff) => ("skipped", "cut_off"),
            Self::Skipped(Skipped::Pipelined) => ("skipped", "pipelined"),
            Self::Dropped(Dropped::QueueFull) => ("dropped", "queue_full"),
            Self::Dropped(Dropped::TooLarge) => ("dropped", "too_large"),
            Self::Failed(Failed::Connection) => ("failed", "connection"),
            Self::Failed(Failed::Timeout) => ("failed", "timeout"),
            Self::Failed(Failed::NoCut) => ("failed", "no_cut"),
        }
    }
}

/// One counter for each outcome.
#[derive(Debug)]
pub(super) struct Counts([AtomicU64; OUTCOMES]);

impl Default for Counts {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; OUTCOMES])
    }
}

impl Counts {
    pub(super) fn count(&self, outcome: Outcome) {
        self.0[outcome.index()].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn report(&self) -> ReadCounts {
        let mut counts = ReadCounts::default();
        for (outcome, count) in Outcome::all().zip(&self.0) {
            let count = count.load(Ordering::Relaxed);
            if count == 0 {
                continue;
            }
            counts.executions += count;
            let reason = outcome.labels().1.to_owned();
            let compared = match outcome {
                Outcome::Matched => &mut counts.matched,
                Outcome::OrderTies => {
                    counts.matched += count;
                    &mut counts.order_ties
                }
                Outcome::Tolerated => {
                    counts.matched += count;
                    &mut counts.tolerated
                }
                Outcome::Partly(_) => {
                    counts.matched += count;
                    counts.partly.entry(reason).or_default()
                }
                Outcome::Mismatched => &mut counts.mismatched,
                Outcome::Transient => &mut counts.transient,
                Outcome::NotComparable(_) => {
                    counts.not_comparable.insert(reason, count);
                    continue;
                }
                Outcome::Skipped(_) => {
                    counts.skipped.insert(reason, count);
                    continue;
                }
                Outcome::Dropped(_) => {
                    counts.dropped.insert(reason, count);
                    continue;
                }
                Outcome::Failed(_) => {
                    counts.failed.insert(reason, count);
                    continue;
                }
            };
            *compared += count;
            counts.compared += count;
        }
        counts
    }
}

/// What became of reads: of all, or of those of one fingerprint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadCounts {
    /// All of them; those still waiting or running are not among them yet.
    pub executions: u64,
    /// Matched, mismatched or transient.
    pub compared: u64,
    /// With those that are counted by `order_ties`, `tolerated` and `partly`, too.
    pub matched: u64,
    pub order_ties: u64,
    /// Equal by a rule of proxy.yaml, not to the letter.
    pub tolerated: u64,
    /// Equal in all that the statement determines or that is not ignored; by what leaves the rest
    /// open.
    pub partly: BTreeMap<String, u64>,
    pub mismatched: u64,
    /// Different at first, equal at a cut.
    pub transient: u64,
    /// These four are the reads that were not compared, by reason. A timeout is `failed.timeout`.
    pub not_comparable: BTreeMap<String, u64>,
    pub skipped: BTreeMap<String, u64>,
    pub dropped: BTreeMap<String, u64>,
    pub failed: BTreeMap<String, u64>,
}

impl ReadCounts {
    pub fn plus(&self, other: &Self) -> Self {
        super::interval::combine(self, other, u64::saturating_add)
    }

    /// Why reads were not compared, the most frequent reason first; being out of the sample is
    /// said only where nothing else is.
    pub fn reasons(&self) -> Vec<(&str, u64)> {
        let mut reasons: Vec<_> = [&self.not_comparable, &self.skipped, &self.dropped, &self.failed]
            .into_iter()
            .flatten()
            .map(|(reason, count)| (reason.as_str(), *count))
            .collect();
        reasons.sort_by_key(|&(reason, count)| (reason == "not_sampled", std::cmp::Reverse(count)));
        reasons
    }
}

/// Outcomes of one database's reads, in total and by fingerprint.
pub(super) struct Counters {
    total: Counts,
    metrics: Vec<Counter>,
    log_lost: (AtomicU64, Counter),
    pub(super) fingerprints: Fingerprints,
    pub(super) canary: CanaryCounters,
    since: String,
}

impl Counters {
    pub(super) fn new(database: &str) -> Self {
        Self {
            total: Counts::default(),
            metrics: Outcome::all()
                .map(|outcome| {
                    let (name, reason) = outcome.labels();
                    metrics::counter!("pgtandem_shadow_reads_total",
                        "database" => database.to_owned(), "outcome" => name, "reason" => reason)
                })
                .collect(),
            log_lost: (
                AtomicU64::new(0),
                metrics::counter!("pgtandem_mismatch_log_lost_total", "database" => database.to_owned()),
            ),
            fingerprints: Fingerprints::default(),
            canary: CanaryCounters::new(database),
            since: super::worker::now(),
        }
    }

    /// Counts what became of a read.
    pub(super) fn count(&self, entry: &Entry, outcome: Outcome) {
        entry.counts.count(outcome);
        self.total.count(outcome);
        self.metrics[outcome.index()].increment(1);
    }

    pub(super) fn of(&self, fingerprint: &Fingerprint) -> Arc<Entry> {
        self.fingerprints.of(fingerprint)
    }

    pub(super) fn count_log_lost(&self) {
        self.log_lost.0.fetch_add(1, Ordering::Relaxed);
        self.log_lost.1.increment(1);
    }

    pub(super) fn stats(&self) -> ShadowStats {
        ShadowStats {
            since: self.since.clone(),
            counts: self.total.report(),
            log_lost: self.log_lost.0.load(Ordering::Relaxed),
            waiting: 0,
        }
    }

    /// Everything that is known, by fingerprint. `slower`: how many times as slow as legacy a
    /// statement must be on new to be named.
    pub(super) fn report(&self, slower: f64) -> ShadowReport {
        let (fingerprints, others) = self.fingerprints.report();
        let totals = self.stats();
        ShadowReport {
            since: self.since.clone(),
            running_since: Some(self.since.clone()),
            coverage: Coverage::of(&totals.counts, &fingerprints, &others),
            slower: slower_on_new(&fingerprints, slower),
            fingerprints,
            others,
            totals,
            ignores: Vec::new(),
        }
    }
}

/// The counts of one database, since the proxy's start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShadowStats {
    /// When counting began, RFC 3339.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub since: String,
    #[serde(flatten)]
    pub counts: ReadCounts,
    /// Mismatches that could not be written to the mismatch log.
    pub log_lost: u64,
    /// Reads waiting or running now.
    pub waiting: usize,
}

/// `GET /api/v1/shadows`, for each database: all that is known of its shadow reads.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ShadowReport {
    /// When counting began, RFC 3339.
    pub since: String,
    /// When the running proxy itself began; what was counted before, the mismatch log told it.
    /// Absent in a report of the log.
    #[serde(default)]
    pub running_since: Option<String>,
    pub totals: ShadowStats,
    pub coverage: Coverage,
    /// Most executions first.
    pub fingerprints: Vec<FingerprintReport>,
    /// Reads of fingerprints that were seen when as many as are kept one by one were known.
    pub others: ReadCounts,
    /// What takes clearly longer on new, worst first.
    pub slower: Vec<Slower>,
    /// As proxy.yaml has them.
    pub ignores: Vec<IgnoreReport>,
}

/// One statement's reads.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FingerprintReport {
    /// 16 hex digits.
    pub fingerprint: String,
    /// The statement with its constants removed; cut off where it is very long.
    pub text: String,
    #[serde(flatten)]
    pub counts: ReadCounts,
    pub noise: Noise,
    /// Absent until a shadow has run.
    pub latency: Option<Latency>,
    /// What the secondary really answered.
    #[serde(default)]
    pub canary: FingerprintCanary,
}

/// How often the primary disagreed with itself, asked twice in one snapshot. It is asked twice
/// where the two sides differ at a cut.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Noise {
    pub asked_twice: u64,
    pub disagreed: u64,
    /// `disagreed / asked_twice`; above 0 the fingerprint is non-deterministic.
    pub rate: f64,
}

impl Noise {
    pub(super) fn new(asked_twice: u64, disagreed: u64) -> Self {
        Self {
            asked_twice,
            disagreed,
            rate: share(disagreed, asked_twice),
        }
    }
}

/// How long both sides took for the same reads. Legacy's and new's, whichever is the primary; the
/// client's own read on the primary, with the way to a slow client in its total, and its first
/// repetition on the secondary, which is parsed and planned each time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    pub legacy: SideLatency,
    pub new: SideLatency,
    /// New's median total of legacy's.
    pub ratio: f64,
}

impl Latency {
    pub(super) fn new(legacy: SideLatency, new: SideLatency) -> Self {
        let ratio = if legacy.total.p50_ms > 0.0 {
            new.total.p50_ms / legacy.total.p50_ms
        } else {
            1.0
        };
        Self { legacy, new, ratio }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SideLatency {
    /// Up to the first row; reads without rows are not in it.
    pub first_row: Durations,
    pub total: Durations,
}

/// How long one answer took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timing {
    pub first_row: Option<Duration>,
    pub total: Duration,
}

/// How much of what the applications read was compared.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Coverage {
    pub fingerprints: u64,
    pub fingerprints_compared: u64,
    /// 0 to 1.
    pub share_of_fingerprints: f64,
    pub executions: u64,
    pub executions_compared: u64,
    pub share_of_executions: f64,
    /// Most executions first. Fingerprints beyond those kept one by one are not in here; `others`
    /// counts their reads.
    pub never_compared: Vec<NeverCompared>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeverCompared {
    pub fingerprint: String,
    pub text: String,
    pub executions: u64,
    /// The most frequent one.
    pub reason: String,
}

impl Coverage {
    pub(super) fn of(totals: &ReadCounts, fingerprints: &[FingerprintReport], others: &ReadCounts) -> Self {
        let never: Vec<_> = fingerprints.iter().filter(|one| one.counts.compared == 0).collect();
        // What is beyond is at least one fingerprint, compared or not.
        let beyond = u64::from(others.executions > 0);
        let known = fingerprints.len() as u64 + beyond;
        let compared = (fingerprints.len() - never.len()) as u64 + u64::from(others.compared > 0);
        Self {
            fingerprints: known,
            fingerprints_compared: compared,
            share_of_fingerprints: share(compared, known),
            executions: totals.executions,
            executions_compared: totals.compared,
            share_of_executions: share(totals.compared, totals.executions),
            never_compared: never
                .into_iter()
                .map(|one| NeverCompared {
                    fingerprint: one.fingerprint.clone(),
                    text: one.text.clone(),
                    executions: one.counts.executions,
                    reason: one
                        .counts
                        .reasons()
                        .first()
                        .map_or("", |(reason, _)| *reason)
                        .to_owned(),
                })
                .collect(),
        }
    }
}

/// A statement that takes longer on new.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Slower {
    pub fingerprint: String,
    pub text: String,
    pub reads: u64,
    pub legacy_p50_ms: f64,
    pub new_p50_ms: f64,
    pub ratio: f64,
}

/// Fewer reads tell nothing of a statement's speed.
pub(super) const SLOWER_READS_MIN: u64 = 20;
/// Faster than this on new nobody minds, and a shadow's own overhead weighs too much.
pub(super) const SLOWER_MS_MIN: f64 = 1.0;

pub(super) fn slower_on_new(fingerprints: &[FingerprintReport], ratio: f64) -> Vec<Slower> {
    let mut slower: Vec<Slower> = fingerprints
        .iter()
        .filter_map(|one| {
            let latency = one.latency.as_ref()?;
            let found = Slower {
                fingerprint: one.fingerprint.clone(),
                text: one.text.clone(),
                reads: latency.new.total.count,
                legacy_p50_ms: latency.legacy.total.p50_ms,
                new_p50_ms: latency.new.total.p50_ms,
                ratio: latency.ratio,
            };
            let clearly = found.ratio >= ratio && found.reads >= SLOWER_READS_MIN && found.new_p50_ms >= SLOWER_MS_MIN;
            clearly.then_some(found)
        })
        .collect();
    slower.sort_by(|one, other| other.ratio.total_cmp(&one.ratio));
    slower
}

/// An ignore of proxy.yaml.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IgnoreReport {
    /// What it covers; absent ones are not asked for.
    pub fingerprint: Option<String>,
    pub table: Option<String>,
    pub column: Option<String>,
    pub owner: String,
    pub reason: String,
    /// The last day on which it is in force, `YYYY-MM-DD`, UTC.
    pub expires: String,
    /// It is over: what it covered is compared again, and `check` refuses it.
    pub expired: bool,
    /// In a report of the log: it was in force in the period, and is in proxy.yaml no more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub withdrawn: bool,
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Whose latency it is.
pub(super) const fn of_side<T>(side: Side, legacy: T, new: T) -> T
where
    T: Copy,
{
    match side {
        Side::Legacy => legacy,
        Side::New => new,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_own_place() {
        let all: Vec<_> = Outcome::all().collect();
        assert_eq!(all.len(), OUTCOMES);
        for (at, outcome) in all.iter().enumerate() {
            assert_eq!(outcome.index(), at, "{outcome:?}");
        }
        let labels: std::collections::HashSet<_> = all.iter().map(|outcome| outcome.labels()).collect();
        assert_eq!(labels.len(), OUTCOMES);
    }

    #[test]
    fn counts_add_up() {
        let counts = Counts::default();
        for outcome in Outcome::all() {
            counts.count(outcome);
        }
        let report = counts.report();
        assert_eq!(report.executions, OUTCOMES as u64);
        let others = [&report.not_comparable, &report.skipped, &report.dropped, &report.failed];
        let not_compared: u64 = others.iter().flat_map(|map| map.values()).sum();
        assert_eq!(report.compared + not_compared, report.executions);
        assert_eq!(report.matched + report.mismatched + report.transient, report.compared);
    }

    #[test]
    fn coverage_and_its_reasons() {
        let counters = Counters::new("shop");
        let of = |text: &str| counters.of(&crate::sql::fingerprint(text.as_bytes()));
        counters.count(&of("select 1"), Outcome::Matched);
        for _ in 0..2 {
            counters.count(&of("select a"), Outcome::Skipped(Skipped::NotSampled));
        }
        counters.count(&of("select a"), Outcome::NotComparable(NotComparable::Clock));
        let report = counters.report(2.0);
        let coverage = &report.coverage;
        assert_eq!((coverage.fingerprints, coverage.fingerprints_compared), (2, 1));
        assert_eq!((coverage.executions, coverage.executions_compared), (4, 1));
        assert!((coverage.share_of_executions - 0.25).abs() < 1e-9);
        assert_eq!(coverage.never_compared.len(), 1);
        assert_eq!(coverage.never_compared[0].text, "select a");
        assert_eq!(coverage.never_compared[0].reason, "clock");
        let copy: ShadowReport = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
        assert_eq!(copy, report);
    }

    #[test]
    fn what_is_slower_on_new() {
        let counters = Counters::new("shop");
        let record = |text: &str, legacy: u64, new: u64| {
            let entry = counters.of(&crate::sql::fingerprint(text.as_bytes()));
            for _ in 0..SLOWER_READS_MIN {
                for (side, milliseconds) in [(Side::Legacy, legacy), (Side::New, new)] {
                    let total = Duration::from_millis(milliseconds);
                    entry.record(side, Timing { first_row: None, total });
                }
            }
        };
        record("select slow", 5, 50);
        record("select slower", 5, 500);
        record("select alike", 5, 6);
        let slower = counters.report(2.0).slower;
        let texts: Vec<_> = slower.iter().map(|one| one.text.as_str()).collect();
        assert_eq!(texts, ["select slower", "select slow"]);
        assert!(slower[1].ratio > 8.0 && slower[1].ratio < 12.0, "{}", slower[1].ratio);
    }
}
