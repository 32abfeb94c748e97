//! What became of the writes, by statement. Every write of the sample has one outcome.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dashmap::DashMap;
use serde::{Deserialize, Serialize};

use super::super::histogram::{Durations, Histogram};
use super::super::stats::of_side;
use crate::control::Side;
use crate::sql::{Fingerprint, FingerprintId, LeftOut};

/// What became of one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Matched,
    Mismatched,
    /// Different, in a state of the secondary that is not known to be the right one.
    Unsettled,
    LeftOut(LeftOut),
    Skipped(Skipped),
    Dropped(Dropped),
    Failed(Failed),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Skipped {
    NotSampled,
    /// The phase or the primary changed before it ran.
    Flip,
    /// The primary's own answer was a cancellation, a deadlock or the like.
    PrimaryError,
    /// The sequences were being compared, by a verification.
    Verification,
    /// An earlier statement of its transaction came out differently.
    AfterDifference,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dropped {
    QueueFull,
    TooLarge,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failed {
    /// No connection as the client's user, or it broke.
    Connection,
    Timeout,
    /// Somebody on the secondary waited for it: the applier, mostly.
    GaveWay,
    /// It waited for a lock, or met another writer.
    Locked,
}

impl Outcome {
    /// Labels `outcome` and `reason`.
    const fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::Matched => ("matched", ""),
            Self::Mismatched => ("mismatched", ""),
            Self::Unsettled => ("unsettled", ""),
            Self::LeftOut(reason) => ("left_out", reason.as_str()),
            Self::Skipped(Skipped::NotSampled) => ("skipped", "not_sampled"),
            Self::Skipped(Skipped::Flip) => ("skipped", "flip"),
            Self::Skipped(Skipped::PrimaryError) => ("skipped", "primary_error"),
            Self::Skipped(Skipped::Verification) => ("skipped", "verification"),
            Self::Skipped(Skipped::AfterDifference) => ("skipped", "after_difference"),
            Self::Dropped(Dropped::QueueFull) => ("dropped", "queue_full"),
            Self::Dropped(Dropped::TooLarge) => ("dropped", "too_large"),
            Self::Failed(Failed::Connection) => ("failed", "connection"),
            Self::Failed(Failed::Timeout) => ("failed", "timeout"),
            Self::Failed(Failed::GaveWay) => ("failed", "gave_way"),
            Self::Failed(Failed::Locked) => ("failed", "locked"),
        }
    }
}

/// What became of writes: of all, or of those of one fingerprint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteCounts {
    /// All of them; those still waiting or running are not among them yet.
    pub executions: u64,
    /// Matched, mismatched or unsettled.
    pub compared: u64,
    pub matched: u64,
    pub mismatched: u64,
    pub unsettled: u64,
    /// These four are the writes that were not compared, by reason.
    pub left_out: BTreeMap<String, u64>,
    pub skipped: BTreeMap<String, u64>,
    pub dropped: BTreeMap<String, u64>,
    pub failed: BTreeMap<String, u64>,
}

impl WriteCounts {
    fn count(&mut self, outcome: Outcome) {
        self.executions += 1;
        let reason = outcome.labels().1;
        let by_reason = |map: &mut BTreeMap<String, u64>| match map.get_mut(reason) {
            Some(count) => *count += 1,
            None => drop(map.insert(reason.to_owned(), 1)),
        };
        match outcome {
            Outcome::Matched => self.matched += 1,
            Outcome::Mismatched => self.mismatched += 1,
            Outcome::Unsettled => self.unsettled += 1,
            Outcome::LeftOut(_) => return by_reason(&mut self.left_out),
            Outcome::Skipped(_) => return by_reason(&mut self.skipped),
            Outcome::Dropped(_) => return by_reason(&mut self.dropped),
            Outcome::Failed(_) => return by_reason(&mut self.failed),
        }
        self.compared += 1;
    }

    pub(super) fn combined(&self, other: &Self, how: impl Fn(u64, u64) -> u64) -> Self {
        let maps = |one: &BTreeMap<String, u64>, other: &BTreeMap<String, u64>| -> BTreeMap<String, u64> {
            let of = |map: &BTreeMap<String, u64>, reason: &String| map.get(reason).copied().unwrap_or(0);
            one.keys()
                .chain(other.keys())
                .map(|reason| (reason.clone(), how(of(one, reason), of(other, reason))))
                .filter(|(_, count)| *count > 0)
                .collect()
        };
        Self {
            executions: how(self.executions, other.executions),
            compared: how(self.compared, other.compared),
            matched: how(self.matched, other.matched),
            mismatched: how(self.mismatched, other.mismatched),
            unsettled: how(self.unsettled, other.unsettled),
            left_out: maps(&self.left_out, &other.left_out),
            skipped: maps(&self.skipped, &other.skipped),
            dropped: maps(&self.dropped, &other.dropped),
            failed: maps(&self.failed, &other.failed),
        }
    }

