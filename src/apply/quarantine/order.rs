//! Taking transactions out of quarantine by an operator's order: tried again in their order, or
//! discarded.

use serde::{Deserialize, Serialize};

use crate::apply::plan::DdlRecord;
use crate::apply::refusal::Refusal;
use crate::apply::round::{Ending, Stop, wait_flushed};
use crate::apply::rows::{Mode, NotWritten, Writes};
use crate::apply::session::Session;
use crate::apply::{ApplyError, doing};
use crate::catalog::Oid;
use crate::journal::read::{Change, Operation, Raw, Unsigned};

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
    /// Carries out an operator's order, at the end of a round.
    pub(in crate::apply) async fn carry_out(&mut self, order: &Order) -> Result<Outcome, ApplyError> {
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
        let end = self.standing();
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
             SELECT rel, op, pos, COALESCE(old, convert_from(old_bytes, 'UTF8')), COALESCE(new, convert_from(new_bytes, 'UTF8'))
               FROM pgtandem.quarantine_change WHERE id = {id} AND NOT void AND op IN ('R', 'T')"
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

    pub(in crate::apply) async fn leave(
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
