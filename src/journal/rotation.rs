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
use super::state::{read_slot_state, write_slot_state};
use super::{JournalError, LOCK_CLASS, LOCK_STATE, doing};
use crate::catalog::snapshot::Snapshot;

/// Writers move on when their table has grown to this: large enough that a TRUNCATE is rare,
/// small enough that the journal stays near the lag's size.
const ROTATE_BYTES: i64 = 16 * 1024 * 1024;

/// What a look at the journal found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JournalSize {
    pub bytes: u64,
    /// A closed slot waits for a durable snapshot that covers it.
    pub waits_for_watermark: bool,
}

/// Empties what may be emptied and moves writers on when it is time. `durable` is the snapshot
/// stored on the secondary, not one that is only in the applier's memory.
pub async fn rotate(client: &mut Client, durable: &Snapshot) -> Result<JournalSize, JournalError> {
    let slots = client
        .query(
            "SELECT s.slot::smallint, pg_table_size(('pgtandem.change_' || s.slot)::regclass),
                    pg_indexes_size(('pgtandem.change_' || s.slot)::regclass), r.closed
               FROM generate_series(0, 2) AS s(slot) LEFT JOIN pgtandem.rotation r ON r.slot = s.slot ORDER BY 1",
            &[],
        )
        .await
        .map_err(doing("measure the journal"))?;
    let state = read_slot_state(client).await?.ok_or(JournalError::NotInstalled)?;
    let mut size = JournalSize::default();
    let mut heaps = [0_i64; 3];
    for row in &slots {
        let slot: i16 = row.get(0);
        let heap: i64 = row.get(1);
        heaps[slot as usize % 3] = heap;
        size.bytes += (heap + row.get::<_, i64>(2)) as u64;
        if slot == i16::from(state.slot) || heap == 0 {
            continue;
        }
        match row.get::<_, Option<Unsigned>>(3) {
            Some(closed) if durable.xmin() >= closed.0 => {
                if empty(client, slot).await? {
                    size.bytes = size.bytes.saturating_sub(heap as u64);
                    heaps[slot as usize % 3] = 0;
                }
            }
            Some(_) => size.waits_for_watermark = true,
            // A crash came between moving on and noting it: close it now, which is later than
            // need be and as safe.
            None => close(client, slot).await?,
        }
    }
    let next = (state.slot + 1) % 3;
    if heaps[state.slot as usize] >= ROTATE_BYTES && heaps[next as usize] == 0 {
        move_on(client, state.slot, next).await?;
    }
    Ok(size)
}

/// TRUNCATE, but only if nobody is in the way: a dump may be reading the table, and behind a
/// waiting TRUNCATE others would queue.
async fn empty(client: &Client, slot: i16) -> Result<bool, JournalError> {
    let result = client
        .batch_execute(&format!(
            "BEGIN; LOCK TABLE pgtandem.change_{slot} IN ACCESS EXCLUSIVE MODE NOWAIT; TRUNCATE pgtandem.change_{slot};
             DELETE FROM pgtandem.rotation WHERE slot = {slot}; UPDATE pgtandem.side SET truncations = truncations + 1; COMMIT"
        ))
        .await;
    match result {
        Ok(()) => Ok(true),
        Err(error) => {
            client
                .batch_execute("ROLLBACK")
                .await
                .map_err(doing("empty a journal table"))?;
            if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) {
                Ok(false)
            } else {
                Err(doing("empty a journal table")(error))
            }
        }
    }
}

async fn close(client: &Client, slot: i16) -> Result<(), JournalError> {
    client
        .batch_execute(&format!(
            "INSERT INTO pgtandem.rotation (slot, closed) VALUES ({slot}, pg_current_xact_id())
             ON CONFLICT (slot) DO UPDATE SET closed = EXCLUDED.closed"
        ))
        .await
        .map_err(doing("close a journal table"))
}

async fn move_on(client: &mut Client, from: u8, to: u8) -> Result<(), JournalError> {
    let transaction = client.transaction().await.map_err(doing("rotate the journal"))?;
    // Tried, not waited for: a flip holds this lock and waits for our round.
    let locked = transaction
        .query_one("SELECT pg_try_advisory_xact_lock($1, $2)", &[&LOCK_CLASS, &LOCK_STATE])
        .await
        .map_err(doing("rotate the journal"))?
        .get::<_, bool>(0);
    let mut state = read_slot_state(&transaction).await?.ok_or(JournalError::NotInstalled)?;
    if !locked || state.slot != from {
        return transaction.rollback().await.map_err(doing("rotate the journal"));
    }
    state.slot = to;
    write_slot_state(&transaction, state).await?;
    // setval above made this transaction take its id, maybe before another read the old slot.
    // Only an id given out from now on is above all of those; the next transaction's is.
    transaction.commit().await.map_err(doing("rotate the journal"))?;
    close(client, i16::from(from)).await
}
