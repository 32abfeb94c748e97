//! What `complete` leaves on legacy: without it, a proxy started later with an earlier phase
//! would find nothing recorded and take the stale legacy for the truth.

use tokio_postgres::Client;

use super::{JournalError, doing};

/// Whether this side carries the marker.
pub async fn is_completed(client: &Client) -> Result<bool, JournalError> {
    let row = client
        .query_one("SELECT to_regclass('pgtandem.completed') IS NOT NULL", &[])
        .await
        .map_err(doing("look for the marker of a completed migration"))?;
    Ok(row.get(0))
}

/// Leaves the marker; everything else has been removed.
pub async fn mark_completed(client: &Client) -> Result<(), JournalError> {
    client
        .batch_execute(
            "BEGIN;
             CREATE SCHEMA IF NOT EXISTS pgtandem;
             CREATE TABLE IF NOT EXISTS pgtandem.completed (at timestamptz NOT NULL DEFAULT now());
             INSERT INTO pgtandem.completed DEFAULT VALUES;
             COMMENT ON SCHEMA pgtandem IS 'pgtandem: this database was the legacy side of a migration that is complete; clients belong on the new one';
             COMMIT",
        )
        .await
        .map_err(doing("mark the migration as completed"))
}
