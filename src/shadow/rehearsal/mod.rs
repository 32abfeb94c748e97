//! Rehearsed writes: a share of the clients' transactions is also run on the secondary, as their
//! user, and always rolled back; what the statements came to there is compared.
//!
//! ```text
//! session ── transaction over ──▶ bounded queue ──▶ the same statements on the secondary ──▶ alike: matched
//!                                                        │ always rolled back          └▶ different: confirm
//!                                                        └ gives way to whoever waits for it
//! ```
//! A rehearsal begins right behind its transaction's end, which mostly is before the round that
//! brings its rows; but not always, and others write meanwhile. So a difference is a mismatch only
//! where it is certain that the secondary's state is not to blame (`confirm`): everything else is
//! counted as *unsettled*, by fingerprint. How nothing of it stays is told in
//! `journal/sql/rehearse.sql`.

mod confirm;
mod desk;
mod interval;
mod run;
mod sink;
mod stats;
mod worker;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use dashmap::DashMap;
use tokio::sync::{Mutex, Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;

pub use interval::{WriteInterval, WritePeriod};
pub use sink::RehearsalSink;
pub use stats::{RehearsalReport, Rehearsed, RehearsedStatement, SlowerWrite, WriteCounts};
pub use worker::read_reach;

use super::ShadowSink;
use super::connection::Pool;
use super::log::MismatchLog;
use super::sample::Sample;
use crate::config::{DatabaseConfig, Rehearse};
use crate::control::Control;
use crate::sql::{LeftOut, LexSettings, Part, Reach, Script};
use crate::upstream::Login;

/// A transaction whose writes are to be tried on the secondary.
#[derive(Debug, Clone)]
pub struct Transaction {
    pub control: Control,
    pub login: Arc<Login>,
    /// Statements that bring a fresh connection to the session's settings, as they were when it
    /// began; `None` where they are not known in full.
    pub settings: Option<Arc<[Bytes]>>,
    pub lex: LexSettings,
    /// Temporary relations of the session.
    pub temporary: Vec<String>,
    /// The last round that was known to be applied when its first statement came.
    pub round: u64,
    pub steps: Vec<Step>,
    pub committed: bool,
    /// A refusal of its last write may be what COMMIT said: of what is checked only then.
    pub refused_at_end: bool,
    /// Why it is not to be rehearsed, where that is known already.
    pub left_out: Option<LeftOut>,
}

/// A statement of it.
#[derive(Debug, Clone)]
pub struct Step {
    pub text: Bytes,
    pub script: Arc<Script>,
    /// Four bytes for each parameter type of its Parse; and Bind's body behind the two names.
    pub types: Bytes,
    pub bind: Bytes,
    pub part: Part,
    /// What the primary said; `None` where it said nothing.
    pub said: Option<Said>,
    /// How long that took.
    pub took: Duration,
}

/// What a server said of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// The command tag.
    Done(String),
    /// The SQLSTATE.
    Refused(String),
}

impl Said {
    /// Rows that were written.
    pub(super) fn rows(&self) -> u64 {
        match self {
            Self::Done(tag) => tag.rsplit(' ').next().and_then(|rows| rows.parse().ok()).unwrap_or(0),
            Self::Refused(_) => 0,
        }
    }

    pub(super) fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Done(_) => None,
            Self::Refused(code) => Some(code),
        }
    }
}

impl Transaction {
    /// What is checked at COMMIT is held against it.
    fn last_write(&self) -> Option<usize> {
        self.steps.iter().rposition(Step::is_write)
    }
}

impl Step {
    const fn is_write(&self) -> bool {
        matches!(self.part, Part::Write { .. })
    }

    fn bytes(&self) -> usize {
        self.text.len() + self.types.len() + self.bind.len()
    }
}

/// What the rehearsals need of the applier.
pub trait Pace: Send + Sync + 'static {
    /// The last round that is known to be applied; 0 for none.
    fn applied_round(&self) -> u64;

    /// Done when a round that began after this call has been applied.
    fn round_after_now(&self) -> Pin<Box<dyn Future<Output = bool> + Send + '_>>;

    /// The same, and the sequences have been copied after that.
    fn catch_up(&self) -> Pin<Box<dyn Future<Output = bool> + Send + '_>>;

    /// Whether nothing shall be drawn from the secondary's sequences now.
    fn sequences_are_compared(&self) -> bool;
}

/// What the rehearsals of one database need.
pub struct Rehearsals<'a> {
    /// As clients name it.
    pub database: String,
    pub targets: DatabaseConfig,
    pub rehearse: Rehearse,
    pub control: watch::Receiver<Control>,
    pub pace: Arc<dyn Pace>,
    pub log: MismatchLog,
    /// The database's shadow reads: they know the primary's catalog.
    pub reads: &'a ShadowSink,
}

/// The tasks of one database's rehearsals.
pub struct RehearsalTasks {
    _worker: JoinHandle<()>,
    _reach: AbortOnDropHandle<()>,
}

/// Starts the rehearsals of one database. They end when every clone of the sink is gone.
pub fn spawn_rehearsals(rehearsals: Rehearsals<'_>) -> (RehearsalSink, RehearsalTasks) {
    let Rehearsals {
        database,
        targets,
        rehearse,
        control,
        pace,
        log,
        reads,
    } = rehearsals;
    let shared = Arc::new(sink::Shared {
        sample: ArcSwap::from_pointee(Sample::by(rehearse.percent, rehearse.key, &rehearse.rules)),
        on: ArcSwap::from_pointee(rehearse.any()),
        reach: ArcSwap::from_pointee(Reach::default()),
        look: Notify::new(),
        catalog: reads.0.catalog.clone(),
        catalog_changed: reads.0.catalog_changed.clone(),
        counters: stats::Counters::new(&database),
        pace,
        waiting: Arc::default(),
    });
    let (sink, queue) = RehearsalSink::new(shared.clone(), rehearse.queue);
    let desk = desk::Desk::new(targets.clone());
    let reach = worker::keep_reach(Arc::downgrade(&shared), targets.clone(), control.clone());
    let worker = worker::Worker {
        database,
        targets,
        control,
        shared,
        log,
        log_counters: reads.0.counters.clone(),
        pool: Pool::new(),
        desk,
        alike: DashMap::new(),
        deadline: rehearse.timeout,
        truncations: Mutex::default(),
    };
    let tasks = RehearsalTasks {
        _worker: tokio::spawn(worker::run(Arc::new(worker), queue, rehearse.max_concurrency)),
        _reach: AbortOnDropHandle::new(tokio::spawn(reach)),
    };
    (sink, tasks)
}
