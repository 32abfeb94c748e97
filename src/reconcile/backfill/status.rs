//! What a backfill says of itself, and how fast it is.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::copy::Copied;

/// `read = written + skipped + failed`, in rows, for each table and in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Rows read on the primary.
    pub read: u64,
    /// Rows that the secondary did not have before.
    pub written: u64,
    /// Rows that mirroring had brought already, because somebody wrote them meanwhile; they were
    /// replaced by what they were.
    pub skipped: u64,
    /// Rows that the secondary refused (table `pgtandem.backfill_refused` there).
    pub failed: u64,
    /// Of the rows read, as COPY writes them.
    pub bytes: u64,
}

impl Counts {
    pub(super) const fn add(&mut self, copied: Copied) {
        self.read += copied.read;
        self.skipped += copied.skipped;
        self.failed += copied.failed;
        self.written += copied.read.saturating_sub(copied.skipped + copied.failed);
        self.bytes += copied.bytes;
    }

    pub(super) const fn merge(&mut self, other: Self) {
        self.read += other.read;
        self.written += other.written;
        self.skipped += other.skipped;
        self.failed += other.failed;
        self.bytes += other.bytes;
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackfillTable {
    pub name: String,
    /// `waiting`, `copying`, `copied`, `done`, `refused` (all there but rows that the secondary
    /// refused), `failed`.
    pub state: String,
    /// Why it is not done, where it is not.
    pub note: Option<String>,
    /// The planner's estimate.
    pub rows_expected: u64,
    #[serde(flatten)]
    pub counts: Counts,
    pub rows_per_second: f64,
    /// By the rate of the last seconds; absent where that says nothing.
    pub remaining_seconds: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackfillStatus {
    /// `running`, `done`, `stopped` (the note says why), `cancelled`, `interrupted` (recorded as
    /// running, but nobody runs it: start it again and it goes on).
    pub state: String,
    pub note: Option<String>,
    pub workers: usize,
    pub max_rate: Option<String>,
    /// What it waits for, while something hurts.
    pub slowed_by: Option<String>,
    pub rows_expected: u64,
    #[serde(flatten)]
    pub counts: Counts,
    pub rows_per_second: f64,
    pub bytes_per_second: f64,
    pub remaining_seconds: Option<f64>,
    pub tables: Vec<BackfillTable>,
}

impl BackfillStatus {
    pub fn is_running(&self) -> bool {
        self.state == "running"
    }
}

/// Rates are those of so many seconds.
const WINDOW: Duration = Duration::from_secs(15);

/// Measures a growing quantity over the last seconds.
#[derive(Debug, Default)]
pub(super) struct Meter {
    samples: VecDeque<(Instant, f64)>,
}

impl Meter {
    pub(super) fn note(&mut self, now: Instant, total: f64) {
        self.samples.push_back((now, total));
        // One sample before the window is kept, so that it is spanned.
        while self.samples.len() > 2 && self.samples.get(1).is_some_and(|(at, _)| now - *at > WINDOW) {
            self.samples.pop_front();
        }
    }

    /// A second.
    pub(super) fn rate(&self, now: Instant) -> f64 {
        match (self.samples.front(), self.samples.back()) {
            (Some((first, from)), Some((_, to))) if now > *first => (to - from) / (now - *first).as_secs_f64(),
            _ => 0.0,
        }
    }
}

/// Seconds until `left` more have come; none while nothing comes.
pub(super) fn remaining(left: f64, rate: f64) -> Option<f64> {
    (rate > 0.0).then(|| left.max(0.0) / rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let began = Instant::now();
        let mut meter = Meter::default();
        assert!(meter.rate(began).abs() < f64::EPSILON);
        for second in 0..=100_u32 {
            // Fast at first, then 10 a second.
            let total = if second < 50 {
                f64::from(second) * 1000.0
            } else {
                50_000.0 + f64::from(second - 50) * 10.0
            };
            meter.note(began + Duration::from_secs(second.into()), total);
        }
        let rate = meter.rate(began + Duration::from_secs(100));
        assert!((rate - 10.0).abs() < 0.01, "{rate}");
        let later = meter.rate(began + Duration::from_secs(200));
        assert!(later < 2.0, "it fades while nothing comes: {later}");
        assert_eq!(remaining(100.0, 10.0), Some(10.0));
        assert_eq!(remaining(100.0, 0.0), None);
    }
}
