//! What the shadow reads and rehearsed writes came to in an interval, as the mismatch log keeps it,
//! and intervals added up again: so a report, and a proxy that starts, can look back beyond a
//! restart.
//!
//! A line tells what was counted since the line before; none is cumulative, so lines of several
//! runs of the proxy simply add up. What was counted after the last line of a proxy that was
//! killed is lost; its mismatches are not, which have lines of their own.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::canary::FingerprintCanary;
use super::histogram::{Durations, Histogram, bucket_ending, upper_ms};
use super::rehearsal::{RehearsalReport, WriteInterval, WritePeriod};
use super::stats::{
    Coverage, FingerprintReport, IgnoreReport, Latency, Noise, ReadCounts, ShadowReport, ShadowStats, SideLatency,
    slower_on_new,
};

/// One line has this many fingerprints at most; an interval with more has several lines.
const FINGERPRINTS_MAX: usize = 100;
/// Of each one's text.
const TEXT_CHARACTERS_MAX: usize = 500;

/// The keys of a line of statistics.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub database: String,
    /// When counting began, RFC 3339; the line's own time is the end.
    pub since: String,
    /// Those that were read.
    #[serde(default)]
    pub fingerprints: Vec<FingerprintInterval>,
    /// Reads of fingerprints beyond those that the proxy keeps one by one.
    #[serde(default)]
    pub others: ReadCounts,
    /// As they were in force.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignores: Vec<IgnoreReport>,
    /// Those that were rehearsed, or left out of it. They have lines of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub writes: Vec<WriteInterval>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FingerprintInterval {
    pub fingerprint: String,
    pub text: String,
    pub counts: ReadCounts,
    /// How often the primary was asked twice in one snapshot, and disagreed with itself.
    #[serde(default)]
    pub asked_twice: u64,
    #[serde(default)]
    pub disagreed: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<LatencyInterval>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencyInterval {
    pub legacy: SideInterval,
    pub new: SideInterval,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SideInterval {
    pub first_row: Buckets,
    pub total: Buckets,
}

/// Durations by size: `[n, count]` counts those up to 2^(n/8) µs and above the bucket before.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Buckets {
    pub sum_ms: f64,
    /// The greatest since the proxy's start.
    pub max_ms: f64,
    pub buckets: Vec<(u32, u64)>,
}

impl Interval {
    /// What came between two looks at one database's counters, as lines; none where nothing did.
    pub fn between(database: &str, before: &ShadowReport, now: &ShadowReport) -> Vec<Self> {
        // Counted anew: the earlier counters are gone.
        let none = ShadowReport::default();
        let before = if before.since == now.since { before } else { &none };
        let known: BTreeMap<&str, &FingerprintReport> = before
            .fingerprints
            .iter()
            .map(|one| (one.fingerprint.as_str(), one))
            .collect();
        let nothing = FingerprintReport::default();
        let fingerprints: Vec<_> = now
            .fingerprints
            .iter()
            .map(|one| FingerprintInterval::between(known.get(one.fingerprint.as_str()).unwrap_or(&&nothing), one))
            .filter(|one| one.counts.executions > 0)
            .collect();
        let others = counts_between(&before.others, &now.others);
        let line = |fingerprints: &[FingerprintInterval], others| Self {
            database: database.to_owned(),
            since: now.since.clone(),
            fingerprints: fingerprints.to_vec(),
            others,
            ignores: now.ignores.clone(),
            writes: Vec::new(),
        };
        let mut lines: Vec<Self> = fingerprints
            .chunks(FINGERPRINTS_MAX)
            .map(|some| line(some, ReadCounts::default()))
            .collect();
        if others.executions > 0 {
            match lines.last_mut() {
                Some(last) => last.others = others,
                None => lines.push(line(&[], others)),
            }
        }
        lines
    }

    /// The same of the rehearsed writes.
    pub fn of_writes(database: &str, before: &RehearsalReport, now: &RehearsalReport) -> Vec<Self> {
        WriteInterval::between(before, now)
            .chunks(FINGERPRINTS_MAX)
            .map(|some| Self {
                database: database.to_owned(),
                since: now.since.clone(),
                writes: some.to_vec(),
                ..Self::default()
            })
            .collect()
    }
}

