//! Writers that came to a side past pgtandem while it was the secondary (`stray_writers: report`):
//! what is recorded of them there, and who said that it may stand.

use serde::{Deserialize, Serialize};
use tokio_postgres::{Client, Error, Row};

/// One writer's writes of one kind to one table, since somebody acknowledged the ones before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stray {
    pub role: String,
    pub application: String,
    /// `schema.table`
    pub table: String,
    /// `INSERT`, `UPDATE`, `DELETE` or `TRUNCATE`.
    pub operation: String,
    pub writes: u64,
    /// RFC 3339, UTC.
    pub last: String,
}

/// In the order of [`stray`].
const COLUMNS: &str = "role, application, relation, operation, writes,
    pg_catalog.to_char(last AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')";

/// What nobody has acknowledged, the latest first.
pub async fn strays(client: &Client) -> Result<Vec<Stray>, Error> {
    if !is_installed(client).await? {
        return Ok(Vec::new());
    }
    let sql = format!("SELECT {COLUMNS} FROM pgtandem.stray ORDER BY last DESC, role, relation, operation");
    let rows = client.query(&sql, &[]).await?;
    Ok(rows.iter().map(stray).collect())
}

/// Takes all of them off the record of what is open, onto that of what was looked at, in one
/// transaction. What comes later is open again. Returns what was acknowledged.
pub async fn acknowledge_strays(client: &Client, by: &str, reason: &str) -> Result<Vec<Stray>, Error> {
    if !is_installed(client).await? {
        return Ok(Vec::new());
    }
    let sql = format!(
        "WITH seen AS (DELETE FROM pgtandem.stray RETURNING *)
         INSERT INTO pgtandem.stray_acknowledged (role, application, relation, operation, writes, last, actor, reason)
         SELECT role, application, relation, operation, writes, last, $1, $2 FROM seen
         RETURNING {COLUMNS}"
    );
    let rows = client.query(&sql, &[&by, &reason]).await?;
    Ok(rows.iter().map(stray).collect())
}

async fn is_installed(client: &Client) -> Result<bool, Error> {
    let row = client
        .query_one("SELECT to_regclass('pgtandem.stray_acknowledged') IS NOT NULL", &[])
        .await?;
    Ok(row.get(0))
}

fn stray(row: &Row) -> Stray {
    Stray {
        role: row.get(0),
        application: row.get(1),
        table: row.get(2),
        operation: row.get(3),
        writes: u64::try_from(row.get::<_, i64>(4)).unwrap_or_default(),
        last: row.get(5),
    }
}
