//! `pgtandem quarantine list|retry|discard`

use clap::{Args, Subcommand};

use super::{Common, Output, client, print_json, say};
use crate::admin::api::{DiscardRequest, QuarantineAnswer, QuarantineEntry, QuarantineList, RetryRequest};
use crate::admin::client::{AdminClient, AdminError};

#[derive(Subcommand)]
pub(super) enum Action {
    /// Show what the secondary refused and what follows it. Exit 1 when there is any.
    List {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
    },
    /// Apply what is held, in order: all, or one entry with those it depends on. Exit 1 when not
    /// all of it was applied. Where mirroring had stopped it goes on.
    Retry {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        /// The entry; without it all.
        id: Option<i64>,
        /// Where there are several.
        #[arg(long, value_name = "NAME")]
        database: Option<String>,
    },
    /// Drop one entry for good; its tables then count as diverged. Exit 1 when there is no such.
    Discard {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: Output,
        id: i64,
        /// Why; it is recorded.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Where there are several.
        #[arg(long, value_name = "NAME")]
        database: Option<String>,
    },
}

pub(super) async fn run(action: Action) -> anyhow::Result<bool> {
    match action {
        Action::List { common, output } => list(&client(&common)?, output.json).await,
        Action::Retry {
            common,
            output,
            id,
            database,
        } => {
            let request = RetryRequest {
                database,
                id,
                actor: actor(),
            };
            let answer = client(&common)?.post("/api/v1/quarantine/retry", &request).await;
            said(answer, output.json, "applied")
        }
        Action::Discard {
            common,
            output,
            id,
            reason,
            database,
        } => {
            let request = DiscardRequest {
                database,
                id,
                actor: actor(),
                reason,
            };
            let answer = client(&common)?.post("/api/v1/quarantine/discard", &request).await;
            said(answer, output.json, "discarded")
        }
    }
}

async fn list(client: &AdminClient, json: bool) -> anyhow::Result<bool> {
    let list: QuarantineList = client.get("/api/v1/quarantine").await?;
    if json {
        print_json(&list)?;
    } else if list.entries.is_empty() {
        say("the quarantine is empty");
    } else {
        list.entries.iter().for_each(print);
        say(
            "mend the secondary and `pgtandem quarantine retry [ID]`, or `pgtandem quarantine discard ID --reason TEXT`",
        );
    }
    Ok(list.entries.is_empty())
}

fn print(held: &QuarantineEntry) {
    let entry = &held.entry;
    let xid = entry
        .xid
        .as_deref()
        .map_or_else(String::new, |xid| format!(", transaction {xid}"));
    say(&format!(
        "{:>6}  {}  database {}{xid}: {} changes of {}",
        entry.id,
        entry.held_at,
        held.database,
        entry.changes,
        entry.tables.join(", ")
    ));
    let state = entry
        .sqlstate
        .as_deref()
        .map_or_else(String::new, |code| format!(" ({code})"));
    let again = match entry.attempts {
        0 => String::new(),
        attempts => format!("; tried again {attempts} times"),
    };
    say(&format!("        {}{state}{again}", entry.error));
    if let Some(detail) = entry.detail.as_ref().and_then(|detail| detail.split_once("DETAIL: ")) {
        say(&format!("        {}", detail.1));
    }
    for statement in &entry.statements {
        say(&format!("        {statement}"));
    }
    for (table, key) in &entry.keys {
        say(&format!("        {table} {key}"));
    }
}

fn said(answer: Result<QuarantineAnswer, AdminError>, json: bool, done: &str) -> anyhow::Result<bool> {
    let answer = match answer {
        Ok(answer) => answer,
        Err(AdminError::Refused(why)) => {
            if json {
                print_json(&serde_json::json!({ "error": why }))?;
            } else {
                eprintln!("nothing was {done}: {why}");
            }
            return Ok(false);
        }
        Err(other) => return Err(other.into()),
    };
    if json {
        print_json(&answer)?;
        return Ok(answer.done);
    }
    for (database, outcome) in &answer.databases {
        say(&format!("database {database}: {} {done}", outcome.done.len()));
        for (id, error) in &outcome.refused {
            say(&format!("  {id} was refused again: {error}"));
        }
        for id in &outcome.left {
            say(&format!("  {id} was left: it depends on one that is still held"));
        }
    }
    if !answer.done
        && answer
            .databases
            .values()
            .all(|outcome| outcome.refused.is_empty() && outcome.left.is_empty())
    {
        say("there is no such entry");
    }
    Ok(answer.done)
}

/// Somebody's word that what was found may stand.
#[derive(Args)]
pub(super) struct Word {
    /// Why they may stand.
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
    /// Who says so; otherwise PGTANDEM_ACTOR or the user at the keyboard.
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
}

impl Word {
    pub(super) fn by(&self) -> String {
        self.by.clone().unwrap_or_else(actor)
    }
}

/// Who is at the keyboard, as far as the environment says.
pub(super) fn actor() -> String {
    ["PGTANDEM_ACTOR", "SUDO_USER", "USER", "LOGNAME"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        .unwrap_or_else(|| "unknown".into())
}
