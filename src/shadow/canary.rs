//! Reads that the secondary really answered, counted: for the status, the budget and the report.
//!
//! What is counted here only grows; whoever wants a window takes two looks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use metrics::Counter;
use serde::{Deserialize, Serialize};

use super::read::ShadowRead;

/// What became of a read, or of a transaction that only reads, while the canary is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CanaryEvent {
    /// It might have been sent to the secondary; the share is counted by these.
    Considered,
    /// The secondary answered.
    Served,
    /// A transaction that says that it only reads ran there.
    Transaction,
    /// The secondary gave an error and the primary none.
    Error,
    /// Both gave an error.
    BothFailed,
    /// The primary answered instead.
    Fallback(Fallback),
    /// The secondary's connection broke after the first row, or behind the first read of a
    /// transaction: the client got an error.
    Broken,
    /// A transaction that the secondary served asked for what it cannot: the client got an error.
    Stranded,
}

/// Why the primary answered a read that was meant for the secondary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// No connection to the secondary as the client's user.
    Connection,
    /// The connection broke before the first row.
    Broken,
    /// The session's writes had not arrived within `reads.canary_wait`.
    Wait,
    /// The session has what cannot be brought to the secondary.
    Session,
    /// The answer has columns of user-defined types, which the client knows by the primary's OIDs.
    Types,
}

impl Fallback {
    const ALL: [Self; 5] = [Self::Connection, Self::Broken, Self::Wait, Self::Session, Self::Types];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Broken => "broken",
            Self::Wait => "wait",
            Self::Session => "session",
            Self::Types => "types",
        }
    }
}

const EVENTS: usize = 7 + Fallback::ALL.len();

impl CanaryEvent {
    const fn index(self) -> usize {
        match self {
            Self::Considered => 0,
            Self::Served => 1,
            Self::Transaction => 2,
            Self::Error => 3,
            Self::BothFailed => 4,
            Self::Broken => 5,
            Self::Stranded => 6,
            Self::Fallback(why) => 7 + why as usize,
        }
    }

    fn all() -> impl Iterator<Item = Self> {
        [
            Self::Considered,
            Self::Served,
            Self::Transaction,
            Self::Error,
            Self::BothFailed,
            Self::Broken,
            Self::Stranded,
        ]
        .into_iter()
        .chain(Fallback::ALL.map(Self::Fallback))
    }

    /// Labels `outcome` and `reason`.
    const fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::Considered => ("considered", ""),
            Self::Served => ("served", ""),
            Self::Transaction => ("transaction", ""),
            Self::Error => ("error", ""),
            Self::BothFailed => ("both_failed", ""),
            Self::Broken => ("broken", ""),
            Self::Stranded => ("stranded", ""),
            Self::Fallback(why) => ("fallback", why.as_str()),
        }
    }
}

/// Of one database, since the proxy's start.
pub(super) struct CanaryCounters {
    events: [AtomicU64; EVENTS],
    metrics: Vec<Counter>,
    waits: AtomicU64,
    waited_micros: AtomicU64,
    compared: AtomicU64,
    mismatched: AtomicU64,
    timed: AtomicU64,
    primary_micros: AtomicU64,
    secondary_micros: AtomicU64,
}

impl CanaryCounters {
    pub(super) fn new(database: &str) -> Self {
        Self {
            events: [const { AtomicU64::new(0) }; EVENTS],
            metrics: CanaryEvent::all()
                .map(|event| {
                    let (outcome, reason) = event.labels();
                    metrics::counter!("pgtandem_canary_reads_total",
                        "database" => database.to_owned(), "outcome" => outcome, "reason" => reason)
                })
                .collect(),
            waits: AtomicU64::new(0),
            waited_micros: AtomicU64::new(0),
            compared: AtomicU64::new(0),
            mismatched: AtomicU64::new(0),
            timed: AtomicU64::new(0),
            primary_micros: AtomicU64::new(0),
            secondary_micros: AtomicU64::new(0),
        }
    }

    pub(super) fn count(&self, event: CanaryEvent) {
        self.events[event.index()].fetch_add(1, Ordering::Relaxed);
        self.metrics[event.index()].increment(1);
    }

    /// A read waited for the session's own writes.
    pub(super) fn waited(&self, time: Duration) {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.waited_micros.fetch_add(micros(time), Ordering::Relaxed);
    }

    /// The primary was asked the same.
    pub(super) fn compared(&self, read: &ShadowRead, mismatched: bool) {
        if read.canary {
            self.compared.fetch_add(1, Ordering::Relaxed);
            self.mismatched.fetch_add(u64::from(mismatched), Ordering::Relaxed);
        }
    }

    /// How long both took for the same read.
    pub(super) fn took(&self, primary: Duration, secondary: Duration) {
        self.timed.fetch_add(1, Ordering::Relaxed);
        self.primary_micros.fetch_add(micros(primary), Ordering::Relaxed);
        self.secondary_micros.fetch_add(micros(secondary), Ordering::Relaxed);
    }