impl FingerprintInterval {
    fn between(before: &FingerprintReport, now: &FingerprintReport) -> Self {
        let none = Latency::default();
        Self {
            fingerprint: now.fingerprint.clone(),
            text: now.text.chars().take(TEXT_CHARACTERS_MAX).collect(),
            counts: counts_between(&before.counts, &now.counts),
            asked_twice: now.noise.asked_twice - before.noise.asked_twice.min(now.noise.asked_twice),
            disagreed: now.noise.disagreed - before.noise.disagreed.min(now.noise.disagreed),
            latency: now.latency.as_ref().map(|latency| {
                let before = before.latency.as_ref().unwrap_or(&none);
                LatencyInterval {
                    legacy: side_between(&before.legacy, &latency.legacy),
                    new: side_between(&before.new, &latency.new),
                }
            }),
        }
    }
}

/// What both sides took for a statement's reads since an earlier look.
pub(super) fn latency_between(before: Option<&FingerprintReport>, now: &FingerprintReport) -> Option<Latency> {
    let nothing = FingerprintReport::default();
    let interval = FingerprintInterval::between(before.unwrap_or(&nothing), now).latency?;
    let side = |side: &SideInterval| SideLatency {
        first_row: side.first_row.reported(),
        total: side.total.reported(),
    };
    Some(Latency::new(side(&interval.legacy), side(&interval.new)))
}

fn side_between(before: &SideLatency, now: &SideLatency) -> SideInterval {
    SideInterval {
        first_row: buckets_between(&before.first_row, &now.first_row),
        total: buckets_between(&before.total, &now.total),
    }
}

pub(super) fn buckets_between(before: &Durations, now: &Durations) -> Buckets {
    let place = |upper: f64| u32::try_from(bucket_ending(upper)).unwrap_or(u32::MAX);
    let known: BTreeMap<u32, u64> = before
        .buckets
        .iter()
        .map(|&(upper, count)| (place(upper), count))
        .collect();
    Buckets {
        sum_ms: rounded((now.sum_ms - before.sum_ms).max(0.0)),
        max_ms: rounded(now.max_ms),
        buckets: now
            .buckets
            .iter()
            .map(|&(upper, count)| (place(upper), count))
            .map(|(place, count)| (place, count.saturating_sub(known.get(&place).copied().unwrap_or(0))))
            .filter(|&(_, count)| count > 0)
            .collect(),
    }
}

/// To a microsecond: more digits say nothing.
fn rounded(milliseconds: f64) -> f64 {
    (milliseconds * 1000.0).round() / 1000.0
}

fn counts_between(before: &ReadCounts, now: &ReadCounts) -> ReadCounts {
    combine(now, before, u64::saturating_sub)
}

pub(super) fn combine(one: &ReadCounts, other: &ReadCounts, how: impl Fn(u64, u64) -> u64) -> ReadCounts {
    let maps = |one: &BTreeMap<String, u64>, other: &BTreeMap<String, u64>| -> BTreeMap<String, u64> {
        one.keys()
            .chain(other.keys())
            .map(|key| {
                let of = |map: &BTreeMap<String, u64>| map.get(key).copied().unwrap_or(0);
                (key.clone(), how(of(one), of(other)))
            })
            .filter(|(_, count)| *count > 0)
            .collect()
    };
    ReadCounts {
        executions: how(one.executions, other.executions),
        compared: how(one.compared, other.compared),
        matched: how(one.matched, other.matched),
        order_ties: how(one.order_ties, other.order_ties),
        tolerated: how(one.tolerated, other.tolerated),
        partly: maps(&one.partly, &other.partly),
        mismatched: how(one.mismatched, other.mismatched),
        transient: how(one.transient, other.transient),
        not_comparable: maps(&one.not_comparable, &other.not_comparable),
        skipped: maps(&one.skipped, &other.skipped),
        dropped: maps(&one.dropped, &other.dropped),
        failed: maps(&one.failed, &other.failed),
    }
}

/// Intervals of one database, added up.
#[derive(Clone, Default)]
pub struct Period {
    fingerprints: BTreeMap<String, Summed>,
    others: ReadCounts,
    ignores: Vec<IgnoreReport>,
    since: Option<String>,
    writes: WritePeriod,
}

#[derive(Clone, Default)]
struct Summed {
    text: String,
    counts: ReadCounts,
    asked_twice: u64,
    disagreed: u64,
    latency: Option<Box<[[Histogram; 2]; 2]>>,
}

