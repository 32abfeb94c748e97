//! What the rehearsed writes came to in an interval, as the mismatch log keeps it, and intervals added
//! up again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::super::histogram::Histogram;
use super::super::interval::{Buckets, Interval, buckets_between};
use super::stats::{RehearsalReport, Rehearsed, RehearsedStatement, WriteCounts, share};

/// Of each one's text.
const TEXT_CHARACTERS_MAX: usize = 500;

/// One statement's writes in an interval.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct WriteInterval {
    /// Empty for what is beyond those that the proxy keeps one by one.
    pub fingerprint: String,
    pub text: String,
    pub counts: WriteCounts,
    /// The SQLSTATEs of the last difference; `00000` for success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_difference: Option<[String; 2]>,
    #[serde(default, skip_serializing_if = "Buckets::is_empty")]
    pub legacy: Buckets,
    #[serde(default, skip_serializing_if = "Buckets::is_empty")]
    pub new: Buckets,
}

impl WriteInterval {
    /// What came between two looks at one database's counters.
    pub(in super::super) fn between(before: &RehearsalReport, now: &RehearsalReport) -> Vec<Self> {
        // Counted anew: the earlier counters are gone.
        let before = (before.since == now.since).then_some(before);
        let known: BTreeMap<&str, &RehearsedStatement> = before
            .into_iter()
            .flat_map(|before| &before.statements)
            .map(|one| (one.fingerprint.as_str(), one))
            .collect();
        let nothing = RehearsedStatement::default();
        now.statements
            .iter()
            .map(|one| Self::of(known.get(one.fingerprint.as_str()).unwrap_or(&&nothing), one))
            .filter(|one| one.counts.executions > 0)
            .collect()
    }

    fn of(before: &RehearsedStatement, now: &RehearsedStatement) -> Self {
        Self {
            fingerprint: now.fingerprint.clone(),
            text: now.text.chars().take(TEXT_CHARACTERS_MAX).collect(),
            counts: now.counts.combined(&before.counts, u64::saturating_sub),
            last_difference: now.last_difference.clone(),
            legacy: buckets_between(&before.legacy, &now.legacy),
            new: buckets_between(&before.new, &now.new),
        }
    }
}

/// Intervals of one database's writes, added up.
#[derive(Clone, Default)]
pub struct WritePeriod {
    statements: BTreeMap<String, Summed>,
    since: Option<String>,
}

#[derive(Clone, Default)]
struct Summed {
    text: String,
    counts: WriteCounts,
    last_difference: Option<[String; 2]>,
    sides: Option<Box<[Histogram; 2]>>,
}

impl Summed {
    fn add(&mut self, counts: &WriteCounts, last_difference: Option<&[String; 2]>) {
        self.counts = self.counts.plus(counts);
        if let Some(last) = last_difference {
            self.last_difference = Some(last.clone());
        }
    }
}

impl WritePeriod {
    pub(in super::super) fn add(&mut self, interval: &Interval) {
        for one in &interval.writes {
            let summed = self.statements.entry(one.fingerprint.clone()).or_default();
            summed.text.clone_from(&one.text);
            summed.add(&one.counts, one.last_difference.as_ref());
            if !one.legacy.is_empty() || !one.new.is_empty() {
                let sides = summed.sides.get_or_insert_default();
                for (histogram, side) in sides.iter_mut().zip([&one.legacy, &one.new]) {
                    histogram.add(&side.durations());
                }
            }
        }
        if !interval.writes.is_empty() {
            self.since.get_or_insert_with(|| interval.since.clone());
        }
    }

    /// Counts the rarest statements together, where there are more than so many.
    pub(in super::super) fn keep(&mut self, most: usize) {
        let mut by_executions: Vec<(u64, String)> = self
            .statements
            .iter()
            .filter(|(fingerprint, _)| !fingerprint.is_empty())
            .map(|(fingerprint, summed)| (summed.counts.executions, fingerprint.clone()))
            .collect();
        by_executions.sort_by(|one, other| other.cmp(one));
        for (_, rare) in by_executions.iter().skip(most) {
            if let Some(rare) = self.statements.remove(rare) {
                let others = self.statements.entry(String::new()).or_default();
                others.add(&rare.counts, rare.last_difference.as_ref());
            }
        }
    }

