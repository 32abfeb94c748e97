//! When a proxy ran, and what share of the traffic it compared: while none ran, nothing was compared.

use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::chain::{self, Envelope};
use crate::shadow::{Sampling, events};

/// One run of a proxy, as its log tells it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Run {
    /// Which log tells of it: its place in the report's list.
    pub log: usize,
    /// Absent: before the period.
    pub began: Option<String>,
    /// The log's last line of it.
    pub last: String,
    pub ended: Ended,
    /// The proxy's version.
    pub pgtandem: Option<String>,
    /// Until the same log's next run began: a blind spot. After a kill it may have begun later than the
    /// last line.
    pub blind_seconds: Option<f64>,
    /// Its last line of statistics; what came after it was not counted, where it was killed.
    pub counted_until: Option<String>,
    #[serde(skip)]
    id: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// The log does not tell: it runs, or was killed.
    #[default]
    Unknown,
    Running,
    /// In order, with its last counts.
    Stopped,
    /// Without a last word.
    Killed,
}

/// A line `sampling`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sampled {
    pub log: usize,
    pub since: String,
    pub line: u64,
    pub sampling: Sampling,
}

/// The runs of one log, in order.
#[derive(Default)]
pub(super) struct Runs {
    runs: Vec<Run>,
    /// A command writes, while no proxy runs.
    command: bool,
}

/// What a writer tells of the log before it says that it opened it.
const OF_THE_NEXT: [&str; 3] = [
    chain::events::TORN,
    chain::events::LINES_MISSING,
    chain::events::SET_ASIDE,
];

impl Runs {
    /// Every line goes through here.
    pub(super) fn passed(&mut self, log: usize, event: &str, time: &str) {
        if self.command || OF_THE_NEXT.contains(&event) {
            return;
        }
        if self.runs.is_empty() {
            self.runs.push(Run { log, ..Run::default() });
        }
        let Some(run) = self.runs.last_mut() else { return };
        time.clone_into(&mut run.last);
        run.ended = match event {
            events::CLOSED => Ended::Stopped,
            _ => Ended::Unknown,
        };
        if event == events::STATISTICS {
            run.counted_until = Some(time.to_owned());
        }
    }

    /// A writer opened the log. Returns whether it is another process than before.
    pub(super) fn opened(&mut self, log: usize, envelope: &Envelope, value: &Value) -> bool {
        debug_assert_eq!(envelope.event, chain::events::OPENED);
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        self.command = text("command").is_some();
        if self.command {
            // The log has one writer, so no proxy runs.
            if let Some(before) = self.runs.last_mut().filter(|run| run.ended == Ended::Unknown) {
                before.ended = Ended::Killed;
            }
            return false;
        }
        let id = text("started").or_else(|| Some(value["pid"].to_string()));
        if let Some(before) = self.runs.last_mut() {
            if before.id == id {
                return false;
            }
            if before.ended == Ended::Unknown {
                before.ended = Ended::Killed;
            }
            before.blind_seconds = seconds_between(&before.last, &envelope.time);
        }
        self.runs.push(Run {
            log,
            began: Some(envelope.time.clone()),
            last: envelope.time.clone(),
            pgtandem: text("pgtandem"),
            id,
            ..Run::default()
        });
        true
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter()
    }
}

fn seconds_between(one: &str, other: &str) -> Option<f64> {
    let parse = |text| OffsetDateTime::parse(text, &Rfc3339).ok();
    Some((parse(other)? - parse(one)?).as_seconds_f64().max(0.0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn opened(runs: &mut Runs, seconds: u32, by: (&str, &str)) -> bool {
        let time = format!("2026-01-02T03:04:{seconds:02}Z");
        let mut value =
            json!({ "version": 2, "seq": 1, "time": time, "event": "opened", "prev": "", "pgtandem": "0.1.0" });
        value[by.0] = by.1.into();
        let envelope = serde_json::from_value(value.clone()).unwrap();
        runs.opened(0, &envelope, &value)
    }

    #[test]
    fn runs_and_what_is_between_them() {
        let mut runs = Runs::default();
        let at = |seconds: u32| format!("2026-01-02T03:04:{seconds:02}Z");
        runs.passed(0, events::STATISTICS, &at(1));
        assert!(opened(&mut runs, 5, ("started", "a")));
        runs.passed(0, events::STATISTICS, &at(7));
        runs.passed(0, events::MISMATCH, &at(8));
        // The disk was full for a while: the same process.
        assert!(!opened(&mut runs, 9, ("started", "a")));
        runs.passed(0, events::CLOSED, &at(10));
        assert!(opened(&mut runs, 30, ("started", "b")));
        // Killed; somebody acknowledges something; and what the next one finds torn is not of this one.
        runs.passed(0, events::MISMATCH, &at(31));
        assert!(!opened(&mut runs, 40, ("command", "mismatches ack")));
        runs.passed(0, events::ACKNOWLEDGED, &at(41));
        runs.passed(0, chain::events::TORN, &at(50));
        assert!(opened(&mut runs, 51, ("started", "c")));
        let told: Vec<_> = runs
            .all()
            .map(|run| (run.began.is_some(), run.ended, run.blind_seconds))
            .collect();
        assert_eq!(
            told,
            [
                (false, Ended::Killed, Some(4.0)),
                (true, Ended::Stopped, Some(20.0)),
                (true, Ended::Killed, Some(20.0)),
                (true, Ended::Unknown, None)
            ]
        );
        assert_eq!(runs.all().nth(1).unwrap().counted_until, Some(at(7)));
    }
}
