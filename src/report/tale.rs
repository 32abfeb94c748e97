//! What the mismatch log tells of a period, in one pass over its lines.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::runs::{Run, Runs, Sampled};
use super::{Database, RecordedFlip};
use crate::admin::api::Flip;
use crate::chain;
use crate::shadow::rehearsal::RehearsalReport;
use crate::shadow::{
    Acknowledgement, CanaryCounts, CanaryLine, CanaryNews, FingerprintSummary, Interval, Mismatch, Parsed, Period,
    Sampling, ShadowReport, SlowerOnNew, by_fingerprint, events, joined, parse,
};
use crate::switchover::machine::Kind;

#[derive(Default)]
pub(super) struct Tale {
    /// Times of the first and the last line.
    pub(super) period: Option<(String, String)>,
    /// What each log tells of itself: its acknowledgements go by its own lines' numbers.
    pub(super) logs: Vec<LogTale>,
    pub(super) sampled: Vec<Sampled>,
    slower: Vec<SlowerOnNew>,
    periods: BTreeMap<String, Period>,
    /// Of a database of which nothing was read.
    unread: Period,
    /// With the lines that tell of them.
    flips: Vec<(u64, Flip)>,
    canaries: BTreeMap<String, CanaryPeriod>,
    happenings: Vec<Happening>,
}

/// One of the logs.
#[derive(Default)]
pub(super) struct LogTale {
    pub(super) acknowledgements: Vec<Acknowledgement>,
    /// Lines that could not be written.
    pub(super) lost: u64,
    pub(super) runs: Runs,
    mismatches: Vec<Mismatch>,
}

/// Something that happened, with who and why where that is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Happening {
    pub at: String,
    pub what: String,
    pub who: Option<String>,
    pub why: Option<String>,
    /// Number of the log's line that tells of it; absent: a database does.
    pub line: Option<u64>,
    /// Which log: its place in the report's list.
    pub log: usize,
}

/// What the canary reads of one database came to.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct CanaryPeriod {
    /// `reads.canary_percent`, as last told.
    pub percent: f64,
    pub counts: CanaryCounts,
    /// Of the reads considered, answered by the secondary.
    pub share: f64,
    /// How often the budget turned them off, and why it last did.
    pub turned_off: u64,
    pub last_reason: Option<String>,
}

impl CanaryPeriod {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    fn add(&mut self, line: CanaryLine) {
        self.percent = line.percent;
        self.counts = self.counts.plus(&line.counts);
        if self.counts.considered > 0 {
            let served = self.counts.served.min(self.counts.considered);
            self.share = served as f64 / self.counts.considered as f64;
        }
        if line.what == CanaryNews::TurnedOff {
            self.turned_off += 1;
            self.last_reason = line.reason;
        }
    }
}

impl LogTale {
    fn mismatches_of(&self, database: &str) -> impl Iterator<Item = &Mismatch> {
        self.mismatches
            .iter()
            .filter(move |mismatch| mismatch.database == database)
    }
}

impl Tale {
    /// Lines of `since` and later. A line of statistics counts what came before it, too, back to
    /// the line of statistics before.
    pub(super) fn read(logs: &[PathBuf], since: Option<OffsetDateTime>) -> anyhow::Result<Self> {
        let mut tale = Self::default();
        for path in logs {
            tale.logs.push(LogTale::default());
            tale.read_one(path, since)
                .with_context(|| format!("read the mismatch log {}", path.display()))?;
        }
        Ok(tale)
    }

