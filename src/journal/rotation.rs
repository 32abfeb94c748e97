//! Old journal tables go by rotation among three and TRUNCATE, never by DELETE and vacuum.
//!
//! Writers read the slot from the state sequence. When it moves on, a transaction that read
//! the old value may still write the old table; but it had its transaction id by then (a
//! trigger fires after its row was written), so it is below any id given out afterwards.
//! `rotation.closed` holds such an id, and the table may go once every transaction below it is
//! below the xmin of a snapshot durable on the secondary.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::read::Unsigned;
use super::state::{read_slot_state, try_change, try_lock};
use super::{JournalError, SideRole, SlotState, doing};
use crate::catalog::snapshot::Snapshot;
use crate::config::{self, WhenFull};

/// Writers move on when their table has grown to this: large enough that a TRUNCATE is rare,
/// small enough that the journal stays near the lag's size.
const ROTATE_BYTES: u64 = 16 * 1024 * 1024;

/// What a look at the journal found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JournalSize {
    pub bytes: u64,
    /// A closed slot waits for a durable snapshot that covers it.
    pub waits_for_watermark: bool,
    /// Capture is off: the bound was reached under `stop_mirroring`.
    pub stopped: bool,
}

/// The bytes that the journal holds.
pub async fn measure(client: &Client) -> Result<u64, JournalError> {
    let row = client
        .query_one(
            "SELECT COALESCE(sum(pg_total_relation_size(c)) FILTER (WHERE pg_relation_size(c) > 0), 0)::bigint
               FROM unnest(ARRAY['pgtandem.change_0', 'pgtandem.change_1', 'pgtandem.change_2']::regclass[]) AS c",
            &[],
        )
        .await
        .map_err(doing("measure the journal"))?;
    Ok(row.get::<_, i64>(0) as u64)
}

/// Empties what may be emptied and moves writers on when it is time. `durable` is the snapshot
/// stored on the secondary, not one that is only in the applier's memory; `pair` the name that it
/// bears, for what another secondary has says nothing of this one.
pub async fn rotate(
    client: &mut Client,
    durable: &Snapshot,
    pair: &str,
    limit: &config::Journal,
) -> Result<JournalSize, JournalError> {
    let slots = client
        .query(
            "SELECT s.slot::smallint, pg_relation_size(('pgtandem.change_' || s.slot)::regclass),
                    pg_total_relation_size(('pgtandem.change_' || s.slot)::regclass), r.closed
               FROM generate_series(0, 2) AS s(slot) LEFT JOIN pgtandem.rotation r ON r.slot = s.slot ORDER BY 1",
            &[],
        )
        .await
        .map_err(doing("measure the journal"))?;
    let state = read_slot_state(client).await?.ok_or(JournalError::NotInstalled)?;
    let mut size = JournalSize {
        stopped: state.side.role == SideRole::Off,
        ..JournalSize::default()
    };
    // With what is kept beside the table itself: wide images are.
    let mut held = [0_u64; 3];
    for row in &slots {
        let slot: i16 = row.get(0);
        // An empty table still counts a page of each index; that is not journal.
        let bytes = match row.get::<_, i64>(1) {
            0 => 0,
            _ => row.get::<_, i64>(2) as u64,
        };
        held[slot as usize % 3] = bytes;
        size.bytes += bytes;
        if slot == i16::from(state.slot) || bytes == 0 {
            continue;
        }
        match row.get::<_, Option<Unsigned>>(3) {
            Some(closed) if durable.xmin() >= closed.0 => {
                if empty(client, slot, durable, pair).await? {
                    size.bytes -= bytes;
                    held[slot as usize % 3] = 0;
                }
            }
            Some(_) => size.waits_for_watermark = true,
            // A crash came between moving on and noting it: close it now, which is later than
            // need be and as safe.
            None => close(client, slot).await?,
        }
    }
    let next = (state.slot + 1) % 3;
    // Under a small limit, or with writers refused, the slot in use must go as well.
    let threshold = if state.full {
        1
    } else {
        ROTATE_BYTES.min(limit.max_bytes / 4).max(1)
    };
    if held[state.slot as usize] >= threshold && held[next as usize] == 0 {
        move_on(client, state.slot, next).await?;
    }
    Ok(size)
}

