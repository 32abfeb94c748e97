//! `pgtandem backfill`: starts the job in the running proxy and shows how it goes. Ending this
//! command ends nothing; run again, it shows the same job.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::status::human_bytes;
use super::{print_json, say};
use crate::admin::api::{BackfillAnswer, BackfillCancelRequest, BackfillRequest};
use crate::admin::client::{AdminClient, AdminError};
use crate::reconcile::backfill::{BackfillStatus, BackfillTable, Order};

/// Between two looks at it, for a person and for a log.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const LINE_EVERY: Duration = Duration::from_secs(1);

/// Bars for so many tables at once; the others wait or are done.
const BARS_MAX: usize = 8;

pub(super) struct Arguments {
    pub database: Option<String>,
    pub order: Order,
    pub cancel: bool,
}

pub(super) async fn run(client: &AdminClient, json: bool, arguments: Arguments) -> anyhow::Result<bool> {
    let Arguments {
        database,
        order,
        cancel,
    } = arguments;
    let asked: Result<BackfillAnswer, AdminError> = if cancel {
        let request = BackfillCancelRequest { database };
        client.post("/api/v1/backfill/cancel", &request).await
    } else {
        let request = BackfillRequest { database, order };
        client.post("/api/v1/backfill", &request).await
    };
    let answer = match asked {
        Ok(answer) => answer,
        Err(AdminError::Refused(why)) => {
            if json {
                print_json(&serde_json::json!({ "error": why }))?;
            } else {
                eprintln!("not {}: {why}", if cancel { "cancelled" } else { "started" });
            }
            return Ok(false);
        }
        Err(other) => return Err(other.into()),
    };
    if cancel {
        if json {
            print_json(&answer)?;
        } else {
            tell_all(&answer);
        }
        return Ok(true);
    }
    let chosen: Vec<String> = answer.databases.keys().cloned().collect();
    let ended = if json || !std::io::stdout().is_terminal() {
        follow_in_lines(client, &chosen).await?
    } else {
        follow_in_bars(client, &chosen).await?
    };
    if !json {
        tell_all(&ended);
    }
    Ok(ended.databases.values().all(|status| status.state == "done"))
}

async fn look(client: &AdminClient, chosen: &[String]) -> Result<BackfillAnswer, AdminError> {
    let mut answer: BackfillAnswer = client.get("/api/v1/backfill").await?;
    answer.databases.retain(|name, _| chosen.contains(name));
    Ok(answer)
}

fn is_running(answer: &BackfillAnswer) -> bool {
    answer.databases.values().any(BackfillStatus::is_running)
}

/// A JSON document a line, until it has ended.
async fn follow_in_lines(client: &AdminClient, chosen: &[String]) -> anyhow::Result<BackfillAnswer> {
    loop {
        let answer = look(client, chosen).await?;
        say(&serde_json::to_string(&answer)?);
        if !is_running(&answer) {
            return Ok(answer);
        }
        tokio::time::sleep(LINE_EVERY).await;
    }
}

async fn follow_in_bars(client: &AdminClient, chosen: &[String]) -> anyhow::Result<BackfillAnswer> {
    let mut bars = Bars::new()?;
    loop {
        let answer = look(client, chosen).await?;
        for (database, status) in &answer.databases {
            bars.show(database, status);
        }
        if !is_running(&answer) {
            bars.all.clear()?;
            return Ok(answer);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// One bar in all, and one for each table that is being copied.
struct Bars {
    all: MultiProgress,
    style: ProgressStyle,
    by_name: BTreeMap<String, ProgressBar>,
}

impl Bars {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            all: MultiProgress::new(),
            style: ProgressStyle::with_template("{prefix:28!} {bar:24} {percent:>3}%  {msg}")?,
            by_name: BTreeMap::new(),
        })
    }

    fn show(&mut self, database: &str, status: &BackfillStatus) {
        self.set(
            database.to_owned(),
            (status.counts.read, status.rows_expected),
            total_line(status),
        );
        for table in &status.tables {
            let name = format!("{database} {}", table.name);
            let shown =
                table.state == "copying" && (self.by_name.contains_key(&name) || self.by_name.len() <= BARS_MAX);
            if shown {
                self.set(name, (table.counts.read, table.rows_expected), table_line(table));
            } else if let Some(bar) = self.by_name.remove(&name) {
                bar.finish_and_clear();
                self.all.remove(&bar);
            }
        }
    }

    fn set(&mut self, name: String, (read, expected): (u64, u64), message: String) {
        let bar = self.by_name.entry(name).or_insert_with_key(|name| {
            let bar = self.all.add(ProgressBar::new(0).with_style(self.style.clone()));
            bar.set_prefix(name.clone());
            bar
        });
        // An estimate may be too low; a bar beyond its end would say nothing.
        bar.set_length(expected.max(read).max(1));
        bar.set_position(read);
        bar.set_message(message);
    }
}

pub(super) fn table_line(table: &BackfillTable) -> String {
    format!(
        "{} rows, {}, {:.0} rows/s{}",
        table.counts.read,
        human_bytes(table.counts.bytes),
        table.rows_per_second,
        left(table.remaining_seconds)
    )
}

/// Also a line of `pgtandem status`.
pub(super) fn total_line(status: &BackfillStatus) -> String {
    let slowed = status
        .slowed_by
        .as_ref()
        .map_or_else(String::new, |why| format!("; waits: {why}"));
    format!(
        "{} of about {} rows, {}, {:.0} rows/s ({}/s){}{slowed}",
        status.counts.read,
        status.rows_expected,
        human_bytes(status.counts.bytes),
        status.rows_per_second,
        human_bytes(status.bytes_per_second as u64),
        left(status.remaining_seconds)
    )
}

fn left(seconds: Option<f64>) -> String {
    match seconds {
        None => String::new(),
        Some(seconds) if seconds < 90.0 => format!(", about {seconds:.0} s left"),
        Some(seconds) if seconds < 5400.0 => format!(", about {:.0} min left", seconds / 60.0),
        Some(seconds) => format!(", about {:.1} h left", seconds / 3600.0),
    }
}

fn tell_all(answer: &BackfillAnswer) {
    for (database, status) in &answer.databases {
        tell(database, status);
    }
}

fn tell(database: &str, status: &BackfillStatus) {
    let note = status
        .note
        .as_ref()
        .map_or_else(String::new, |note| format!(": {note}"));
    say(&format!("database {database}: {}{note}", status.state));
    let counts = status.counts;
    say(&format!(
        "  {} rows read, {} written, {} skipped (mirrored meanwhile), {} refused by the new side; {}",
        counts.read,
        counts.written,
        counts.skipped,
        counts.failed,
        human_bytes(counts.bytes)
    ));
    for table in status.tables.iter().filter(|table| table.state != "done") {
        let note = table.note.as_ref().map_or_else(String::new, |note| format!(": {note}"));
        say(&format!("  {}: {}{note}", table.name, table.state));
    }
}
