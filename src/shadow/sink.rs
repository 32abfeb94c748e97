//! Where sessions leave their reads. Nothing here waits, and with `reads.shadow_percent: 0` it
//! costs one load.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};

use super::catalog::Catalog;
use super::read::{ShadowRead, sample_key};
use super::stats::{Counters, Dropped, Outcome, ShadowReport, ShadowStats, Skipped};
use crate::control::Control;
use crate::sql::{Fingerprint, Glance, NotComparable, Script, Writes, fingerprint, may_write, shadowable, single_read};

/// Reads waiting to be shadowed: some seconds of them. More would only be older.
pub(super) const QUEUE_READS: usize = 1024;
/// Their texts and parameters.
const QUEUE_BYTES_MAX: usize = 32 * 1024 * 1024;
const READ_BYTES_MAX: usize = 1024 * 1024;

/// One database's intake of reads; cheap to clone.
#[derive(Clone)]
pub struct ShadowSink(pub(super) Arc<Intake>);

pub(super) struct Intake {
    /// Reads whose key is at most this are in the sample; 0 for none.
    threshold: AtomicU64,
    pub(super) catalog: Arc<ArcSwap<Catalog>>,
    pub(super) catalog_changed: Arc<Notify>,
    queue: mpsc::Sender<Queued>,
    /// Reads queued or running, and the bytes of their texts and parameters.
    reads: Arc<Waiting>,
    pub(super) counters: Arc<Counters>,
}

#[derive(Default)]
struct Waiting {
    reads: AtomicUsize,
    bytes: AtomicUsize,
}

/// A read with its room in the queue, given back when it is done with.
pub(super) struct Queued {
    pub(super) read: ShadowRead,
    waiting: Arc<Waiting>,
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.waiting.reads.fetch_sub(1, Ordering::Relaxed);
        self.waiting.bytes.fetch_sub(self.read.bytes(), Ordering::Relaxed);
    }
}

impl ShadowSink {
    pub(super) fn new(
        percent: f64,
        catalog: Arc<ArcSwap<Catalog>>,
        counters: Arc<Counters>,
        queue_reads: usize,
    ) -> (Self, mpsc::Receiver<Queued>) {
        let (queue, reads) = mpsc::channel(queue_reads);
        let sink = Self(Arc::new(Intake {
            threshold: AtomicU64::new(threshold(percent)),
            catalog,
            catalog_changed: Arc::new(Notify::new()),
            queue,
            reads: Arc::default(),
            counters,
        }));
        (sink, reads)
    }

    /// Whether anything is wanted at all: asked before a text is even looked up.
    pub fn is_on(&self, control: Control) -> bool {
        self.0.threshold.load(Ordering::Relaxed) != 0 && control.phase.shadows()
    }

    /// Whether this text and its parameters are in the sample: asked before the text is analysed,
    /// so that what is not sampled costs a hash. `glance` keeps what is no query out of the count.
    pub fn samples(&self, glance: Glance, text: &[u8], parameters: &[u8]) -> bool {
        let threshold = self.0.threshold.load(Ordering::Relaxed);
        if threshold == 0 || glance == Glance::Dml {
            return false;
        }
        sample_key(text, parameters) <= threshold
            || glance == Glance::Query && self.turn_down(&fingerprint(text), Outcome::Skipped(Skipped::NotSampled))
    }

    /// Whether this read shall be digested and offered; decided before its answer comes, by text
    /// and parameters (the Bind body behind its names; empty for a simple query), so that the
    /// same read is always in the sample or never. Reads that are not wanted are counted here.
    pub fn wants(&self, control: Control, script: &Script, text: &[u8], parameters: &[u8]) -> bool {
        let threshold = self.0.threshold.load(Ordering::Relaxed);
        if threshold == 0 || !control.phase.shadows() {
            return false;
        }
        let facts = match single_read(script) {
            Ok(facts) => facts,
            // Writes, SET and the like were never meant to be compared.
            Err(NotComparable::NotARead) => return false,
            Err(reason) => return self.turn_down(script.fingerprint(text), Outcome::NotComparable(reason)),
        };
        if sample_key(text, parameters) > threshold {
            return self.turn_down(script.fingerprint(text), Outcome::Skipped(Skipped::NotSampled));
        }
        match shadowable(facts, &self.0.catalog.load().functions) {
            Ok(()) => true,
            Err(reason) => {
                if matches!(reason, NotComparable::UnknownFunction | NotComparable::UnknownRelation) {
                    // Perhaps it is new.
                    self.schema_changed();
                }
                self.turn_down(script.fingerprint(text), Outcome::NotComparable(reason))
            }
        }
    }

