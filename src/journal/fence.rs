//! The fence: an exclusive lock that waits for every writer in flight and lets no new one
//! begin, under which a side's role is turned.
//!
//! Every capture trigger holds the same lock shared, from its transaction's first write to its
//! end (see `sql/capture.sql`), before it reads the state. So whoever holds it exclusively
//! knows that no transaction has acted on the old state and not yet ended, and that every later
//! one will read the new.
//!
//! A prepared transaction that wrote nothing holds no such lock; the fence waits for it all the same.
//! Whoever ends it asks for it by name, on the side that is primary then, and it would be left behind
//! with its locks.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};

use super::state::{read_slot_state, write_slot_state};
use super::{JournalError, LOCK_CLASS, LOCK_FENCE, LOCK_STATE, SideState, doing};

/// A waiting exclusive lock holds up new writers. So it waits in slices, with a pause between
/// them in which writers pass; the slices grow, because writers that overlap without end would
/// otherwise never leave a gap.
const FIRST_SLICE: Duration = Duration::from_millis(50);
const LONGEST_SLICE: Duration = Duration::from_millis(1000);
const PAUSE: Duration = Duration::from_millis(20);

/// No writer is in flight on this side and none can begin. Dropping it releases everything as
/// it was.
pub struct Fence<'a> {
    transaction: Transaction<'a>,
}

#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// The writers that were still in flight: process id, role, application, state.
    #[error("writers were still in flight after {waited:?}: {writers}")]
    Timeout { waited: Duration, writers: String },
    /// What was to be recorded with the turn was refused.
    #[error("somebody else has gone on with it")]
    Overruled,
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Waits for every writer in flight, at most `timeout`.
pub async fn fence(client: &mut Client, timeout: Duration) -> Result<Fence<'_>, FenceError> {
    let started = Instant::now();
    let transaction = client.transaction().await.map_err(doing("raise the fence"))?;
    transaction
        .batch_execute(&format!(
            "SET LOCAL synchronous_commit = on; SELECT pg_advisory_xact_lock({LOCK_CLASS}, {LOCK_STATE}); SAVEPOINT slice"
        ))
        .await
        .map_err(doing("raise the fence"))?;
    let mut slice = FIRST_SLICE;
    loop {
        let left = timeout.saturating_sub(started.elapsed());
        let this_slice = slice.min(left).as_millis().max(1);
        let locked = transaction
            .batch_execute(&format!(
                "SET LOCAL lock_timeout = {this_slice}; SELECT pg_advisory_xact_lock({LOCK_CLASS}, {LOCK_FENCE})"
            ))
            .await;
        match locked {
            Ok(()) if any_prepared(&transaction).await? => {
                transaction
                    .batch_execute("ROLLBACK TO SAVEPOINT slice")
                    .await
                    .map_err(doing("raise the fence"))?;
            }
            Ok(()) => {
                transaction
                    .batch_execute("SET LOCAL lock_timeout = 0")
                    .await
                    .map_err(doing("raise the fence"))?;
                return Ok(Fence { transaction });
            }
            Err(error)
                if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
                    || error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) =>
            {
                transaction
                    .batch_execute("ROLLBACK TO SAVEPOINT slice")
                    .await
                    .map_err(doing("raise the fence"))?;
            }
            Err(error) => return Err(doing("raise the fence")(error).into()),
        }
        if started.elapsed() >= timeout {
            return Err(FenceError::Timeout {
                waited: started.elapsed(),
                writers: writers_in_flight(&transaction).await?,
            });
        }
        tokio::time::sleep(PAUSE).await;
        slice = (slice * 2).min(LONGEST_SLICE);
    }
}

impl Fence<'_> {
    /// Turns this side's epoch and role and releases the fence. The sequence changes at once;
    /// it is read by writers only after the lock goes, with the commit that makes it durable.
    pub async fn turn(self, side: SideState) -> Result<(), FenceError> {
        self.turn_recording(side, None).await
    }

    /// The same with a query that is run in the same transaction and must answer true, or nothing
    /// is committed. (The sequence may be turned all the same: it is not transactional.)
    pub async fn turn_recording(self, side: SideState, record: Option<&str>) -> Result<(), FenceError> {
        let mut state = read_slot_state(&self.transaction)
            .await?
            .ok_or(JournalError::NotInstalled)?;
        state.side = side;
        state.full = false;
        if let Some(record) = record {
            // First what may refuse.
            let row = self
                .transaction
                .query_one(record, &[])
                .await
                .map_err(doing("record the turn"))?;
            if !row.get::<_, bool>(0) {
                self.release().await?;
                return Err(FenceError::Overruled);
            }
        }
        write_slot_state(&self.transaction, state).await?;
        self.transaction.commit().await.map_err(doing("turn the side's role"))?;
        Ok(())
    }

    /// Releases the fence with nothing changed.
    pub async fn release(self) -> Result<(), FenceError> {
        self.transaction.rollback().await.map_err(doing("release the fence"))?;
        Ok(())
    }
}

async fn any_prepared(transaction: &Transaction<'_>) -> Result<bool, JournalError> {
    let row = transaction
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database())",
            &[],
        )
        .await
        .map_err(doing("look for prepared transactions"))?;
    Ok(row.get(0))
}

async fn writers_in_flight(transaction: &Transaction<'_>) -> Result<String, JournalError> {
    let row = transaction
        .query_one(
            "SELECT COALESCE(pg_catalog.string_agg(w.who, '; '), 'none any more') FROM (
             SELECT pg_catalog.format('pid %s (%s, %s, %s)', a.pid, a.usename, a.application_name, a.state) AS who
               FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
              WHERE l.locktype = 'advisory' AND l.classid = $1::integer::oid AND l.objid = $2::integer::oid AND l.objsubid = 2
                AND l.granted AND l.mode = 'ShareLock'
                AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
             UNION ALL
             SELECT pg_catalog.format('the prepared transaction %L', p.gid)
               FROM pg_catalog.pg_prepared_xacts p WHERE p.database = pg_catalog.current_database()) w",
            &[&LOCK_CLASS, &LOCK_FENCE],
        )
        .await
        .map_err(doing("list writers in flight"))?;
    Ok(row.get(0))
}
