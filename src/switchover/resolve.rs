//! Ending a flip that nobody leads any more, or whose coordinator does not know what became of its
//! decision: back before the point of no return, forward after it. By any proxy, any number of
//! times.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_postgres::error::SqlState;

use super::crossing::{last_to_cross, restore_old, turn_new};
use super::machine::{self, Step};
use super::records::{self, FlipRow, recorded};
use super::recover::Recorded;
use super::tandem::Tandem;
use crate::control::Side;
use crate::journal::{LOCK_CLASS, LOCK_STATE, SideRole, SideState, read_slot_state, read_state, write_slot_state};
use crate::upstream::control::{Control as Connection, connect, error_chain};

/// A fence holds the lock on the side's state while its flip lives.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// What is over has no deadline.
const OVER: Duration = Duration::ZERO;

/// The database whose records decide, where there are several: every proxy on the pair finds the
/// same one.
pub fn seat(tandems: &[Arc<Tandem>]) -> Option<&Arc<Tandem>> {
    tandems.iter().min_by_key(|tandem| tandem.name())
}

/// Ends `flip` and says how: [`Step::Aborted`] or [`Step::Turned`].
///
/// # Errors
/// Nothing can be decided while a server is away, or while its coordinator holds the fence.
pub async fn take_over(tandems: &[Arc<Tandem>], flip: &FlipRow, who: &str, why: &str) -> Result<Step, String> {
    let seat = seat(tandems).ok_or("there is no database")?;
    let step = match settle(seat, flip, who, why).await {
        Ok(step) => step,
        // The old side may be gone; a new side that was turned is proof enough.
        Err(cause) => match role_of(seat, flip.to.primary).await {
            Ok(Some(Recorded::Primary(epoch))) if epoch >= flip.to.epoch => Step::Decided,
            _ => return Err(cause),
        },
    };
    match step {
        Step::Decided => {
            turn_all(tandems, flip).await?;
            let measured = json!({ "outcome": "done", "taken_over": why });
            record_turned(seat, flip, who, &measured).await?;
            Ok(Step::Turned)
        }
        Step::Aborted => {
            restore_others(tandems, flip).await?;
            Ok(Step::Aborted)
        }
        other => Ok(other),
    }
}

/// Once `flip` is given up, by its record in the database that decides, the other databases' old sides
/// are made primary again where it had turned them.
pub(super) async fn restore_others(tandems: &[Arc<Tandem>], flip: &FlipRow) -> Result<(), String> {
    let seat = seat(tandems).map(|seat| seat.name());
    for tandem in tandems.iter().filter(|tandem| Some(tandem.name()) != seat) {
        restore_old(tandem, flip)
            .await
            .map_err(|cause| format!("database {}: {cause}", tandem.name()))?;
    }
    Ok(())
}

/// Ends what a flip left of a database of which neither side says that it is the primary: by the record
/// of that flip in the database that decides. False where there is none.
pub async fn settle_database(tandems: &[Arc<Tandem>], tandem: &Tandem, old: Side) -> Result<bool, String> {
    let seat = seat(tandems).ok_or("there is no database")?;
    let Some(id) = last_to_cross(tandem, old).await? else {
        return Ok(false);
    };
    let client = open(seat, old).await?;
    let found = records::find(&client, &id).await.map_err(|error| error_chain(&error))?;
    let Some(flip) = found else { return Ok(false) };
    match flip.step {
        Step::Aborted => restore_old(tandem, &flip).await?,
        Step::Decided | Step::Turned | Step::Done => turn_new(tandem, flip.to.primary, flip.to.epoch).await?,
        open => return Err(format!("a switchover is under way ({open}); its outcome is waited for")),
    }
    Ok(true)
}

/// Every database's new side is made primary.
pub(super) async fn turn_all(tandems: &[Arc<Tandem>], flip: &FlipRow) -> Result<(), String> {
    for tandem in tandems {
        turn_new(tandem, flip.to.primary, flip.to.epoch)
            .await
            .map_err(|cause| format!("database {}: {cause}", tandem.name()))?;
    }
    Ok(())
}