    /// Whether a text may change rows, as far as the primary's catalog tells.
    pub fn may_write(&self, script: &Script) -> bool {
        let writes = may_write(script, &self.0.catalog.load().functions);
        if writes == Writes::Unknown {
            self.schema_changed();
        }
        writes != Writes::Nothing
    }

    fn turn_down(&self, fingerprint: &Fingerprint, outcome: Outcome) -> bool {
        self.0.counters.count(&self.0.counters.of(fingerprint), outcome);
        false
    }

    /// A read that was wanted turns out not to be compared after all (an earlier write in its
    /// transaction, a temporary table of the session, an answer that was cut off).
    pub fn withdraw(&self, fingerprint: &Fingerprint, outcome: Outcome) {
        self.turn_down(fingerprint, outcome);
    }

    /// Hands over a read whose answer is through. No room: dropped and counted.
    pub fn offer(&self, read: ShadowRead) {
        let bytes = read.bytes();
        if bytes > READ_BYTES_MAX {
            self.withdraw(read.fingerprint(), Outcome::Dropped(Dropped::TooLarge));
            return;
        }
        let waiting = &self.0.reads;
        waiting.reads.fetch_add(1, Ordering::Relaxed);
        let before = waiting.bytes.fetch_add(bytes, Ordering::Relaxed);
        // From here on dropping it gives its room back.
        let queued = Queued {
            read,
            waiting: waiting.clone(),
        };
        let refused = if before + bytes > QUEUE_BYTES_MAX {
            Some(queued)
        } else {
            let sent = self.0.queue.try_send(queued);
            sent.err().map(|error| match error {
                TrySendError::Full(queued) | TrySendError::Closed(queued) => queued,
            })
        };
        if let Some(queued) = refused {
            self.withdraw(queued.read.fingerprint(), Outcome::Dropped(Dropped::QueueFull));
        }
    }

    /// A schema change went through: the catalog is read again soon.
    pub fn schema_changed(&self) {
        self.0.catalog_changed.notify_one();
    }

    /// The catalog as last read, for `explain`.
    pub fn catalog(&self) -> Arc<Catalog> {
        self.0.catalog.load_full()
    }

    /// After a reload.
    pub fn set_percent(&self, percent: f64) {
        self.0.threshold.store(threshold(percent), Ordering::Relaxed);
    }

    pub fn stats(&self) -> ShadowStats {
        ShadowStats {
            waiting: self.waiting(),
            ..self.0.counters.stats()
        }
    }

    fn waiting(&self) -> usize {
        self.0.reads.reads.load(Ordering::Relaxed)
    }

    /// All that is known, by fingerprint. `slower`: how many times as slow as legacy a statement
    /// must be on new to be named.
    pub fn report(&self, slower: f64) -> ShadowReport {
        let mut report = self.0.counters.report(slower);
        report.totals.waiting = self.waiting();
        report
    }
}

/// The part of all 64-bit keys that `percent` stands for.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates as wanted"
)]
fn threshold(percent: f64) -> u64 {
    if percent >= 100.0 {
        u64::MAX
    } else {
        (percent.max(0.0) / 100.0 * 2_f64.powi(64)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_keys() {
        assert_eq!(threshold(0.0), 0);
        assert_eq!(threshold(-1.0), 0);
        assert_eq!(threshold(100.0), u64::MAX);
        for percent in [0.5, 10.0, 50.0, 99.0] {
            let threshold = threshold(percent);
            let inside = (0..100_000_u32)
                .filter(|number| sample_key(b"select $1", &number.to_be_bytes()) <= threshold)
                .count();
            let share = f64::from(u32::try_from(inside).unwrap()) / 1000.0;
            assert!((share - percent).abs() < 1.0, "{percent}: {share}");
        }
    }
}
