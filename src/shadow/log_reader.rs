//! Reads the mismatch log, for `pgtandem mismatches`: by fingerprint or one by one.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::compare::Kind;
use super::log::Mismatch;

/// Which mismatches to show.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter {
    pub since: Option<OffsetDateTime>,
    /// The beginning of a fingerprint's id.
    pub fingerprint: Option<String>,
    pub kind: Option<Kind>,
}

impl Filter {
    /// Parses `--since`: an RFC 3339 time, or an age (`90s`, `15m`, `2h`, `7d`).
    pub fn parse_since(text: &str, now: OffsetDateTime) -> Result<OffsetDateTime, String> {
        if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
            return Ok(time);
        }
        let wrong =
            || format!("\"{text}\" is neither a time like 2026-01-31T12:00:00Z nor an age like 90s, 15m, 2h, 7d");
        let unit = text.chars().next_back().ok_or_else(wrong)?;
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(wrong()),
        };
        let count: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
        now.checked_sub(
            Duration::from_secs(count.saturating_mul(seconds))
                .try_into()
                .map_err(|_| wrong())?,
        )
        .ok_or_else(wrong)
    }

    fn wants(&self, mismatch: &Mismatch) -> bool {
        let late_enough = self.since.is_none_or(|since| {
            // A line whose time cannot be read is shown rather than hidden.
            OffsetDateTime::parse(&mismatch.time, &Rfc3339).map_or(true, |time| time >= since)
        });
        late_enough
            && self
                .fingerprint
                .as_ref()
                .is_none_or(|wanted| mismatch.fingerprint.starts_with(wanted.as_str()))
            && self.kind.is_none_or(|kind| kind == mismatch.kind)
    }
}

/// What a log holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LogContents {
    pub mismatches: Vec<Mismatch>,
    /// Lines that are no mismatch of a known version: a torn last line, or a newer program's.
    pub unreadable_lines: u64,
}

/// Reads the mismatches that the filter wants. A log that does not exist holds none.
pub fn read_log(path: &Path, filter: &Filter) -> io::Result<LogContents> {
    let mut contents = LogContents::default();
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(contents),
        Err(error) => return Err(error),
    };
    for line in BufReader::new(file).split(b'\n') {
        let line = line?;
        if line.is_empty() {
            continue;
        }
        match serde_json::from_slice::<Mismatch>(&line) {
            Ok(mismatch) if mismatch.version <= super::log::VERSION => {
                if filter.wants(&mismatch) {
                    contents.mismatches.push(mismatch);
                }
            }
            _ => contents.unreadable_lines += 1,
        }
    }
    Ok(contents)
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
    /// The latest one.
    pub example: Mismatch,
}

/// By fingerprint, the most frequent first.
pub fn by_fingerprint(mismatches: &[Mismatch]) -> Vec<FingerprintSummary> {
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
                example: mismatch.clone(),
            });
        summary.count += 1;
        *summary.kinds.entry(mismatch.kind).or_default() += 1;
        summary.last.clone_from(&mismatch.time);
        summary.example.clone_from(mismatch);
    }
    let mut summaries: Vec<_> = summaries.into_values().collect();
    summaries.sort_by_key(|summary| std::cmp::Reverse(summary.count));
    summaries
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
        write!(f, "{}", self.example)
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  {} {} {} as {}, key {}, round {}: {} rows on the primary ({}), {} on the secondary; {:.1} ms and {:.1} ms",
            self.time,
            self.kind.as_str(),
            self.database,
            self.user,
            self.key,
            self.round,
            self.rows.primary,
            self.primary,
            self.rows.secondary,
            self.latency_ms.primary,
            self.latency_ms.secondary
        )?;
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::control::Side;
    use crate::shadow::log::{BothSides, VERSION};

    fn mismatch(time: &str, fingerprint: &str, kind: Kind) -> Mismatch {
        Mismatch {
            version: VERSION,
            time: time.into(),
            database: "shop".into(),
            user: "app".into(),
            fingerprint: fingerprint.into(),
            statement: "select * from t where a = ?".into(),
            key: "0123".into(),
            kind,
            primary: Side::Legacy,
            rows: BothSides {
                primary: 1,
                secondary: 2,
            },
            error: BothSides::default(),
            first_rows: BothSides {
                primary: vec![],
                secondary: vec![vec![Some("x".into()), None]],
            },
            latency_ms: BothSides {
                primary: 1.25,
                secondary: 2.0,
            },
            round: 7,
        }
    }

    #[test]
    fn a_log_is_read_back() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let lines = [
            mismatch("2026-01-01T00:00:00Z", "aa01", Kind::Value),
            mismatch("2026-01-02T00:00:00Z", "aa01", Kind::ExtraRow),
            mismatch("2026-01-03T00:00:00Z", "bb02", Kind::Error),
        ];
        for line in &lines {
            writeln!(file, "{}", serde_json::to_string(line).unwrap()).unwrap();
        }
        write!(file, "{{\"version\":1,\"ti").unwrap();
        let read = |filter: &Filter| read_log(file.path(), filter).unwrap();
        let all = read(&Filter::default());
        assert_eq!((all.mismatches.as_slice(), all.unreadable_lines), (&lines[..], 1));
        let summaries = by_fingerprint(&all.mismatches);
        assert_eq!((summaries.len(), summaries[0].count), (2, 2));
        assert_eq!(
            (summaries[0].first.as_str(), summaries[0].last.as_str()),
            ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")
        );
        assert!(
            summaries[0].to_string().contains("secondary (x, null)"),
            "{}",
            summaries[0]
        );
        let now = OffsetDateTime::parse("2026-01-03T12:00:00Z", &Rfc3339).unwrap();
        let since = |text| Filter {
            since: Some(Filter::parse_since(text, now).unwrap()),
            ..Filter::default()
        };
        assert_eq!(read(&since("1d")).mismatches.len(), 1);
        assert_eq!(read(&since("2026-01-02T00:00:00Z")).mismatches.len(), 2);
        assert!(Filter::parse_since("yesterday", now).is_err() && Filter::parse_since("", now).is_err());
        assert!(Filter::parse_since("5\u{e4}", now).is_err());
        let one = Filter {
            fingerprint: Some("bb".into()),
            ..Filter::default()
        };
        assert_eq!(read(&one).mismatches[0].kind, Kind::Error);
        assert_eq!(
            read_log(Path::new("/nowhere/at/all"), &one).unwrap(),
            LogContents::default()
        );
    }
}
