//! One database's way through a flip: its fence, its last round, the turning of its two sides.
//!
//! The connections are opened before anybody is held. The old side can be turned only with a
//! [`Drained`], which nothing but the last round under the fence returns: forgetting the fence does
//! not compile.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use super::machine::{self, FlipId};
use super::probe;
use super::records::{FlipRow, recorded};
use super::recover::Recorded;
use super::tandem::Tandem;
use crate::apply::{self, PreparedSequences, Tried};
use crate::catalog::quote::literal;
use crate::control::{Control, Epoch, Side};
use crate::journal::{self, FenceError, SideRole, SideState, SlotState};
use crate::upstream::control::{Control as Connection, connect, error_chain};

/// A last round may take this long even where draining has used up the deadline.
const LAST_ROUND_MIN: Duration = Duration::from_secs(5);
/// For locks of applications' open transactions: clients are held meanwhile.
const LOCK_WAIT: Duration = Duration::from_secs(1);
/// A fence whose holder is cut off is lifted by its server after this long.
const FENCE_SILENCE_MAX: Duration = Duration::from_secs(20);

/// The open connections of one database's flip.
pub(super) struct Crossing {
    pub tandem: Arc<Tandem>,
    to: Control,
    old: Connection,
    new: Connection,
    fencing: Option<Connection>,
    /// What the trial has found, so that clients need not wait while it is read.
    tried: Option<(Tried, PreparedSequences)>,
}

/// Writers are fenced off the old primary while this lives; dropping it lets them go on.
pub(super) struct Fenced {
    turn: oneshot::Sender<Turn>,
    outcome: JoinHandle<Result<(), FenceError>>,
}

struct Turn {
    state: SideState,
    record: Option<String>,
}

/// Proof that the last round under the fence has been applied.
pub(super) struct Drained {
    fenced: Fenced,
}

impl Fenced {
    /// Lets writers go on; returns when they do.
    pub(super) async fn release(self) {
        drop(self.turn);
        if let Ok(Err(cause)) = self.outcome.await {
            // Its connection is gone, and the fence with it.
            tracing::warn!(%cause, "the fence was released by its server");
        }
    }
}

impl Drained {
    pub(super) async fn release(self) {
        self.fenced.release().await;
    }
}

/// Why the old side was not turned.
#[derive(Debug, thiserror::Error)]
pub(super) enum TurnError {
    /// Nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// It may have been, or not: what is recorded tells.
    #[error("{0}")]
    Unknown(String),
}

impl Crossing {
    /// Opens the connections.
    pub(super) async fn open(tandem: &Arc<Tandem>, from: Control, to: Control) -> Result<Self, String> {
        let (old, new, fencing) = tokio::try_join!(
            open(tandem, from.primary),
            open(tandem, to.primary),
            open(tandem, from.primary)
        )?;
        Ok(Self {
            tandem: tandem.clone(),
            to,
            old,
            new,
            fencing: Some(fencing),
            tried: None,
        })
    }

    /// Notes on the old side which flip is about to cross, has a change travel the reverse way, and does
    /// what will be done when clients wait once before.
    pub(super) async fn probe(&mut self, flip: &FlipId) -> Result<Value, String> {
        self.old
            .batch_execute(&format!(
                "INSERT INTO pgtandem.crossing (flip) VALUES ({}) ON CONFLICT (one) DO UPDATE SET flip = EXCLUDED.flip",
                literal(flip)
            ))
            .await
            .map_err(|error| error_chain(&error))?;
        let measured = probe::send(&self.new, &self.old).await?;
        self.check_capture().await?;
        let tried = apply::try_direction(&self.new, &mut self.old, self.to.primary, self.to.epoch)
            .await
            .map_err(|error| error.to_string())?;
        let sequences = PreparedSequences::prepare(&self.old, &self.new)
            .await
            .map_err(|error| format!("sequences: {error}"))?;
        self.tried = Some((tried, sequences));
        Ok(measured)
    }

