//! Reads the mismatch log, for `pgtandem mismatches`: by fingerprint or one by one.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::compare::Kind;
use super::log::{Acknowledgement, Mismatch, events};
use super::slower::SlowerOnNew;
use crate::chain;

/// Which mismatches to show.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter {
    pub since: Option<OffsetDateTime>,
    /// The beginning of a fingerprint's id.
    pub fingerprint: Option<String>,
    pub kind: Option<Kind>,
}

impl Filter {
    /// Parses `--since`: an RFC 3339 time, or an age (`90s`, `15min`, `2h`, `7d`).
    pub fn parse_since(text: &str, now: OffsetDateTime) -> Result<OffsetDateTime, String> {
        if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
            return Ok(time);
        }
        let wrong =
            || format!("\"{text}\" is neither a time like 2026-01-31T12:00:00Z nor an age like 90s, 15min, 2h, 7d");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (count, unit) = text.split_at(digits);
        let seconds = match unit {
            "s" => 1,
            "m" | "min" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return Err(wrong()),
        };
        let count: u64 = count.parse().map_err(|_| wrong())?;
        now.checked_sub(
            Duration::from_secs(count.saturating_mul(seconds))
                .try_into()
                .map_err(|_| wrong())?,
        )
        .ok_or_else(wrong)
    }

    pub fn wants(&self, mismatch: &Mismatch) -> bool {
        self.wants_line(&mismatch.time, &mismatch.fingerprint, mismatch.kind)
    }

    pub fn wants_slower(&self, slower: &SlowerOnNew) -> bool {
        self.wants_line(&slower.time, &slower.fingerprint, slower.kind)
    }

    fn wants_line(&self, time: &str, fingerprint: &str, kind: Kind) -> bool {
        let late_enough = self.since.is_none_or(|since| {
            // A line whose time cannot be read is shown rather than hidden.
            OffsetDateTime::parse(time, &Rfc3339).map_or(true, |time| time >= since)
        });
        late_enough
            && self
                .fingerprint
                .as_ref()
                .is_none_or(|wanted| fingerprint.starts_with(wanted.as_str()))
            && self.kind.is_none_or(|wanted| wanted == kind)
    }
}

/// What a log holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LogContents {
    pub mismatches: Vec<Mismatch>,
    /// Statements that take longer on new: no mismatches.
    pub slower: Vec<SlowerOnNew>,
    /// All of them, whatever the filter wants.
    pub acknowledgements: Vec<Acknowledgement>,
    /// Lines that are none of a known version: a torn last line, or a newer program's.
    pub unreadable_lines: u64,
}

/// Reads the mismatches that the filter wants, across rotated files. A log that does not exist
/// holds none.
pub fn read_log(path: &Path, filter: &Filter) -> io::Result<LogContents> {
    let mut contents = LogContents::default();
    for line in chain::lines(path, filter.since.map(Into::into))? {
        match parse(&line?.bytes) {
            Some(Parsed::Mismatch(mismatch)) if filter.wants(&mismatch) => contents.mismatches.push(*mismatch),
            Some(Parsed::Slower(slower)) if filter.wants_slower(&slower) => contents.slower.push(*slower),
            Some(Parsed::Acknowledged(acknowledgement)) => contents.acknowledgements.push(acknowledgement),
            Some(_) => {}
            None => contents.unreadable_lines += 1,
        }
    }
    Ok(contents)
}

/// A line of the log, as far as it is of interest here.
pub enum Parsed {
    Mismatch(Box<Mismatch>),
    Slower(Box<SlowerOnNew>),
    Acknowledged(Acknowledgement),
    /// Another event, with its keys.
    Other(chain::Envelope, serde_json::Value),
}

/// `None` where the line is none of a known version.
pub fn parse(line: &[u8]) -> Option<Parsed> {
    let envelope: chain::Envelope = serde_json::from_slice(line).ok()?;
    if envelope.version > chain::VERSION {
        return None;
    }
    match envelope.event.as_str() {
        events::MISMATCH => serde_json::from_slice(line).ok().map(Parsed::Mismatch),
        events::SLOWER => serde_json::from_slice(line).ok().map(Parsed::Slower),
        events::ACKNOWLEDGED => serde_json::from_slice(line).ok().map(Parsed::Acknowledged),
        _ => serde_json::from_slice(line)
            .ok()
            .map(|value| Parsed::Other(envelope, value)),
    }
}

/// The newest acknowledgement of a mismatch.
pub fn is_acknowledged<'a>(
    mismatch: &Mismatch,
    acknowledgements: &'a [Acknowledgement],
) -> Option<&'a Acknowledgement> {
    covering(acknowledgements, mismatch.seq, &mismatch.fingerprint, mismatch.kind)
}

/// The newest acknowledgement of a statement that takes longer on new.
pub fn is_slower_acknowledged<'a>(
    slower: &SlowerOnNew,
    acknowledgements: &'a [Acknowledgement],
) -> Option<&'a Acknowledgement> {
    covering(acknowledgements, slower.seq, &slower.fingerprint, slower.kind)
}