    pub fn plus(&self, other: &Self) -> Self {
        self.combined(other, u64::saturating_add)
    }
}

/// `status`, for each database: what became of the rehearsed writes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rehearsed {
    /// When counting began, RFC 3339.
    #[serde(default)]
    pub since: String,
    #[serde(flatten)]
    pub counts: WriteCounts,
    /// Transactions waiting or running now.
    pub waiting: usize,
}

/// `GET /api/v1/shadows`, for each database: all that is known of its rehearsed writes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RehearsalReport {
    /// When counting began, RFC 3339.
    pub since: String,
    /// When the running proxy itself began; what was counted before, the mismatch log told it.
    /// Absent in a report of the log.
    #[serde(default)]
    pub running_since: Option<String>,
    pub totals: Rehearsed,
    /// Of all writes, the share that was compared, 0 to 1.
    pub coverage: f64,
    /// Most executions first.
    pub statements: Vec<RehearsedStatement>,
    /// What takes clearly longer on new, worst first.
    pub slower: Vec<SlowerWrite>,
}

/// One statement's writes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RehearsedStatement {
    /// 16 hex digits; empty for what is beyond those kept one by one.
    pub fingerprint: String,
    pub text: String,
    #[serde(flatten)]
    pub counts: WriteCounts,
    /// `unsettled / compared`.
    pub unsettled_rate: f64,
    /// The SQLSTATEs of the last difference, settled or not; `00000` for success.
    pub last_difference: Option<[String; 2]>,
    /// Of the client's own statement, on the side that was the primary, and of its rehearsal.
    pub legacy: Durations,
    pub new: Durations,
}

/// A write that takes longer on new.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlowerWrite {
    pub fingerprint: String,
    pub text: String,
    pub writes: u64,
    pub legacy_p50_ms: f64,
    pub new_p50_ms: f64,
    pub ratio: f64,
}

/// Kept one by one; the others share one entry.
const FINGERPRINTS_MAX: usize = 1000;
/// Of each one's text.
const TEXT_BYTES_MAX: usize = 2048;
/// As for reads: fewer tell nothing, and faster than this nobody minds.
const SLOWER_WRITES_MIN: u64 = 20;
const SLOWER_MS_MIN: f64 = 1.0;

#[derive(Default)]
struct Entry {
    text: String,
    counts: WriteCounts,
    last_difference: Option<[String; 2]>,
    sides: Option<Box<[Histogram; 2]>>,
}

pub(super) struct Counters {
    database: String,
    since: String,
    statements: DashMap<FingerprintId, Arc<Mutex<Entry>>>,
    others: Arc<Mutex<Entry>>,
}

impl Counters {
    pub(super) fn new(database: &str) -> Self {
        Self {
            database: database.to_owned(),
            since: super::super::worker::now(),
            statements: DashMap::new(),
            others: Arc::default(),
        }
    }

    fn of(&self, fingerprint: &Fingerprint) -> Arc<Mutex<Entry>> {
        if let Some(entry) = self.statements.get(&fingerprint.id) {
            return entry.clone();
        }
        if self.statements.len() >= FINGERPRINTS_MAX {
            return self.others.clone();
        }
        let made = || {
            let text = &fingerprint.text;
            let mut end = text.len().min(TEXT_BYTES_MAX);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            let text = text[..end].to_owned();
            Arc::new(Mutex::new(Entry {
                text,
                ..Entry::default()
            }))
        };
        self.statements.entry(fingerprint.id).or_insert_with(made).clone()
    }

    pub(super) fn count(&self, fingerprint: &Fingerprint, outcome: Outcome) {
        let (name, reason) = outcome.labels();
        metrics::counter!("pgtandem_rehearsed_writes_total",
            "database" => self.database.clone(), "outcome" => name, "reason" => reason)
        .increment(1);
        let entry = self.of(fingerprint);
        entry
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .counts
            .count(outcome);
    }

    pub(super) fn note_difference(&self, fingerprint: &Fingerprint, codes: [&str; 2]) {
        let entry = self.of(fingerprint);
        entry.lock().unwrap_or_else(PoisonError::into_inner).last_difference = Some(codes.map(str::to_owned));
    }

    /// How long both sides took.
    pub(super) fn record(&self, fingerprint: &Fingerprint, primary: Side, took: [Duration; 2]) {
        let entry = self.of(fingerprint);
        let mut entry = entry.lock().unwrap_or_else(PoisonError::into_inner);
        let sides = entry.sides.get_or_insert_default();
        for (side, took) in [(primary, took[0]), (primary.other(), took[1])] {
            sides[of_side(side, 0, 1)].record(took);
        }
        drop(entry);
        for (role, took) in [("primary", took[0]), ("secondary", took[1])] {
            metrics::histogram!("pgtandem_rehearsed_write_seconds", "database" => self.database.clone(), "side" => role)
                .record(took.as_secs_f64());
        }
    }

