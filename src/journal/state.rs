//! A side's state: one number in a sequence, because a sequence is read as it is now, whatever
//! the reader's snapshot, and by one cheap call from a trigger.

use tokio_postgres::{Client, GenericClient, Transaction};

use super::{JournalError, LOCK_CLASS, LOCK_STATE, doing};
use crate::config::StrayWriters;
use crate::control::Epoch;

/// What a side lets writers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SideRole {
    /// Takes writes and captures them.
    Primary,
    /// Follows; a stray writer is refused or reported.
    Secondary { strays: StrayWriters },
    /// Takes no writes and follows nobody: in the middle of a flip.
    Fenced,
    /// Takes writes and captures nothing: mirroring was stopped (a full journal under
    /// `stop_mirroring`). The other side must be seeded again.
    Off,
}

/// A side's epoch and role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SideState {
    pub epoch: Epoch,
    pub role: SideRole,
}

/// Everything that the sequence holds; the applier's own view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotState {
    pub side: SideState,
    /// Which of the three journal tables writers use.
    pub slot: u8,
    /// The journal is full: writes are refused until it has drained.
    pub full: bool,
}

impl SlotState {
    pub const fn pack(self) -> i64 {
        let role = match self.side.role {
            SideRole::Primary => 0,
            SideRole::Secondary {
                strays: StrayWriters::Refuse,
            } => 1,
            SideRole::Secondary {
                strays: StrayWriters::Report,
            } => 2,
            SideRole::Fenced => 3,
            SideRole::Off => 4,
        };
        (self.side.epoch.0 as i64) << 8 | (self.full as i64) << 5 | role << 2 | self.slot as i64
    }

    pub const fn unpack(value: i64) -> Option<Self> {
        let role = match (value >> 2) & 7 {
            0 => SideRole::Primary,
            1 => SideRole::Secondary {
                strays: StrayWriters::Refuse,
            },
            2 => SideRole::Secondary {
                strays: StrayWriters::Report,
            },
            3 => SideRole::Fenced,
            4 => SideRole::Off,
            _ => return None,
        };
        if value < 0 || value & 3 == 3 || value & 0xc0 != 0 {
            return None;
        }
        Some(Self {
            side: SideState {
                epoch: Epoch((value >> 8) as u64),
                role,
            },
            slot: (value & 3) as u8,
            full: value & 32 != 0,
        })
    }
}

/// The side's state, or `None` where pgtandem is not installed.
pub async fn read_state(client: &Client) -> Result<Option<SideState>, JournalError> {
    Ok(read_slot_state(client).await?.map(|state| state.side))
}

pub(crate) async fn read_slot_state(client: &impl GenericClient) -> Result<Option<SlotState>, JournalError> {
    let row = client
        .query_one(
            "SELECT CASE WHEN to_regclass('pgtandem.state') IS NOT NULL
                    THEN pg_sequence_last_value(to_regclass('pgtandem.state')) END",
            &[],
        )
        .await
        .map_err(doing("read the side's state"))?;
    match row.get::<_, Option<i64>>(0) {
        None => Ok(None),
        Some(value) => SlotState::unpack(value).map(Some).ok_or(JournalError::BadState(value)),
    }
}

/// Writes the sequence. The caller holds [`LOCK_STATE`], so that nobody else's change is lost.
pub(crate) async fn write_slot_state(client: &impl GenericClient, state: SlotState) -> Result<(), JournalError> {
    client
        .execute("SELECT setval('pgtandem.state', $1)", &[&state.pack()])
        .await
        .map_err(doing("write the side's state"))?;
    Ok(())
}

/// Changes the role in the same epoch, without the fence: for changes that do not move the
/// primary (what to do with stray writers, mirroring off and on).
pub async fn set_role(client: &mut Client, role: SideRole) -> Result<(), JournalError> {
    change(client, |state| state.side.role = role).await
}