fn covering<'a>(
    acknowledgements: &'a [Acknowledgement],
    seq: u64,
    fingerprint: &str,
    kind: Kind,
) -> Option<&'a Acknowledgement> {
    acknowledgements
        .iter()
        .rfind(|acknowledgement| acknowledgement.covers(seq, fingerprint, kind))
}

/// By whom, when and why mismatches were accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Acknowledged {
    pub by: String,
    pub at: String,
    pub reason: String,
}

/// The mismatches of one statement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FingerprintSummary {
    pub fingerprint: String,
    pub statement: String,
    pub count: u64,
    pub kinds: BTreeMap<Kind, u64>,
    pub first: String,
    pub last: String,
    /// Those that nobody has acknowledged.
    pub open: u64,
    /// The newest acknowledgement of any of them.
    pub acknowledged: Option<Acknowledged>,
    /// The latest one.
    pub example: Mismatch,
}

/// By fingerprint, the most frequent first.
pub fn by_fingerprint(mismatches: &[Mismatch], acknowledgements: &[Acknowledgement]) -> Vec<FingerprintSummary> {
    let mut summaries: BTreeMap<&str, FingerprintSummary> = BTreeMap::new();
    for mismatch in mismatches {
        let summary = summaries
            .entry(&mismatch.fingerprint)
            .or_insert_with(|| FingerprintSummary {
                fingerprint: mismatch.fingerprint.clone(),
                statement: mismatch.statement.clone(),
                count: 0,
                kinds: BTreeMap::new(),
                first: mismatch.time.clone(),
                last: mismatch.time.clone(),
                open: 0,
                acknowledged: None,
                example: mismatch.clone(),
            });
        summary.count += 1;
        *summary.kinds.entry(mismatch.kind).or_default() += 1;
        summary.last.clone_from(&mismatch.time);
        summary.example.clone_from(mismatch);
        match is_acknowledged(mismatch, acknowledgements) {
            None => summary.open += 1,
            Some(acknowledgement) => {
                summary.acknowledged = Some(Acknowledged {
                    by: acknowledgement.by.clone(),
                    at: acknowledgement.time.clone(),
                    reason: acknowledgement.reason.clone(),
                });
            }
        }
    }
    let mut summaries: Vec<_> = summaries.into_values().collect();
    summaries.sort_by_key(|summary| std::cmp::Reverse(summary.count));
    summaries
}

/// Of several logs, the most frequent first.
pub fn joined(summaries: impl Iterator<Item = FingerprintSummary>) -> Vec<FingerprintSummary> {
    let mut whole: BTreeMap<String, FingerprintSummary> = BTreeMap::new();
    for one in summaries {
        let Some(known) = whole.get_mut(&one.fingerprint) else {
            whole.insert(one.fingerprint.clone(), one);
            continue;
        };
        known.count += one.count;
        known.open += one.open;
        for (kind, count) in one.kinds {
            *known.kinds.entry(kind).or_default() += count;
        }
        if one.first < known.first {
            known.first = one.first;
        }
        if one.last > known.last {
            known.last = one.last;
            known.example = one.example;
        }
        known.acknowledged = match (known.acknowledged.take(), one.acknowledged) {
            (Some(known), Some(other)) if other.at > known.at => Some(other),
            (known, other) => known.or(other),
        };
    }
    let mut whole: Vec<_> = whole.into_values().collect();
    whole.sort_by_key(|summary| std::cmp::Reverse(summary.count));
    whole
}

