//! The quarantine on the secondary: putting a transaction there, and taking it out again by an
//! operator's order.

use std::collections::{BTreeSet, HashMap};

use bytes::{BufMut, BytesMut};
use futures_util::{SinkExt, pin_mut};
use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::errands;
use super::held::{HeldKeys, Touched, Unit};
use super::isolate::{Cause, failing};
use super::plan::DdlRecord;
use super::refusal::Refusal;
use super::round::{Ending, Stop, wait_flushed};
use super::rows::{Mode, NotWritten, Writes};
use super::session::{Session, Target};
use super::{ApplyError, doing, image};
use crate::catalog::Oid;
use crate::journal::read::{Change, Operation, Raw, Unsigned, lsn};

/// Keys of a transaction that are kept as text, to be listed.
const SHOWN_MAX: usize = 20;

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

/// What an operator may order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// All, or one with those it depends on; in order.
    Retry {
        id: Option<i64>,
        actor: String,
    },
    Discard {
        id: i64,
        actor: String,
        reason: String,
    },
}

/// What came of an order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Applied now, or discarded.
    pub done: Vec<i64>,
    /// Refused again: entry and error.
    pub refused: Vec<(i64, String)>,
    /// Left because they depend on one that was refused.
    pub left: Vec<i64>,
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

/// Numbers for what a round holds, taken as a block, so that they follow the places of the
/// transactions and not the order in which refusals are found.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct EntryNumbers {
    first: Option<i64>,
}

impl EntryNumbers {
    /// The number that this transaction has or would have, once the block is taken.
    pub(super) fn number(self, unit: &Unit<'_>) -> Option<i64> {
        self.first.map(|first| first + unit.order as i64)
    }
}

/// Entries that must be applied before this one: they share a key with it, or are another part
/// of the same transaction.
const NEEDED: &str = "\
LATERAL (SELECT b.id FROM pgtandem.quarantine_key a
           JOIN pgtandem.quarantine_key b ON b.rel = a.rel AND b.id < a.id AND (b.key = a.key OR a.key IS NULL OR b.key IS NULL)
           JOIN pgtandem.quarantine bq ON bq.id = b.id AND bq.epoch = e.epoch
          WHERE a.id = e.id
         UNION
         SELECT o.id FROM pgtandem.quarantine o WHERE o.xid = e.xid AND o.epoch = e.epoch AND o.id < e.id AND o.xid <> '0')";

