//! `pgtandem verify` and `pgtandem repair`: events of the running proxy, shown as they come.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use super::status::human_bytes;
use super::{client, print_line, quarantine::actor, say};
use crate::admin::api::VerifyRequest;
use crate::reconcile::report::{
    DatabaseReport, DifferenceKind, Event, SequenceReport, TableReport, TableResult, VerificationReport,
};

/// Differing rows of a table that are shown on a terminal; the report file has more.
const SHOWN_MAX: usize = 20;

#[derive(Args)]
pub(super) struct Which {
    /// Only this database.
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
    /// Only this table (schema.name, or a name that is there once); may be repeated. Without it
    /// all tables and sequences.
    #[arg(long, value_name = "NAME")]
    table: Vec<String>,
    /// Connections to each server.
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Rows per second on each server, at most.
    #[arg(long, value_name = "ROWS")]
    rate: Option<u64>,
    /// How differing rows are shown: by their hash, or as they are. Keys are always shown.
    #[arg(long, value_name = "HOW", default_value = "hashed")]
    values: Values,
    /// Write what was compared, at which cuts and with which result to this file (JSON).
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Values {
    Hashed,
    Plain,
}

/// What is done with differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    Verify,
    /// Say what would be mended.
    DryRun,
    Repair,
}

/// True where both sides are equal at the end.
pub(super) async fn run(common: &super::Common, json: bool, which: Which, doing: Doing) -> anyhow::Result<bool> {
    let request = VerifyRequest {
        database: which.database,
        tables: which.table,
        plain: which.values == Values::Plain,
        workers: which.workers,
        rate: which.rate,
        actor: Some(actor()),
    };
    let path = match doing {
        Doing::Verify | Doing::DryRun => "/api/v1/verify",
        Doing::Repair => "/api/v1/repair",
    };
    let mut heard = Heard {
        json,
        doing,
        bar: ProgressBar::hidden(),
        done: Vec::new(),
        failed: None,
    };
    let asked = client(common)?
        .post_for_lines(path, &request, |event| heard.event(event))
        .await;
    heard.bar.finish_and_clear();
    asked?;
    if let Some(error) = heard.failed {
        bail!(error);
    }
    if heard.done.is_empty() {
        bail!("the proxy stopped before it was done");
    }
    let report = VerificationReport::of(heard.done);
    if let Some(file) = which.report {
        write(&file, &report)?;
        if !json {
            say(&format!("report written to {}", file.display()));
        }
    }
    Ok(report.equal)
}

fn write(file: &Path, report: &VerificationReport) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
}

/// What was heard so far.
struct Heard {
    json: bool,
    doing: Doing,
    /// Hidden where stderr is no terminal.
    bar: ProgressBar,
    done: Vec<DatabaseReport>,
    failed: Option<String>,
}

impl Heard {
    fn event(&mut self, event: Event) {
        if self.json {
            print_line(&event);
        }
        match event {
            Event::Begun { ranges, .. } if !self.json => {
                self.bar.finish_and_clear();
                self.bar = ProgressBar::new(ranges);
                let style =
                    ProgressStyle::with_template("{bar:30} {pos}/{len} ranges  {msg}  {elapsed} of about {duration}");
                if let Ok(style) = style {
                    self.bar.set_style(style);
                }
            }
            Event::Progress { table, rows, .. } => {
                self.bar.inc(1);
                self.bar.set_message(format!("{rows} rows  {table}"));
            }
            Event::Table { table, .. } if !self.json => self.bar.suspend(|| print_table(&table, self.doing)),
            Event::Mended {
                table,
                round,
                deleted,
                inserted,
                ..
            } if !self.json => self.bar.suspend(|| {
                say(&format!(
                    "{table}: mended at the cut of round {round}: {deleted} rows deleted, {inserted} written"
                ));
            }),
            Event::Done { report } => {
                if !self.json {
                    self.bar.finish_and_clear();
                    print_end(&report);
                }
                self.done.push(*report);
            }
            Event::Failed { database, error } => self.failed = Some(format!("database {database}: {error}")),
            Event::Begun { .. } | Event::Table { .. } | Event::Mended { .. } => {}
        }
    }
}

fn print_table(table: &TableReport, doing: Doing) {
    let name = table.qualified();
    match table.result {
        TableResult::NotCompared => {
            let why = table.note.as_deref().unwrap_or("it was not read to the end");
            say(&format!("{name}: not compared: {why}"));
            return;
        }
        TableResult::Equal => say(&format!("{name}: equal; {}", measured(table))),
        TableResult::Different => say(&format!(
            "{name}: {} rows differ ({} missing, {} extra, {} different); {}",
            table.differing.total(),
            table.differing.missing,
            table.differing.extra,
            table.differing.different,
            measured(table)
        )),
    }
    if table.now_synced {
        say("    synced from here on");
    }
    if let Some(note) = &table.note {
        say(&format!("    {note}"));
    }
    for row in table.differing_rows.iter().take(SHOWN_MAX) {
        let what = match (row.kind, doing) {
            (DifferenceKind::Missing, Doing::DryRun) => "would be inserted",
            (DifferenceKind::Extra, Doing::DryRun) => "would be deleted",
            (DifferenceKind::Different, Doing::DryRun) => "would be replaced",
            (DifferenceKind::Missing, _) => "missing",
            (DifferenceKind::Extra, _) => "extra",
            (DifferenceKind::Different, _) => "different",
        };
        let key = row
            .key
            .as_ref()
            .map_or_else(String::new, |key| format!(" ({})", key.join(",")));
        let side = |side: &str, value: &Option<String>| {
            value
                .as_ref()
                .map_or_else(String::new, |value| format!("  {side} {value}"))
        };
        say(&format!(
            "    {what}{key}{}{}",
            side("primary", &row.primary),
            side("secondary", &row.secondary)
        ));
    }
    let left = (table.differing.total() as usize).saturating_sub(table.differing_rows.len().min(SHOWN_MAX));
    if left > 0 {
        say(&format!("    and {left} more"));
    }
}

fn measured(table: &TableReport) -> String {
    format!(
        "{} rows, {}, {} ranges, {:.1} s, {:.0} rows/s",
        table.rows,
        human_bytes(table.bytes),
        table.ranges,
        table.duration_ms / 1000.0,
        table.rows_per_second
    )
}

fn print_end(report: &DatabaseReport) {
    for sequence in report.sequences.iter().filter(|sequence| !sequence.equal) {
        say(&sequence_line(sequence));
    }
    for object in &report.not_mirrored {
        say(&format!("not mirrored, not compared: {object}"));
    }
    let count = |result: TableResult| report.tables.iter().filter(|table| table.result == result).count();
    let behind = report.sequences.iter().filter(|sequence| !sequence.equal).count();
    say(&format!(
        "database {}: {} tables equal, {} different, {} not compared; {} sequences equal, {behind} different; {} cuts",
        report.database,
        count(TableResult::Equal),
        count(TableResult::Different),
        count(TableResult::NotCompared),
        report.sequences.len() - behind,
        report.cuts.len()
    ));
}

fn sequence_line(sequence: &SequenceReport) -> String {
    let value = |value: Option<(i64, bool)>| match value {
        None => "absent".to_owned(),
        Some((last, true)) => last.to_string(),
        Some((last, false)) => format!("{last} (not given out)"),
    };
    format!(
        "sequence {}.{}: {}: primary {}, secondary {}",
        sequence.schema,
        sequence.name,
        if sequence.behind { "behind" } else { "different" },
        value(sequence.primary),
        value(sequence.secondary)
    )
}