    pub fn totals(&self) -> WriteCounts {
        let counts = self.statements.values().map(|summed| &summed.counts);
        counts.fold(WriteCounts::default(), |sum, one| sum.plus(one))
    }

    /// `None` where there were none. `slower`: how many times as slow as legacy a statement must be
    /// on new to be named.
    pub(in super::super) fn report(&self, slower: f64) -> Option<RehearsalReport> {
        if self.statements.is_empty() {
            return None;
        }
        let statements = self.statements.iter().map(|(fingerprint, summed)| {
            let side = |at: usize| {
                summed
                    .sides
                    .as_ref()
                    .map(|sides| sides[at].report())
                    .unwrap_or_default()
            };
            RehearsedStatement {
                fingerprint: fingerprint.clone(),
                text: summed.text.clone(),
                counts: summed.counts.clone(),
                unsettled_rate: share(summed.counts.unsettled, summed.counts.compared),
                last_difference: summed.last_difference.clone(),
                legacy: side(0),
                new: side(1),
            }
        });
        let totals = Rehearsed {
            since: self.since.clone().unwrap_or_default(),
            counts: self.totals(),
            waiting: 0,
        };
        Some(RehearsalReport::of(totals, statements.collect(), slower))
    }

    /// What a running proxy counts, on top of this.
    pub fn continued_by(&self, live: &RehearsalReport, slower: f64) -> RehearsalReport {
        let mut whole = self.clone();
        for interval in Interval::of_writes("", &RehearsalReport::default(), live) {
            whole.add(&interval);
        }
        let Some(mut report) = whole.report(slower) else {
            return live.clone();
        };
        for one in &mut report.statements {
            if let Some(live) = live.statements.iter().find(|live| live.fingerprint == one.fingerprint) {
                one.text.clone_from(&live.text);
            }
        }
        report.running_since.clone_from(&live.running_since);
        report.totals.waiting = live.totals.waiting;
        report
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::stats::{Counters, Outcome, Skipped};
    use super::*;
    use crate::control::Side;
    use crate::sql::LeftOut;

    #[test]
    fn intervals_of_writes_add_up_to_what_was_counted() {
        let counters = Counters::new("shop");
        let (one, other) = (
            crate::sql::fingerprint(b"update t set a = 1"),
            crate::sql::fingerprint(b"delete from t"),
        );
        let mut period = WritePeriod::default();
        let mut before = RehearsalReport::default();
        for turn in 1..5 {
            for n in 0..10 {
                counters.count(&one, Outcome::Matched);
                let ms = Duration::from_millis;
                counters.record(&one, Side::New, [ms(1 + n), ms(turn * (1 + n))]);
            }
            counters.count(&one, Outcome::Unsettled);
            counters.note_difference(&one, ["00000", "23505"]);
            counters.count(&other, Outcome::LeftOut(LeftOut::Copy));
            counters.count(&other, Outcome::Skipped(Skipped::NotSampled));
            let now = counters.report(0, 2.0);
            for interval in Interval::of_writes("shop", &before, &now) {
                let line = serde_json::to_string(&interval).unwrap();
                period.add(&serde_json::from_str(&line).unwrap());
            }
            assert!(Interval::of_writes("shop", &now, &now).is_empty());
            before = now;
        }
        let (told, counted) = (period.report(2.0).unwrap(), counters.report(0, 2.0));
        assert_eq!(told.totals, counted.totals);
        assert!((told.coverage - counted.coverage).abs() < 1e-9);
        assert_eq!(told.statements.len(), 2);
        assert_eq!(
            told.statements[0].last_difference,
            Some(["00000".into(), "23505".into()])
        );
        assert_eq!(told.statements[0].legacy.buckets, counted.statements[0].legacy.buckets);
        // A second run goes on from there.
        let whole = period.continued_by(&counted, 2.0);
        assert_eq!(whole.totals.counts, told.totals.counts.plus(&counted.totals.counts));
        period.keep(1);
        assert_eq!(period.totals(), told.totals.counts);
        assert_eq!(period.report(2.0).unwrap().statements.len(), 2);
    }
}
