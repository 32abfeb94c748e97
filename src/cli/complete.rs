//! `pgtandem complete --yes`

use super::change_phase;
use crate::admin::api::Status;
use crate::admin::client::AdminClient;
use crate::control::Phase;

pub(super) async fn run(client: &AdminClient, json: bool, yes: bool) -> anyhow::Result<bool> {
    if !yes {
        return refuse(client).await;
    }
    change_phase(client, "/api/v1/complete", json, ["phase", "not completed"]).await
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
