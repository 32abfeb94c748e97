//! `pgtandem switchover --to new|legacy`

use super::{print_json, say};
use crate::admin::api::{Flip, Gate, SwitchoverAnswer, SwitchoverRequest};
use crate::admin::client::{AdminClient, AdminError};
use crate::control::Side;

pub(super) async fn run(
    client: &AdminClient,
    json: bool,
    to: Side,
    dry_run: bool,
    force: Option<String>,
) -> anyhow::Result<bool> {
    let request = SwitchoverRequest { to, dry_run, force };
    let answer: SwitchoverAnswer = match client.post("/api/v1/switchover", &request).await {
        Ok(answer) => answer,
        Err(AdminError::Refused(why)) => {
            if json {
                print_json(&serde_json::json!({ "error": why }))?;
            } else {
                eprintln!("not switched over: {why}");
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
    say(&format!(
        "switchover to {} at {}: {}; transactions were held for {:.0} ms, {} sessions carried over, {} ended",
        flip.to, flip.at, flip.outcome, flip.held_ms, flip.sessions_carried, flip.sessions_ended
    ));
    for step in &flip.steps {
        say(&format!("  {:>8.1} ms  {}", step.ms, step.name));
    }
    if let Some(reason) = &flip.forced {
        say(&format!("  forced: {reason}"));
    }
}
