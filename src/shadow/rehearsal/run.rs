//! One run of a transaction on the secondary: its statements one after another, and a rollback.
//!
//! It gives way: it waits for a lock for milliseconds only, and where anybody waits for it, above
//! all the applier, it is cancelled and its locks are gone. Both are far below the time after which
//! Postgres looks for a deadlock, so nobody becomes the victim of one with it.

use std::pin::pin;
use std::time::Duration;

use tokio::time::sleep;

use super::super::connection::{Connection, ConnectionError, Heard};
use super::worker::Worker;
use super::{Said, Step, Transaction};
use crate::control::Side;
use crate::sql::{Class, SetWhat};
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

impl Heard {
    fn said(self) -> Said {
        match self.refused {
            None => Said::Done(self.tag),
            Some(refused) => Said::Refused(refused.sqlstate),
        }
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
                let (here, took) = if checks_all(step) {
                    check_deferred(connection).await?.map_or_else(
                        || (Said::Done("SET CONSTRAINTS".into()), Duration::ZERO),
                        |refused| (refused, Duration::ZERO),
                    )
                } else {
                    let bind = if step.bind.is_empty() { NO_VALUES } else { &step.bind };
                    let (heard, took) = connection.perform(&step.text, types, bind).await?;
                    (heard.said(), took)
                };
                let differs = step.said.as_ref() != Some(&here);
                said.push((here, took));
                if differs {
                    break;
                }
            }
            if let Some(last) = due(transaction, &said)
                && let Some(refused) = check_deferred(connection).await?
            {
                said[last].0 = refused;
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

/// The write that what is checked at COMMIT is held against, where it has come to that: all went as on
/// the primary, which committed; or all but this one, which the primary may have refused only then.
fn due(transaction: &Transaction, said: &[(Said, Duration)]) -> Option<usize> {
    let last = transaction.last_write()?;
    let alike = |at: usize| transaction.steps[at].said.as_ref() == said.get(at).map(|(said, _)| said);
    let all = (0..transaction.steps.len()).all(alike);
    let refused_there = (0..last).all(alike)
        && matches!(transaction.steps[last].said, Some(Said::Refused(_)))
        && matches!(said.get(last), Some((Said::Done(_), _)));
    (all && transaction.committed || refused_there && transaction.refused_at_end).then_some(last)
}

/// Has what is due at COMMIT checked; what is refused of it, if anything is.
async fn check_deferred(connection: &mut Connection) -> Result<Option<Said>, ConnectionError> {
    let (heard, _) = connection
        .perform(b"select pgtandem.check_deferred()", &[], NO_VALUES)
        .await?;
    Ok(Some(heard.said()).filter(|said| matches!(said, Said::Refused(_))))
}

/// `SET CONSTRAINTS ALL IMMEDIATE`: as it stands it would fire the mark's own trigger.
fn checks_all(step: &Step) -> bool {
    let sets = step
        .script
        .single()
        .is_some_and(|statement| matches!(&statement.class, Class::Set(set) if set.what == SetWhat::Constraints));
    let text = String::from_utf8_lossy(&step.text).to_lowercase();
    let words: Vec<&str> = text
        .split(|at: char| !at.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    sets && words.ends_with(&["all", "immediate"])
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
