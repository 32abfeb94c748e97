//! Whether a difference can be blamed on the new database, and not on the moment.
//!
//! Two kinds of proof are accepted; what neither settles is counted as unsettled.
//!
//! The columns of RETURNING rest on definitions alone, and are asked of both sides by themselves.
//!
//! *By definitions*: the secondary refuses the statement for what it is (a missing column, function
//! or privilege). EXPLAIN asks both sides as the client's user, without running anything, after a
//! round that began when the primary's definitions were looked at; they are looked at again at the
//! end. So both sides were asked with the same definitions, and rows do not come into it.
//!
//! *By state*: everything else rests on rows. The rehearsal ran in the state of round r, where
//! nothing was applied while it ran. Let P be the state in which the primary ran the transaction W.
//! If r was known to be applied before W's first statement came, all of r is in P. If the journal,
//! read after W's end, has of all that r does not see the changes of one transaction, and W changed
//! something (so that one is W), then P has nothing besides r; likewise where there is none and W
//! changed nothing. So P = r, on all mirrored tables, provided that r is the primary's state: every
//! table is synced and nothing is held in quarantine. That neither the clock nor chance
//! decided is asked of the statement's text; that nothing was drawn from sequences by which later
//! statements go, of the statements before it.

use std::collections::HashMap;

use tokio::time::{Duration, timeout};

use super::super::confirm::DEFINITIONS;
use super::super::connection::{Columns, Connection, ConnectionError, PoolKey};
use super::super::read::Call;
use super::run::Run;
use super::worker::Worker;
use super::{Step, Transaction};
use crate::control::{Control, Side};
use crate::sql::{Part, is_steady};

/// What a proof is given: the round comes that makes it moot.
const PATIENCE: Duration = Duration::from_secs(2);

/// The secondary's state.
const STATE: &str = "\
SELECT w.round, w.snapshot,
       NOT EXISTS (SELECT FROM pgtandem.seeding s WHERE s.state <> 'synced' OR s.paused IS NOT NULL)
       AND NOT EXISTS (SELECT FROM pgtandem.quarantine)
  FROM pgtandem.watermark w WHERE w.target IS NULL AND w.piece IS NULL AND w.outside IS NULL";

/// What the journal has beyond a snapshot. A slot that was emptied meanwhile may have had more.
const BEYOND: &str = "\
SELECT (SELECT s.truncations FROM pgtandem.side s), count(DISTINCT c.xid), count(*)
  FROM (SELECT xid FROM pgtandem.change_0 UNION ALL SELECT xid FROM pgtandem.change_1 UNION ALL SELECT xid FROM pgtandem.change_2) c
 WHERE NOT pg_catalog.pg_visible_in_snapshot(c.xid, $1::text::pg_catalog.pg_snapshot)";

/// How far each sequence is, in its own direction.
const SEQUENCES: &str = "\
SELECT s.schemaname::text, s.sequencename::text, sign(s.increment_by::numeric)::int8 * COALESCE(s.last_value, s.start_value - s.increment_by)
  FROM pg_catalog.pg_sequences s WHERE s.schemaname <> 'pgtandem'";

/// Whether an SQLSTATE may be about the statement alone: syntax and access, features, schemas.
pub(super) fn is_about_definitions(sqlstate: &str) -> bool {
    sqlstate.starts_with("42") || matches!(sqlstate, "0A000" | "3F000" | "3D000")
}

impl Worker {
    /// The round at which the difference in this step was proven.
    pub(super) async fn proven_by_state(&self, transaction: &Transaction, run: &Run, at: usize) -> Option<u64> {
        let round = run.round.filter(|round| *round <= transaction.round)?;
        let step = &transaction.steps[at];
        let steady = is_steady(&step.text, transaction.lex, &self.shared.catalog.load().functions);
        let drew = |step: &Step| step.part == Part::Write { inserts: true };
        if !steady || transaction.steps[..at].iter().any(drew) {
            return None;
        }
        let proven = timeout(PATIENCE, self.state_was(transaction, round)).await;
        matches!(proven, Ok(Ok(true))).then_some(round)
    }