/// Tells every proxy that clients belong on the new side. There it must be recorded; the old one may
/// be away by now.
pub(super) async fn record_turned(seat: &Tandem, flip: &FlipRow, who: &str, measured: &Value) -> Result<(), String> {
    let on = async |side, expected: &[Step]| {
        let client = open(seat, side).await?;
        let sql = records::go_sql(&flip.id, expected, Step::Turned, who, measured, OVER);
        client
            .query_one(&sql, &[])
            .await
            .map(|_| ())
            .map_err(|error| error_chain(&error))
    };
    let open_or_decided = [
        Step::Preparing,
        Step::Probing,
        Step::Holding,
        Step::Fencing,
        Step::Draining,
        Step::Decided,
    ];
    let (old, new) = tokio::join!(on(flip.from, &[Step::Decided]), on(flip.to.primary, &open_or_decided));
    if let Err(cause) = old {
        tracing::warn!(cause, "the end of a switchover could not be recorded on the old side");
    }
    new
}

/// One transaction on the old side that excludes the fence, and so whoever holds it.
async fn settle(seat: &Tandem, flip: &FlipRow, who: &str, why: &str) -> Result<Step, String> {
    let told = |error| error_chain(&error);
    let mut client = open(seat, flip.from).await?;
    let transaction = client.transaction().await.map_err(told)?;
    let locked = transaction
        .batch_execute(&format!(
            "SET LOCAL synchronous_commit = on; SET LOCAL lock_timeout = {}; SELECT pg_advisory_xact_lock({LOCK_CLASS}, {LOCK_STATE})",
            LOCK_WAIT.as_millis()
        ))
        .await;
    if let Err(error) = locked {
        transaction.rollback().await.map_err(told)?;
        if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) {
            end_holder(&client).await.map_err(told)?;
        }
        return Err(told(error));
    }
    let Some(found) = records::find_for_update(&transaction, &flip.id).await.map_err(told)? else {
        return Ok(Step::Aborted);
    };
    let mut state = read_slot_state(&transaction)
        .await
        .map_err(|error| error.to_string())?
        .ok_or("pgtandem is not installed there any more")?;
    let stands = recorded(state.side.role, state.side.epoch);
    let (step, role) = machine::resolve(found.step, stands, flip.to.epoch);
    if step != found.step {
        let sql = records::go_sql(&flip.id, &[found.step], step, who, &json!({ "outcome": why }), OVER);
        transaction.query_one(&sql, &[]).await.map_err(told)?;
    }
    if let Recorded::Primary(epoch) = role
        && role != stands
    {
        state.side = SideState {
            epoch,
            role: SideRole::Primary,
        };
        write_slot_state(&transaction, state)
            .await
            .map_err(|error| error.to_string())?;
    }
    transaction.commit().await.map_err(told)?;
    if step == Step::Aborted && step != found.step {
        record_aborted_on_the_other(seat, flip, who, why).await;
    }
    Ok(step)
}

/// A coordinator that stands still or is cut off may have left its fence behind. Ended, it cannot
/// decide any more, and finds out how the flip was ended.
async fn end_holder(client: &Connection) -> Result<(), tokio_postgres::Error> {
    let rows = client
        .query(
            &format!(
                "SELECT l.pid, pg_catalog.pg_terminate_backend(l.pid) FROM pg_catalog.pg_locks l
                  WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
                    AND l.classid = {LOCK_CLASS}::oid AND l.objid = {LOCK_STATE}::oid
                    AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())"
            ),
            &[],
        )
        .await?;
    for row in &rows {
        tracing::warn!(
            pid = row.get::<_, i32>(0),
            "ended a session that held on to the side's state"
        );
    }
    Ok(())
}

/// For whoever reads the history there; nothing depends on it.
async fn record_aborted_on_the_other(seat: &Tandem, flip: &FlipRow, who: &str, why: &str) {
    let record = async {
        let client = open(seat, flip.to.primary).await?;
        let open: Vec<Step> = Step::ALL.into_iter().filter(|step| step.is_open()).collect();
        let sql = records::go_sql(&flip.id, &open, Step::Aborted, who, &json!({ "outcome": why }), OVER);
        client.query_one(&sql, &[]).await.map_err(|error| error_chain(&error))
    };
    // That side may be why it was given up.
    if let Ok(Err(cause)) = tokio::time::timeout(LOCK_WAIT, record).await {
        tracing::warn!(cause, "that a switchover was given up is recorded on one side only");
    }
}

/// What a side says of itself.
pub(super) async fn role_of(tandem: &Tandem, side: Side) -> Result<Option<Recorded>, String> {
    let client = open(tandem, side).await?;
    let state = read_state(&client).await.map_err(|error| error.to_string())?;
    Ok(state.map(|state| recorded(state.role, state.epoch)))
}

async fn open(tandem: &Tandem, side: Side) -> Result<Connection, String> {
    connect(tandem.targets().target(side), "switchover")
        .await
        .map_err(|error| error.to_string())
}
