//! Existing rows: copying them, comparing them, and mending what differs, at cuts.
//!
//! | file | holds |
//! | --- | --- |
//! | `backfill/` | copies tables, range by range |
//! | `key.rs` | by which key a table is walked, and ranges of it |
//! | `digest.rs` | how a row becomes a checksum that both servers compute alike |
//! | `readers.rs` | connections that read one cut |
//! | `compare.rs` | one range, down to the rows that differ |
//! | `sides.rs` | the two sides of a database, and who applies |
//! | `verify/` | all tables, batch by batch |
//! | `sequences.rs` | sequences, which no snapshot shows |
//! | `repair.rs` | verify, mend, verify again |
//! | `report.rs` | what is said of it |
//! | `copy/` | brings one side's definitions to an empty other one: pg_dump, psql, and what follows the rows |
//! | `schema/` | definitions: which statements bring one side in line with the other; pure |

pub mod backfill;
mod compare;
pub mod copy;
pub mod digest;
pub mod key;
mod place;
mod readers;
mod repair;
pub mod report;
pub mod schema;
mod sequences;
mod sides;
mod verify;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_postgres::error::SqlState;

pub use repair::repair;
pub use sides::Sides;
pub use verify::{Chosen, Options, SecondarySnapshot, verify, verify_over_and_over, verify_unseeded};

use crate::apply::Stopped;
use crate::upstream::control::{ConnectError, error_chain};

/// Why existing rows could not be compared or mended.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{}", error_chain(.0))]
    Postgres(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Stopped(#[from] Stopped),
    #[error("the cut was released before both snapshots were taken")]
    TooSlow,
    #[error("no mirrored table is called {0}")]
    NoSuchTable(String),
    #[error("{0} is the name of several tables; say which schema")]
    Ambiguous(String),
    /// Nobody listens any more.
    #[error("abandoned by whoever asked")]
    Abandoned,
    #[error("{0}")]
    NotMended(String),
}

/// The server ended a wait for a lock: for a deadlock among others perhaps, in which a reader only
/// stood in the queue.
fn was_interrupted(error: &tokio_postgres::Error) -> bool {
    let code = error.code();
    code.is_some_and(|code| [SqlState::T_R_DEADLOCK_DETECTED, SqlState::LOCK_NOT_AVAILABLE].contains(code))
}

/// RFC 3339, UTC.
fn now() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}
