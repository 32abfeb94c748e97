//! What is known of each statement that clients read with. Bounded: fingerprints beyond
//! [`FINGERPRINTS_MAX`] share one entry, so that nothing goes uncounted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use xxhash_rust::xxh3::xxh3_64;

use super::canary::{CanaryEvent, FingerprintCanary};
use super::catalog::Catalog;
use super::histogram::Histogram;
use super::read::ShadowRead;
use super::stats::{Counts, FingerprintReport, Latency, Noise, ReadCounts, SideLatency, Timing, of_side};
use crate::config::Which;
use crate::control::Side;
use crate::sql::{
    Fingerprint, FingerprintId, NotComparable, ReadFacts, Writes, analyze, facts_may_write, fingerprint,
    fingerprint_id, single_read,
};

/// Kept one by one. With all its latencies one takes some 5 kB, and its text.
const FINGERPRINTS_MAX: usize = 2000;
/// Of each one's text.
const TEXT_BYTES_MAX: usize = 2048;
/// Text and parameters of the read that is kept of each; of longer ones there is none.
const EXAMPLE_BYTES_MAX: usize = 4096;

/// One statement.
#[derive(Debug, Default)]
pub(super) struct Entry {
    /// None: the others' entry.
    id: Option<FingerprintId>,
    text: Box<str>,
    /// What the first of its texts reads, or why it can never be compared.
    read: Option<Result<ReadFacts, NotComparable>>,
    /// Whether it may write, in the lowest bit, and which catalog said so.
    writes: AtomicU64,
    pub(super) counts: Counts,
    asked_twice: AtomicU64,
    disagreed: AtomicU64,
    canary: CanaryOfOne,
    /// The first of its reads that was compared, to ask for plans with.
    example: Mutex<Option<Arc<ShadowRead>>>,
    /// Made with the first latency.
    latencies: Mutex<Option<Box<Latencies>>>,
}

#[derive(Debug, Default)]
struct CanaryOfOne {
    served: AtomicU64,
    errors: AtomicU64,
    fallbacks: AtomicU64,
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
    /// Whether a rule of proxy.yaml is about it.
    pub(super) fn is_meant(&self, which: &Which) -> bool {
        match (&self.read, self.id) {
            (Some(Ok(facts)), Some(id)) => which.holds(id, facts),
            (_, id) => which.table.is_none() && (which.fingerprint.is_none() || which.fingerprint == id),
        }
    }

    fn is_no_read(&self) -> bool {
        self.read == Some(Err(NotComparable::NotARead))
    }

    /// Why it can never be compared, as far as its text tells.
    pub(super) fn never(&self) -> Option<NotComparable> {
        self.read.as_ref()?.as_ref().err().copied()
    }

    /// What the first of its texts reads.
    pub(super) fn facts(&self) -> Option<&ReadFacts> {
        self.read.as_ref()?.as_ref().ok()
    }

    /// Whether functions that it calls may write, by this catalog.
    pub(super) fn may_write(&self, catalog: &Catalog) -> bool {
        let Some(Ok(facts)) = &self.read else { return true };
        let known = self.writes.load(Ordering::Relaxed);
        if catalog.generation > 0 && known >> 1 == catalog.generation {
            return known & 1 == 1;
        }
        let writes = facts_may_write(facts, &catalog.functions) != Writes::Nothing;
        self.writes
            .store(catalog.generation << 1 | u64::from(writes), Ordering::Relaxed);
        writes
    }

    /// How long a side took for a read.
    pub(super) fn record(&self, side: Side, timing: Timing) {
        let mut latencies = self.latencies.lock().unwrap_or_else(PoisonError::into_inner);
        let side = &mut latencies.get_or_insert_default().sides[of_side(side, 0, 1)];
        side.total.record(timing.total);
        if let Some(first_row) = timing.first_row {
            side.first_row.record(first_row);
        }
    }

    pub(super) fn keep_example(&self, read: &ShadowRead) {
        let mut example = self.example.lock().unwrap_or_else(PoisonError::into_inner);
        if example.is_none() && read.bytes() <= EXAMPLE_BYTES_MAX {
            *example = Some(Arc::new(read.clone()));
        }
    }

    /// The primary was asked twice in one snapshot.
    pub(super) fn asked_twice(&self, agreed: bool) {
        self.asked_twice.fetch_add(1, Ordering::Relaxed);
        self.disagreed.fetch_add(u64::from(!agreed), Ordering::Relaxed);
    }

