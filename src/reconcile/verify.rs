//! Compares a table in a round's own snapshot on the primary and in one taken right after that
//! round on the secondary: exact while applications write. The applier stands still only until
//! both snapshots are taken. Equal at one cut is equal at every later one, since every round is
//! exact; so an equal table becomes `synced`.

use tokio_postgres::Client;

use crate::apply::{Applier, ApplierState, Seeding, Stopped, TableStatus};
use crate::catalog::{PINNED_SETTINGS, quote};
use crate::config::Target;
use crate::upstream::control::{ConnectError, Control, connect, error_chain};

#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{}", error_chain(.0))]
    Postgres(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Stopped(#[from] Stopped),
    #[error("the cut was released before both snapshots were taken")]
    TooSlow,
}

/// Compares every table that is not synced and not paused, one cut each; returns the names of
/// those that were found equal.
pub async fn verify_unseeded(
    applier: &Applier,
    primary: &Target,
    secondary: &Target,
) -> Result<Vec<String>, VerifyError> {
    until_it_applies(applier).await?;
    // A first round has read the tables.
    applier.round_after_now().await?;
    let unseeded: Vec<TableStatus> = applier
        .status()
        .borrow()
        .tables
        .iter()
        .filter(|table| table.seeding == Seeding::Unseeded && table.paused.is_none())
        .cloned()
        .collect();
    let mut equal = Vec::new();
    for table in unseeded {
        let name = format!("{}.{}", table.schema, table.name);
        if is_equal_at_a_cut(applier, primary, secondary, &table).await? {
            mark_synced(secondary, &table).await?;
            applier.tables_changed();
            equal.push(name);
        } else {
            tracing::warn!(
                table = name,
                "the two sides differ in rows that were there before mirroring; it needs seeding"
            );
        }
    }
    Ok(equal)
}

/// Only the proxy that applies can hold a cut; another one compares when it comes to apply.
async fn until_it_applies(applier: &Applier) -> Result<(), Stopped> {
    let mut status = applier.status();
    let decided = status
        .wait_for(|status| matches!(status.state, ApplierState::Running | ApplierState::Stopped))
        .await
        .map_err(|_| Stopped)?;
    match decided.state {
        ApplierState::Running => Ok(()),
        _ => Err(Stopped),
    }
}

async fn is_equal_at_a_cut(
    applier: &Applier,
    primary: &Target,
    secondary: &Target,
    table: &TableStatus,
) -> Result<bool, VerifyError> {
    let primary = reader(primary).await?;
    let secondary = reader(secondary).await?;
    let held = applier.cut().await?;
    let import = format!("SET TRANSACTION SNAPSHOT '{}'", held.primary_snapshot);
    primary.batch_execute(&import).await?;
    secondary.batch_execute("SELECT 1").await?;
    if !held.still_held() {
        return Err(VerifyError::TooSlow);
    }
    drop(held);
    let sql = digest_sql(&primary, table).await?;
    let (here, there) = tokio::try_join!(digest(&primary, &sql), digest(&secondary, &sql))?;
    Ok(here == there)
}

async fn reader(target: &Target) -> Result<Control, VerifyError> {
    let client = connect(target, "verify").await?;
    client.batch_execute(PINNED_SETTINGS).await?;
    client
        .batch_execute(
            "SET row_security = off; SET statement_timeout = 0; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        )
        .await?;
    Ok(client)
}

/// Rows and the sum of their hashes, over the columns in order of their names: the two sides may
/// have them in another order.
async fn digest_sql(primary: &Client, table: &TableStatus) -> Result<String, tokio_postgres::Error> {
    let rows = primary
        .query(
            "SELECT a.attname::text FROM pg_catalog.pg_attribute a
               JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
               JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
              WHERE n.nspname = $1 AND c.relname = $2 AND a.attnum > 0 AND NOT a.attisdropped
              ORDER BY a.attname",
            &[&table.schema, &table.name],
        )
        .await?;
    let columns: Vec<String> = rows
        .iter()
        .map(|row| format!("t.{}", quote::identifier(row.get(0))))
        .collect();
    Ok(format!(
        "SELECT count(*), COALESCE(sum(('x' || substr(md5(ROW({})::text), 1, 16))::bit(64)::bigint::numeric), 0)::text FROM ONLY {} AS t",
        columns.join(", "),
        quote::qualified(&table.schema, &table.name)
    ))
}

async fn digest(client: &Client, sql: &str) -> Result<(i64, String), tokio_postgres::Error> {
    let row = client.query_one(sql, &[]).await?;
    Ok((row.get(0), row.get(1)))
}

/// Unless something happened to the table since it was looked at.
async fn mark_synced(secondary: &Target, table: &TableStatus) -> Result<(), VerifyError> {
    let client = connect(secondary, "verify").await?;
    client
        .execute(
            "UPDATE pgtandem.seeding SET state = 'synced', note = NULL
              WHERE schema = $1 AND name = $2 AND state = 'unseeded' AND paused IS NULL AND note IS NOT DISTINCT FROM $3",
            &[&table.schema, &table.name, &table.note],
        )
        .await?;
    Ok(())
}