    fn read_one(&mut self, path: &Path, since: Option<OffsetDateTime>) -> io::Result<()> {
        for line in chain::lines(path, since.map(Into::into))? {
            match parse(&line?.bytes) {
                Some(Parsed::Mismatch(mismatch)) if is_late(&mismatch.time, since) => {
                    self.passed(events::MISMATCH, &mismatch.time);
                    self.log().mismatches.push(*mismatch);
                }
                Some(Parsed::Slower(slower)) if is_late(&slower.time, since) => {
                    self.passed(events::SLOWER, &slower.time);
                    self.slower.push(*slower);
                }
                Some(Parsed::Acknowledged(acknowledgement)) if is_late(&acknowledgement.time, since) => {
                    self.passed(events::ACKNOWLEDGED, &acknowledgement.time);
                    self.acknowledged(acknowledgement);
                }
                Some(Parsed::Other(envelope, value)) if is_late(&envelope.time, since) => {
                    self.other(&envelope, value);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The one that is read.
    fn log(&mut self) -> &mut LogTale {
        if self.logs.is_empty() {
            self.logs.push(LogTale::default());
        }
        let last = self.logs.len() - 1;
        &mut self.logs[last]
    }

    fn place(&self) -> usize {
        self.logs.len().saturating_sub(1)
    }

    fn passed(&mut self, event: &str, time: &str) {
        let place = self.place();
        self.log().runs.passed(place, event, time);
        match &mut self.period {
            // Several logs are read one after the other.
            Some((first, last)) => {
                if time < first.as_str() {
                    time.clone_into(first);
                }
                if time > last.as_str() {
                    time.clone_into(last);
                }
            }
            None => self.period = Some((time.to_owned(), time.to_owned())),
        }
    }

    fn acknowledged(&mut self, acknowledgement: Acknowledgement) {
        let log = self.place();
        let of = match (&acknowledgement.fingerprint, acknowledgement.kind, acknowledgement.line) {
            (_, _, Some(line)) => format!("mismatch #{line}"),
            (Some(fingerprint), Some(kind), _) => format!("mismatches of {fingerprint}, {}", kind.as_str()),
            (Some(fingerprint), None, _) => format!("mismatches of {fingerprint}"),
            (None, ..) => "nothing".into(),
        };
        self.happenings.push(Happening {
            at: acknowledgement.time.clone(),
            what: format!("{of} acknowledged"),
            who: Some(acknowledgement.by.clone()),
            why: Some(acknowledgement.reason.clone()),
            line: Some(acknowledgement.seq),
            log,
        });
        self.log().acknowledgements.push(acknowledgement);
    }

    fn other(&mut self, envelope: &chain::Envelope, value: Value) {
        let log = self.place();
        if envelope.event == chain::events::OPENED {
            self.log().runs.opened(log, envelope, &value);
        }
        self.passed(&envelope.event, &envelope.time);
        if envelope.event == events::SWITCHOVER
            && let Ok(flip) = serde_json::from_value(value.clone())
        {
            self.flips.push((envelope.seq, flip));
        }
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let (what, why) = match envelope.event.as_str() {
            events::STATISTICS => {
                if let Ok(interval) = serde_json::from_value::<Interval>(value) {
                    self.periods
                        .entry(interval.database.clone())
                        .or_default()
                        .add(&interval);
                }
                return;
            }
            events::CANARY => {
                let Ok(line) = serde_json::from_value::<CanaryLine>(value) else {
                    return;
                };
                let (database, what, reason) = (line.database.clone(), line.what, line.reason.clone());
                self.canaries.entry(database.clone()).or_default().add(line);
                if what == CanaryNews::TurnedOff {
                    self.happenings.push(Happening {
                        at: envelope.time.clone(),
                        what: format!("canary reads of {database} turned themselves off"),
                        who: None,
                        why: reason,
                        line: Some(envelope.seq),
                        log,
                    });
                }
                return;
            }
            events::PHASE => (
                format!(
                    "phase {}, {} is primary, epoch {}",
                    text("phase").unwrap_or_default(),
                    text("primary").unwrap_or_default(),
                    value["epoch"]
                ),
                None,
            ),
            events::SWITCHOVER => (
                switched(
                    serde_json::from_value(value["kind"].clone()).unwrap_or(Kind::Flip),
                    &text("to").unwrap_or_default(),
                    &text("outcome").unwrap_or_default(),
                    value["held_ms"].as_f64().unwrap_or_default(),
                ),
                text("forced").map(|reason| passed(&reason)),
            ),
            events::STRAYS_ACKNOWLEDGED => {
                let strays = value["strays"].as_array().map(Vec::as_slice).unwrap_or_default();
                let writes: u64 = strays.iter().filter_map(|one| one["writes"].as_u64()).sum();
                let mut tables: Vec<&str> = strays.iter().filter_map(|one| one["table"].as_str()).collect();
                tables.sort_unstable();
                tables.dedup();
                (
                    format!(
                        "{writes} writes that reached the secondary without pgtandem acknowledged ({})",
                        tables.join(", ")
                    ),
                    text("reason"),
                )
            }
            events::SAMPLING => {
                if let Ok(sampling) = serde_json::from_value::<Sampling>(value) {
                    for period in self.periods.values_mut().chain([&mut self.unread]) {
                        period.ignored(&sampling.ignores);
                    }
                    self.sampled.push(Sampled {
                        log,
                        since: envelope.time.clone(),
                        line: envelope.seq,
                        sampling,
                    });
                }
                return;
            }
            // Runs are told of by themselves.
            events::CLOSED => return,
            chain::events::OPENED => {
                let lost = value["lost_before"].as_u64().unwrap_or(0);
                self.log().lost += lost;
                if lost == 0 {
                    return;
                }
                (format!("{lost} lines could not be written before this one"), None)
            }
            chain::events::TORN => (
                format!(
                    "an unfinished last line ({} bytes) of a writer that was killed was set aside",
                    value["bytes"]
                ),
                None,
            ),
            chain::events::LINES_MISSING | chain::events::SET_ASIDE => {
                (format!("log: {}", envelope.event.replace('_', " ")), text("note"))
            }
            other => (format!("log: {other}"), None),
        };
        self.happenings.push(Happening {
            at: envelope.time.clone(),
            what,
            who: text("by").or_else(|| text("coordinator")),
            why,
            line: Some(envelope.seq),
            log,
        });
    }

    /// Those that the log tells of, with their lines.
    pub(super) fn flips(&self) -> impl Iterator<Item = (u64, &Flip)> {
        self.flips.iter().map(|(line, flip)| (*line, flip))
    }

    pub(super) fn acknowledgements(&self) -> Vec<Acknowledgement> {
        self.logs.iter().flat_map(|log| log.acknowledgements.clone()).collect()
    }

    pub(super) fn runs(&self) -> Vec<Run> {
        self.logs.iter().flat_map(|log| log.runs.all().cloned()).collect()
    }

    /// By fingerprint, the most frequent first. What was acknowledged in one log was so in that one.
    pub(super) fn by_fingerprint(&self, database: &str) -> Vec<FingerprintSummary> {
        joined(self.logs.iter().flat_map(|log| {
            let found: Vec<Mismatch> = log.mismatches_of(database).cloned().collect();
            by_fingerprint(&found, &log.acknowledgements)
        }))
    }

    pub(super) fn line_of(&self, flip: &str) -> Option<u64> {
        self.flips().find(|(_, told)| told.id == flip).map(|(line, _)| line)
    }

    /// Those of proxy.yaml, and those that only the log knows.
    pub(super) fn databases<'a>(&self, named: impl Iterator<Item = &'a String>) -> Vec<String> {
        let mut names: Vec<String> = named.cloned().collect();
        let logged = self
            .logs
            .iter()
            .flat_map(|log| &log.mismatches)
            .map(|mismatch| &mismatch.database);
        for name in logged.chain(self.periods.keys()) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }

    pub(super) fn reads(&self, database: &str, slower: f64) -> ShadowReport {
        // Where nothing was read, what would have been ignored is told all the same.
        self.periods.get(database).unwrap_or(&self.unread).report(slower)
    }

    pub(super) fn writes(&self, database: &str, slower: f64) -> Option<RehearsalReport> {
        self.periods.get(database)?.writes(slower)
    }

    pub(super) fn canary(&self, database: &str) -> Option<CanaryPeriod> {
        self.canaries.get(database).cloned()
    }

    pub(super) fn mismatches_of(&self, database: &str) -> impl Iterator<Item = &Mismatch> {
        self.logs.iter().flat_map(move |log| log.mismatches_of(database))
    }

    pub(super) fn slower_in(&self, database: &str) -> Vec<SlowerOnNew> {
        let slower = self.slower.iter().filter(|one| one.database == database);
        slower.cloned().collect()
    }

    /// With what the databases tell: orders that somebody gave, and flips that the log does not have.
    pub(super) fn happenings(&self, databases: &[Database], flips: &[RecordedFlip]) -> Vec<Happening> {
        let mut all = self.happenings.clone();
        all.extend(flips.iter().filter(|one| one.line.is_none()).map(|one| Happening {
            at: one.flip.at.clone(),
            what: switched(one.flip.kind, one.flip.to.as_str(), &one.flip.outcome, one.flip.held_ms),
            who: one.flip.by.clone().or_else(|| Some(one.flip.coordinator.clone())),
            why: one.flip.forced.clone().map(|reason| passed(&reason)),
            line: None,
            log: 0,
        }));
        for database in databases {
            for event in [&database.legacy, &database.new]
                .into_iter()
                .flat_map(|side| &side.quarantine_history)
            {
                all.push(Happening {
                    at: event.at.clone(),
                    what: format!(
                        "quarantine of {}: entry {} {} ({} changes in {})",
                        database.name,
                        event.id,
                        event.action,
                        event.changes,
                        event.tables.join(", ")
                    ),
                    who: event.actor.clone(),
                    why: event.reason.clone().or_else(|| event.error.clone()),
                    line: None,
                    log: 0,
                });
            }
        }
        all.sort_by(|one, other| one.at.cmp(&other.at));
        all
    }
}

fn switched(kind: Kind, to: &str, outcome: &str, held_ms: f64) -> String {
    let what = match kind {
        Kind::Flip => "switchover",
        Kind::Rehearsal => "rehearsal of a switchover",
    };
    format!("{what} to {to}: {outcome}; new transactions held for {held_ms:.0} ms")
}

fn passed(reason: &str) -> String {
    format!("closed gates were passed: {reason}")
}

/// A line whose time cannot be read is told rather than hidden.
pub(super) fn is_late(time: &str, since: Option<OffsetDateTime>) -> bool {
    since.is_none_or(|since| OffsetDateTime::parse(time, &Rfc3339).map_or(true, |time| time >= since))
}