    pub(super) fn count_canary(&self, event: CanaryEvent) {
        let counter = match event {
            CanaryEvent::Served => &self.canary.served,
            CanaryEvent::Error => &self.canary.errors,
            CanaryEvent::Fallback(_) => &self.canary.fallbacks,
            _ => return,
        };
        counter.fetch_add(1, Ordering::Relaxed);
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
            canary: FingerprintCanary {
                served: self.canary.served.load(Ordering::Relaxed),
                errors: self.canary.errors.load(Ordering::Relaxed),
                fallbacks: self.canary.fallbacks.load(Ordering::Relaxed),
            },
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

pub(super) struct Fingerprints {
    entries: DashMap<FingerprintId, Arc<Entry>>,
    others: Arc<Entry>,
    /// Stands for every text that is no read.
    no_read: Arc<Entry>,
    /// Entries by a hash of texts seen a short while ago; emptied when it is full.
    texts: DashMap<u64, Arc<Entry>>,
}

impl Default for Fingerprints {
    fn default() -> Self {
        Self {
            entries: DashMap::new(),
            others: Arc::default(),
            no_read: Arc::new(Entry {
                read: Some(Err(NotComparable::NotARead)),
                ..Entry::default()
            }),
            texts: DashMap::new(),
        }
    }
}

/// Texts whose entries are found without normalizing them; 24 bytes each.
const TEXTS_MAX: usize = 16 * 1024;

impl Fingerprints {
    /// The entry of a statement, made where there is none and room for it.
    pub(super) fn of(&self, fingerprint: &Fingerprint) -> Arc<Entry> {
        self.known(fingerprint.id)
            // Normalized, it reads what it did before.
            .unwrap_or_else(|| self.make(fingerprint, read_of(fingerprint.text.as_bytes())))
    }

    /// The entry of a text; `None` where it is no read. Of a text seen before it costs a hash and
    /// allocates nothing; of a new one with a known fingerprint, normalizing it.
    pub(super) fn of_text(&self, text: &[u8]) -> Option<Arc<Entry>> {
        let hash = xxh3_64(text);
        if let Some(entry) = self.texts.get(&hash) {
            return Some(entry.clone()).filter(|entry| !entry.is_no_read());
        }
        let entry = match self.known(fingerprint_id(text)) {
            Some(entry) => entry,
            None => {
                let read = read_of(text);
                match read {
                    Err(NotComparable::NotARead) => self.no_read.clone(),
                    read => self.make(&fingerprint(text), read),
                }
            }
        };
        if self.texts.len() >= TEXTS_MAX {
            self.texts.clear();
        }
        self.texts.insert(hash, entry.clone());
        Some(entry).filter(|entry| !entry.is_no_read())
    }

    /// A read of this fingerprint that was compared.
    pub(super) fn example(&self, id: FingerprintId) -> Option<Arc<ShadowRead>> {
        let entry = self.entries.get(&id)?;
        let example = entry.example.lock().unwrap_or_else(PoisonError::into_inner);
        example.clone()
    }

    fn known(&self, id: FingerprintId) -> Option<Arc<Entry>> {
        let known = self.entries.get(&id).map(|entry| entry.clone());
        // Some too many, where several come at once, do no harm.
        known.or_else(|| (self.entries.len() >= FINGERPRINTS_MAX).then(|| self.others.clone()))
    }

    fn make(&self, fingerprint: &Fingerprint, read: Result<ReadFacts, NotComparable>) -> Arc<Entry> {
        let text = &fingerprint.text;
        let mut end = text.len().min(TEXT_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let made = || Entry {
            id: Some(fingerprint.id),
            text: text[..end].into(),
            read: Some(read),
            ..Entry::default()
        };
        self.entries
            .entry(fingerprint.id)
            .or_insert_with(|| Arc::new(made()))
            .clone()
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

fn read_of(text: &[u8]) -> Result<ReadFacts, NotComparable> {
    single_read(&analyze(text)).cloned()
}

#[cfg(test)]
mod tests {
    use super::super::stats::Outcome;
    use super::*;

    #[test]
    fn what_is_beyond_the_bound_is_counted_together() {
        let fingerprints = Fingerprints::default();
        for number in 0..FINGERPRINTS_MAX + 10 {
            let fingerprint = fingerprint(format!("select a{number}").as_bytes());
            fingerprints.of(&fingerprint).counts.count(Outcome::Matched);
        }
        let (reports, others) = fingerprints.report();
        assert_eq!((reports.len(), others.executions), (FINGERPRINTS_MAX, 10));
    }

    #[test]
    fn texts_find_their_entries() {
        let fingerprints = Fingerprints::default();
        let one = fingerprints.of_text(b"select 1").unwrap();
        assert!(Arc::ptr_eq(&one, &fingerprints.of_text(b"SELECT  2").unwrap()));
        assert!(Arc::ptr_eq(&one, &fingerprints.of_text(b"select 1").unwrap()));
        assert!(Arc::ptr_eq(&one, &fingerprints.of(&fingerprint(b"select 3"))));
        for no_read in ["begin", "insert into t values (1)", "select 1; delete from t"] {
            assert!(fingerprints.of_text(no_read.as_bytes()).is_none(), "{no_read}");
        }
        for (never, reason) in [
            ("select a from t for update", NotComparable::Locking),
            ("select 1; select a", NotComparable::SeveralStatements),
            ("copy t to '/tmp/t'", NotComparable::CopyToServer),
        ] {
            let entry = fingerprints.of_text(never.as_bytes()).unwrap();
            assert_eq!(entry.never(), Some(reason), "{never}");
        }
        for number in 0..TEXTS_MAX + 10 {
            fingerprints.of_text(format!("select {number}").as_bytes());
        }
        assert!(fingerprints.texts.len() <= TEXTS_MAX);
    }

    #[test]
    fn whether_it_may_write_is_asked_once_a_catalog() {
        let fingerprints = Fingerprints::default();
        let entry = fingerprints.of_text(b"select audit(1)").unwrap();
        let catalog = |generation, volatility: &str| {
            let mut catalog = Catalog::default();
            catalog.generation = generation;
            catalog
                .functions
                .add_function("public".into(), "audit".into(), volatility);
            catalog
        };
        assert!(entry.may_write(&catalog(1, "v")));
        assert!(!entry.may_write(&catalog(2, "s")));
        assert!(!entry.may_write(&catalog(2, "v")));
    }

    #[test]
    fn long_texts_are_cut() {
        let fingerprints = Fingerprints::default();
        let text = format!("select {}", "ä".repeat(TEXT_BYTES_MAX));
        fingerprints.of(&fingerprint(text.as_bytes()));
        let (reports, _) = fingerprints.report();
        assert!(reports[0].text.len() <= TEXT_BYTES_MAX);
    }
}
