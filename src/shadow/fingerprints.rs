//! What is known of each statement that clients read with. Bounded: fingerprints beyond
//! [`FINGERPRINTS_MAX`] share one entry, so that nothing goes uncounted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Slot;

use super::histogram::Histogram;
use super::stats::{Counts, FingerprintReport, Latency, Noise, ReadCounts, SideLatency, Timing, of_side};
use crate::control::Side;
use crate::sql::{Fingerprint, FingerprintId};

/// Kept one by one. With all its latencies one takes some 5 kB, and its text.
const FINGERPRINTS_MAX: usize = 2000;
/// Of each one's text.
const TEXT_BYTES_MAX: usize = 2048;

/// One statement.
#[derive(Debug, Default)]
pub(super) struct Entry {
    text: Box<str>,
    pub(super) counts: Counts,
    asked_twice: AtomicU64,
    disagreed: AtomicU64,
    /// Made with the first latency.
    latencies: Mutex<Option<Box<Latencies>>>,
}

#[derive(Debug, Default)]
struct Latencies {
    sides: [SideHistograms; 2],
}

#[derive(Debug, Default)]
struct SideHistograms {
    first_row: Histogram,
    total: Histogram,
}

impl Entry {
    /// How long a side took for a read.
    pub(super) fn record(&self, side: Side, timing: Timing) {
        let mut latencies = self.latencies.lock().unwrap_or_else(PoisonError::into_inner);
        let side = &mut latencies.get_or_insert_default().sides[of_side(side, 0, 1)];
        side.total.record(timing.total);
        if let Some(first_row) = timing.first_row {
            side.first_row.record(first_row);
        }
    }

    /// The primary was asked twice in one snapshot.
    pub(super) fn asked_twice(&self, agreed: bool) {
        self.asked_twice.fetch_add(1, Ordering::Relaxed);
        self.disagreed.fetch_add(u64::from(!agreed), Ordering::Relaxed);
    }

    fn report(&self, id: FingerprintId) -> FingerprintReport {
        let latencies = self.latencies.lock().unwrap_or_else(PoisonError::into_inner);
        FingerprintReport {
            fingerprint: id.to_string(),
            text: self.text.to_string(),
            counts: self.counts.report(),
            noise: Noise::new(
                self.asked_twice.load(Ordering::Relaxed),
                self.disagreed.load(Ordering::Relaxed),
            ),
            latency: latencies.as_ref().map(|latencies| {
                let side = |at: usize| SideLatency {
                    first_row: latencies.sides[at].first_row.report(),
                    total: latencies.sides[at].total.report(),
                };
                Latency::new(side(0), side(1))
            }),
        }
    }
}

#[derive(Default)]
pub(super) struct Fingerprints {
    entries: DashMap<FingerprintId, Arc<Entry>>,
    others: Arc<Entry>,
}

impl Fingerprints {
    /// The entry of a statement, made where there is none and room for it.
    pub(super) fn of(&self, fingerprint: &Fingerprint) -> Arc<Entry> {
        if let Some(entry) = self.entries.get(&fingerprint.id) {
            return entry.clone();
        }
        // Some too many, where several come at once, do no harm.
        if self.entries.len() >= FINGERPRINTS_MAX {
            return self.others.clone();
        }
        match self.entries.entry(fingerprint.id) {
            Slot::Occupied(known) => known.get().clone(),
            Slot::Vacant(room) => {
                let end = fingerprint.text.floor_char_boundary(TEXT_BYTES_MAX);
                let entry = Entry {
                    text: fingerprint.text[..end].into(),
                    ..Entry::default()
                };
                room.insert(Arc::new(entry)).clone()
            }
        }
    }

    /// Most executions first; and what the others have in common.
    pub(super) fn report(&self) -> (Vec<FingerprintReport>, ReadCounts) {
        let mut reports: Vec<_> = self
            .entries
            .iter()
            .map(|slot| slot.value().report(*slot.key()))
            .collect();
        reports.sort_by(|one, other| {
            (other.counts.executions, &one.fingerprint).cmp(&(one.counts.executions, &other.fingerprint))
        });
        (reports, self.others.counts.report())
    }
}

#[cfg(test)]
mod tests {
    use super::super::stats::Outcome;
    use super::*;

    #[test]
    fn what_is_beyond_the_bound_is_counted_together() {
        let fingerprints = Fingerprints::default();
        for number in 0..FINGERPRINTS_MAX + 10 {
            let fingerprint = crate::sql::fingerprint(format!("select a{number}").as_bytes());
            fingerprints.of(&fingerprint).counts.count(Outcome::Matched);
        }
        let (reports, others) = fingerprints.report();
        assert_eq!((reports.len(), others.executions), (FINGERPRINTS_MAX, 10));
    }

    #[test]
    fn long_texts_are_cut() {
        let fingerprints = Fingerprints::default();
        let text = format!("select {}", "ä".repeat(TEXT_BYTES_MAX));
        fingerprints.of(&crate::sql::fingerprint(text.as_bytes()));
        let (reports, _) = fingerprints.report();
        assert!(reports[0].text.len() <= TEXT_BYTES_MAX);
    }
}
