//! The applier: brings what the primary's journal holds to the secondary, round by round.
//!
//! ```text
//! primary ── read.rs ──▶ plan.rs ──▶ rows.rs / bulk.rs ──▶ secondary
//!  journal   one snapshot  difference    one transaction     rows + watermark
//! ```
//!
//! `app` spawns one [`Applier`] per pair of databases; the switchover, the shadow reads and
//! `wait --caught-up` ask it for cuts; the status reads what it publishes. It never fails: it
//! reconnects, and says in its status what is wrong.
//!
//! Why a round is exact. Let S be the snapshot of the last round and T the one of this. (1)
//! Every committed effect is in the journal of its own transaction, so the changes visible in T
//! and not in S are exactly the effects of the transactions that committed between the two. (2)
//! Each change consumes one old image and produces one new one, so the rows at T are the rows
//! at S, minus all old images, plus all new ones, in whatever order they were captured. (3) The
//! secondary equals the primary at S, so it equals it at T once the difference is written; rows
//! and T commit together, so a crash leaves S or T and nothing between. (4) Before that commit
//! the primary has its log on disk past T, so no crash of it can take T back.
//!
//! What the secondary refuses for good is put into quarantine, and the rest goes on: held.rs says
//! what is exact then, isolate.rs how the refused is found, quarantine/ how it is taken up again.

mod awaited;
mod bulk;
mod ddl;
pub mod difference;
mod direction;
mod errands;
mod faces;
mod follower;
mod guard;
mod heal;
pub mod held;
pub mod image;
mod isolate;
mod lease;
mod memory;
mod mend;
pub mod pipeline;
pub mod plan;
mod quarantine;
mod refill;
pub mod refusal;
mod round;
mod rows;
mod seeding;
mod sequences;
mod session;
pub mod statements;
mod status;
mod tables;
mod task;
pub mod threshold;
mod views;
mod walk;

use std::sync::Arc;
use std::time::Duration;

pub use awaited::Awaited;
pub use direction::{BeginError, Tried, begin_as_tried, begin_direction, try_direction};
pub use heal::{HealOrder, Healed};
pub(crate) use lease::{depose, this_proxy};
pub use mend::{Mend, MendRows, Mended};
pub use quarantine::{Entry, Order, Outcome, QuarantineStatus, list as list_quarantine};
pub use sequences::{PreparedSequences, SequenceError, copy_sequences};
pub(crate) use session::purpose as applier_purpose;
pub use status::{
    ApplierState, ApplierStatus, JournalStatus, Lag, NotMirrored, Seeding, TableStatus, Verified, WatermarkStatus,
};
pub use task::{Applier, Cut, HeldCut, Stopped, spawn};

pub use crate::journal::read::ReadBy;

use crate::config::{Journal, StrayWriters, Target, Writes};
use crate::control::Epoch;
use crate::journal::JournalError;
use crate::journal::read::RoundReadError;
use crate::transform::Transform;
use crate::upstream::control::{ConnectError, error_chain};

/// What an applier is told.
#[derive(Debug, Clone)]
pub struct ApplierConfig {
    pub primary: Target,
    pub secondary: Target,
    pub epoch: Epoch,
    /// Between rounds while there is something to do, at least.
    pub poll_min: Duration,
    /// Between rounds while there is something to do, in times of what the last one took; up to half
    /// of `poll_max`.
    pub rest: u32,
    /// Between rounds when nothing has come for a while.
    pub poll_max: Duration,
    /// Bytes of journal in one piece of a backlog: large, because each piece scans the backlog
    /// once for its share; small enough that a crash repeats little.
    pub piece_bytes: u64,
    pub read_by: ReadBy,
    pub stray_writers: StrayWriters,
    pub journal: Journal,
    pub writes: Writes,
    /// How the two sides' schemas differ.
    pub transform: Arc<Transform>,
    /// Whether the secondary's database may still have to be created by another one's round.
    pub awaited: Awaited,
}

impl ApplierConfig {
    /// With the usual pauses, reading by snapshots.
    pub fn new(
        primary: Target,
        secondary: Target,
        epoch: Epoch,
        journal: Journal,
        writes: Writes,
        stray_writers: StrayWriters,
    ) -> Self {
        Self {
            primary,
            secondary,
            epoch,
            poll_min: Self::POLL_MIN,
            rest: Self::REST,
            poll_max: Self::POLL_MAX,
            piece_bytes: Self::PIECE_BYTES,
            read_by: ReadBy::Snapshot,
            stray_writers,
            journal,
            writes,
            transform: Arc::default(),
            awaited: Awaited::default(),
        }
    }

    pub const POLL_MIN: Duration = Duration::from_millis(15);
    pub const REST: u32 = 3;
    pub const POLL_MAX: Duration = Duration::from_millis(100);
    pub const PIECE_BYTES: u64 = 256 * 1024 * 1024;
}

/// Why a session of the applier ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    #[error("{doing}: {}", error_chain(.source))]
    Postgres {
        doing: &'static str,
        #[source]
        source: tokio_postgres::Error,
    },
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Read(#[from] RoundReadError),
    #[error(transparent)]
    Snapshot(#[from] crate::catalog::snapshot::NotASnapshot),
    #[error("the {0} does not answer")]
    Silent(&'static str),
    #[error("{0}")]
    Deposed(String),
    #[error("proxy.yaml describes what cannot be mirrored; `pgtandem check` lists it: {0}")]
    Transform(String),
    #[error("schema pgtandem is not installed on {0}")]
    NotInstalled(String),
    #[error("the proxy's role on the secondary lacks a privilege; a DBA must run: {0}")]
    Privileges(String),
    #[error("the secondary refused a round: {0}")]
    Refused(String),
    /// Too much was refused; an operator says when to go on.
    #[error("mirroring has stopped: {0}")]
    Halted(String),
    #[error("{0}")]
    Inconsistent(String),
}

impl ApplyError {
    fn overtaken() -> Self {
        Self::Deposed("another applier has gone on from the same round".into())
    }

    /// Whether a server has no such database.
    fn is_missing_database(&self) -> bool {
        matches!(self, Self::Connect(error) if error.is_missing_database())
    }

    /// Whether a server could not be reached or went away, as opposed to said no.
    fn is_connection(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Silent(_) => true,
            Self::Postgres { source, .. }
            | Self::Read(RoundReadError::Postgres(source))
            | Self::Journal(JournalError::Postgres { source, .. }) => {
                // 57P01 to 57P05 and class 08: the server shut down or ended the session.
                source.is_closed()
                    || source.code().is_none_or(|code| {
                        let code = code.code();
                        code.starts_with("57P") || code.starts_with("08")
                    })
            }
            _ => false,
        }
    }
}

/// Adds what was being done to a database error.
pub(crate) fn doing(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> ApplyError {
    move |source| ApplyError::Postgres { doing, source }
}