impl Session {
    /// Puts a whole transaction into quarantine, in the round's transaction.
    pub(super) async fn hold(&mut self, unit: &Unit<'_>, cause: &Cause) -> Result<(), ApplyError> {
        let (refusal, follows) = match cause {
            Cause::Refused(refusal) => (refusal.clone(), None),
            Cause::Follows(id) => (Refusal::said(format!("touches what entry {id} holds")), Some(*id)),
            Cause::Continues => (Refusal::said("an earlier part of the same transaction is held"), None),
        };
        let Refusal {
            sqlstate,
            text: error,
            detail,
        } = refusal;
        if follows.is_none() {
            self.last_refusal = Some(error.clone());
        }
        self.pause_tables_of(unit, &error).await?;
        self.held_of_read.insert(unit.xid);
        self.held_in_round += 1;
        let paused: BTreeSet<Oid> = unit
            .rels()
            .into_iter()
            .filter(|&rel| self.key_places(rel).is_none())
            .collect();
        let is_void = |change: &Change<'_>| match change.operation {
            Operation::Row | Operation::Truncate => paused.contains(&change.rel),
            Operation::Ddl | Operation::DdlOutside => false,
        };
        if unit.changes.iter().all(is_void) {
            // All its tables are paused, which says that they need seeding.
            return Ok(());
        }
        let touched = unit.touches(|rel| self.key_places(rel));
        let keys = serde_json::to_string(&self.shown_keys(unit)).unwrap_or_else(|_| "[]".into());
        let id = self.number_of(unit).await?;
        self.secondary
            .execute(
                "INSERT INTO pgtandem.quarantine (id, epoch, round, xid, sqlstate, error, detail, follows, tables, keys, changes)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::jsonb, $11)",
                &[
                    &id,
                    &(self.config.epoch.0 as i64),
                    &(self.round as i64 + 1),
                    &unit.xid.to_string(),
                    &sqlstate,
                    &error,
                    &detail,
                    &follows,
                    &self.names_of(unit),
                    &keys,
                    &(unit.changes.len() as i64),
                ],
            )
            .await
            .map_err(doing("put a transaction into quarantine"))?;
        let mut rows = BytesMut::new();
        for change in &unit.changes {
            copy_change(&mut rows, id, change, is_void(change));
        }
        self.copy("pgtandem.quarantine_change (id, pos, rel, op, old, new, void)", rows)
            .await?;
        self.copy("pgtandem.quarantine_key (id, rel, key)", key_rows(id, &touched))
            .await?;
        self.note_held(id).await?;
        self.held.add(id, &touched);
        match follows {
            None => tracing::error!(id, xid = unit.xid, error, "a transaction was put into quarantine"),
            Some(_) => tracing::warn!(id, xid = unit.xid, error, "a transaction was put into quarantine"),
        }
        Ok(())
    }

    async fn number_of(&mut self, unit: &Unit<'_>) -> Result<i64, ApplyError> {
        if self.entries.first.is_none() {
            let row = self
                .secondary
                .query_one(
                    "SELECT setval(s, nextval(s) + $1) - $1 FROM CAST('pgtandem.quarantine_id_seq' AS regclass) s",
                    &[&(self.transactions_in_round.max(1) as i64 - 1)],
                )
                .await
                .map_err(doing("number what is held"))?;
            self.entries.first = Some(row.get(0));
        }
        Ok(self.entries.number(unit).unwrap_or_default())
    }

    /// The same with what `pgtandem.staged` holds, for what does not fit into memory. It holds its
    /// tables as a whole.
    pub(super) async fn hold_staged(
        &mut self,
        count: usize,
        ddl: &Unit<'_>,
        rels: &[Oid],
        refusal: &Refusal,
    ) -> Result<(), ApplyError> {
        let live: Vec<Oid> = rels
            .iter()
            .copied()
            .filter(|&rel| self.key_places(rel).is_some())
            .collect();
        self.held_in_round += 1;
        let names: BTreeSet<String> = rels
            .iter()
            .filter_map(|&rel| self.tables.get(rel))
            .map(|table| format!("{}.{}", table.schema, table.name))
            .chain(self.names_of(ddl))
            .collect();
        let names: Vec<String> = names.into_iter().collect();
        let id: i64 = self
            .secondary
            .query_one(
                "INSERT INTO pgtandem.quarantine (epoch, round, xid, sqlstate, error, detail, tables, changes)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING id",
                &[
                    &(self.config.epoch.0 as i64),
                    &(self.round as i64 + 1),
                    &ddl.xid.to_string(),
                    &refusal.sqlstate,
                    &refusal.text,
                    &refusal.detail,
                    &names,
                    &(count as i64),
                ],
            )
            .await
            .map_err(doing("put a transaction into quarantine"))?
            .get(0);
        self.secondary
            .execute(
                "INSERT INTO pgtandem.quarantine_change (id, pos, rel, op, old, new, void)
                 SELECT $1, s.pos, s.rel, s.op, s.old, s.new, s.op IN ('R', 'T') AND s.rel <> ALL ($2)
                   FROM pgtandem.staged s WHERE s.op <> 'O'",
                &[&id, &live],
            )
            .await
            .map_err(doing("put a transaction into quarantine"))?;
        self.secondary
            .execute(
                "INSERT INTO pgtandem.quarantine_key (id, rel) SELECT $1, unnest($2::oid[])",
                &[&id, &live],
            )
            .await
            .map_err(doing("put a transaction into quarantine"))?;
        self.note_held(id).await?;
        for rel in live {
            self.held.add_whole(id, rel);
        }
        tracing::error!(
            id,
            changes = count,
            error = refusal.text,
            "a transaction was put into quarantine"
        );
        Ok(())
    }

    pub(super) async fn note_held(&self, id: i64) -> Result<(), ApplyError> {
        self.secondary
            .execute(
                "INSERT INTO pgtandem.quarantine_history (action, id, xid, tables, changes, error)
                 SELECT 'held', q.id, q.xid, q.tables, q.changes, q.error FROM pgtandem.quarantine q WHERE q.id = $1",
                &[&id],
            )
            .await
            .map_err(doing("record the quarantine"))?;
        Ok(())
    }

    /// DDL outside of transactions that the secondary refused for good.
    pub(super) async fn hold_outside(&mut self, record: &DdlRecord, refusal: Refusal) -> Result<(), ApplyError> {
        let context = super::ddl::record_text(record);
        let change = Change {
            position: self.target.as_ref().map_or(0, |target| target.piece),
            xid: 0,
            rel: 0,
            operation: Operation::DdlOutside,
            old: Some(context.as_bytes()),
            new: Some(record.statement.as_bytes()),
        };
        self.hold_alone(&change, &Cause::Refused(refusal)).await
    }

    /// A record of such DDL that cannot be read.
    pub(super) async fn hold_outside_change(&mut self, change: &Change<'_>, error: &str) -> Result<(), ApplyError> {
        self.hold_alone(change, &Cause::Refused(Refusal::said(error))).await
    }

    async fn hold_alone(&mut self, change: &Change<'_>, cause: &Cause) -> Result<(), ApplyError> {
        let unit = Unit {
            xid: change.xid,
            order: 0,
            changes: vec![*change],
        };
        self.begin_counting(1);
        self.secondary
            .batch_execute(&format!("BEGIN; {}", self.guarded_watermark("outside = NULL")))
            .await
            .map_err(doing("put DDL into quarantine"))?;
        self.hold(&unit, cause).await?;
        failing(self.commit().await)?;
        self.outside = None;
        self.summarize_quarantine().await
    }

    fn names_of(&self, unit: &Unit<'_>) -> Vec<String> {
        let mut names: BTreeSet<String> = unit
            .rels()
            .iter()
            .filter_map(|&rel| self.tables.get(rel))
            .map(|table| format!("{}.{}", table.schema, table.name))
            .collect();
        for record in unit.ddl() {
            let tables = record.created.iter().chain(&record.changed);
            names.extend(tables.map(|table| format!("{}.{}", table.schema, table.name)));
        }
        names.into_iter().collect()
    }

    fn shown_keys(&self, unit: &Unit<'_>) -> Vec<(String, String)> {
        let mut shown = BTreeSet::new();
        for change in &unit.changes {
            let Some((table, writer)) = self
                .tables
                .get(change.rel)
                .and_then(|table| Some((table, table.writer.as_ref()?)))
            else {
                continue;
            };
            for image in [change.old, change.new].into_iter().flatten() {
                if let Some(key) = image::key_text(image, &writer.key_positions) {
                    shown.insert((format!("{}.{}", table.schema, table.name), key));
                }
            }
            if shown.len() >= SHOWN_MAX {
                break;
            }
        }
        shown.into_iter().take(SHOWN_MAX).collect()
    }

    pub(super) async fn copy(&self, into: &str, rows: BytesMut) -> Result<(), ApplyError> {
        let copied = async {
            let sink = self
                .secondary
                .copy_in::<_, bytes::Bytes>(&format!("COPY {into} FROM STDIN"))
                .await?;
            pin_mut!(sink);
            sink.send(rows.freeze()).await?;
            sink.finish().await
        };
        copied.await.map_err(doing("write into the quarantine"))?;
        Ok(())
    }

    /// Asked before a commit: rather than fill the quarantine, mirroring stops.
    pub(super) async fn judge(&mut self) -> Result<(), ApplyError> {
        let diverged: u64 = self.diverged_in_round.values().sum();
        let errors = self.held_in_round + diverged.min(self.transactions_in_round);
        let counted = self
            .memory
            .count(self.transactions_in_round, errors, &self.config.writes);
        let Err(too_many) = counted else { return Ok(()) };
        self.secondary
            .batch_execute("ROLLBACK")
            .await
            .map_err(doing("roll back a round"))?;
        let last = self
            .last_refusal
            .as_ref()
            .map_or_else(String::new, |error| format!("; the last error: {error}"));
        let reason = format!(
            "{too_many}{last}. Nothing is lost, the journal keeps what comes: mend the secondary, then `pgtandem quarantine retry` or `pgtandem reload`"
        );
        self.secondary
            .execute(
                "INSERT INTO pgtandem.halted (reason) VALUES ($1) ON CONFLICT (one) DO UPDATE SET reason = EXCLUDED.reason",
                &[&reason],
            )
            .await
            .map_err(doing("record that mirroring stops"))?;
        tracing::error!(reason, "mirroring stops");
        Err(ApplyError::Halted(reason))
    }

    /// At the beginning of a session: a halt lasts until an operator says to go on.
    pub(super) async fn heed_halt(&self) -> Result<(), ApplyError> {
        let row = self
            .secondary
            .query_opt("SELECT reason FROM pgtandem.halted", &[])
            .await
            .map_err(doing("ask whether mirroring was stopped"))?;
        let Some(row) = row else { return Ok(()) };
        if errands::retry_waits(&self.secondary, self.config.epoch).await? {
            self.memory.say_go_on();
        }
        if !self.memory.may_go_on() {
            return Err(ApplyError::Halted(row.get(0)));
        }
        self.secondary
            .batch_execute("DELETE FROM pgtandem.halted")
            .await
            .map_err(doing("go on with mirroring"))?;
        tracing::warn!("mirroring goes on by an operator's order");
        Ok(())
    }

    /// Reads what is held; of one entry less, where that is about to be applied.
    pub(super) async fn load_held(&mut self, but: Option<i64>) -> Result<(), ApplyError> {
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

    pub(super) async fn summarize_quarantine(&mut self) -> Result<(), ApplyError> {
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

    /// Carries out an operator's order, at the end of a round.
    pub(super) async fn carry_out(&mut self, order: &Order) -> Result<Outcome, ApplyError> {
        self.reload_tables().await?;
        let outcome = match order {
            Order::Retry { id, actor } => self.retry(*id, actor).await?,
            Order::Discard { id, actor, reason } => self.discard(*id, actor, reason).await?,
        };
        self.load_held(None).await?;
        self.reload_tables().await?;
        self.summarize_quarantine().await?;
        Ok(outcome)
    }

    async fn retry(&mut self, only: Option<i64>, actor: &str) -> Result<Outcome, ApplyError> {
        let mut outcome = Outcome::default();
        for id in self.chosen(only).await? {
            if self.rests_on_held(id).await? {
                outcome.left.push(id);
                continue;
            }
            self.load_held(Some(id)).await?;
            match self.apply_held(id, actor).await? {
                None => outcome.done.push(id),
                Some(refusal) => {
                    self.note_refused_again(id, actor, &refusal).await?;
                    outcome.refused.push((id, refusal.text));
                }
            }
        }
        Ok(outcome)
    }

    /// All entries, or one with those before it that it depends on.
    async fn chosen(&self, only: Option<i64>) -> Result<Vec<i64>, ApplyError> {
        let sql = format!(
            "WITH RECURSIVE needed(id, epoch, xid) AS (
                 SELECT q.id, q.epoch, q.xid FROM pgtandem.quarantine q WHERE q.epoch = $1 AND q.id = COALESCE($2, q.id)
                 UNION
                 SELECT q.id, q.epoch, q.xid FROM needed e, {NEEDED} d, pgtandem.quarantine q WHERE q.id = d.id)
             SELECT DISTINCT id FROM needed ORDER BY id"
        );
        let rows = self
            .secondary
            .query(&sql, &[&(self.config.epoch.0 as i64), &only])
            .await
            .map_err(doing("choose what to retry"))?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    async fn rests_on_held(&self, id: i64) -> Result<bool, ApplyError> {
        let sql = format!("SELECT EXISTS (SELECT FROM pgtandem.quarantine e, {NEEDED} d WHERE e.id = $1)");
        let row = self
            .secondary
            .query_one(&sql, &[&id])
            .await
            .map_err(doing("look for what an entry depends on"))?;
        Ok(row.get(0))
    }

    /// Applies one entry in a transaction of its own; the refusal where there is one again.
    async fn apply_held(&mut self, id: i64, actor: &str) -> Result<Option<Refusal>, ApplyError> {
        let (ddl, rels) = match self.contents_of(id).await {
            Ok(contents) => contents,
            Err(error) => return self.refusal_of(error).map(Some),
        };
        if let [(_, Operation::DdlOutside, record)] = &ddl[..] {
            return self.run_held_outside(id, record, actor).await;
        }
        for mode in [Mode::Short, Mode::Careful] {
            if mode == Mode::Careful {
                self.learn_uniques(&rels).await?;
            }
            let refusal = match self.write_held(id, &ddl, mode, actor).await {
                Ok(()) => return Ok(None),
                Err(NotWritten::Surprise(what)) if mode == Mode::Careful => what,
                Err(NotWritten::Surprise(_)) => {
                    self.roll_back().await?;
                    continue;
                }
                Err(NotWritten::Failed(error)) => self.refusal_of(error)?,
            };
            self.roll_back().await?;
            return Ok(Some(refusal));
        }
        Ok(None)
    }

    /// An entry's DDL by position, and the tables that its rows are of.
    async fn contents_of(&self, id: i64) -> Result<(Vec<(u64, Operation, DdlRecord)>, Vec<Oid>), ApplyError> {
        let rows = self
            .secondary
            .query(
                "SELECT c.pos, c.op, c.old, c.new FROM pgtandem.quarantine_change c
                  WHERE c.id = $1 AND c.op IN ('S', 'O') ORDER BY c.pos",
                &[&id],
            )
            .await
            .map_err(doing("read DDL in quarantine"))?;
        let mut ddl = Vec::new();
        for row in &rows {
            let operation = match row.get::<_, i8>(1) as u8 {
                b'O' => Operation::DdlOutside,
                _ => Operation::Ddl,
            };
            let change = Change {
                position: row.get::<_, Unsigned>(0).0,
                xid: 0,
                rel: 0,
                operation,
                old: row.get::<_, Option<Raw<'_>>>(2).map(|raw| raw.0),
                new: row.get::<_, Option<Raw<'_>>>(3).map(|raw| raw.0),
            };
            let record = DdlRecord::from_change(&change)
                .map_err(|error| ApplyError::Refused(format!("{error}; it can only be discarded")))?;
            ddl.push((change.position, operation, record));
        }
        let rows = self
            .secondary
            .query(
                "SELECT DISTINCT c.rel FROM pgtandem.quarantine_change c WHERE c.id = $1 AND c.rel <> 0 AND NOT c.void",
                &[&id],
            )
            .await
            .map_err(doing("read the tables of an entry"))?;
        Ok((ddl, rows.iter().map(|row| row.get(0)).collect()))
    }

    async fn write_held(
        &mut self,
        id: i64,
        ddl: &[(u64, Operation, DdlRecord)],
        mode: Mode,
        actor: &str,
    ) -> Result<(), NotWritten> {
        let end = Target {
            snapshot: self.since.clone(),
            position: self.position,
            piece: 0,
        };
        let ending = Ending {
            end: &end,
            stop: Stop::Target,
            flushed: 0,
        };
        self.begin_counting(0);
        let mut writes = Writes::default();
        writes.begin(self.watermark_sql(&ending));
        writes.text("TRUNCATE pgtandem.staged");
        writes.text(format!(
            "INSERT INTO pgtandem.staged (rel, op, pos, old, new)
             SELECT rel, op, pos, old, new FROM pgtandem.quarantine_change WHERE id = {id} AND NOT void AND op IN ('R', 'T')"
        ));
        writes.text("ANALYZE pgtandem.staged");
        self.write(&writes).await?;
        let mut from = 0;
        for (position, _, record) in ddl {
            self.write_span((from, *position), mode).await?;
            self.run_ddl(record).await?;
            self.refresh_tables().await?;
            // What came for its tables meanwhile was left out.
            let rels: Vec<Oid> = record
                .created
                .iter()
                .chain(&record.changed)
                .map(|table| table.rel)
                .collect();
            self.unseed(&rels, "its DDL was in quarantine for a while; it needs seeding")
                .await?;
            from = *position;
        }
        self.write_span((from, u64::MAX), mode).await?;
        self.leave(id, "retried", actor, None).await?;
        wait_flushed(&self.aside, end.position, 0).await?;
        self.commit().await?;
        self.reached(&ending);
        Ok(())
    }

    async fn run_held_outside(
        &mut self,
        id: i64,
        record: &DdlRecord,
        actor: &str,
    ) -> Result<Option<Refusal>, ApplyError> {
        match self.execute_outside(record).await {
            Ok(()) => {
                self.leave(id, "retried", actor, None).await?;
                Ok(None)
            }
            Err(error) => self.refusal_of(error).map(Some),
        }
    }

    pub(super) async fn leave(
        &self,
        id: i64,
        action: &str,
        actor: &str,
        reason: Option<&str>,
    ) -> Result<(), ApplyError> {
        self.secondary
            .execute(
                "SELECT pgtandem.leave_quarantine($1, $2, $3, $4)",
                &[&id, &action, &actor, &reason],
            )
            .await
            .map_err(doing("take a transaction out of quarantine"))?;
        Ok(())
    }

    async fn note_refused_again(&self, id: i64, actor: &str, refusal: &Refusal) -> Result<(), ApplyError> {
        self.secondary
            .execute(
                "WITH q AS (UPDATE pgtandem.quarantine SET attempts = attempts + 1, sqlstate = $2, error = $3, detail = $5, follows = NULL
                             WHERE id = $1 RETURNING *)
                 INSERT INTO pgtandem.quarantine_history (action, id, xid, tables, changes, error, actor)
                 SELECT 'refused again', q.id, q.xid, q.tables, q.changes, q.error, $4 FROM q",
                &[&id, &refusal.sqlstate, &refusal.text, &actor, &refusal.detail],
            )
            .await
            .map_err(doing("record a retry"))?;
        Ok(())
    }

    /// Drops one for good. Its tables are not equal any more: that is a divergence, which closes
    /// the flip's gate, and they need seeding.
    async fn discard(&mut self, id: i64, actor: &str, reason: &str) -> Result<Outcome, ApplyError> {
        if self.chosen(Some(id)).await?.is_empty() {
            return Ok(Outcome::default());
        }
        self.secondary
            .batch_execute(&format!(
                "BEGIN;
                 INSERT INTO pgtandem.divergence (round, schema, name, kind, key)
                 SELECT {round}, s.schema, s.name, 'discarded', 'quarantine entry {id}: ' || count(*) || ' changes'
                   FROM pgtandem.quarantine_change c JOIN pgtandem.seeding s ON s.rel = c.rel
                  WHERE c.id = {id} AND NOT c.void GROUP BY s.schema, s.name;
                 UPDATE pgtandem.seeding SET state = 'unseeded', note = 'a transaction in quarantine was discarded'
                  WHERE rel IN (SELECT c.rel FROM pgtandem.quarantine_change c WHERE c.id = {id} AND NOT c.void)",
                round = self.round
            ))
            .await
            .map_err(doing("discard a transaction"))?;
        self.leave(id, "discarded", actor, Some(reason)).await?;
        self.secondary
            .batch_execute("COMMIT")
            .await
            .map_err(doing("discard a transaction"))?;
        tracing::warn!(id, actor, reason, "a transaction in quarantine was discarded");
        Ok(Outcome {
            done: vec![id],
            ..Outcome::default()
        })
    }
}

