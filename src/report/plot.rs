//! Where lines and points of the latency plots are drawn: legacy against new. Pure.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::shadow::{Durations, FingerprintReport, ShadowReport};

/// In the units of the drawing, which is scaled to the page.
pub(super) const WIDTH: f64 = 520.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const STEPS_HEIGHT: f64 = 200.0;
const ROW_HEIGHT: f64 = 24.0;
/// Fingerprints drawn one by one.
const ROWS_MAX: usize = 12;
/// Steps to a doubling of the time.
const PER_DOUBLING: f64 = 2.0;

pub(super) struct Tick {
    pub(super) at: f64,
    pub(super) label: String,
}

/// How all reads of a database are spread over time: one line a side.
pub(super) struct Steps {
    pub(super) left: f64,
    pub(super) right: f64,
    pub(super) bottom: f64,
    pub(super) legacy: String,
    pub(super) new: String,
    pub(super) times: Vec<Tick>,
    pub(super) shares: Vec<Tick>,
}

/// A statement's median on both sides.
pub(super) struct Pair {
    pub(super) y: f64,
    pub(super) fingerprint: String,
    pub(super) text: String,
    pub(super) legacy: f64,
    pub(super) new: f64,
    pub(super) legacy_ms: f64,
    pub(super) new_ms: f64,
}

pub(super) struct Pairs {
    pub(super) left: f64,
    pub(super) height: f64,
    pub(super) bottom: f64,
    pub(super) rows: Vec<Pair>,
    pub(super) times: Vec<Tick>,
}

/// Times on a logarithmic scale.
struct Scale {
    /// Logarithms to base 2 of milliseconds.
    from: f64,
    to: f64,
    left: f64,
}

impl Scale {
    fn x(&self, milliseconds: f64) -> f64 {
        let share = (milliseconds.max(1e-6).log2() - self.from) / (self.to - self.from);
        round(self.left + share.clamp(0.0, 1.0) * (WIDTH - RIGHT - self.left))
    }

    /// Powers of ten, or fewer where they would stand too close.
    fn ticks(&self) -> Vec<Tick> {
        let decades = || (-3..=5).map(|power| 10_f64.powi(power));
        let within: Vec<f64> = decades()
            .flat_map(|decade| [decade, decade * 2.0, decade * 5.0])
            .filter(|time| (self.from..=self.to).contains(&time.log2()))
            .collect();
        let only_decades = within.len() > 7;
        within
            .into_iter()
            .filter(|time| !only_decades || (time.log10() - time.log10().round()).abs() < 1e-9)
            .map(|time| Tick {
                at: self.x(time),
                label: short_time(time),
            })
            .collect()
    }
}

pub(super) fn short_time(milliseconds: f64) -> String {
    match milliseconds {
        ms if ms < 0.9995 => format!("{} µs", trimmed(ms * 1000.0)),
        ms if ms < 999.5 => format!("{} ms", trimmed(ms)),
        ms => format!("{} s", trimmed(ms / 1000.0)),
    }
}

/// Three digits.
fn trimmed(value: f64) -> String {
    match value {
        value if value >= 99.95 => format!("{value:.0}"),
        value if value >= 9.995 => format!("{value:.1}").trim_end_matches('0').trim_end_matches('.').into(),
        value => format!("{value:.2}").trim_end_matches('0').trim_end_matches('.').into(),
    }
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Counts by step; a step is named by the logarithm of its upper end.
type ByStep = BTreeMap<i64, u64>;

#[expect(clippy::cast_possible_truncation, reason = "some dozens of steps")]
fn by_step<'a>(durations: impl Iterator<Item = &'a Durations>) -> ByStep {
    let mut steps = ByStep::new();
    for (upper, count) in durations.flat_map(|durations| &durations.buckets) {
        let step = (upper.max(1e-6).log2() * PER_DOUBLING - 1e-9).ceil() as i64;
        *steps.entry(step).or_default() += count;
    }
    steps
}

/// `None` where nothing was measured.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub(super) fn steps(reads: &ShadowReport) -> Option<Steps> {
    let latencies = || reads.fingerprints.iter().filter_map(|one| one.latency.as_ref());
    let legacy = by_step(latencies().map(|latency| &latency.legacy.total));
    let new = by_step(latencies().map(|latency| &latency.new.total));
    let first = *legacy.keys().chain(new.keys()).min()?;
    let last = *legacy.keys().chain(new.keys()).max()?;
    let scale = Scale {
        from: (first - 2) as f64 / PER_DOUBLING,
        to: (last + 1) as f64 / PER_DOUBLING,
        left: LEFT,
    };
    let share = |steps: &ByStep, step: i64| {
        let total: u64 = steps.values().sum();
        steps.get(&step).copied().unwrap_or(0) as f64 / total.max(1) as f64
    };
    let highest = (first..=last)
        .flat_map(|step| [share(&legacy, step), share(&new, step)])
        .fold(0.05, f64::max);
    let bottom = TOP + STEPS_HEIGHT;
    let y = |share: f64| round(bottom - share / highest * STEPS_HEIGHT * 0.96);
    let path = |steps: &ByStep| {
        let mut path = format!("M{} {}", scale.x((first as f64 - 1.0).end_ms()), y(0.0));
        for step in first..=last {
            let (begin, end) = (scale.x((step as f64 - 1.0).end_ms()), scale.x((step as f64).end_ms()));
            let height = y(share(steps, step));
            write!(path, "L{begin} {height}L{end} {height}").ok();
        }
        write!(path, "L{} {}", scale.x((last as f64).end_ms()), y(0.0)).ok();
        path
    };
    let every = [0.05, 0.1, 0.2, 0.25]
        .into_iter()
        .find(|every| highest / every <= 5.0)
        .unwrap_or(0.25);
    Some(Steps {
        left: LEFT,
        right: WIDTH - RIGHT,
        bottom,
        legacy: path(&legacy),
        new: path(&new),
        times: scale.ticks(),
        shares: (0..)
            .map(|n| f64::from(n) * every)
            .take_while(|share| *share <= highest)
            .map(|share| Tick {
                at: y(share),
                label: format!("{:.0} %", share * 100.0),
            })
            .collect(),
    })
}

