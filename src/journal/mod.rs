//! The journal: what captures changes on a side, where they stand, how they are read by
//! snapshots and go by rotation, and the fence that keeps writers off.
//!
//! The SQL of schema `pgtandem` is in `sql/`. Used by the applier (rounds, rotation, capture),
//! the switchover (fence, state) and `app` (install, uninstall). Nothing here writes to an
//! application's table.

mod capture;
mod completed;
mod fence;
pub mod horizon;
mod install;
pub mod joined;
pub mod read;
pub mod rotation;
mod state;
mod strays;

pub use capture::{CaptureReport, capture_tables, refuse_or_report};
pub use completed::{is_completed, mark_completed};
pub use fence::{Fence, FenceError, fence};
pub use install::{Installed, install, uninstall};
pub use state::{SideRole, SideState, SlotState, read_state, set_role};
pub(crate) use state::{change, change_if, read_slot_state, write_slot_state};
pub use strays::{Stray, acknowledge_strays, strays};

use crate::config::StrayWriters;

/// Run by a client's session right before a DDL statement, in its transaction; `$1` is what the
/// words of the statement tell. It remembers, for the transaction, what only the session can see
/// and only now: which of the relations are temporary.
pub const DDL_HOOK_BEFORE: &str = "SELECT pgtandem.before_ddl($1::jsonb)";

/// Run by a client's session right after a DDL statement, in its transaction; `$1` is the
/// statement's exact text.
pub const DDL_HOOK: &str =
    "SELECT pgtandem.ddl($1::text, pg_catalog.current_setting('search_path'), current_user::text)";

/// Run by a client's session after a DDL statement outside transactions has succeeded.
pub const DDL_HOOK_OUTSIDE: &str =
    "SELECT pgtandem.ddl_outside($1::text, pg_catalog.current_setting('search_path'), current_user::text)";

/// First key of every advisory lock that pgtandem takes ("pgtd"); also in `sql/`.
pub(crate) const LOCK_CLASS: i32 = 1_885_828_196;

/// Second keys: held shared by every capturing transaction, exclusively by a flip;
pub(crate) const LOCK_FENCE: i32 = 1;
/// by whoever changes the state sequence or installs;
pub(crate) const LOCK_STATE: i32 = 2;
/// by the one applier, on the secondary, for its session.
pub(crate) const LOCK_APPLIER: i32 = 3;
/// by the one proxy that leads a flip, on the side that is primary when it begins, for its session.
pub(crate) const LOCK_FLIP: i32 = 4;

/// Why an operation on the journal failed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{doing}: {}", crate::upstream::control::error_chain(.source))]
    Postgres {
        doing: &'static str,
        #[source]
        source: tokio_postgres::Error,
    },
    /// What a DBA must run, because the proxy's own role may not.
    #[error("the proxy's role lacks privileges; a DBA must run: {0}")]
    Privileges(String),
    #[error("schema pgtandem says that this database is {found}, the configuration calls it {expected}")]
    WrongSide { found: String, expected: String },
    #[error("this journal is read for another secondary now")]
    AnotherFollows,
    #[error("schema pgtandem is not installed here")]
    NotInstalled,
    #[error("the state sequence holds {0}, which this version cannot read")]
    BadState(i64),
}

/// Adds what was being done to a database error.
pub(crate) fn doing(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> JournalError {
    move |source| JournalError::Postgres { doing, source }
}

impl From<StrayWriters> for SideRole {
    fn from(strays: StrayWriters) -> Self {
        Self::Secondary { strays }
    }
}