    async fn state_was(&self, transaction: &Transaction, round: u64) -> Result<bool, String> {
        let failed = |error: tokio_postgres::Error| error.to_string();
        let secondary = self.desk.at(transaction.control.secondary()).await?;
        let Some(row) = secondary.query_opt(STATE, &[]).await.map_err(failed)? else {
            return Ok(false);
        };
        let snapshot: String = row.get(1);
        let as_the_primary: bool = row.get(2);
        if u64::try_from(row.get::<_, i64>(0)) != Ok(round) || !as_the_primary {
            return Ok(false);
        }
        let primary = self.desk.at(transaction.control.primary).await?;
        let row = primary.query_one(BEYOND, &[&snapshot]).await.map_err(failed)?;
        let truncations = (transaction.control.primary, row.get::<_, i64>(0));
        let known = self.truncations.lock().await.replace(truncations);
        let (transactions, changes): (i64, i64) = (row.get(1), row.get(2));
        let wrote: u64 = match transaction.committed {
            true => transaction
                .steps
                .iter()
                .filter_map(|step| step.said.as_ref())
                .map(super::Said::rows)
                .sum(),
            false => 0,
        };
        let own = if wrote == 0 {
            transactions == 0
        } else {
            transactions == 1 && u64::try_from(changes).is_ok_and(|changes| changes >= wrote)
        };
        Ok(own && known == Some(truncations))
    }

    /// Whether no sequence of the secondary is behind the primary's.
    pub(super) async fn sequences_are_even(&self, control: Control) -> Result<bool, String> {
        let read = async |side| {
            let client = self.desk.at(side).await?;
            let rows = client.query(SEQUENCES, &[]).await.map_err(|error| error.to_string())?;
            let named = rows.iter().map(|row| ((row.get(0), row.get(1)), row.get(2)));
            Ok::<HashMap<(String, String), i64>, String>(named.collect())
        };
        let primary = read(control.primary).await?;
        let secondary = read(control.secondary()).await?;
        Ok(primary
            .iter()
            .all(|(name, last)| secondary.get(name).is_some_and(|here| here >= last)))
    }

    /// Before a rehearsal runs: how often journal tables had been emptied by then.
    pub(super) async fn note_truncations(&self, primary: Side) -> Result<(), String> {
        let mut known = self.truncations.lock().await;
        if known.is_none_or(|(of, _)| of != primary) {
            let client = self.desk.at(primary).await?;
            let row = client.query_one("SELECT truncations FROM pgtandem.side", &[]).await;
            *known = Some((primary, row.map_err(|error| error.to_string())?.get(0)));
        }
        Ok(())
    }

    /// Whether the secondary refuses this step for what it is, and the primary does not.
    pub(super) async fn proven_by_definitions(
        &self,
        transaction: &Transaction,
        types: &[Vec<u8>],
        at: usize,
        sqlstate: &str,
    ) -> Result<bool, ConnectionError> {
        let keys =
            [transaction.control.primary, transaction.control.secondary()].map(|side| self.key(transaction, side));
        let Some([primary_key, secondary_key]) = keys[0].clone().zip(keys[1].clone()).map(|(one, two)| [one, two])
        else {
            return Ok(false);
        };
        let mut primary = self.pool.take(&primary_key, self.deadline).await?;
        let mut secondary = self.pool.take(&secondary_key, self.deadline).await?;
        let asked = async {
            let (defined, _) = primary.digest(DEFINITIONS, &Call::Simple, 0).await?;
            if !self.shared.pace.round_after_now().await {
                return Ok(false);
            }
            let own: Vec<Vec<u8>> = transaction.steps.iter().map(|step| step.types.to_vec()).collect();
            let here = explain(&mut secondary, transaction, types, at).await?;
            let there = explain(&mut primary, transaction, &own, at).await?;
            let (now, _) = primary.digest(DEFINITIONS, &Call::Simple, 0).await?;
            Ok(here.as_deref() == Some(sqlstate) && there.is_none() && defined == now)
        };
        let proven = timeout(self.patience(), asked)
            .await
            .unwrap_or(Err(ConnectionError::Deadline))?;
        self.pool.give(primary_key, primary);
        self.pool.give(secondary_key, secondary);
        Ok(proven)
    }