    /// Waits until no writer is in flight on the old side and lets none begin.
    pub(super) async fn fence(&mut self, patience: Duration) -> Result<Fenced, String> {
        let mut client = self.fencing.take().ok_or("the fence has been raised already")?;
        let (raised, is_raised) = oneshot::channel();
        let (turn, turned) = oneshot::channel::<Turn>();
        // A task of its own owns the connection whose transaction is the fence.
        let outcome = tokio::spawn(async move {
            let fence = journal::fence(&mut client, patience).await?;
            raised.send(()).ok();
            match turned.await {
                Ok(turn) => fence.turn_recording(turn.state, turn.record.as_deref()).await,
                // Dropped: the flip was abandoned.
                Err(_) => fence.release().await,
            }
        });
        if is_raised.await.is_ok() {
            return Ok(Fenced { turn, outcome });
        }
        match outcome.await {
            Ok(Ok(())) => Err("the fence was not raised".into()),
            Ok(Err(cause)) => Err(cause.to_string()),
            Err(panicked) => Err(panicked.to_string()),
        }
    }

    /// Applies what the fenced side has committed, sequences included, and stores on the old side
    /// from where the reverse direction begins.
    ///
    /// # Errors
    /// It took too long; or, unless `forced`, the secondary is not equal after it: something was
    /// put into quarantine since the gates were measured.
    pub(super) async fn last_round(
        &mut self,
        fenced: Fenced,
        patience: Duration,
        forced: bool,
    ) -> Result<(Drained, Value), String> {
        let began = Instant::now();
        self.tandem.round_after_now(patience.max(LAST_ROUND_MIN)).await?;
        let applied = began.elapsed();
        let applier = self.tandem.applier().ok_or("nothing is mirrored")?;
        let (held, diverged) = {
            let status = applier.status();
            let status = status.borrow();
            (status.quarantine.transactions, status.diverged)
        };
        if !forced && (held > 0 || diverged > 0) {
            return Err(format!(
                "after it {held} transactions are in quarantine and {diverged} rows have diverged"
            ));
        }
        let (sequences, as_tried) = match self.arm_as_tried().await? {
            Some(sequences) => (sequences, true),
            None => (self.arm_anew().await?, false),
        };
        let measured = json!({
            "round_ms": applied.as_secs_f64() * 1000.0,
            "sequences": sequences,
            "as_tried": as_tried,
            "all_ms": began.elapsed().as_secs_f64() * 1000.0,
        });
        Ok((Drained { fenced }, measured))
    }

    /// Brings the sequences forward and stores on the old side from where the new primary's changes are
    /// to be applied, with what the trial has read; nobody writes on either side now. Returns how many
    /// sequences were behind; `None` where definitions have changed since the trial.
    async fn arm_as_tried(&mut self) -> Result<Option<usize>, String> {
        let Some((tried, sequences)) = &self.tried else {
            return Ok(None);
        };
        let sequences = match sequences.copy(&self.old, &self.new).await {
            Ok(sequences) => sequences,
            Err(cause) => {
                tracing::debug!(%cause, "sequences are listed anew");
                return Ok(None);
            }
        };
        let begun = apply::begin_as_tried(&self.new, &mut self.old, self.to.primary, self.to.epoch, tried)
            .await
            .map_err(|error| error.to_string())?;
        Ok(begun.then_some(sequences))
    }

    /// The same with all of it read now, and every table of the new primary captured.
    async fn arm_anew(&mut self) -> Result<usize, String> {
        let sequences = apply::copy_sequences(&self.old, &self.new)
            .await
            .map_err(|error| format!("sequences: {error}"))?;
        self.check_capture().await?;
        apply::begin_direction(&self.new, &mut self.old, self.to.primary, self.to.epoch)
            .await
            .map_err(|error| error.to_string())?;
        Ok(sequences)
    }

    async fn check_capture(&self) -> Result<(), String> {
        let report = journal::capture_tables(&self.new)
            .await
            .map_err(|error| error.to_string())?;
        let failed = report.failed.iter().map(|(table, _)| table);
        let missing: Vec<&String> = report.busy.iter().chain(failed).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(format!(
            "on {} these tables could not be captured: {missing:?}",
            self.to.primary
        ))
    }

