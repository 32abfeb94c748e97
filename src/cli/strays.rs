//! `pgtandem strays`: who wrote to the secondary past pgtandem, and `strays ack`.

use clap::{Args, Subcommand};

use super::quarantine::Word;
use super::{Common, Output, client, print_json, say};
use crate::admin::api::{AcknowledgeStraysRequest, AcknowledgedStrays, StrayEntry, StrayList};

#[derive(Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    output: Output,
}

#[derive(Subcommand)]
enum Action {
    /// Record that all that are there were looked at. It mends nothing: `pgtandem verify` finds
    /// what they changed.
    Ack(Ack),
}

#[derive(Args)]
struct Ack {
    /// Of this database alone.
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
    #[command(flatten)]
    word: Word,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    output: Output,
}

pub(super) async fn run(arguments: Arguments) -> anyhow::Result<bool> {
    if let Some(Action::Ack(ack)) = arguments.action {
        return acknowledge(ack).await;
    }
    let list: StrayList = client(&arguments.common)?.get("/api/v1/strays").await?;
    if arguments.output.json {
        print_json(&list)?;
    } else if list.strays.is_empty() {
        say("no stray writers");
    } else {
        list.strays.iter().for_each(print);
        say(
            "`pgtandem verify` and `pgtandem repair` mend what they changed; `pgtandem strays ack --reason TEXT` records that they were looked at",
        );
    }
    Ok(list.strays.is_empty())
}

async fn acknowledge(ack: Ack) -> anyhow::Result<bool> {
    let request = AcknowledgeStraysRequest {
        database: ack.database,
        by: ack.word.by(),
        reason: ack.word.reason,
    };
    let answer: AcknowledgedStrays = client(&ack.common)?
        .post("/api/v1/strays/acknowledge", &request)
        .await?;
    if ack.output.json {
        print_json(&answer)?;
        return Ok(answer.log_error.is_none());
    }
    answer.acknowledged.iter().for_each(print);
    match (&answer.head, &answer.log_error) {
        (Some(head), _) => say(&format!("recorded as line #{} by {}", head.seq, request.by)),
        (None, Some(why)) => say(&format!(
            "recorded in the databases by {}; the mismatch log could not take it: {why}",
            request.by
        )),
        (None, None) => say("no stray writers"),
    }
    Ok(answer.log_error.is_none())
}

fn print(entry: &StrayEntry) {
    let stray = &entry.stray;
    let application = match stray.application.as_str() {
        "" => String::new(),
        name => format!(" ({name})"),
    };
    say(&format!(
        "{}  {}, {}: {}{application}, {} {} on {}",
        stray.last, entry.database, entry.side, stray.role, stray.writes, stray.operation, stray.table
    ));
}