impl Period {
    pub fn add(&mut self, interval: &Interval) {
        for one in &interval.fingerprints {
            let summed = self.fingerprints.entry(one.fingerprint.clone()).or_default();
            summed.text.clone_from(&one.text);
            summed.counts = combine(&summed.counts, &one.counts, u64::saturating_add);
            summed.asked_twice += one.asked_twice;
            summed.disagreed += one.disagreed;
            if let Some(latency) = &one.latency {
                let sides = summed.latency.get_or_insert_default();
                for (histograms, side) in sides.iter_mut().zip([&latency.legacy, &latency.new]) {
                    histograms[0].add(&side.first_row.durations());
                    histograms[1].add(&side.total.durations());
                }
            }
        }
        self.others = combine(&self.others, &interval.others, u64::saturating_add);
        if interval.writes.is_empty() {
            self.ignored(&interval.ignores);
        }
        self.since.get_or_insert_with(|| interval.since.clone());
        self.writes.add(interval);
    }

    /// What is ignored from now on; what was before stays told.
    pub fn ignored(&mut self, now: &[IgnoreReport]) {
        let same = |one: &IgnoreReport, other: &IgnoreReport| {
            let bare = |of: &IgnoreReport| IgnoreReport {
                expired: false,
                withdrawn: false,
                ..of.clone()
            };
            bare(one) == bare(other)
        };
        let gone = self
            .ignores
            .drain(..)
            .filter(|old| !now.iter().any(|new| same(old, new)));
        let gone = gone.map(|old| IgnoreReport { withdrawn: true, ..old });
        self.ignores = now.iter().cloned().chain(gone.collect::<Vec<_>>()).collect();
    }

    /// Counts the rarest fingerprints together, where there are more than so many.
    pub fn keep(&mut self, most: usize) {
        let mut by_executions: Vec<(u64, String)> = self
            .fingerprints
            .iter()
            .map(|(fingerprint, summed)| (summed.counts.executions, fingerprint.clone()))
            .collect();
        by_executions.sort_by(|one, other| other.cmp(one));
        for (_, rare) in by_executions.iter().skip(most) {
            if let Some(summed) = self.fingerprints.remove(rare) {
                self.others = combine(&self.others, &summed.counts, u64::saturating_add);
            }
        }
        self.writes.keep(most);
    }

    /// What became of all reads.
    pub fn totals(&self) -> ReadCounts {
        self.fingerprints.values().fold(self.others.clone(), |sum, one| {
            combine(&sum, &one.counts, u64::saturating_add)
        })
    }

    /// The rehearsed writes; `None` where there were none.
    pub fn writes(&self, slower: f64) -> Option<RehearsalReport> {
        self.writes.report(slower)
    }

    /// Of the writes.
    pub const fn write_period(&self) -> &WritePeriod {
        &self.writes
    }

    /// What a running proxy counts, on top of this.
    pub fn continued_by(&self, live: &ShadowReport, slower: f64) -> ShadowReport {
        let mut whole = self.clone();
        for interval in Interval::between("", &ShadowReport::default(), live) {
            whole.add(&interval);
        }
        let mut report = whole.report(slower);
        let mut running: BTreeMap<&str, &FingerprintReport> = live
            .fingerprints
            .iter()
            .map(|one| (one.fingerprint.as_str(), one))
            .collect();
        for one in &mut report.fingerprints {
            if let Some(live) = running.remove(one.fingerprint.as_str()) {
                one.text.clone_from(&live.text);
                one.canary = live.canary.clone();
            }
        }
        report.fingerprints.extend(running.into_values().cloned());
        report.running_since.clone_from(&live.running_since);
        report.totals.log_lost = live.totals.log_lost;
        report.totals.waiting = live.totals.waiting;
        report.ignores.clone_from(&live.ignores);
        report
    }

