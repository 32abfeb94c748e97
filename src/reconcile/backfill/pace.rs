//! How much is copied in one round, and how long to pause between two. Pure.

use std::time::Duration;

use crate::config::{Backfill, MaxRate};

/// The first range of a table, before its rows have been timed: so many, or so much.
const FIRST_ROWS: u64 = 5_000;
const FIRST_BYTES: u64 = 4 << 20;
const ROWS_MIN: u64 = 1;
const ROWS_MAX: u64 = 1_000_000;
/// A range of less than this takes as long as what surrounds it, whatever its size: smaller ones
/// would not be done sooner, only never.
const BYTES_MIN: u64 = 64 << 10;
/// A range takes this share of the time that mirroring may stand still; the rest is for what
/// surrounds it, and for ranges that turn out slower.
const SHARE: f64 = 0.8;

const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// The size of a table's next range, from how long its last ones took.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChunkSize {
    rows: u64,
}

impl ChunkSize {
    /// Of a table of so many rows and bytes.
    pub(super) fn first(rows: u64, bytes: u64) -> Self {
        let fitting = (FIRST_BYTES as f64 * rows as f64 / bytes.max(1) as f64) as u64;
        Self {
            rows: fitting.clamp(ROWS_MIN, FIRST_ROWS),
        }
    }

    /// Whether a first range is the whole table.
    pub(super) const fn holds(rows: u64, bytes: u64) -> bool {
        rows <= FIRST_ROWS && bytes <= FIRST_BYTES
    }

    /// With a rate given, never so much at once that a second is used up.
    pub(super) fn rows(self, settings: &Backfill) -> u64 {
        match settings.max_rate {
            Some(MaxRate::Rows(rate)) => self.rows.min((rate / 4).max(1)),
            Some(MaxRate::Bytes(_)) | None => self.rows,
        }
    }

    /// At most doubles; shrinks at once.
    pub(super) fn learn(&mut self, rows: u64, bytes: u64, took: Duration, hold_max: Duration) {
        if rows == 0 {
            return;
        }
        let wanted = rows as f64 * (hold_max.as_secs_f64() * SHARE) / took.as_secs_f64().max(0.001);
        let least = (BYTES_MIN.saturating_mul(rows) / bytes.max(1)).clamp(ROWS_MIN, ROWS_MAX);
        self.rows = (wanted as u64).min(self.rows.saturating_mul(2)).clamp(least, ROWS_MAX);
    }
}

/// What a round of copying has to wait for, as measured.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Measured {
    /// How far the secondary is behind.
    pub lag: Duration,
    /// How long the primary took to answer a small query.
    pub primary_latency: Duration,
}

/// Whether something hurts.
pub(super) fn hurts(measured: Measured, settings: &Backfill) -> Option<String> {
    if measured.lag > settings.max_lag {
        return Some(format!(
            "the secondary is {:.1} s behind (backfill.max_lag)",
            measured.lag.as_secs_f64()
        ));
    }
    if measured.primary_latency > settings.max_primary_latency {
        return Some(format!(
            "the primary answers after {} ms (backfill.max_primary_latency)",
            measured.primary_latency.as_millis()
        ));
    }
    None
}

/// Pauses that grow while something hurts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    next: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { next: PAUSE_MIN }
    }
}

impl Patience {
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(PAUSE_MAX);
        pause
    }

    /// Towards none, step by step: what hurt once may hurt again.
    pub(super) fn relieve(&mut self) {
        self.next = (self.next / 2).max(PAUSE_MIN);
    }
}

/// How long what was copied should have taken at the given rate.
pub(super) fn due(rows: u64, bytes: u64, settings: &Backfill) -> Duration {
    match settings.max_rate {
        Some(MaxRate::Rows(rate)) => Duration::from_secs_f64(rows as f64 / rate.max(1) as f64),
        Some(MaxRate::Bytes(rate)) => Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64),
        None => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_grow_into_the_time_there_is() {
        let hold = Duration::from_millis(250);
        let mut size = ChunkSize { rows: 5_000 };
        size.learn(5_000, 500_000, Duration::from_millis(10), hold);
        assert_eq!(size.rows, 10_000, "at most twice as much");
        size.learn(10_000, 1_000_000, Duration::from_millis(1_000), hold);
        assert_eq!(size.rows, 2_000);
        size.learn(2_000, 200_000, Duration::from_secs(60), hold);
        assert_eq!(size.rows, 655, "64 KiB of them");
        size.learn(655, 655 << 20, Duration::from_secs(60), hold);
        assert_eq!(size.rows, 2, "a MiB each");
        size.learn(2, 2 << 20, Duration::from_secs(60), hold);
        assert_eq!(size.rows, ROWS_MIN);
    }

    #[test]
    fn large_rows_begin_with_few() {
        assert_eq!(ChunkSize::first(1_000_000, 100_000_000).rows, FIRST_ROWS);
        assert_eq!(ChunkSize::first(1_000, 1_000 << 20).rows, 4, "a MiB each");
        assert_eq!(ChunkSize::first(0, 0).rows, ROWS_MIN);
        assert!(ChunkSize::holds(10, 8192) && !ChunkSize::holds(10, 1 << 30));
    }

    #[test]
    fn a_rate_bounds_a_range() {
        let mut settings = Backfill {
            max_rate: Some(MaxRate::Rows(400)),
            ..Backfill::default()
        };
        assert_eq!(ChunkSize { rows: 5_000 }.rows(&settings), 100);
        assert_eq!(due(800, 0, &settings), Duration::from_secs(2));
        settings.max_rate = Some(MaxRate::Bytes(1000));
        assert_eq!(due(800, 500, &settings), Duration::from_millis(500));
    }

    #[test]
    fn what_hurts() {
        let settings = Backfill::default();
        let fine = Measured::default();
        assert_eq!(hurts(fine, &settings), None);
        let slow = Measured {
            primary_latency: Duration::from_secs(1),
            ..fine
        };
        assert!(hurts(slow, &settings).unwrap().contains("max_primary_latency"));
        let behind = Measured {
            lag: Duration::from_secs(10),
            ..fine
        };
        assert!(hurts(behind, &settings).unwrap().contains("max_lag"));
    }

    #[test]
    fn pauses_grow_and_shrink() {
        let mut patience = Patience::default();
        assert_eq!(patience.pause(), PAUSE_MIN);
        assert_eq!(patience.pause(), PAUSE_MIN * 2);
        patience.relieve();
        assert_eq!(patience.pause(), PAUSE_MIN * 2);
        for _ in 0..20 {
            patience.pause();
        }
        assert_eq!(patience.pause(), PAUSE_MAX);
    }
}
