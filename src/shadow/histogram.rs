//! Durations in buckets of equal ratio: a fixed size however many there are.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Buckets to a doubling: a quantile is off by at most 9 %.
const PER_DOUBLING: u32 = 8;
/// The first bucket ends at a microsecond, the last at two minutes and a quarter.
const DOUBLINGS: u32 = 27;
const BUCKETS: usize = (PER_DOUBLING * DOUBLINGS) as usize + 1;

/// How often durations of each size came.
#[derive(Debug, Clone)]
pub(super) struct Histogram {
    buckets: [u32; BUCKETS],
    sum: Duration,
    max: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [0; BUCKETS],
            sum: Duration::ZERO,
            max: Duration::ZERO,
        }
    }
}

impl Histogram {
    pub(super) fn record(&mut self, duration: Duration) {
        let bucket = &mut self.buckets[bucket(duration)];
        *bucket = bucket.saturating_add(1);
        self.sum += duration;
        self.max = self.max.max(duration);
    }

    /// What another one counted, as [`Durations`] tells it.
    pub(super) fn add(&mut self, other: &Durations) {
        for &(upper, count) in &other.buckets {
            let bucket = &mut self.buckets[bucket_ending(upper)];
            *bucket = bucket.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        }
        self.sum += duration(other.sum_ms);
        self.max = self.max.max(duration(other.max_ms));
    }

    pub(super) fn report(&self) -> Durations {
        let count = self.buckets.iter().copied().map(u64::from).sum();
        Durations {
            count,
            sum_ms: milliseconds(self.sum),
            p50_ms: self.quantile(count, 50),
            p90_ms: self.quantile(count, 90),
            p99_ms: self.quantile(count, 99),
            max_ms: milliseconds(self.max),
            buckets: (0_u32..)
                .zip(self.buckets)
                .filter(|&(_, count)| count > 0)
                .map(|(at, count)| (upper_ms(at), u64::from(count)))
                .collect(),
        }
    }

    /// The upper end of the bucket that holds it, but never beyond the greatest there was.
    fn quantile(&self, count: u64, percent: u64) -> f64 {
        let wanted = (count * percent).div_ceil(100);
        let mut seen = 0;
        for (at, &here) in (0_u32..).zip(&self.buckets) {
            seen += u64::from(here);
            if seen >= wanted {
                return upper_ms(at).min(milliseconds(self.max));
            }
        }
        milliseconds(self.max)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "at least 0, and bounded by the number of buckets"
)]
fn bucket(duration: Duration) -> usize {
    let microseconds = duration.as_secs_f64() * 1e6;
    let place = (microseconds.max(1.0).log2() * f64::from(PER_DOUBLING)).ceil();
    (place as usize).min(BUCKETS - 1)
}

/// The bucket with that upper end.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "at least 0, and bounded by the number of buckets"
)]
pub(super) fn bucket_ending(upper_ms: f64) -> usize {
    let place = ((upper_ms * 1000.0).max(1.0).log2() * f64::from(PER_DOUBLING)).round();
    (place as usize).min(BUCKETS - 1)
}

fn duration(milliseconds: f64) -> Duration {
    Duration::try_from_secs_f64(milliseconds / 1000.0).unwrap_or_default()
}

pub(super) fn upper_ms(bucket: u32) -> f64 {
    (f64::from(bucket) / f64::from(PER_DOUBLING)).exp2() / 1000.0
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Durations, as the admin API gives them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Durations {
    pub count: u64,
    pub sum_ms: f64,
    /// Quantiles are the upper ends of buckets, 9 % apart.
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
    /// Upper end in milliseconds, and how many; empty buckets are left out. The last one, at
    /// 134,218 ms, has no end.
    pub buckets: Vec<(f64, u64)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_within_a_bucket() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.report(), Durations::default());
        for number in 1..=1000 {
            histogram.record(Duration::from_micros(number * 100));
        }
        let report = histogram.report();
        assert_eq!(report.count, 1000);
        for (found, exact) in [(report.p50_ms, 50.0), (report.p90_ms, 90.0), (report.p99_ms, 99.0)] {
            assert!((exact..=exact * 1.1).contains(&found), "{found} for {exact}");
        }
        assert!((report.max_ms - 100.0).abs() < 1e-9);
        assert!((report.sum_ms - 50_050.0).abs() < 1e-6);
        assert_eq!(report.buckets.iter().map(|(_, count)| count).sum::<u64>(), 1000);
    }

    #[test]
    fn what_is_told_can_be_added_up() {
        let mut one = Histogram::default();
        let mut all = Histogram::default();
        let mut added = Histogram::default();
        for number in 1..=1000 {
            let duration = Duration::from_micros(number * number);
            one.record(duration);
            all.record(duration);
            if number % 250 == 0 {
                added.add(&std::mem::take(&mut one).report());
            }
        }
        let (all, added) = (all.report(), added.report());
        assert_eq!(all.buckets, added.buckets);
        assert!((all.sum_ms - added.sum_ms).abs() < 1e-3 && (all.max_ms - added.max_ms).abs() < 1e-6);
    }

    #[test]
    fn the_ends() {
        let mut histogram = Histogram::default();
        histogram.record(Duration::ZERO);
        histogram.record(Duration::from_secs(100_000));
        let report = histogram.report();
        assert_eq!(report.buckets.len(), 2);
        assert!((report.buckets[0].0 - 0.001).abs() < 1e-9);
        assert!((report.max_ms - 1e8).abs() < 1e-3);
    }
}