    /// As the running proxy would tell it. `slower`: how many times as slow as legacy a statement
    /// must be on new to be named.
    pub fn report(&self, slower: f64) -> ShadowReport {
        let mut fingerprints: Vec<FingerprintReport> = self
            .fingerprints
            .iter()
            .map(|(fingerprint, summed)| FingerprintReport {
                fingerprint: fingerprint.clone(),
                text: summed.text.clone(),
                counts: summed.counts.clone(),
                noise: Noise::new(summed.asked_twice, summed.disagreed),
                canary: FingerprintCanary::default(),
                latency: summed.latency.as_ref().map(|sides| {
                    let side = |at: usize| SideLatency {
                        first_row: sides[at][0].report(),
                        total: sides[at][1].report(),
                    };
                    Latency::new(side(0), side(1))
                }),
            })
            .collect();
        fingerprints.sort_by_key(|one| std::cmp::Reverse(one.counts.executions));
        let counts = self.totals();
        ShadowReport {
            since: self.since.clone().unwrap_or_default(),
            running_since: None,
            coverage: Coverage::of(&counts, &fingerprints, &self.others),
            slower: slower_on_new(&fingerprints, slower),
            totals: ShadowStats {
                counts,
                ..ShadowStats::default()
            },
            fingerprints,
            others: self.others.clone(),
            ignores: self.ignores.clone(),
        }
    }
}

impl Buckets {
    pub(super) const fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }

    /// With their quantiles.
    fn reported(&self) -> Durations {
        let mut histogram = Histogram::default();
        histogram.add(&self.durations());
        histogram.report()
    }

    pub(super) fn durations(&self) -> Durations {
        Durations {
            sum_ms: self.sum_ms,
            max_ms: self.max_ms,
            buckets: self
                .buckets
                .iter()
                .map(|&(place, count)| (upper_ms(place), count))
                .collect(),
            ..Durations::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::control::Side;
    use crate::shadow::stats::{Counters, Failed, Outcome, Timing};

    fn read(counters: &Counters, text: &str, outcome: Outcome, milliseconds: u64) {
        let entry = counters.of(&crate::sql::fingerprint(text.as_bytes()));
        counters.count(&entry, outcome);
        for (side, factor) in [(Side::Legacy, 1), (Side::New, 2)] {
            let total = Duration::from_millis(milliseconds * factor);
            entry.record(
                side,
                Timing {
                    first_row: Some(total / 2),
                    total,
                },
            );
        }
    }

    #[test]
    fn intervals_add_up_to_what_was_counted() {
        let counters = Counters::new("shop");
        let mut period = Period::default();
        let mut before = ShadowReport::default();
        for turn in 0..5 {
            for n in 0..20 {
                read(&counters, "select a", Outcome::Matched, 1 + n * turn);
            }
            read(&counters, "select b", Outcome::Mismatched, 5);
            read(&counters, "select c", Outcome::Failed(Failed::Timeout), 5);
            let now = counters.report(2.0);
            for interval in Interval::between("shop", &before, &now) {
                let line = serde_json::to_string(&interval).unwrap();
                period.add(&serde_json::from_str(&line).unwrap());
            }
            assert!(Interval::between("shop", &now, &now).is_empty());
            before = now;
        }
        let (told, counted) = (period.report(2.0), counters.report(2.0));
        assert_eq!(told.totals.counts, counted.totals.counts);
        assert_eq!(told.coverage, counted.coverage);
        assert_eq!(told.fingerprints.len(), 3);
        let latency = |report: &ShadowReport| report.fingerprints[0].latency.clone().unwrap().new.total;
        assert_eq!(latency(&told).buckets, latency(&counted).buckets);
        assert!((latency(&told).p50_ms - latency(&counted).p50_ms).abs() < 1e-6);
    }

    #[test]
    fn counters_of_another_run_begin_anew() {
        let first = Counters::new("shop");
        read(&first, "select a", Outcome::Matched, 1);
        let first = first.report(2.0);
        let second = Counters::new("shop");
        read(&second, "select a", Outcome::Matched, 1);
        let mut second = second.report(2.0);
        second.since = "another time".into();
        let lines = Interval::between("shop", &first, &second);
        assert_eq!(lines[0].fingerprints[0].counts.matched, 1);
    }

    #[test]
    fn many_fingerprints_take_several_lines() {
        let counters = Counters::new("shop");
        for n in 0..250 {
            read(&counters, &format!("select a{n}"), Outcome::Matched, 1);
        }
        let lines = Interval::between("shop", &ShadowReport::default(), &counters.report(2.0));
        let counts: Vec<_> = lines.iter().map(|line| line.fingerprints.len()).collect();
        assert_eq!(counts, [100, 100, 50]);
    }
}
