//! What became of the reads, counted: for `status` and for Prometheus.
//!
//! Metrics go through the `metrics` facade; a recorder must be installed before the first
//! [`Counters`] is made.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use metrics::Counter;
use serde::Serialize;

use crate::sql::{Fingerprint, FingerprintId, NotComparable};

/// What became of one read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    Matched,
    /// Equal but for the order of rows with equal ORDER BY keys, which is left open.
    OrderTies,
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
    /// Not in the sample of `reads.shadow_percent`.
    Sample,
    /// The phase or the primary changed before the shadow ran.
    Flip,
    /// The primary's own answer was a cancellation, a shutdown or the like.
    PrimaryError,
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

impl Outcome {
    const ALL_BUT_NOT_COMPARABLE: [Self; 12] = [
        Self::Matched,
        Self::OrderTies,
        Self::Mismatched,
        Self::Transient,
        Self::Skipped(Skipped::Sample),
        Self::Skipped(Skipped::Flip),
        Self::Skipped(Skipped::PrimaryError),
        Self::Dropped(Dropped::QueueFull),
        Self::Dropped(Dropped::TooLarge),
        Self::Failed(Failed::Connection),
        Self::Failed(Failed::Timeout),
        Self::Failed(Failed::NoCut),
    ];

    /// Labels `outcome` and `reason`.
    pub const fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::Matched => ("matched", ""),
            Self::OrderTies => ("matched", "order_ties"),
            Self::Mismatched => ("mismatched", ""),
            Self::Transient => ("transient", ""),
            Self::NotComparable(reason) => ("not_comparable", reason.as_str()),
            Self::Skipped(Skipped::Sample) => ("skipped", "sample"),
            Self::Skipped(Skipped::Flip) => ("skipped", "flip"),
            Self::Skipped(Skipped::PrimaryError) => ("skipped", "primary_error"),
            Self::Dropped(Dropped::QueueFull) => ("dropped", "queue_full"),
            Self::Dropped(Dropped::TooLarge) => ("dropped", "too_large"),
            Self::Failed(Failed::Connection) => ("failed", "connection"),
            Self::Failed(Failed::Timeout) => ("failed", "timeout"),
            Self::Failed(Failed::NoCut) => ("failed", "no_cut"),
        }
    }
}

/// Fingerprints remembered one by one as non-deterministic; later ones only count in the total.
const FINGERPRINTS_MAX: usize = 1000;

pub(super) struct Counters {
    outcomes: HashMap<Outcome, (AtomicU64, Counter)>,
    log_lost: (AtomicU64, Counter),
    non_deterministic: Mutex<BTreeMap<FingerprintId, NonDeterministic>>,
}

/// A statement on which the primary disagreed with itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NonDeterministic {
    pub fingerprint: FingerprintId,
    pub text: String,
    pub count: u64,
}

impl Counters {
    pub(super) fn new(database: &str) -> Self {
        let all = Outcome::ALL_BUT_NOT_COMPARABLE
            .into_iter()
            .chain(NotComparable::ALL.into_iter().map(Outcome::NotComparable));
        Self {
            outcomes: all
                .map(|outcome| {
                    let (name, reason) = outcome.labels();
                    let counter = metrics::counter!("pgtandem_shadow_reads_total",
                        "database" => database.to_owned(), "outcome" => name, "reason" => reason);
                    (outcome, (AtomicU64::new(0), counter))
                })
                .collect(),
            log_lost: (
                AtomicU64::new(0),
                metrics::counter!("pgtandem_mismatch_log_lost_total", "database" => database.to_owned()),
            ),
            non_deterministic: Mutex::default(),
        }
    }

    pub(super) fn count(&self, outcome: Outcome) {
        // Every outcome has its counter from the start.
        if let Some((count, counter)) = self.outcomes.get(&outcome) {
            count.fetch_add(1, Ordering::Relaxed);
            counter.increment(1);
        }
    }

    pub(super) fn count_log_lost(&self) {
        self.log_lost.0.fetch_add(1, Ordering::Relaxed);
        self.log_lost.1.increment(1);
    }

    pub(super) fn count_non_deterministic(&self, fingerprint: &Fingerprint) {
        let mut known = self.non_deterministic.lock().unwrap_or_else(PoisonError::into_inner);
        let room = known.len() < FINGERPRINTS_MAX;
        match known.get_mut(&fingerprint.id) {
            Some(entry) => entry.count += 1,
            None if room => {
                let entry = NonDeterministic {
                    fingerprint: fingerprint.id,
                    text: fingerprint.text.clone(),
                    count: 1,
                };
                known.insert(fingerprint.id, entry);
            }
            None => {}
        }
    }

    pub(super) fn stats(&self) -> ShadowStats {
        let mut stats = ShadowStats::default();
        for (outcome, (count, _)) in &self.outcomes {
            let count = count.load(Ordering::Relaxed);
            let (_, reason) = outcome.labels();
            let by_reason = |map: &mut BTreeMap<&'static str, u64>| {
                if count > 0 {
                    map.insert(reason, count);
                }
            };
            match outcome {
                Outcome::Matched => stats.matched += count,
                Outcome::OrderTies => {
                    stats.matched += count;
                    stats.order_ties = count;
                }
                Outcome::Mismatched => stats.mismatched = count,
                Outcome::Transient => stats.transient = count,
                Outcome::NotComparable(_) => by_reason(&mut stats.not_comparable),
                Outcome::Skipped(_) => by_reason(&mut stats.skipped),
                Outcome::Dropped(_) => by_reason(&mut stats.dropped),
                Outcome::Failed(_) => by_reason(&mut stats.failed),
            }
        }
        stats.log_lost = self.log_lost.0.load(Ordering::Relaxed);
        let known = self.non_deterministic.lock().unwrap_or_else(PoisonError::into_inner);
        stats.non_deterministic = known.values().cloned().collect();
        stats
    }
}

/// The counts of one database, since start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ShadowStats {
    /// Order ties included.
    pub matched: u64,
    pub order_ties: u64,
    pub mismatched: u64,
    pub transient: u64,
    pub not_comparable: BTreeMap<&'static str, u64>,
    pub skipped: BTreeMap<&'static str, u64>,
    pub dropped: BTreeMap<&'static str, u64>,
    pub failed: BTreeMap<&'static str, u64>,
    /// Mismatches that could not be written to the mismatch log.
    pub log_lost: u64,
    /// Reads waiting or running now.
    pub waiting: usize,
    pub non_deterministic: Vec<NonDeterministic>,
}