/// A row for COPY in text format.
fn copy_change(out: &mut BytesMut, id: i64, change: &Change<'_>, void: bool) {
    let op = match change.operation {
        Operation::Row => 'R',
        Operation::Truncate => 'T',
        Operation::Ddl => 'S',
        Operation::DdlOutside => 'O',
    };
    out.put_slice(format!("{id}\t{}\t{}\t{op}\t", lsn(change.position), change.rel).as_bytes());
    copy_text(out, change.old);
    out.put_u8(b'\t');
    copy_text(out, change.new);
    out.put_slice(if void { b"\tt\n" } else { b"\tf\n" });
}

fn copy_text(out: &mut BytesMut, text: Option<&[u8]>) {
    let Some(text) = text else {
        out.put_slice(b"\\N");
        return;
    };
    for &byte in text {
        match byte {
            b'\\' => out.put_slice(b"\\\\"),
            b'\n' => out.put_slice(b"\\n"),
            b'\r' => out.put_slice(b"\\r"),
            b'\t' => out.put_slice(b"\\t"),
            other => out.put_u8(other),
        }
    }
}

fn key_rows(id: i64, touched: &HashMap<Oid, Touched>) -> BytesMut {
    let mut out = BytesMut::new();
    for (rel, touched) in touched {
        if touched.whole {
            out.put_slice(format!("{id}\t{rel}\t\\N\n").as_bytes());
        }
        for key in &touched.keys {
            out.put_slice(format!("{id}\t{rel}\t\\\\x{key:032x}\n").as_bytes());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copied_text_is_escaped() {
        let mut out = BytesMut::new();
        let change = Change {
            position: 16,
            xid: 1,
            rel: 7,
            operation: Operation::Row,
            old: None,
            new: Some(b"(\"a\tb\\\\\n\")"),
        };
        copy_change(&mut out, 3, &change, false);
        assert_eq!(&out[..], b"3\t0/10\t7\tR\t\\N\t(\"a\\tb\\\\\\\\\\n\")\tf\n");
    }
}
