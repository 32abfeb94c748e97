//! What follows the rows: recorded on the new side by `schema copy`, built here once the rows of
//! the tables concerned are in. Each statement and the record that it was run are one transaction.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::upstream::control::error_chain;

/// How often a statement that met somebody else's locks is tried again, and how long it rests
/// before: rounds and clients' DDL hold theirs for moments.
const ATTEMPTS: u32 = 10;
const REST: Duration = Duration::from_millis(200);

/// Written by psql at the end of the first half.
pub(super) const TABLE: &str = "
CREATE SCHEMA IF NOT EXISTS pgtandem;
CREATE TABLE IF NOT EXISTS pgtandem.schema_rest (
    number integer PRIMARY KEY,
    name text NOT NULL,
    sql text NOT NULL,
    waits text[] NOT NULL,
    done_at timestamptz,
    note text
);
";

/// What became of the statements that were not run before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Built {
    pub built: usize,
    /// Names, with the error. They stay recorded, and are tried again.
    pub failed: Vec<(String, String)>,
    /// Rows of their tables are not in.
    pub waiting: usize,
}

/// Runs what can be run, in order. `finished` (`schema.name`) counts as a table whose rows are in,
/// besides those that are synced. Where nothing is `mirrored`, nothing is waited for: whoever asks
/// has brought the rows, or wants no backfill.
///
/// # Errors
/// Of the connection, and those that pass by themselves (a lock that somebody holds) but have not
/// in [`ATTEMPTS`].
pub async fn build(
    client: &mut Client,
    finished: Option<&str>,
    mirrored: bool,
) -> Result<Built, tokio_postgres::Error> {
    let mut built = Built::default();
    let Some(missing_rows) = tables_without_rows(client, finished, mirrored).await? else {
        return Ok(built);
    };
    let rows = client
        .query(
            "SELECT number, name, sql, waits FROM pgtandem.schema_rest WHERE done_at IS NULL ORDER BY number",
            &[],
        )
        .await?;
    for row in rows {
        let (number, name, sql): (i32, String, String) = (row.get(0), row.get(1), row.get(2));
        let waits: Vec<String> = row.get(3);
        if waits.iter().any(|table| missing_rows.contains(table)) {
            built.waiting += 1;
            continue;
        }
        match run_patiently(client, number, &sql).await {
            Ok(()) => built.built += 1,
            Err(error) => match note_of(&error) {
                Verdict::Passes => return Err(error),
                Verdict::Needless(note) => record(client, number, note).await?,
                Verdict::Refused => built.failed.push((name, error_chain(&error))),
            },
        }
    }
    Ok(built)
}

/// `None` where nothing is recorded.
async fn tables_without_rows(
    client: &Client,
    finished: Option<&str>,
    mirrored: bool,
) -> Result<Option<BTreeSet<String>>, tokio_postgres::Error> {
    let there = client
        .query_one(
            "SELECT pg_catalog.to_regclass('pgtandem.schema_rest') IS NOT NULL, pg_catalog.to_regclass('pgtandem.seeding') IS NOT NULL",
            &[],
        )
        .await?;
    if !there.get::<_, bool>(0) {
        return Ok(None);
    }
    if !mirrored {
        return Ok(Some(BTreeSet::new()));
    }
    // The applier installs this side when it first reaches it; until then no table has its rows.
    let unless_synced = if there.get::<_, bool>(1) {
        "AND NOT EXISTS (SELECT FROM pgtandem.seeding s WHERE s.schema = n.nspname AND s.name = c.relname AND s.state = 'synced')"
    } else {
        ""
    };
    let rows = client
        .query(
            &format!(
                "SELECT n.nspname || '.' || c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                  WHERE c.relkind = 'r' AND n.nspname NOT LIKE 'pg\\_%' {unless_synced}"
            ),
            &[],
        )
        .await?;
    let mut without: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    if let Some(finished) = finished {
        without.remove(finished);
    }
    Ok(Some(without))
}

/// Again where another transaction was in the way: a round that applies rows of the same tables
/// takes their locks in another order than DDL does, and the deadlock's victim may be either.
async fn run_patiently(client: &mut Client, number: i32, sql: &str) -> Result<(), tokio_postgres::Error> {
    let mut attempt = 1;
    loop {
        match run(client, number, sql).await {
            Err(error) if attempt < ATTEMPTS && error.code().is_some_and(|code| IN_THE_WAY.contains(code)) => {
                attempt += 1;
                tokio::time::sleep(REST).await;
            }
            outcome => return outcome,
        }
    }
}

async fn run(client: &mut Client, number: i32, sql: &str) -> Result<(), tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    transaction
        .batch_execute("SET LOCAL search_path = pg_catalog; SET LOCAL check_function_bodies = off")
        .await?;
    transaction.batch_execute(sql).await?;
    transaction
        .execute(
            "UPDATE pgtandem.schema_rest SET done_at = pg_catalog.clock_timestamp() WHERE number = $1 AND done_at IS NULL",
            &[&number],
        )
        .await?;
    transaction.commit().await
}

async fn record(client: &Client, number: i32, note: &str) -> Result<(), tokio_postgres::Error> {
    client
        .execute(
            "UPDATE pgtandem.schema_rest SET done_at = pg_catalog.clock_timestamp(), note = $2 WHERE number = $1",
            &[&number, &note],
        )
        .await
        .map(|_| ())
}

/// Another transaction's doing, gone with it.
const IN_THE_WAY: [SqlState; 3] = [
    SqlState::LOCK_NOT_AVAILABLE,
    SqlState::T_R_DEADLOCK_DETECTED,
    SqlState::T_R_SERIALIZATION_FAILURE,
];

enum Verdict {
    /// The connection is gone, or somebody is in the way.
    Passes,
    /// DDL that was mirrored meanwhile made it so.
    Needless(&'static str),
    Refused,
}

fn note_of(error: &tokio_postgres::Error) -> Verdict {
    let Some(code) = error.code() else {
        return Verdict::Passes;
    };
    let passing = [
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::CANNOT_CONNECT_NOW,
        SqlState::DISK_FULL,
        SqlState::QUERY_CANCELED,
    ];
    if IN_THE_WAY.contains(code) || passing.contains(code) {
        return Verdict::Passes;
    }
    if [SqlState::DUPLICATE_TABLE, SqlState::DUPLICATE_OBJECT].contains(code) {
        return Verdict::Needless("was there already");
    }
    if [SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_COLUMN].contains(code) {
        return Verdict::Needless("what it was about is gone");
    }
    Verdict::Refused
}
