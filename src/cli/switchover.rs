//! `pgtandem switchover --to new|legacy [--dry-run|--rehearse]`, `switchover --history`

use super::{print_json, say};
use crate::admin::api::{Flip, Gate, History, InTheWay, Kind, SwitchoverAnswer, SwitchoverRequest};
use crate::admin::client::{AdminClient, AdminError};

pub(super) async fn run(client: &AdminClient, json: bool, request: SwitchoverRequest) -> anyhow::Result<bool> {
    let (dry_run, rehearse) = (request.dry_run, request.rehearse);
    let answer: SwitchoverAnswer = match client.post("/api/v1/switchover", &request).await {
        Ok(answer) => answer,
        Err(AdminError::Refused(why)) => {
            if json {
                print_json(&serde_json::json!({ "error": why }))?;
            } else {
                let what = if rehearse { "rehearsed" } else { "switched over" };
                eprintln!("not {what}: {why}");
            }
            return Ok(false);
        }
        Err(other) => return Err(other.into()),
    };
    let open = answer.gates.iter().all(|gate| gate.open);
    if json {
        print_json(&answer)?;
    } else {
        print_gates(&answer.gates);
        match &answer.flip {
            Some(flip) => print_flip(flip),
            None if dry_run => say(&format!(
                "dry run: {}",
                if open {
                    "the flip could begin"
                } else {
                    "a gate is closed"
                }
            )),
            None => say("nothing was changed: a gate is closed (--force --reason TEXT passes it, and is recorded)"),
        }
    }
    Ok(if dry_run { open } else { answer.done })
}

pub(super) async fn history(client: &AdminClient, json: bool) -> anyhow::Result<bool> {
    let history: History = client.get("/api/v1/switchover").await?;
    if json {
        print_json(&history)?;
    } else if history.flips.is_empty() {
        say("no switchover and no rehearsal is recorded");
    } else {
        // The latest is what the reader's eye falls on.
        for flip in history.flips.iter().rev() {
            print_flip(flip);
            say("");
        }
    }
    Ok(true)
}

pub(super) fn print_gates(gates: &[Gate]) {
    let width = gates.iter().map(|gate| gate.name.len()).max().unwrap_or(0);
    for gate in gates {
        let verdict = if gate.open { "open  " } else { "CLOSED" };
        say(&format!(
            "  {verdict}  {:width$}  {} (required: {})",
            gate.name, gate.measured, gate.required
        ));
    }
}

pub(super) fn print_flip(flip: &Flip) {
    let what = match flip.kind {
        Kind::Flip => "switchover",
        Kind::Rehearsal => "rehearsal of a switchover",
    };
    say(&format!(
        "{what} to {} at {} (epoch {}, ordered by {}, led by {}): {}; transactions were held for {:.0} ms, {} sessions carried over, {} ended",
        flip.to,
        flip.at,
        flip.epoch,
        flip.by.as_deref().unwrap_or("somebody"),
        flip.coordinator,
        flip.outcome,
        flip.held_ms,
        flip.sessions_carried,
        flip.sessions_ended
    ));
    for step in &flip.steps {
        let held = if step.held { "held" } else { "    " };
        say(&format!("  {:>8.1} ms  {held}  {:9}  {}", step.ms, step.name, step.at));
    }
    if let Some(reason) = &flip.forced {
        say(&format!("  forced: {reason}"));
    }
    for proxy in &flip.fenced_out {
        say(&format!("  fenced out, since it did not answer: {proxy}"));
    }
    for InTheWay {
        proxy,
        user,
        application,
        reason,
    } in &flip.in_the_way
    {
        say(&format!("  in the way: {user} ({application}) on {proxy}: {reason}"));
    }
}