    /// Makes the old side secondary; with `record`, only if that says true, and both or neither.
    pub(super) async fn turn_old(&self, drained: Drained, record: Option<String>) -> Result<(), TurnError> {
        let Fenced { turn, outcome } = drained.fenced;
        let state = SideState {
            epoch: self.to.epoch,
            role: SideRole::from(self.tandem.stray_writers()),
        };
        turn.send(Turn { state, record }).ok();
        match outcome.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(FenceError::Overruled)) => Err(TurnError::Refused(FenceError::Overruled.to_string())),
            Ok(Err(cause)) => Err(TurnError::Unknown(cause.to_string())),
            Err(panicked) => Err(TurnError::Unknown(panicked.to_string())),
        }
    }

    /// As [`turn_new`], over the connection that is open.
    pub(super) async fn turn_new(&mut self) -> Result<(), String> {
        turn_on(&mut self.new, self.to.epoch).await
    }
}

/// Makes the new side primary once the flip to `epoch` is decided, and ends what the old direction's
/// appliers have open there. May be done any number of times, by anybody, however late.
pub(super) async fn turn_new(tandem: &Tandem, side: Side, epoch: Epoch) -> Result<(), String> {
    let mut client = open(tandem, side).await?;
    turn_on(&mut client, epoch).await
}

async fn turn_on(client: &mut Connection, epoch: Epoch) -> Result<(), String> {
    change(client, |stands| machine::turn(stands, epoch)).await?;
    apply::depose(client, epoch.previous()).await
}

/// Makes the old side primary again that `flip`, which was not decided, may have turned. May be done
/// by anybody, any number of times, however late: a later flip, which may lead to the same epoch, has
/// noted itself before it turned anything.
pub(super) async fn restore_old(tandem: &Tandem, flip: &FlipRow) -> Result<(), String> {
    let mut client = open(tandem, flip.from).await?;
    let unchanged = format!(
        "SELECT NOT EXISTS (SELECT FROM pgtandem.crossing WHERE flip <> {})",
        literal(&flip.id)
    );
    let restored = journal::change_if(&mut client, &unchanged, |state| {
        let stands = recorded(state.side.role, state.side.epoch);
        let (_, role) = machine::resolve(machine::Step::Draining, stands, flip.to.epoch);
        make_primary(state, stands, role);
    });
    restored.await.map(|_| ()).map_err(|error| error.to_string())
}

/// The last flip that set out to turn `side`.
pub(super) async fn last_to_cross(tandem: &Tandem, side: Side) -> Result<Option<FlipId>, String> {
    let client = open(tandem, side).await?;
    let row = client.query_opt("SELECT flip FROM pgtandem.crossing", &[]).await;
    match row {
        Ok(row) => Ok(row.map(|row| row.get(0))),
        // Installed by a version that did not note it.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Ok(None),
        Err(error) => Err(error_chain(&error)),
    }
}

/// Makes `side` primary in `epoch`, where it still says that it is secondary.
pub(super) async fn make_primary_again(tandem: &Tandem, side: Side, epoch: Epoch) -> Result<(), String> {
    let mut client = open(tandem, side).await?;
    change(&mut client, |stands| match stands {
        Recorded::Secondary(_) => Recorded::Primary(epoch),
        primary => primary,
    })
    .await
}

/// Lets writers in where the role becomes primary; the other way only a fence leads. Nobody has to
/// be waited for: who has found the side closed has written nothing.
async fn change(client: &mut Connection, role: impl FnOnce(Recorded) -> Recorded) -> Result<(), String> {
    journal::change(client, |state| {
        let stands = recorded(state.side.role, state.side.epoch);
        make_primary(state, stands, role(stands));
    })
    .await
    .map_err(|error| error.to_string())
}

fn make_primary(state: &mut SlotState, stands: Recorded, role: Recorded) {
    if let Recorded::Primary(epoch) = role
        && stands != role
    {
        let role = SideRole::Primary;
        state.side = SideState { epoch, role };
        state.full = false;
    }
}

/// A connection whose transaction its server ends when nobody goes on with it.
async fn open(tandem: &Tandem, side: Side) -> Result<Connection, String> {
    let connection = connect(tandem.targets().target(side), "switchover")
        .await
        .map_err(|error| error.to_string())?;
    connection
        .batch_execute(&format!(
            "SET idle_in_transaction_session_timeout = {}; SET lock_timeout = {}",
            FENCE_SILENCE_MAX.as_millis(),
            LOCK_WAIT.as_millis()
        ))
        .await
        .map_err(|error| error.to_string())?;
    Ok(connection)
}