    pub(super) fn report(&self) -> CanaryCounts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let of = |event: CanaryEvent| load(&self.events[event.index()]);
        let fallback = |why| of(CanaryEvent::Fallback(why));
        CanaryCounts {
            considered: of(CanaryEvent::Considered),
            served: of(CanaryEvent::Served),
            transactions: of(CanaryEvent::Transaction),
            errors: of(CanaryEvent::Error),
            both_failed: of(CanaryEvent::BothFailed),
            fallbacks: Fallbacks {
                connection: fallback(Fallback::Connection),
                broken: fallback(Fallback::Broken),
                wait: fallback(Fallback::Wait),
                session: fallback(Fallback::Session),
                types: fallback(Fallback::Types),
            },
            broken: of(CanaryEvent::Broken),
            stranded: of(CanaryEvent::Stranded),
            waits: load(&self.waits),
            waited_ms: load(&self.waited_micros) as f64 / 1000.0,
            compared: load(&self.compared),
            mismatched: load(&self.mismatched),
            timed: load(&self.timed),
            primary_ms: load(&self.primary_micros) as f64 / 1000.0,
            secondary_ms: load(&self.secondary_micros) as f64 / 1000.0,
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Canary reads of one database, since the proxy's start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CanaryCounts {
    /// Reads and read-only transactions that the canary's share was drawn from.
    pub considered: u64,
    /// Reads that the secondary answered, those inside transactions included.
    pub served: u64,
    /// Read-only transactions that it ran.
    pub transactions: u64,
    /// Errors of the secondary where the primary gave none; the client got the primary's answer.
    pub errors: u64,
    pub both_failed: u64,
    /// Answered by the primary instead, by reason.
    pub fallbacks: Fallbacks,
    /// The client got an error, since the connection broke too late for the primary to answer.
    pub broken: u64,
    /// The client got an error, since its transaction asked for what the secondary cannot do.
    pub stranded: u64,
    /// Reads that waited for the session's own writes, and how long in all.
    pub waits: u64,
    pub waited_ms: f64,
    /// Repeated on the primary; of those, the confirmed mismatches.
    pub compared: u64,
    pub mismatched: u64,
    /// Reads whose time is known on both sides, and how long each took for all of them.
    pub timed: u64,
    pub primary_ms: f64,
    pub secondary_ms: f64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fallbacks {
    pub connection: u64,
    pub broken: u64,
    pub wait: u64,
    pub session: u64,
    #[serde(default)]
    pub types: u64,
}

impl CanaryCounts {
    /// What was counted between two looks.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        self.with(before, u64::saturating_sub, |now, then| (now - then).max(0.0))
    }

    /// Of two periods.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        self.with(other, u64::saturating_add, |one, other| one + other)
    }

    fn with(&self, before: &Self, less: fn(u64, u64) -> u64, time: fn(f64, f64) -> f64) -> Self {
        Self {
            considered: less(self.considered, before.considered),
            served: less(self.served, before.served),
            transactions: less(self.transactions, before.transactions),
            errors: less(self.errors, before.errors),
            both_failed: less(self.both_failed, before.both_failed),
            fallbacks: Fallbacks {
                connection: less(self.fallbacks.connection, before.fallbacks.connection),
                broken: less(self.fallbacks.broken, before.fallbacks.broken),
                wait: less(self.fallbacks.wait, before.fallbacks.wait),
                session: less(self.fallbacks.session, before.fallbacks.session),
                types: less(self.fallbacks.types, before.fallbacks.types),
            },
            broken: less(self.broken, before.broken),
            stranded: less(self.stranded, before.stranded),
            waits: less(self.waits, before.waits),
            waited_ms: time(self.waited_ms, before.waited_ms),
            compared: less(self.compared, before.compared),
            mismatched: less(self.mismatched, before.mismatched),
            timed: less(self.timed, before.timed),
            primary_ms: time(self.primary_ms, before.primary_ms),
            secondary_ms: time(self.secondary_ms, before.secondary_ms),
        }
    }

    /// Reads that the secondary failed at: errors of its own, no connection, connections that
    /// broke.
    pub const fn failures(&self) -> u64 {
        self.errors + self.fallbacks.connection + self.fallbacks.broken + self.broken
    }

    /// Reads that were sent to the secondary, or should have been.
    pub const fn tried(&self) -> u64 {
        self.served + self.errors + self.both_failed + self.fallbacks.connection + self.fallbacks.broken + self.broken
    }
}

/// A line of the mismatch log about canary reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CanaryLine {
    pub database: String,
    pub what: CanaryNews,
    /// Why it was turned off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// `reads.canary_percent`
    pub percent: f64,
    /// How long it had been on since it was last turned off, or the proxy started.
    pub seconds_on: f64,
    /// Since the line before, of this database.
    pub counts: CanaryCounts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CanaryNews {
    /// What was counted, every few minutes.
    Counts,
    /// The budget was exceeded.
    TurnedOff,
}

/// One statement's canary reads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FingerprintCanary {
    pub served: u64,
    pub errors: u64,
    pub fallbacks: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_has_a_place_of_its_own() {
        let counters = CanaryCounters::new("shop");
        for event in CanaryEvent::all() {
            counters.count(event);
        }
        for (index, event) in CanaryEvent::all().enumerate() {
            assert_eq!(event.index(), index, "{event:?}");
        }
        counters.took(Duration::from_millis(2), Duration::from_millis(3));
        let counts = counters.report();
        assert_eq!(
            (counts.served, counts.stranded, counts.fallbacks.session, counts.timed),
            (1, 1, 1, 1)
        );
        assert_eq!((counts.tried(), counts.failures()), (6, 4));
        assert_eq!((counts.primary_ms, counts.secondary_ms), (2.0, 3.0));
        assert_eq!(counts.since(&counts), CanaryCounts::default());
    }
}