impl fmt::Display for FingerprintSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<String> = self
            .kinds
            .iter()
            .map(|(kind, count)| format!("{} {count}", kind.as_str()))
            .collect();
        writeln!(
            f,
            "{}  {} times ({}), first {}, last {}",
            self.fingerprint,
            self.count,
            kinds.join(", "),
            self.first,
            self.last
        )?;
        writeln!(f, "  {}", self.statement)?;
        if let Some(Acknowledged { by, at, reason }) = &self.acknowledged {
            writeln!(
                f,
                "  acknowledged by {by} at {at}: {reason}; {} since or besides",
                self.open
            )?;
        }
        write!(f, "{}", self.example)
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  #{} {} {} {} as {}, key {}, epoch {}, round {}: {} rows on the primary ({}), {} on the secondary; {:.1} ms and {:.1} ms",
            self.seq,
            self.time,
            self.kind.as_str(),
            self.database,
            self.user,
            self.key,
            self.epoch,
            self.round,
            self.rows.primary,
            self.primary,
            self.rows.secondary,
            self.latency_ms.primary,
            self.latency_ms.secondary
        )?;
        if !self.differing_columns.is_empty() {
            writeln!(f, "    differing columns: {}", self.differing_columns.join(", "))?;
        }
        let sides = [
            ("primary  ", &self.error.primary, &self.first_rows.primary),
            ("secondary", &self.error.secondary, &self.first_rows.secondary),
        ];
        for (name, error, rows) in sides {
            if let Some(code) = error {
                writeln!(f, "    {name} error {code}")?;
            }
            for row in rows {
                let values: Vec<&str> = row.iter().map(|value| value.as_deref().unwrap_or("null")).collect();
                writeln!(f, "    {name} ({})", values.join(", "))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for SlowerOnNew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  #{} {} {} {}: median {:.1} ms on legacy, {:.1} ms on new ({:.1} times), of {} reads",
            self.seq,
            self.time,
            self.kind.as_str(),
            self.database,
            self.legacy.p50_ms,
            self.new.p50_ms,
            self.ratio,
            self.reads
        )?;
        let Some(plans) = &self.plans else { return Ok(()) };
        let same = if plans.same { "the same plan" } else { "another plan" };
        writeln!(
            f,
            "    {same}: {} on legacy, {} on new",
            plans.legacy.fingerprint, plans.new.fingerprint
        )?;
        for (side, plan) in [("legacy", &plans.legacy), ("new", &plans.new)] {
            for node in &plan.nodes {
                writeln!(f, "      {side:6}  {node}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::{Chain, Options, body};
    use crate::control::{Epoch, Side};
    use crate::shadow::log::BothSides;

    fn mismatch(fingerprint: &str, kind: Kind) -> Mismatch {
        Mismatch {
            seq: 0,
            time: String::new(),
            database: "shop".into(),
            user: "app".into(),
            fingerprint: fingerprint.into(),
            statement: "select * from t where a = ?".into(),
            sql: None,
            key: "0123".into(),
            kind,
            primary: Side::Legacy,
            rows: BothSides {
                primary: 1,
                secondary: 2,
            },
            digest: BothSides::default(),
            error: BothSides::default(),
            columns: vec!["a".into(), "b".into()],
            differing_columns: vec![],
            keys: vec![],
            first_rows: BothSides {
                primary: vec![],
                secondary: vec![vec![Some("x".into()), None]],
            },
            latency_ms: BothSides {
                primary: 1.25,
                secondary: 2.0,
            },
            canary: false,
            epoch: Epoch::FIRST,
            round: 7,
        }
    }

    #[test]
    fn a_log_is_read_back_with_what_was_acknowledged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mismatches.jsonl");
        let mut chain = Chain::open(Options::from(path.clone()), serde_json::Map::new()).unwrap();
        let mut write = |event, of: &dyn erased::Body| {
            chain.append(event, of.body()).unwrap();
        };
        write(events::MISMATCH, &mismatch("aa01", Kind::Value));
        write(events::MISMATCH, &mismatch("bb02", Kind::Error));
        let accepted = Acknowledgement {
            seq: 0,
            time: String::new(),
            by: "ann".into(),
            reason: "rounding, ticket 7".into(),
            fingerprint: Some("aa01".into()),
            kind: None,
            line: None,
        };
        write(events::ACKNOWLEDGED, &accepted);
        write(events::MISMATCH, &mismatch("aa01", Kind::ExtraRow));

        let contents = read_log(&path, &Filter::default()).unwrap();
        assert_eq!((contents.mismatches.len(), contents.unreadable_lines), (3, 0));
        assert_eq!(contents.mismatches[0].seq, 2);
        let summaries = by_fingerprint(&contents.mismatches, &contents.acknowledgements);
        let shown: Vec<_> = summaries
            .iter()
            .map(|summary| (summary.fingerprint.as_str(), summary.count, summary.open))
            .collect();
        // What comes after the acknowledgement is open again.
        assert_eq!(shown, [("aa01", 2, 1), ("bb02", 1, 1)]);
        assert_eq!(summaries[0].acknowledged.as_ref().unwrap().by, "ann");
        let text = summaries[0].to_string();
        assert!(
            text.contains("secondary (x, null)") && text.contains("ticket 7"),
            "{text}"
        );

        let one = Filter {
            fingerprint: Some("bb".into()),
            ..Filter::default()
        };
        assert_eq!(read_log(&path, &one).unwrap().mismatches[0].kind, Kind::Error);
        let later = Filter {
            since: Some(OffsetDateTime::now_utc() + Duration::from_secs(60)),
            ..Filter::default()
        };
        assert!(read_log(&path, &later).unwrap().mismatches.is_empty());
        assert_eq!(
            read_log(Path::new("/nowhere/at/all"), &one).unwrap(),
            LogContents::default()
        );
    }

    /// Two types of events in one list.
    mod erased {
        use serde_json::{Map, Value};

        pub(super) trait Body {
            fn body(&self) -> Map<String, Value>;
        }

        impl<T: serde::Serialize> Body for T {
            fn body(&self) -> Map<String, Value> {
                super::body(self).unwrap()
            }
        }
    }

    #[test]
    fn since() {
        let now = OffsetDateTime::parse("2026-01-03T12:00:00Z", &Rfc3339).unwrap();
        let since = |text| Filter::parse_since(text, now);
        assert_eq!(since("1d").unwrap(), now - Duration::from_secs(86_400));
        assert_eq!(since("10min").unwrap(), now - Duration::from_secs(600));
        assert!(since("2026-01-02T00:00:00Z").is_ok());
        assert!(since("yesterday").is_err() && since("").is_err() && since("5\u{e4}").is_err());
    }
}