    /// Both sides' columns of a write's RETURNING, primary first, where they are not the same, by the same
    /// definitions. They rest on no rows, and so on no state.
    pub(super) async fn other_columns(
        &self,
        transaction: &Transaction,
        types: &[Vec<u8>],
        at: usize,
    ) -> Result<Option<[Columns; 2]>, ConnectionError> {
        let keys =
            [transaction.control.primary, transaction.control.secondary()].map(|side| self.key(transaction, side));
        let [Some(primary_key), Some(secondary_key)] = keys else {
            return Ok(None);
        };
        let mut primary = self.pool.take(&primary_key, self.deadline).await?;
        let mut secondary = self.pool.take(&secondary_key, self.deadline).await?;
        let asked = async {
            let own = &transaction.steps[at].types;
            let here = described(&mut secondary, transaction, &types[at], at).await?;
            let there = described(&mut primary, transaction, own, at).await?;
            if here == there || here.is_none() || there.is_none() {
                return Ok(None);
            }
            // A schema change on its way makes such a difference, too.
            let (defined, _) = primary.digest(DEFINITIONS, &Call::Simple, 0).await?;
            if !self.shared.pace.round_after_now().await {
                return Ok(None);
            }
            let here = described(&mut secondary, transaction, &types[at], at).await?;
            let there = described(&mut primary, transaction, own, at).await?;
            let (now, _) = primary.digest(DEFINITIONS, &Call::Simple, 0).await?;
            Ok(there
                .zip(here)
                .filter(|(there, here)| there != here && defined == now)
                .map(<[Columns; 2]>::from))
        };
        let found = timeout(self.patience(), asked)
            .await
            .unwrap_or(Err(ConnectionError::Deadline))?;
        self.pool.give(primary_key, primary);
        self.pool.give(secondary_key, secondary);
        Ok(found)
    }

    pub(super) fn key(&self, transaction: &Transaction, side: Side) -> Option<PoolKey> {
        Some(PoolKey {
            target: self.targets.target(side).clone(),
            login: transaction.login.clone(),
            settings: transaction.settings.clone()?,
        })
    }
}

/// What a step would give, under the settings of its transaction.
async fn described(
    connection: &mut Connection,
    transaction: &Transaction,
    types: &[u8],
    at: usize,
) -> Result<Option<Columns>, ConnectionError> {
    connection.command("look at a statement", b"begin read only").await?;
    for step in transaction.steps[..at].iter().filter(|step| step.part == Part::Control) {
        connection.perform(&step.text, &[], b"\0\0\0\0\0\0").await?;
    }
    let columns = connection.describe(&transaction.steps[at].text, types).await?;
    connection.command("look at a statement", b"rollback").await?;
    Ok(columns)
}

/// The SQLSTATE with which EXPLAIN of a step is refused, under the settings of its transaction.
async fn explain(
    connection: &mut Connection,
    transaction: &Transaction,
    types: &[Vec<u8>],
    at: usize,
) -> Result<Option<String>, ConnectionError> {
    connection.command("look at a statement", b"begin read only").await?;
    for step in transaction.steps[..at].iter().filter(|step| step.part == Part::Control) {
        connection.perform(&step.text, &[], b"\0\0\0\0\0\0").await?;
    }
    let step = &transaction.steps[at];
    let bind = if step.bind.is_empty() {
        b"\0\0\0\0\0\0"
    } else {
        &step.bind[..]
    };
    let text = [b"explain ", &step.text[..]].concat();
    let (heard, _) = connection.perform(&text, &types[at], bind).await?;
    connection.command("look at a statement", b"rollback").await?;
    Ok(heard.refused.map(|refused| refused.sqlstate))
}
