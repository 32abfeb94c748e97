//! Where sessions leave their reads. Nothing here waits, and with `reads.shadow_percent: 0` it
//! costs one load.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};

use super::canary::{CanaryCounts, CanaryEvent};
use super::catalog::Catalog;
use super::read::ShadowRead;
use super::rules::Rules;
use super::sample::{Asked, Sample};
use super::stats::{Counters, Dropped, Outcome, ShadowReport, ShadowStats, Skipped};
use crate::config::Reads;
use crate::control::Control;
use crate::sql::{Fingerprint, NotComparable, ReadFacts, Script, Writes, may_write, shadowable, single_read};

/// Of the texts and parameters of the reads that wait.
const QUEUE_BYTES_MAX: usize = 32 * 1024 * 1024;
const READ_BYTES_MAX: usize = 1024 * 1024;

/// One database's intake of reads; cheap to clone.
#[derive(Clone)]
pub struct ShadowSink(pub(super) Arc<Intake>);

pub(super) struct Intake {
    sample: ArcSwap<Sample>,
    canary: ArcSwap<Sample>,
    pub(super) rules: Arc<ArcSwap<Rules>>,
    pub(super) catalog: Arc<ArcSwap<Catalog>>,
    pub(super) catalog_changed: Arc<Notify>,
    queue: mpsc::Sender<Queued>,
    /// Reads queued or running, and the bytes of their texts and parameters.
    reads: Arc<Waiting>,
    pub(super) counters: Arc<Counters>,
}

