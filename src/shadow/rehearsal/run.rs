//! One run of a transaction on the secondary: its statements one after another, and a rollback.
//!
//! It gives way: it waits for a lock for milliseconds only, and where anybody waits for it, above
//! all the applier, it is cancelled and its locks are gone. Both are far below the time after which
//! Postgres looks for a deadlock, so nobody becomes the victim of one with it.

use std::pin::pin;
use std::time::Duration;

use tokio::time::sleep;

use super::super::connection::{Connection, ConnectionError};
use super::worker::Worker;
use super::{Said, Transaction};
use crate::control::Side;
use crate::upstream::cancel::cancel;

/// How long a rehearsal waits for a lock.
const LOCK_TIMEOUT_MS: u32 = 20;
/// Between looks at whether anybody waits for it.
const LOOK: Duration = Duration::from_millis(5);

pub(super) struct Run {
    /// The last round of which the secondary had all when it began; `None` between two rounds.
    pub(super) round: Option<u64>,
    /// Of its statements, up to the first that came out differently.
    pub(super) said: Vec<(Said, Duration)>,
    /// Somebody waited for it.
    pub(super) gave_way: bool,
}

impl Run {
    /// The first statement that came out otherwise than on the primary.
    pub(super) fn difference(&self, transaction: &Transaction) -> Option<usize> {
        let mut pairs = transaction.steps.iter().zip(&self.said);
        pairs.position(|(step, (said, _))| step.said.as_ref() != Some(said))
    }
}

/// Bind's body behind the names for a statement without parameters.
const NO_VALUES: &[u8] = b"\0\0\0\0\0\0";

/// Runs a transaction; leaves the connection outside of any. `calls`: the statements' parameter
/// types as the secondary knows them.
pub(super) async fn run(
    worker: &Worker,
    connection: &mut Connection,
    transaction: &Transaction,
    types: &[Vec<u8>],
) -> Result<Run, ConnectionError> {
    let side = transaction.control.secondary();
    let (pid, secret) = (connection.pid, connection.secret.clone());
    let mut gave_way = false;
    let outcome = {
        let steps = async {
            let round = begin(worker, connection, side).await?;
            let mut said = Vec::with_capacity(transaction.steps.len());
            for (step, types) in transaction.steps.iter().zip(types) {
                let bind = if step.bind.is_empty() { NO_VALUES } else { &step.bind };
                let (heard, took) = connection.perform(&step.text, types, bind).await?;
                let here = match heard.refused {
                    None => Said::Done(heard.tag),
                    Some(refused) => Said::Refused(refused.sqlstate),
                };
                let differs = step.said.as_ref() != Some(&here);
                said.push((here, took));
                if differs {
                    break;
                }
            }
            connection.command("roll the rehearsal back", b"rollback").await?;
            Ok((round, said))
        };
        let mut steps = pin!(steps);
        let mut late = pin!(sleep(worker.patience()));
        loop {
            let look = async {
                sleep(LOOK).await;
                let blocks = worker.desk.is_blocked_by(side, pid).await;
                if blocks {
                    cancel(worker.targets.target(side), pid, &secret).await.ok();
                }
                blocks
            };
            tokio::select! {
                biased;
                outcome = &mut steps => break outcome,
                blocks = look => gave_way |= blocks,
                () = &mut late => {
                    cancel(worker.targets.target(side), pid, &secret).await.ok();
                    break Err(ConnectionError::Deadline);
                }
            }
        }
    };
    let (round, said) = outcome?;
    Ok(Run { round, said, gave_way })
}

/// Opens the transaction and marks it as one that is never committed.
async fn begin(worker: &Worker, connection: &mut Connection, side: Side) -> Result<Option<u64>, ConnectionError> {
    let refused = |error| ConnectionError::Refused {
        what: "open the rehearsal",
        error,
    };
    let key = worker.desk.key(side).await.map_err(refused)?;
    let begin = format!(
        "begin isolation level read committed read write; set local lock_timeout = {LOCK_TIMEOUT_MS}; \
         set local statement_timeout = {}; set local idle_in_transaction_session_timeout = 5000",
        worker.deadline.as_millis().max(1)
    );
    connection.command("open the rehearsal", begin.as_bytes()).await?;
    // As a parameter: the text of a statement is shown to all sessions of its user.
    let mut bind = b"\0\0\0\x01".to_vec();
    bind.extend_from_slice(&u32::try_from(key.len()).unwrap_or_default().to_be_bytes());
    bind.extend_from_slice(key.as_bytes());
    bind.extend_from_slice(b"\0\0");
    let (heard, _) = connection.perform(b"select pgtandem.rehearse($1)", &[], &bind).await?;
    match heard.refused {
        None => Ok(heard.value.and_then(|round| round.parse().ok())),
        Some(error) => {
            worker.desk.forget_key().await;
            Err(refused(error.text))
        }
    }
}