/// Reads, changes and writes the state under [`LOCK_STATE`].
pub(crate) async fn change(client: &mut Client, alter: impl FnOnce(&mut SlotState)) -> Result<(), JournalError> {
    let transaction = lock(client).await?;
    alter_and_commit(transaction, alter).await
}

/// The same where `condition`, a query for a boolean, says true under the lock; else nothing changes.
pub(crate) async fn change_if(
    client: &mut Client,
    condition: &str,
    alter: impl FnOnce(&mut SlotState),
) -> Result<bool, JournalError> {
    let transaction = lock(client).await?;
    let holds: bool = transaction
        .query_one(condition, &[])
        .await
        .map_err(doing("look who turned this side"))?
        .get(0);
    if holds {
        alter_and_commit(transaction, alter).await?;
    } else {
        transaction.rollback().await.map_err(doing("leave the side's state"))?;
    }
    Ok(holds)
}

/// The same, but false and nothing changed when somebody else is at it: a flip holds the lock
/// and waits for the applier's round, which must therefore not wait for the lock.
pub(crate) async fn try_change(client: &mut Client, alter: impl FnOnce(&mut SlotState)) -> Result<bool, JournalError> {
    match try_lock(client).await? {
        Some(transaction) => {
            alter_and_commit(transaction, alter).await?;
            Ok(true)
        }
        None => Ok(false),
    }
}

/// A transaction that holds [`LOCK_STATE`].
async fn lock(client: &mut Client) -> Result<Transaction<'_>, JournalError> {
    let transaction = client.transaction().await.map_err(doing("lock the side's state"))?;
    // In one: clients may be held meanwhile.
    transaction
        .batch_execute(&format!(
            "SET LOCAL synchronous_commit = on; SELECT pg_advisory_xact_lock({LOCK_CLASS}, {LOCK_STATE})"
        ))
        .await
        .map_err(doing("lock the side's state"))?;
    Ok(transaction)
}

/// A transaction that holds [`LOCK_STATE`], or `None` when somebody else does.
pub(crate) async fn try_lock(client: &mut Client) -> Result<Option<Transaction<'_>>, JournalError> {
    let transaction = client.transaction().await.map_err(doing("lock the side's state"))?;
    transaction
        .batch_execute("SET LOCAL synchronous_commit = on")
        .await
        .map_err(doing("lock the side's state"))?;
    let locked = transaction
        .query_one("SELECT pg_try_advisory_xact_lock($1, $2)", &[&LOCK_CLASS, &LOCK_STATE])
        .await
        .map_err(doing("lock the side's state"))?
        .get::<_, bool>(0);
    if !locked {
        transaction.rollback().await.map_err(doing("leave the side's state"))?;
        return Ok(None);
    }
    Ok(Some(transaction))
}

async fn alter_and_commit(
    transaction: Transaction<'_>,
    alter: impl FnOnce(&mut SlotState),
) -> Result<(), JournalError> {
    let before = read_slot_state(&transaction).await?.ok_or(JournalError::NotInstalled)?;
    let mut state = before;
    alter(&mut state);
    if state != before {
        write_slot_state(&transaction, state).await?;
    }
    transaction.commit().await.map_err(doing("change the side's state"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_and_unpacks() {
        for role in [
            SideRole::Primary,
            SideRole::from(StrayWriters::Refuse),
            SideRole::from(StrayWriters::Report),
            SideRole::Fenced,
            SideRole::Off,
        ] {
            for slot in 0..3 {
                for full in [false, true] {
                    let state = SlotState {
                        side: SideState { epoch: Epoch(7), role },
                        slot,
                        full,
                    };
                    assert_eq!(SlotState::unpack(state.pack()), Some(state));
                    // The triggers' short cut: below 3 is "primary, journal open, this slot".
                    assert_eq!(state.pack() & 255 < 3, role == SideRole::Primary && !full);
                }
            }
        }
        for value in [-1, 3, 5 << 2, 64, 128] {
            assert_eq!(SlotState::unpack(value), None, "{value}");
        }
    }
}
