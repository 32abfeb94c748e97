//! How the report looks: askama's templates, so that everything is escaped, and what they need
//! said shortly.

use std::collections::BTreeMap;

use askama::Template;

use super::plot::{self, Pairs, Steps, short_time};
use super::{Database, Ended, Rate, Report, Run, SideHistory};
use crate::admin::api::Flip;
use crate::shadow::rehearsal::{RehearsalReport, RehearsedStatement, WriteCounts};
use crate::shadow::{FingerprintReport, ReadCounts, Share};

/// Rows of a table; the JSON has all.
const ROWS_MAX: usize = 100;

#[derive(Template)]
#[template(path = "report.html")]
struct Html<'a> {
    report: &'a Report,
    say: Say,
}

#[derive(Template)]
#[template(path = "report.md", escape = "none")]
struct Markdown<'a> {
    report: &'a Report,
    say: Say,
}

pub(super) fn html(report: &Report) -> anyhow::Result<String> {
    Ok(Html { report, say: Say }.render()?)
}

pub(super) fn markdown(report: &Report) -> anyhow::Result<String> {
    Ok(Markdown { report, say: Say }.render()?)
}

/// The templates' phrases.
#[derive(Clone, Copy)]
struct Say;

/// Group, reason, and how many were not compared for it.
type Reason = (&'static str, String, u64);

#[allow(clippy::unused_self, reason = "templates call methods")]
impl Say {
    /// `1,234,567`
    fn number(self, value: impl ToString) -> String {
        let digits = value.to_string();
        let mut text = String::new();
        for (n, digit) in digits.chars().enumerate() {
            if n > 0 && (digits.len() - n).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        text
    }

    /// `1 line`, `1,234 lines`
    fn some(self, count: impl ToString, what: &str) -> String {
        let count = self.number(count);
        let plural = if count == "1" { "" } else { "s" };
        format!("{count} {what}{plural}")
    }

    /// Cut off, never rounded up: 99.9999 % is not all.
    fn share(self, value: &f64) -> String {
        match value * 100.0 {
            all if all >= 100.0 => "100\u{a0}%".into(),
            nearly if nearly > 99.0 => {
                let cut = (nearly * 10_000.0).floor() / 10_000.0;
                format!(
                    "{}\u{a0}%",
                    format!("{cut:.4}").trim_end_matches('0').trim_end_matches('.')
                )
            }
            other => format!("{:.1}\u{a0}%", (other * 10.0).floor() / 10.0),
        }
    }

    fn match_rate(self, rate: &Rate) -> String {
        rate.match_rate.map_or_else(|| "–".into(), |share| self.share(&share))
    }

    /// Two digits, rounded up.
    fn bound(self, rate: &Rate) -> String {
        let Some(bound) = rate.upper_bound else {
            return "–".into();
        };
        let percent = bound * 100.0;
        if percent >= 99.5 {
            return "100\u{a0}%".into();
        }
        let decimals = (1.0 - percent.log10().floor()).clamp(0.0, 12.0);
        let factor = 10_f64.powf(decimals);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 12")]
        let digits = decimals as usize;
        format!("{:.digits$}\u{a0}%", (percent * factor - 1e-9).ceil() / factor)
    }

    fn sentence(self, rate: &Rate) -> String {
        match rate.compared {
            0 => "No read was compared in this period.".into(),
            compared => format!(
                "Of {} reads compared, {} differed. If they are a fair sample, fewer than {} of such reads differ, with 95 % confidence.",
                self.number(compared),
                match rate.mismatched {
                    0 => "none".into(),
                    some => self.number(some),
                },
                self.bound(rate)
            ),
        }
    }

    fn rate(self, database: &Database, fingerprint: &str) -> Rate {
        database.rates.get(fingerprint).copied().unwrap_or_default()
    }

    fn ms(self, value: &f64) -> String {
        if *value > 0.0 { short_time(*value) } else { "–".into() }
    }

    fn ratio(self, value: &f64) -> String {
        format!("{value:.2}")
    }

    /// To the second, with a blank instead of the T.
    fn time(self, rfc3339: &str) -> String {
        let seconds = rfc3339.get(..19).unwrap_or(rfc3339).replacen('T', " ", 1);
        format!("{seconds} UTC")
    }

    /// What would not be seen, or would turn round what stands beside it, by its number.
    fn visible(self, text: &str) -> String {
        let hides = |at: char| {
            at.is_control() && !matches!(at, '\n' | '\t')
                || matches!(at, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
        };
        let mut seen = String::with_capacity(text.len());
        for character in text.chars() {
            match character {
                '\r' => {}
                at if hides(at) => seen.extend(at.escape_unicode()),
                at => seen.push(at),
            }
        }
        seen
    }

    /// The beginning of a long text.
    fn short(self, text: &str) -> String {
        const MAX: usize = 160;
        let text = self.visible(text);
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        match line.char_indices().nth(MAX) {
            Some((end, _)) => format!("{}…", &line[..end]),
            None => line,
        }
    }

    /// As one cell of a Markdown table, in which nothing is markup.
    fn cell(self, text: impl AsRef<str>) -> String {
        let mut cell = String::new();
        for character in self.short(text.as_ref()).chars() {
            match character {
                '&' => cell.push_str("&amp;"),
                '<' => cell.push_str("&lt;"),
                '|' | '\\' | '`' | '*' | '_' | '[' | ']' | '~' | '#' => {
                    cell.push('\\');
                    cell.push(character);
                }
                _ => cell.push(character),
            }
        }
        cell
    }

    fn or_dash(self, text: &Option<String>) -> String {
        text.clone().unwrap_or_else(|| "–".into())
    }

    /// A reason of the log as words.
    fn words(self, name: &str) -> String {
        name.replace('_', " ")
    }

    /// Not compared, by what kept it from being so.
    fn reasons(self, counts: &ReadCounts) -> Vec<Reason> {
        self.listed([
            ("not comparable", &counts.not_comparable),
            ("not wanted", &counts.skipped),
            ("dropped", &counts.dropped),
            ("failed", &counts.failed),
        ])
    }

    fn listed(self, groups: [(&'static str, &BTreeMap<String, u64>); 4]) -> Vec<Reason> {
        groups
            .into_iter()
            .flat_map(|(group, reasons)| {
                reasons
                    .iter()
                    .map(move |(reason, count)| (group, self.words(reason), *count))
            })
            .collect()
    }

    fn kinds(self, kinds: &BTreeMap<crate::shadow::Kind, u64>) -> String {
        let kinds: Vec<String> = kinds
            .iter()
            .map(|(kind, count)| format!("{} {count}", self.words(kind.as_str())))
            .collect();
        kinds.join(", ")
    }

    fn noisy(self, database: &Database) -> Vec<&FingerprintReport> {
        let fingerprints = database.reads.fingerprints.iter();
        fingerprints.filter(|one| one.noise.disagreed > 0).collect()
    }

    fn asked_twice(self, database: &Database) -> u64 {
        let fingerprints = database.reads.fingerprints.iter();
        fingerprints.map(|one| one.noise.asked_twice).sum()
    }

    /// Whether a database could not tell what it records.
    fn unheard(self, report: &Report) -> bool {
        let sides = report.databases.iter().flat_map(|one| [&one.legacy, &one.new]);
        { sides }.any(|side| side.error.is_some())
    }

    fn most_read(self, database: &Database) -> Vec<&FingerprintReport> {
        database.reads.fingerprints.iter().take(ROWS_MAX).collect()
    }

    fn written(self, writes: &RehearsalReport) -> Vec<&RehearsedStatement> {
        writes.statements.iter().take(ROWS_MAX).collect()
    }

    /// The same of writes.
    fn write_reasons(self, writes: &RehearsalReport) -> Vec<Reason> {
        let counts = &writes.totals.counts;
        self.listed([
            ("left out", &counts.left_out),
            ("skipped", &counts.skipped),
            ("dropped", &counts.dropped),
            ("failed", &counts.failed),
        ])
    }

    /// Of those compared and settled.
    fn write_rate(self, counts: &WriteCounts) -> String {
        self.match_rate(&Rate::new(counts.matched + counts.mismatched, counts.mismatched))
    }

    /// New's median of legacy's.
    fn write_ratio(self, one: &RehearsedStatement) -> String {
        if one.legacy.p50_ms > 0.0 {
            self.ratio(&(one.new.p50_ms / one.legacy.p50_ms))
        } else {
            "–".to_owned()
        }
    }

    fn measured(self, database: &Database) -> Vec<(&FingerprintReport, &crate::shadow::Latency)> {
        let fingerprints = database.reads.fingerprints.iter();
        fingerprints
            .filter_map(|one| Some((one, one.latency.as_ref()?)))
            .take(ROWS_MAX)
            .collect()
    }

    fn left_out(self, all: usize) -> usize {
        all.saturating_sub(ROWS_MAX)
    }

    /// Mismatches of reads and of rehearsed writes.
    fn found(self, report: &Report) -> [u64; 2] {
        let databases = report.databases.iter();
        let writes = databases
            .flat_map(|database| &database.mismatches)
            .flat_map(|one| &one.kinds)
            .filter(|(kind, _)| kind.is_write())
            .map(|(_, count)| count)
            .sum();
        [report.overall.mismatched, writes]
    }

    fn compared_writes(self, report: &Report) -> u64 {
        let writes = report.databases.iter().filter_map(|database| database.writes.as_ref());
        writes.map(|writes| writes.totals.counts.compared).sum()
    }

    /// `1.5 s`, `3 min`, `2 h`
    fn long(self, seconds: &Option<f64>) -> String {
        match *seconds {
            None => "–".into(),
            Some(seconds) if seconds < 120.0 => format!("{seconds:.1} s"),
            Some(seconds) if seconds < 7200.0 => format!("{:.0} min", seconds / 60.0),
            Some(seconds) => format!("{:.1} h", seconds / 3600.0),
        }
    }

    /// How often no proxy ran, and for how long in all.
    fn blind(self, report: &Report) -> (usize, Option<f64>) {
        let gaps: Vec<f64> = report.runs.iter().filter_map(|run| run.blind_seconds).collect();
        (gaps.len(), Some(gaps.iter().sum()))
    }

    fn killed(self, report: &Report) -> usize {
        report.runs.iter().filter(|run| run.ended == Ended::Killed).count()
    }

    fn ended(self, run: &Run) -> &'static str {
        match run.ended {
            Ended::Running => "runs",
            Ended::Stopped => "stopped in order",
            Ended::Killed => "killed: what it counted after its last line of statistics is lost",
            Ended::Unknown => "not told: it runs, or was killed",
        }
    }

    /// A log's line; with the log's place in the list where there are several.
    fn line(self, report: &Report, log: &usize, line: &Option<u64>) -> String {
        line.map_or_else(|| "–".into(), |line| self.numbered(report, log, &line))
    }

    fn numbered(self, report: &Report, log: &usize, line: &u64) -> String {
        if report.other_logs.is_empty() {
            line.to_string()
        } else {
            format!("{}:{line}", log + 1)
        }
    }

    fn of_share(self, share: &Share) -> String {
        let mut text = format!("{} %", share.percent);
        if share.percent > 0.0 && share.percent < 100.0 {
            text.push_str(&format!(" by {}", self.words(&share.key)));
        }
        for rule in &share.rules {
            let conditions: Vec<String> = [
                ("fingerprint", &rule.fingerprint),
                ("table", &rule.table),
                ("user", &rule.user),
                ("application", &rule.application_name),
            ]
            .into_iter()
            .filter_map(|(what, of)| Some(format!("{what} {}", self.visible(of.as_ref()?))))
            .collect();
            text.push_str(&format!("; {} % of {}", rule.percent, conditions.join(", ")));
        }
        text
    }

    fn open(self, report: &Report) -> u64 {
        let databases = report.databases.iter();
        databases
            .flat_map(|database| &database.mismatches)
            .map(|one| one.open)
            .sum()
    }

    fn abandoned(self, flip: &Flip) -> bool {
        !matches!(flip.outcome.as_str(), "done" | "rehearsed" | "under way")
    }

    fn only_logged(self, report: &Report) -> usize {
        report.flips.iter().filter(|one| !one.in_databases).count()
    }

    fn steps(self, database: &Database) -> Option<Steps> {
        plot::steps(&database.reads)
    }

    fn pairs(self, database: &Database) -> Option<Pairs> {
        plot::pairs(&database.reads)
    }

    fn width(self) -> f64 {
        plot::WIDTH
    }

    fn sides(self, database: &Database) -> [(&'static str, &SideHistory); 2] {
        [("legacy", &database.legacy), ("new", &database.new)]
    }

    fn executions(self, report: &Report) -> u64 {
        report.databases.iter().map(|one| one.reads.coverage.executions).sum()
    }

    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    fn coverage(self, report: &Report) -> String {
        let coverage = report.databases.iter().map(|one| &one.reads.coverage);
        let (compared, all) = coverage.fold((0, 0), |(compared, all), one| {
            (compared + one.executions_compared, all + one.executions)
        });
        match all {
            0 => "–".into(),
            all => self.share(&(compared as f64 / all as f64)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_looks_better_than_it_is() {
        assert_eq!(Say.share(&1.0), "100\u{a0}%");
        assert_eq!(Say.share(&0.999_999_999), "99.9999\u{a0}%");
        assert_eq!(Say.share(&0.9995), "99.95\u{a0}%");
        assert_eq!(Say.share(&0.129), "12.9\u{a0}%");
        assert_eq!(Say.bound(&Rate::new(10_000, 0)), "0.030\u{a0}%");
        assert_eq!(Say.bound(&Rate::new(100, 1)), "4.7\u{a0}%");
        assert_eq!(Say.bound(&Rate::new(3, 3)), "100\u{a0}%");
        assert_eq!(Say.bound(&Rate::new(0, 0)), "–");
        assert_eq!(Say.number(1_234_567_u64), "1,234,567");
    }

    #[test]
    fn nothing_is_hidden() {
        assert_eq!(
            Say.visible("select 'a\u{202e}b', 'ü\u{0}'\r\n from \"日本\""),
            "select 'a\\u{202e}b', 'ü\\u{0}'\n from \"日本\""
        );
    }

    #[test]
    fn a_cell_is_no_markup() {
        assert_eq!(
            Say.cell("select a | b,\n  c from <t> where `d` = *"),
            "select a \\| b, c from &lt;t> where \\`d\\` = \\*"
        );
    }
}