    fn reports(&self) -> Vec<RehearsedStatement> {
        let others = (String::new(), self.others.clone());
        self.statements
            .iter()
            .map(|slot| (slot.key().to_string(), slot.value().clone()))
            .chain(std::iter::once(others))
            .map(|(id, entry)| report(id, &entry.lock().unwrap_or_else(PoisonError::into_inner)))
            .filter(|report| report.counts.executions > 0)
            .collect()
    }

    pub(super) fn totals(&self, waiting: usize) -> Rehearsed {
        let mut counts = WriteCounts::default();
        for slot in &self.statements {
            counts = counts.plus(&slot.value().lock().unwrap_or_else(PoisonError::into_inner).counts);
        }
        counts = counts.plus(&self.others.lock().unwrap_or_else(PoisonError::into_inner).counts);
        Rehearsed {
            since: self.since.clone(),
            counts,
            waiting,
        }
    }

    /// Everything that is known. `slower`: how many times as slow as legacy a statement must be on
    /// new to be named.
    pub(super) fn report(&self, waiting: usize, slower: f64) -> RehearsalReport {
        let statements = self.reports();
        let totals = self.totals(waiting);
        RehearsalReport {
            running_since: Some(self.since.clone()),
            ..RehearsalReport::of(totals, statements, slower)
        }
    }
}

impl RehearsalReport {
    pub(super) fn of(totals: Rehearsed, mut statements: Vec<RehearsedStatement>, slower: f64) -> Self {
        statements.sort_by(|one, other| {
            (other.counts.executions, &one.fingerprint).cmp(&(one.counts.executions, &other.fingerprint))
        });
        Self {
            since: totals.since.clone(),
            running_since: None,
            coverage: share(totals.counts.compared, totals.counts.executions),
            totals,
            slower: slower_on_new(&statements, slower),
            statements,
        }
    }
}

fn report(fingerprint: String, entry: &Entry) -> RehearsedStatement {
    let side = |at: usize| entry.sides.as_ref().map(|sides| sides[at].report()).unwrap_or_default();
    RehearsedStatement {
        fingerprint,
        text: entry.text.clone(),
        counts: entry.counts.clone(),
        unsettled_rate: share(entry.counts.unsettled, entry.counts.compared),
        last_difference: entry.last_difference.clone(),
        legacy: side(0),
        new: side(1),
    }
}

fn slower_on_new(statements: &[RehearsedStatement], ratio: f64) -> Vec<SlowerWrite> {
    let mut slower: Vec<SlowerWrite> = statements
        .iter()
        .filter(|one| one.new.count >= SLOWER_WRITES_MIN && one.new.p50_ms >= SLOWER_MS_MIN && one.legacy.p50_ms > 0.0)
        .map(|one| SlowerWrite {
            fingerprint: one.fingerprint.clone(),
            text: one.text.clone(),
            writes: one.new.count,
            legacy_p50_ms: one.legacy.p50_ms,
            new_p50_ms: one.new.p50_ms,
            ratio: one.new.p50_ms / one.legacy.p50_ms,
        })
        .filter(|one| one.ratio >= ratio)
        .collect();
    slower.sort_by(|one, other| other.ratio.total_cmp(&one.ratio));
    slower
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub(super) fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_and_slow_writes_are_named() {
        let counters = Counters::new("shop");
        let (slow, alike) = (
            crate::sql::fingerprint(b"update t set a = 1"),
            crate::sql::fingerprint(b"delete from t"),
        );
        for outcome in [
            Outcome::Matched,
            Outcome::Unsettled,
            Outcome::Mismatched,
            Outcome::LeftOut(LeftOut::Copy),
            Outcome::Skipped(Skipped::NotSampled),
            Outcome::Dropped(Dropped::QueueFull),
            Outcome::Failed(Failed::GaveWay),
        ] {
            counters.count(&slow, outcome);
        }
        counters.count(&alike, Outcome::Matched);
        for _ in 0..SLOWER_WRITES_MIN {
            let ms = Duration::from_millis;
            counters.record(&slow, Side::New, [ms(40), ms(4)]);
            counters.record(&alike, Side::Legacy, [ms(4), ms(5)]);
        }
        let report = counters.report(0, 2.0);
        let counts = &report.totals.counts;
        assert_eq!((counts.executions, counts.compared, counts.matched), (8, 4, 2));
        assert_eq!(
            (counts.unsettled, counts.mismatched, counts.left_out["copy"]),
            (1, 1, 1)
        );
        assert!((report.coverage - 0.5).abs() < 1e-9);
        assert!((report.statements[0].unsettled_rate - 1.0 / 3.0).abs() < 1e-9);
        // New was the primary, and is the slower one.
        let slower: Vec<_> = report.slower.iter().map(|one| one.text.as_str()).collect();
        assert_eq!(slower, ["update t set a = ?"]);
    }
}
