//! Puts capture on every table that can have it, with locks short enough that no application
//! queues behind them.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::state::change;
use super::{JournalError, SideRole, doing};
use crate::catalog::{Oid, privileges, quote};
use crate::config::StrayWriters;

/// A waiting lock request holds up the application behind it for at most this long.
const LOCK_TIMEOUT_MS: u32 = 100;
const ATTEMPTS: u32 = 5;

/// What [`capture_tables`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CaptureReport {
    /// Tables captured from now on.
    pub new: Vec<Oid>,
    /// Tables that were captured before, whose triggers had been dropped or switched off:
    /// changes in between are lost to the journal, so they need seeding.
    pub again: Vec<Oid>,
    /// Tables whose lock could not be had; the caller tries again later.
    pub busy: Vec<String>,
    /// Tables that cannot be captured, and why.
    pub failed: Vec<(String, String)>,
    /// What a DBA must run, where the proxy's role lacks privileges.
    pub sql_for_dba: Vec<String>,
}

/// Captures every table that lacks it.
pub async fn capture_tables(client: &Client) -> Result<CaptureReport, JournalError> {
    let mut report = CaptureReport::default();
    let rows = client
        .query(
            "SELECT s.rel, s.schema, s.name, pg_catalog.pg_has_role(c.relowner, 'USAGE')
               FROM pgtandem.shape s JOIN pg_catalog.pg_class c ON c.oid = s.rel
              WHERE s.extension IS NULL AND NOT s.capturing ORDER BY s.rel",
            &[],
        )
        .await
        .map_err(doing("list tables without capture"))?;
    for row in &rows {
        let (rel, schema, name, owned): (Oid, &str, &str, bool) = (row.get(0), row.get(1), row.get(2), row.get(3));
        let table = quote::qualified(schema, name);
        if !owned {
            report.failed.push((
                table,
                "the proxy's role does not own it, nor is a member of its owner".into(),
            ));
            continue;
        }
        match capture(client, rel).await? {
            Outcome::Captured(answer) if answer == "new" => report.new.push(rel),
            Outcome::Captured(answer) if answer == "again" => report.again.push(rel),
            Outcome::Captured(_) | Outcome::Gone => {}
            Outcome::Busy => report.busy.push(table),
            Outcome::Failed(error) => report.failed.push((table, error)),
        }
    }
    if !report.failed.is_empty() {
        report.sql_for_dba = privileges::missing_ownership(client)
            .await
            .map_err(doing("check ownership"))?;
    }
    Ok(report)
}

enum Outcome {
    Captured(String),
    Gone,
    Busy,
    Failed(String),
}

async fn capture(client: &Client, rel: Oid) -> Result<Outcome, JournalError> {
    for attempt in 0..ATTEMPTS {
        let text = format!(
            "BEGIN; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; SET LOCAL synchronous_commit = on; SELECT pgtandem.capture({rel}); COMMIT"
        );
        let error = match client.simple_query(&text).await {
            Ok(messages) => {
                let answer = messages.iter().find_map(|message| match message {
                    tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                    _ => None,
                });
                return Ok(Outcome::Captured(answer.unwrap_or_default()));
            }
            Err(error) => error,
        };
        if client.is_closed() {
            return Err(doing("capture a table")(error));
        }
        client
            .batch_execute("ROLLBACK")
            .await
            .map_err(doing("capture a table"))?;
        match error.code() {
            Some(code) if *code == SqlState::UNDEFINED_TABLE => return Ok(Outcome::Gone),
            Some(code) if *code == SqlState::LOCK_NOT_AVAILABLE || *code == SqlState::T_R_DEADLOCK_DETECTED => {
                tokio::time::sleep(Duration::from_millis(50) * (attempt + 1)).await;
            }
            _ => return Ok(Outcome::Failed(crate::upstream::control::error_chain(&error))),
        }
    }
    Ok(Outcome::Busy)
}

/// Sets what the secondary does with stray writers, where it differs from what is recorded.
pub async fn refuse_or_report(client: &mut Client, strays: StrayWriters) -> Result<(), JournalError> {
    change(client, |state| {
        if matches!(state.side.role, SideRole::Secondary { .. }) {
            state.side.role = SideRole::Secondary { strays };
        }
    })
    .await
}
