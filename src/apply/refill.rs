//! Tables whose rows are sent once more, by journaling all of them behind a clear: unlogged ones
//! that a crash of either server has emptied, and those that mirroring had left out for a while.
//! The table's writers wait while its rows are journaled, so the place of this among their changes
//! is exact.

use super::session::Session;
use super::status::Seeding;
use super::{ApplyError, doing};
use crate::catalog::Oid;
use crate::catalog::quote::literal;

/// A table larger than this is not sent by itself: its writers would wait too long.
const REFILL_BYTES: i64 = 1 << 30;

/// What a resumed table's note begins with until its rows are on their way.
pub(super) const RESUMED: &str = "was paused: ";

/// How its note ends where its rows are too many.
pub(super) const TOO_LARGE: &str = "too large to be copied by itself";

const MARKER: &str = "INSERT INTO pgtandem.intact DEFAULT VALUES ON CONFLICT DO NOTHING";

impl Session {
    /// A crash empties unlogged tables without an event: of the primary, and the secondary still
    /// has rows; of the secondary, and it lacks them. A row in an unlogged table of ours is gone
    /// then as well. Any crash ends the connections, so to look when they are made is enough.
    pub(super) async fn refill_after_a_crash(&self) -> Result<(), ApplyError> {
        let intact = "SELECT EXISTS (SELECT FROM pgtandem.intact)";
        let (primary, secondary) =
            tokio::try_join!(self.aside.query_one(intact, &[]), self.secondary.query_one(intact, &[]))
                .map_err(doing("look whether unlogged tables survived"))?;
        if primary.get(0) && secondary.get(0) {
            return Ok(());
        }
        let rows = self
            .aside
            .query(
                "SELECT s.rel FROM pgtandem.shape s WHERE s.persistence = 'u' AND s.capturing",
                &[],
            )
            .await
            .map_err(doing("list unlogged tables"))?;
        let rels: Vec<Oid> = rows.iter().map(|row| row.get(0)).collect();
        self.refill(&rels, "2s", MARKER)
            .await
            .map_err(doing("send the rows of unlogged tables once more"))?;
        // Only now: what fails before is done again.
        self.secondary
            .batch_execute(MARKER)
            .await
            .map_err(doing("note that unlogged tables are whole"))?;
        if !rels.is_empty() {
            tracing::warn!(
                tables = rels.len(),
                "a server was restarted after a crash, which empties unlogged tables: their rows were sent once more"
            );
        }
        Ok(())
    }

    /// Sends the rows of tables that mirroring goes on with. False when a lock could not be had.
    pub(super) async fn refill_resumed(&mut self) -> Result<bool, ApplyError> {
        let resumed: Vec<(Oid, String)> = self
            .tables
            .iter()
            .filter(|table| table.state == Seeding::Unseeded && table.paused.is_none())
            .filter_map(|table| Some((table.rel, table.note.as_deref()?.strip_prefix(RESUMED)?.to_owned())))
            .collect();
        let mut all = true;
        for (rel, reason) in resumed {
            let note = if self.faces.is_joined(rel) || self.is_too_large(rel).await? {
                format!("mirroring goes on after a pause ({reason}); {TOO_LARGE}")
            } else {
                match self.refill(&[rel], "100ms", "").await {
                    Ok(()) => format!("mirroring goes on after a pause ({reason}); its rows are being copied"),
                    Err(error) if error.code().is_some() && !self.aside.is_closed() => {
                        all = false;
                        continue;
                    }
                    Err(error) => return Err(doing("send a table's rows once more")(error)),
                }
            };
            self.secondary
                .execute(
                    "UPDATE pgtandem.seeding SET note = $2 WHERE rel = $1 AND state <> 'synced'",
                    &[&rel, &note],
                )
                .await
                .map_err(doing("note that a table's rows are on their way"))?;
            if let Some(table) = self.tables.get_mut(rel) {
                table.note = Some(note);
            }
        }
        Ok(all)
    }

    /// Whether the primary's table is too large for its rows to be sent by itself.
    pub(super) async fn is_too_large(&self, rel: Oid) -> Result<bool, ApplyError> {
        let row = self
            .aside
            .query_one(
                "SELECT COALESCE(pg_table_size(pgtandem.source_of($1)::regclass), 0)",
                &[&rel],
            )
            .await
            .map_err(doing("measure a table"))?;
        Ok(row.get::<_, i64>(0) > REFILL_BYTES)
    }

    async fn refill(&self, rels: &[Oid], lock_timeout: &str, then: &str) -> Result<(), tokio_postgres::Error> {
        let calls: Vec<String> = rels
            .iter()
            .map(|rel| format!("SELECT pgtandem.refill(pgtandem.source_of({rel}));"))
            .collect();
        let sql = format!(
            "BEGIN; SET LOCAL lock_timeout = {}; SET LOCAL enable_seqscan = on; {} {then}; COMMIT",
            literal(lock_timeout),
            calls.concat()
        );
        let done = self.aside.batch_execute(&sql).await;
        if done.is_err() && !self.aside.is_closed() {
            self.aside.batch_execute("ROLLBACK").await?;
        }
        done
    }
}