trait StepEnd {
    /// The upper end of a step in milliseconds.
    fn end_ms(self) -> f64;
}

impl StepEnd for f64 {
    fn end_ms(self) -> f64 {
        (self / PER_DOUBLING).exp2()
    }
}

/// The statements read most, both medians. `None` where nothing was measured.
#[expect(clippy::cast_precision_loss, reason = "a dozen rows")]
pub(super) fn pairs(reads: &ShadowReport) -> Option<Pairs> {
    let measured = |one: &&FingerprintReport| one.latency.as_ref().is_some_and(|latency| latency.new.total.count > 0);
    let shown: Vec<_> = reads.fingerprints.iter().filter(measured).take(ROWS_MAX).collect();
    let medians = || {
        shown
            .iter()
            .filter_map(|one| one.latency.as_ref())
            .flat_map(|latency| [latency.legacy.total.p50_ms, latency.new.total.p50_ms])
    };
    let least = medians().min_by(f64::total_cmp)?.max(1e-3);
    let most = medians().max_by(f64::total_cmp)?.max(least);
    const LABELS: f64 = 132.0;
    let scale = Scale {
        from: least.log2() - 0.5,
        to: most.log2() + 0.5,
        left: LABELS,
    };
    let bottom = TOP + shown.len() as f64 * ROW_HEIGHT;
    Some(Pairs {
        left: LABELS,
        bottom,
        height: bottom + 30.0,
        rows: shown
            .iter()
            .enumerate()
            .filter_map(|(n, one)| {
                let latency = one.latency.as_ref()?;
                let (legacy_ms, new_ms) = (latency.legacy.total.p50_ms, latency.new.total.p50_ms);
                Some(Pair {
                    y: TOP + (n as f64 + 0.5) * ROW_HEIGHT,
                    fingerprint: one.fingerprint.clone(),
                    text: one.text.clone(),
                    legacy: scale.x(legacy_ms),
                    new: scale.x(new_ms),
                    legacy_ms,
                    new_ms,
                })
            })
            .collect(),
        times: scale.ticks(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shadow::{Latency, SideLatency};

    fn read(text: &str, legacy: &[(f64, u64)], new: &[(f64, u64)]) -> FingerprintReport {
        let side = |buckets: &[(f64, u64)]| SideLatency {
            total: Durations {
                count: buckets.iter().map(|(_, count)| count).sum(),
                p50_ms: buckets[0].0,
                buckets: buckets.to_vec(),
                ..Durations::default()
            },
            ..SideLatency::default()
        };
        FingerprintReport {
            text: text.into(),
            latency: Some(Latency {
                legacy: side(legacy),
                new: side(new),
                ratio: 1.0,
            }),
            ..FingerprintReport::default()
        }
    }

    #[test]
    fn slower_reads_lie_further_right() {
        let reads = ShadowReport {
            fingerprints: vec![
                read("a", &[(1.0, 90), (2.0, 10)], &[(4.0, 100)]),
                read("b", &[(0.5, 10)], &[(0.5, 10)]),
            ],
            ..ShadowReport::default()
        };
        let pairs = pairs(&reads).unwrap();
        assert!(pairs.rows[0].new > pairs.rows[0].legacy);
        assert!((pairs.rows[1].new - pairs.rows[1].legacy).abs() < 1e-9);
        let steps = steps(&reads).unwrap();
        assert!(steps.legacy.starts_with('M') && steps.legacy != steps.new);
        let labels: Vec<_> = steps.times.iter().map(|tick| tick.label.as_str()).collect();
        assert!(labels.contains(&"1 ms"), "{labels:?}");
        assert!(
            steps
                .times
                .iter()
                .all(|tick| tick.at >= steps.left && tick.at <= steps.right)
        );
    }

    #[test]
    fn nothing_measured_nothing_drawn() {
        assert!(steps(&ShadowReport::default()).is_none() && pairs(&ShadowReport::default()).is_none());
    }

    #[test]
    fn times_have_three_digits() {
        for (time, text) in [
            (0.0123, "12.3 µs"),
            (0.5, "500 µs"),
            (1.0, "1 ms"),
            (12.34, "12.3 ms"),
            (999.9, "1 s"),
            (61_000.0, "61 s"),
        ] {
            assert_eq!(short_time(time), text);
        }
    }
}
