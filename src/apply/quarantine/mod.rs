//! The quarantine on the secondary: what is in it. `hold` puts a transaction there, `order` takes
//! it out again, `halt` stops mirroring before it fills up.

mod halt;
mod hold;
mod order;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

pub(in crate::apply) use self::hold::EntryNumbers;
pub use self::order::{Order, Outcome};
use super::held::HeldKeys;
use super::session::Session;
use super::{ApplyError, doing};
use crate::catalog::Oid;

/// Counts for the status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct QuarantineStatus {
    pub transactions: u64,
    /// Of those, how many the secondary refused itself; the others follow them.
    pub refused: u64,
    pub changes: u64,
    /// When the oldest was put there, RFC 3339.
    pub oldest: Option<String>,
    pub oldest_seconds: u64,
    /// The oldest one's error.
    pub error: Option<String>,
}

/// A transaction in quarantine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub id: i64,
    /// The primary's transaction id; absent for DDL outside of transactions.
    pub xid: Option<String>,
    /// When it was put here, RFC 3339.
    pub held_at: String,
    pub tables: Vec<String>,
    /// The first keys: table and value (as `mismatch_log.values` says).
    pub keys: Vec<(String, String)>,
    pub changes: u64,
    /// DDL that it contains.
    pub statements: Vec<String>,
    pub sqlstate: Option<String>,
    pub error: String,
    /// Everything that the server said, where values may be shown.
    pub detail: Option<String>,
    /// The entry because of which it is held, where it was not refused itself.
    pub follows: Option<i64>,
    pub attempts: u32,
}

/// Everything in quarantine, oldest first.
pub async fn list(secondary: &Client) -> Result<Vec<Entry>, tokio_postgres::Error> {
    let installed = secondary
        .query_one("SELECT to_regclass('pgtandem.quarantine') IS NOT NULL", &[])
        .await?;
    if !installed.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let rows = secondary
        .query(
            r#"SELECT q.id, NULLIF(q.xid, '0'), to_char(q.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
                      q.tables, q.keys::text, q.changes, q.sqlstate, q.error, q.follows, q.attempts, q.detail,
                      ARRAY (SELECT c.new FROM pgtandem.quarantine_change c
                              WHERE c.id = q.id AND c.op IN ('S', 'O') AND c.new IS NOT NULL ORDER BY c.pos)
                 FROM pgtandem.quarantine q WHERE q.epoch = (SELECT w.epoch FROM pgtandem.watermark w) ORDER BY q.id"#,
            &[],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| Entry {
            id: row.get(0),
            xid: row.get(1),
            held_at: row.get(2),
            tables: row.get(3),
            // Our own text; an unreadable one lists no key.
            keys: serde_json::from_str(row.get(4)).unwrap_or_default(),
            changes: row.get::<_, i64>(5) as u64,
            sqlstate: row.get(6),
            error: row.get(7),
            follows: row.get(8),
            attempts: row.get::<_, i32>(9) as u32,
            detail: row.get(10),
            statements: row.get(11),
        })
        .collect())
}

impl Session {
    /// Reads what is held; of one entry less, where that is about to be applied.
    pub(in crate::apply) async fn load_held(&mut self, but: Option<i64>) -> Result<(), ApplyError> {
        let rows = self
            .secondary
            .query(
                "SELECT k.id, k.rel, k.key FROM pgtandem.quarantine_key k
                   JOIN pgtandem.quarantine q ON q.id = k.id WHERE q.epoch = $1 AND k.id IS DISTINCT FROM $2 ORDER BY k.id",
                &[&(self.config.epoch.0 as i64), &but],
            )
            .await
            .map_err(doing("read the keys in quarantine"))?;
        let mut held = HeldKeys::default();
        for row in &rows {
            let (id, rel): (i64, Oid) = (row.get(0), row.get(1));
            let key = row.get::<_, Option<&[u8]>>(2).and_then(|key| key.try_into().ok());
            match key {
                Some(key) => held.add_key(id, rel, u128::from_be_bytes(key)),
                None => held.add_whole(id, rel),
            }
        }
        self.held = held;
        if self.target.is_some() {
            // In the middle of a backlog: the rest of a held transaction may still come.
            let rows = self
                .secondary
                .query(
                    "SELECT q.xid FROM pgtandem.quarantine q WHERE q.epoch = $1",
                    &[&(self.config.epoch.0 as i64)],
                )
                .await
                .map_err(doing("read what is in quarantine"))?;
            self.held_of_read
                .extend(rows.iter().filter_map(|row| row.get::<_, &str>(0).parse::<u64>().ok()));
        }
        Ok(())
    }

    pub(in crate::apply) async fn summarize_quarantine(&mut self) -> Result<(), ApplyError> {
        let row = self
            .secondary
            .query_one(
                r#"SELECT count(*), count(*) FILTER (WHERE q.follows IS NULL), COALESCE(sum(q.changes), 0)::bigint,
                          to_char(min(q.at) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
                          COALESCE(extract(epoch FROM clock_timestamp() - min(q.at)), 0)::bigint,
                          (SELECT f.error FROM pgtandem.quarantine f WHERE f.epoch = $1 ORDER BY f.id LIMIT 1)
                     FROM pgtandem.quarantine q WHERE q.epoch = $1"#,
                &[&(self.config.epoch.0 as i64)],
            )
            .await
            .map_err(doing("count the quarantine"))?;
        self.quarantine = QuarantineStatus {
            transactions: row.get::<_, i64>(0) as u64,
            refused: row.get::<_, i64>(1) as u64,
            changes: row.get::<_, i64>(2) as u64,
            oldest: row.get(3),
            oldest_seconds: row.get::<_, i64>(4) as u64,
            error: row.get(5),
        };
        Ok(())
    }
}
