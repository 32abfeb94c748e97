//! A change that travels the reverse way before anybody is held: written to the new primary's
//! journal, read from there by snapshots as rounds are, and written to the old side as the
//! applier writes. What would keep the reverse direction from working, keeps this from arriving.

use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::catalog::quote::literal;
use crate::journal::read::window_sql;
use crate::journal::read_slot_state;
use crate::upstream::control::error_chain;

/// Sends one from `new`'s journal to `old`.
///
/// # Errors
/// Why the reverse direction would not work.
pub(super) async fn send(new: &Client, old: &Client) -> Result<Value, String> {
    let began = Instant::now();
    let token = format!("{:016x}", rand::random::<u64>());
    let before = snapshot(new).await?;
    write(new, &token).await?;
    let found = read(new, &before, &token).await;
    // It concerns no table: the reverse direction's own rounds begin behind it.
    new.batch_execute(&format!(
        "DELETE FROM {} WHERE rel = 'pgtandem.probe'::regclass",
        journal_of(new).await?
    ))
    .await
    .map_err(|error| {
        format!(
            "clear the probe from the new primary's journal: {}",
            error_chain(&error)
        )
    })?;
    let found = found?;
    if found != 1 {
        return Err(format!("the new primary's journal shows the probe {found} times"));
    }
    let there = apply(old, &token).await?;
    if there != token {
        return Err(format!("the old side holds \"{there}\" where the probe should be"));
    }
    Ok(json!({ "probe_ms": began.elapsed().as_secs_f64() * 1000.0 }))
}

async fn snapshot(client: &Client) -> Result<crate::catalog::snapshot::Snapshot, String> {
    let row = client
        .query_one("SELECT pg_catalog.pg_current_snapshot()::text", &[])
        .await
        .map_err(|error| format!("take a snapshot of the new primary: {}", error_chain(&error)))?;
    row.get::<_, &str>(0).parse().map_err(|error| format!("{error}"))
}

/// As a capture trigger would, into the slot that writers will use.
async fn write(new: &Client, token: &str) -> Result<(), String> {
    new.batch_execute(&format!(
        "SET synchronous_commit = on;
         INSERT INTO {} (rel, op, old, new) VALUES ('pgtandem.probe'::regclass, 'R', NULL, ROW(true, {})::text)",
        journal_of(new).await?,
        literal(token)
    ))
    .await
    .map_err(|error| format!("write to the new primary's journal: {}", error_chain(&error)))
}

async fn journal_of(new: &Client) -> Result<String, String> {
    let state = read_slot_state(new)
        .await
        .map_err(|error| error_chain(&error))?
        .ok_or("schema pgtandem is not installed on the new primary")?;
    Ok(format!("pgtandem.change_{}", state.slot))
}

async fn read(new: &Client, before: &crate::catalog::snapshot::Snapshot, token: &str) -> Result<i64, String> {
    let sql = format!(
        "SELECT count(*) FROM {} w WHERE w.rel = 'pgtandem.probe'::regclass AND w.new = ROW(true, {})::text",
        window_sql(before, None),
        literal(token)
    );
    let row = new
        .query_one(&sql, &[])
        .await
        .map_err(|error| format!("read the new primary's journal: {}", error_chain(&error)))?;
    Ok(row.get(0))
}

async fn apply(old: &Client, token: &str) -> Result<String, String> {
    let refused = |error: tokio_postgres::Error| format!("apply to the old side: {}", error_chain(&error));
    old.batch_execute(&format!(
        "BEGIN; SET LOCAL session_replication_role = replica; SET LOCAL synchronous_commit = on;
         INSERT INTO pgtandem.probe (token) VALUES ({}) ON CONFLICT (one) DO UPDATE SET token = EXCLUDED.token;
         COMMIT",
        literal(token)
    ))
    .await
    .map_err(refused)?;
    let row = old
        .query_one("SELECT token FROM pgtandem.probe", &[])
        .await
        .map_err(refused)?;
    Ok(row.get(0))
}
