//! What earlier runs of the proxy counted, as the mismatch log tells it: a proxy that starts goes on
//! from there.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::interval::{Interval, Period};
use super::log::events;
use super::rehearsal::{RehearsalReport, Rehearsed, WriteCounts};
use super::stats::{ReadCounts, ShadowReport, ShadowStats};
use crate::chain;

/// Kept one by one, as of the proxy's own.
const FINGERPRINTS_MAX: usize = 2000;
/// A line tells its event behind its version, number and time.
const EVENT_WITHIN: usize = 200;

/// One database's counts before this run.
#[derive(Clone, Default)]
pub struct Counted {
    period: Period,
    /// When counting began, of the reads and of the writes.
    since: [Option<String>; 2],
    reads: ReadCounts,
    writes: WriteCounts,
}

impl Counted {
    /// When counting began, and what became of the reads since.
    pub fn reads(&self, live: &ShadowStats) -> (String, ReadCounts) {
        let since = self.since[0].as_ref().unwrap_or(&live.since);
        (since.clone(), self.reads.plus(&live.counts))
    }

    /// `None`: nothing was rehearsed before.
    pub fn writes(&self, live: &Rehearsed) -> Option<Rehearsed> {
        Some(Rehearsed {
            since: self.since[1].clone()?,
            counts: self.writes.plus(&live.counts),
            waiting: live.waiting,
        })
    }

    pub fn read_report(&self, live: &ShadowReport, slower: f64) -> ShadowReport {
        let mut report = self.period.continued_by(live, slower);
        report.since = self.since[0].clone().unwrap_or_else(|| live.since.clone());
        report
    }

    pub fn write_report(&self, live: &RehearsalReport, slower: f64) -> RehearsalReport {
        let mut report = self.period.write_period().continued_by(live, slower);
        report.since = self.since[1].clone().unwrap_or_else(|| live.since.clone());
        report.totals.since.clone_from(&report.since);
        report
    }
}

/// Adds up the lines of statistics since a time that come before a line, by database. A line tells
/// what came since the one before it, too.
///
/// # Errors
/// The log cannot be read.
pub fn read_counted(log: &Path, from: OffsetDateTime, before_line: u64) -> io::Result<BTreeMap<String, Counted>> {
    let mut counted: BTreeMap<String, Counted> = BTreeMap::new();
    for line in chain::lines(log, Some(from.into()))? {
        let line = line?.bytes;
        let Some((envelope, interval)) = statistics(&line) else {
            continue;
        };
        let late = OffsetDateTime::parse(&envelope.time, &Rfc3339).is_ok_and(|time| time >= from);
        if !late || envelope.seq >= before_line {
            continue;
        }
        let of = counted.entry(interval.database.clone()).or_default();
        let began = &mut of.since[usize::from(!interval.writes.is_empty())];
        began.get_or_insert_with(|| later(&interval.since, from));
        of.period.add(&interval);
    }
    for of in counted.values_mut() {
        of.period.keep(FINGERPRINTS_MAX);
        of.reads = of.period.totals();
        of.writes = of.period.write_period().totals();
    }
    Ok(counted)
}

fn statistics(line: &[u8]) -> Option<(chain::Envelope, Interval)> {
    // Most lines of a busy log need not be parsed for this.
    let beginning = String::from_utf8_lossy(&line[..line.len().min(EVENT_WITHIN)]);
    if !beginning.contains("\"event\":\"statistics\"") {
        return None;
    }
    let envelope: chain::Envelope = serde_json::from_slice(line).ok()?;
    let known = envelope.event == events::STATISTICS && envelope.version <= chain::VERSION;
    known.then_some((envelope, serde_json::from_slice(line).ok()?))
}

/// When the run began to count, or the time from which its lines are taken.
fn later(since: &str, from: OffsetDateTime) -> String {
    match OffsetDateTime::parse(since, &Rfc3339) {
        Ok(time) if time >= from => since.to_owned(),
        _ => from.format(&Rfc3339).unwrap_or_default(),
    }
}