/// A read of the sample, with what its session knows of it.
#[derive(Clone, Copy)]
pub struct Candidate<'a> {
    /// The text's script; `None` where it has not been analysed.
    pub script: Option<&'a Script>,
    pub text: &'a [u8],
    /// What the arguments of an EXECUTE use.
    pub arguments: Option<&'a ReadFacts>,
    /// Something that may write ran before it in its transaction.
    pub after_write: bool,
    /// Temporary relations of the session.
    pub temporary: &'a [String],
    /// The session's settings are known in full.
    pub settings_known: bool,
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
        reads: &Reads,
        catalog: Arc<ArcSwap<Catalog>>,
        counters: Arc<Counters>,
    ) -> (Self, mpsc::Receiver<Queued>) {
        let (queue, queued) = mpsc::channel(reads.shadow_queue);
        let sink = Self(Arc::new(Intake {
            sample: ArcSwap::from_pointee(Sample::new(reads)),
            canary: ArcSwap::from_pointee(Sample::of_canary(&reads.canary)),
            rules: Arc::new(ArcSwap::from_pointee(Rules::new(reads))),
            catalog,
            catalog_changed: Arc::new(Notify::new()),
            queue,
            reads: Arc::default(),
            counters,
        }));
        (sink, queued)
    }

    /// Whether anything is wanted at all: asked before a text is even looked at.
    pub fn is_on(&self, control: Control) -> bool {
        control.phase.shadows() && !self.0.sample.load().is_off()
    }

    /// Whether a read is in the sample: asked before its text is analysed, so that what is not in
    /// it costs a hash and a count. What is no read is neither counted nor in it.
    pub fn samples(&self, asked: &Asked<'_>) -> bool {
        let sample = self.0.sample.load();
        if sample.is_off() {
            return false;
        }
        let Some(statement) = self.0.counters.fingerprints.of_text(asked.text) else {
            return false;
        };
        if sample.holds(&statement, asked) {
            return true;
        }
        let skipped = Outcome::Skipped(Skipped::NotSampled);
        let outcome = statement.never().map_or(skipped, Outcome::NotComparable);
        self.0.counters.count(&statement, outcome);
        false
    }

    /// Whether a read is in the canary's share.
    pub fn in_canary(&self, asked: &Asked<'_>) -> bool {
        let statement = self.0.counters.fingerprints.of_text(asked.text);
        statement.is_some_and(|statement| self.0.canary.load().holds(&statement, asked))
    }

    /// Whether a transaction that only reads is in the canary's share; `drawn` tells it from
    /// others.
    pub fn transaction_in_canary(&self, asked: &Asked<'_>, drawn: u64) -> bool {
        self.0.canary.load().holds_transaction(asked, drawn)
    }

    /// Whether the secondary would answer a read as the primary does, as far as can be told
    /// beforehand. `inside` a transaction that runs there, its clock and its session are what the
    /// transaction has. Nothing is counted.
    pub fn servable(&self, read: &Candidate<'_>, inside: bool) -> bool {
        let facts = read.script.ok_or(NotComparable::NotARead).and_then(single_read);
        match facts.and_then(|facts| self.judge(read, facts)) {
            Ok(()) => true,
            Err(NotComparable::Clock | NotComparable::Session) => inside,
            Err(reason) => {
                self.unknown(reason);
                false
            }
        }
    }

    /// The secondary's OIDs of parameter types that a Parse gave.
    pub fn types_on_secondary(&self, types: &[u8]) -> Option<Vec<u8>> {
        self.0.catalog.load().map_types(types)
    }

    pub fn count_canary(&self, text: &[u8], event: CanaryEvent) {
        self.0.counters.canary.count(event);
        if !matches!(event, CanaryEvent::Considered)
            && let Some(statement) = self.0.counters.fingerprints.of_text(text)
        {
            statement.count_canary(event);
        }
    }

    /// A canary read waited for its session's own writes.
    pub fn canary_waited(&self, time: std::time::Duration) {
        self.0.counters.canary.waited(time);
    }

    pub fn canary(&self) -> CanaryCounts {
        self.0.counters.canary.report()
    }

    /// Whether a read of the sample can be compared, so that it shall be digested and offered. Reads
    /// that cannot are counted here; but where a text has not been analysed, its kind alone is asked,
    /// and may leave it open.
    pub fn wants(&self, read: &Candidate<'_>) -> bool {
        let Some(script) = read.script else {
            let kind = self.0.counters.fingerprints.of_text(read.text);
            let facts = kind.as_ref().and_then(|kind| kind.facts());
            return facts.is_some_and(|facts| self.judge(read, facts).is_ok());
        };
        match single_read(script).and_then(|facts| self.judge(read, facts)) {
            Ok(()) => true,
            // Writes, SET and the like were never meant to be compared.
            Err(NotComparable::NotARead) => false,
            Err(reason) => {
                self.unknown(reason);
                self.withdraw(script.fingerprint(read.text), Outcome::NotComparable(reason));
                false
            }
        }
    }

    fn unknown(&self, reason: NotComparable) {
        if matches!(reason, NotComparable::UnknownFunction | NotComparable::UnknownRelation) {
            // Perhaps it is new.
            self.schema_changed();
        }
    }

    fn judge(&self, read: &Candidate<'_>, facts: &ReadFacts) -> Result<(), NotComparable> {
        if read.after_write {
            return Err(NotComparable::EarlierWrite);
        }
        if facts.uses_any(read.temporary) {
            return Err(NotComparable::TemporaryTable);
        }
        let catalog = self.0.catalog.load();
        shadowable(facts, &catalog.functions)?;
        if let Some(arguments) = read.arguments {
            shadowable(arguments, &catalog.functions)?;
        }
        if !read.settings_known {
            return Err(NotComparable::UnknownSettings);
        }
        Ok(())
    }

    /// Whether a read may write all the same, as far as the primary's catalog tells; remembered
    /// for the statement until the catalog is read again.
    pub fn read_may_write(&self, text: &[u8]) -> bool {
        let catalog = self.0.catalog.load();
        match self.0.counters.fingerprints.of_text(text) {
            Some(statement) => statement.may_write(&catalog),
            None => true,
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

    /// A read is not compared, or not after all (an answer that was cut off).
    pub fn withdraw(&self, fingerprint: &Fingerprint, outcome: Outcome) {
        self.0.counters.count(&self.0.counters.of(fingerprint), outcome);
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

    /// After a reload: sample, rules and ignores. Concurrency, queue and deadline stay.
    pub fn configure(&self, reads: &Reads) {
        self.0.sample.store(Arc::new(Sample::new(reads)));
        self.0.canary.store(Arc::new(Sample::of_canary(&reads.canary)));
        self.0.rules.store(Arc::new(Rules::new(reads)));
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
        report.ignores = self.0.rules.load().ignores();
        report
    }
}
