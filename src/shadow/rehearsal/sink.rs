//! Where sessions leave their transactions. Nothing here waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};

use super::super::catalog::Catalog;
use super::super::sample::{Asked, Sample};
use super::stats::{Counters, Dropped, Outcome, RehearsalReport, Rehearsed, Skipped};
use super::{Pace, Step, Transaction};
use crate::config::{Rehearse, Which};
use crate::sql::{FunctionCatalog, LeftOut, Part, QualifiedName, Reach, RelationKind, Script, Writes, read_may_matter};

/// Of the texts and parameters of all that wait.
const QUEUE_BYTES_MAX: usize = 16 * 1024 * 1024;
const TRANSACTION_BYTES_MAX: usize = 1024 * 1024;

/// One database's intake of transactions; cheap to clone.
#[derive(Clone)]
pub struct RehearsalSink {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Queued>,
}

pub(super) struct Shared {
    pub(super) sample: ArcSwap<Sample>,
    pub(super) on: ArcSwap<bool>,
    /// What the secondary's functions and tables reach.
    pub(super) reach: ArcSwap<Reach>,
    /// Asks for a look at that.
    pub(super) look: Notify,
    /// The primary's.
    pub(super) catalog: Arc<ArcSwap<Catalog>>,
    pub(super) catalog_changed: Arc<Notify>,
    pub(super) counters: Counters,
    pub(super) pace: Arc<dyn Pace>,
    pub(super) waiting: Arc<Waiting>,
}

#[derive(Default)]
pub(super) struct Waiting {
    transactions: AtomicUsize,
    bytes: AtomicUsize,
}

/// A transaction with its room in the queue, given back when it is done with.
pub(super) struct Queued {
    pub(super) transaction: Transaction,
    bytes: usize,
    waiting: Arc<Waiting>,
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.waiting.transactions.fetch_sub(1, Ordering::Relaxed);
        self.waiting.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Shared {
    pub(super) fn is_on(&self) -> bool {
        **self.on.load()
    }

    pub(super) fn count(&self, step: &Step, outcome: Outcome) {
        self.counters.count(step.script.fingerprint(&step.text), outcome);
    }

    /// Counts what becomes of all that a transaction wrote.
    pub(super) fn count_all(&self, transaction: &Transaction, outcome: Outcome) {
        for step in &transaction.steps {
            if !matches!(step.part, Part::Control) {
                self.count(step, outcome);
            }
        }
    }

    /// Why a transaction is not rehearsed.
    fn left_out(&self, transaction: &Transaction) -> Option<LeftOut> {
        let catalog = self.catalog.load();
        let reach = self.reach.load();
        let transformed = |word: &str| {
            catalog.functions.relation(&QualifiedName::new(None, word)) == Some(&RelationKind::Transformed)
        };
        let found = transaction.left_out.or_else(|| {
            transaction
                .steps
                .iter()
                .find_map(|step| reach.judge(&step.text, transaction.lex, &transaction.temporary, transformed))
        });
        found.or_else(|| transaction.settings.is_none().then_some(LeftOut::UnknownSettings))
    }
}

impl RehearsalSink {
    pub(super) fn new(shared: Arc<Shared>, room: usize) -> (Self, mpsc::Receiver<Queued>) {
        let (queue, queued) = mpsc::channel(room);
        (Self { shared, queue }, queued)
    }

    /// Whether a transaction that begins with this write is in the sample.
    pub fn samples(&self, asked: &Asked<'_>, script: &Script) -> bool {
        let is_meant = |which: &Which| {
            which
                .fingerprint
                .is_none_or(|id| id == script.fingerprint(asked.text).id)
                && which.table.as_deref().is_none_or(|table| names(asked.text, table))
        };
        self.shared.sample.load().holds_what(is_meant, asked)
    }

    /// The last round that is known to be applied.
    pub fn applied_round(&self) -> u64 {
        self.shared.pace.applied_round()
    }

    /// Whether a read may do what its transaction's rehearsal would lack, as far as the primary's
    /// catalog tells.
    pub fn may_write(&self, script: &Script) -> bool {
        let writes = read_may_matter(script, &self.shared.catalog.load().functions);
        if writes == Writes::Unknown {
            self.shared.catalog_changed.notify_one();
        }
        writes != Writes::Nothing
    }

    /// A schema change went through: until what writes reach has been read again, none is rehearsed.
    pub fn schema_changed(&self) {
        self.shared.reach.store(Arc::default());
        self.shared.look.notify_one();
    }

    /// A write that is not in the sample.
    pub fn pass_over(&self, script: &Script, text: &[u8]) {
        let skipped = Outcome::Skipped(Skipped::NotSampled);
        self.shared.counters.count(script.fingerprint(text), skipped);
    }

    /// Hands over a transaction that is over. No room: dropped and counted.
    pub fn offer(&self, transaction: Transaction) {
        if let Some(reason) = self.shared.left_out(&transaction) {
            if reason == LeftOut::CatalogUnknown {
                self.shared.look.notify_one();
            }
            self.shared.count_all(&transaction, Outcome::LeftOut(reason));
            return;
        }
        let bytes = transaction.steps.iter().map(Step::bytes).sum();
        if bytes > TRANSACTION_BYTES_MAX {
            self.shared.count_all(&transaction, Outcome::Dropped(Dropped::TooLarge));
            return;
        }
        let waiting = self.shared.waiting.clone();
        waiting.transactions.fetch_add(1, Ordering::Relaxed);
        let before = waiting.bytes.fetch_add(bytes, Ordering::Relaxed);
        let queued = Queued {
            transaction,
            bytes,
            waiting,
        };
        let refused = if before + bytes > QUEUE_BYTES_MAX {
            Some(queued)
        } else {
            let sent = self.queue.try_send(queued);
            sent.err().map(|error| match error {
                TrySendError::Full(queued) | TrySendError::Closed(queued) => queued,
            })
        };
        if let Some(queued) = refused {
            let dropped = Outcome::Dropped(Dropped::QueueFull);
            self.shared.count_all(&queued.transaction, dropped);
        }
    }

    /// After a reload: the sample. Concurrency, queue and deadline stay.
    pub fn configure(&self, rehearse: &Rehearse) {
        let sample = Sample::by(rehearse.percent, rehearse.key, &rehearse.rules);
        self.shared.sample.store(Arc::new(sample));
        self.shared.on.store(Arc::new(rehearse.any()));
        self.shared.look.notify_one();
    }

    pub fn stats(&self) -> Rehearsed {
        self.shared.counters.totals(self.waiting())
    }

    fn waiting(&self) -> usize {
        self.shared.waiting.transactions.load(Ordering::Relaxed)
    }

    /// All that is known, by fingerprint. `slower`: how many times as slow as legacy a statement
    /// must be on new to be named.
    pub fn report(&self, slower: f64) -> RehearsalReport {
        self.shared.counters.report(self.waiting(), slower)
    }
}

/// Whether a statement has the table's name in it.
fn names(text: &[u8], table: &str) -> bool {
    let name = table.rsplit('.').next().unwrap_or(table).as_bytes();
    text.windows(name.len().max(1))
        .any(|part| part.eq_ignore_ascii_case(name))
}
