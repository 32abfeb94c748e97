//! `pgtandem complete --yes`

use super::{print_json, say};
use crate::admin::api::{ReloadAnswer, Status};
use crate::admin::client::{AdminClient, AdminError};
use crate::control::Phase;

pub(super) async fn run(client: &AdminClient, json: bool, yes: bool) -> anyhow::Result<bool> {
    if !yes {
        return refuse(client).await;
    }
    let answer: ReloadAnswer = match client.post("/api/v1/complete", &()).await {
        Ok(answer) => answer,
        Err(AdminError::Refused(why)) => {
            if json {
                print_json(&serde_json::json!({ "error": why }))?;
            } else {
                eprintln!("not completed: {why}");
            }
            return Ok(false);
        }
        Err(other) => return Err(other.into()),
    };
    if json {
        print_json(&answer)?;
    } else {
        say(&format!("phase {}", answer.phase));
        for change in &answer.changed {
            say(&format!("  {change}"));
        }
    }
    Ok(true)
}

/// Says what it would do.
async fn refuse(client: &AdminClient) -> anyhow::Result<bool> {
    let status: Status = client.get("/api/v1/status").await?;
    let why = match status.phase {
        Phase::Switchover => {
            "it ends the way back: mirroring to legacy stops, and what pgtandem installed is removed from both sides. Repeat it with --yes"
        }
        Phase::Complete => "it is complete already",
        Phase::Initial | Phase::DualWrite | Phase::DualRead => "clients are still on legacy; switch over first",
    };
    eprintln!("not completed: {why}");
    Ok(false)
}