/// TRUNCATE, but only if nobody is in the way: a dump may be reading the table, and behind a
/// waiting TRUNCATE others would queue. What was found before is asked again under the state's
/// lock: whoever believes to be the applier may have been deposed, and his successor moved on.
async fn empty(client: &mut Client, slot: i16, durable: &Snapshot, pair: &str) -> Result<bool, JournalError> {
    let Some(transaction) = try_lock(client).await? else {
        return Ok(false);
    };
    let state = read_slot_state(&transaction).await?.ok_or(JournalError::NotInstalled)?;
    let closed = transaction
        .query_opt("SELECT closed FROM pgtandem.rotation WHERE slot = $1", &[&slot])
        .await
        .map_err(doing("empty a journal table"))?
        .and_then(|row| row.get::<_, Option<Unsigned>>(0));
    if slot == i16::from(state.slot) || closed.is_none_or(|closed| durable.xmin() < closed.0) {
        return Ok(false);
    }
    let followed = transaction
        .execute(
            "UPDATE pgtandem.side SET truncations = truncations + 1, emptied = GREATEST(emptied, $1::text::xid8) WHERE pair = $2",
            &[&closed.map_or(0, |closed| closed.0).to_string(), &pair],
        )
        .await
        .map_err(doing("empty a journal table"))?;
    if followed == 0 {
        return Err(JournalError::AnotherFollows);
    }
    let emptied = transaction
        .batch_execute(&format!(
            "LOCK TABLE pgtandem.change_{slot} IN ACCESS EXCLUSIVE MODE NOWAIT; TRUNCATE pgtandem.change_{slot};
             DELETE FROM pgtandem.rotation WHERE slot = {slot}"
        ))
        .await;
    match emptied {
        Ok(()) => {
            transaction.commit().await.map_err(doing("empty a journal table"))?;
            Ok(true)
        }
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
            transaction
                .rollback()
                .await
                .map_err(doing("leave a journal table as it is"))?;
            Ok(false)
        }
        Err(error) => Err(doing("empty a journal table")(error)),
    }
}

/// Notes an id above that of everybody who may have written the table; only once it is out of
/// use, for an id noted earlier would let it go too soon.
async fn close(client: &Client, slot: i16) -> Result<(), JournalError> {
    client
        .batch_execute(&format!(
            "INSERT INTO pgtandem.rotation (slot, closed)
             SELECT {slot}, pg_current_xact_id() WHERE pg_sequence_last_value('pgtandem.state') & 3 <> {slot}
             ON CONFLICT (slot) DO UPDATE SET closed = EXCLUDED.closed"
        ))
        .await
        .map_err(doing("close a journal table"))
}

async fn move_on(client: &mut Client, from: u8, to: u8) -> Result<(), JournalError> {
    let mut moved = false;
    // Tried, not waited for: a flip holds this lock and waits for our round.
    try_change(client, |state| {
        if state.slot == from {
            state.slot = to;
            moved = true;
        }
    })
    .await?;
    if moved {
        // setval made that transaction take its id, maybe before another read the old slot.
        // Only an id given out from now on is above all of those; this next transaction's is.
        close(client, i16::from(from)).await?;
    }
    Ok(())
}

/// Keeps the journal within its bound: refuses writes, or stops capture, as configured. Answers
/// the state as it is afterwards.
pub async fn enforce_limit(
    client: &mut Client,
    limit: &config::Journal,
    bytes: u64,
) -> Result<SlotState, JournalError> {
    let stored = read_slot_state(client).await?.ok_or(JournalError::NotInstalled)?;
    let over = bytes >= limit.max_bytes;
    // Not at the first byte below: else writers and applier would take turns at the bound.
    let drained = bytes < limit.max_bytes / 10 * 8;
    let mut after = stored;
    if stored.side.role == SideRole::Primary {
        match limit.when_full {
            WhenFull::Block if over && !stored.full => {
                tracing::error!(
                    bytes,
                    limit = limit.max_bytes,
                    "the journal is full: writes are refused until it has drained"
                );
                after.full = true;
            }
            WhenFull::StopMirroring if over => {
                tracing::error!(
                    bytes,
                    limit = limit.max_bytes,
                    "the journal is full: mirroring stops, the secondary must be seeded again"
                );
                after.side.role = SideRole::Off;
                after.full = false;
            }
            WhenFull::Block | WhenFull::StopMirroring => {}
        }
    }
    if after.full && (drained || limit.when_full == WhenFull::StopMirroring) {
        tracing::info!(bytes, "the journal has drained: writes are accepted again");
        after.full = false;
    }
    if after == stored {
        return Ok(stored);
    }
    let changed = try_change(client, |state| {
        // A flip may have come in between; its word stands.
        if state.side == stored.side {
            state.side = after.side;
            state.full = after.full;
        }
    })
    .await?;
    Ok(if changed { after } else { stored })
}
