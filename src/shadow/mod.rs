//! Shadow reads: a share of the reads is repeated on the secondary and the answers compared.
//!
//! ```text
//! session ── wants? ──▶ digest while the answer passes ── offer ──▶ bounded queue ──▶ worker
//!                                                                                      │
//!              mismatch log ◀── confirmed at a cut ◀── different ◀── after a round ◀───┘
//! ```
//! A client never waits for any of this: a full queue means dropped and counted. The sessions
//! call [`ShadowSink`] and [`DigestBuilder`]; the app calls [`spawn`] once for each database.
//! Nothing here writes to either database.

mod alike;
mod answer;
mod budget;
mod canary;
mod catalog;
mod compare;
mod confirm;
mod connection;
mod counted;
mod cuts;
mod digest;
mod fingerprints;
mod histogram;
mod interval;
mod log;
mod log_reader;
mod plans;
mod read;
pub mod rehearsal;
mod rows;
mod rules;
mod sample;
mod sampling;
mod shown;
mod sink;
mod slower;
mod stats;
mod values;
mod worker;

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;

pub use budget::{Spent, Window, exceeded};
pub use canary::{CanaryCounts, CanaryEvent, CanaryLine, CanaryNews, Fallback, Fallbacks, FingerprintCanary};
pub use catalog::Catalog;
pub use compare::Kind;
pub use counted::{Counted, read_counted};
pub use cuts::{Cuts, CutsFuture, HeldCut, NoCut};
pub use digest::{Digest, DigestBuilder};
pub use interval::{Interval, Period};
pub use log::{Acknowledgement, BothSides, LogStatus, Mismatch, MismatchLog, events};
pub use log_reader::{
    Acknowledged, Filter, FingerprintSummary, LogContents, Parsed, by_fingerprint, is_acknowledged,
    is_slower_acknowledged, joined, parse, read_log,
};
pub use plans::{Planner, Plans};
pub use read::{Analysis, BindValues, Call, ShadowRead};
pub use sample::Asked;
pub use sampling::{Sampling, Share, ShareRule};
pub use sink::{Candidate, ShadowSink};
pub use slower::{PlanShape, PlanShapes, Quantiles, Rule, SlowerOnNew, SlowerWatch};
pub use stats::{
    Coverage, Dropped, Durations, Failed, FingerprintReport, IgnoreReport, Latency, NeverCompared, Noise, Outcome,
    ReadCounts, ShadowReport, ShadowStats, SideLatency, Skipped, Slower, Timing,
};
pub use values::{ValueWriter, load_or_create_key};

use crate::config::{DatabaseConfig, Reads};
use crate::control::Control;
use stats::Counters;
use worker::Worker;
pub(crate) use worker::now;

/// What the shadow reads of one database need.
pub struct Shadow {
    /// As clients name it.
    pub database: String,
    /// With the names of the databases filled in.
    pub targets: DatabaseConfig,
    pub reads: Reads,
    pub control: watch::Receiver<Control>,
    pub cuts: Arc<dyn Cuts>,
    pub log: MismatchLog,
}

/// The tasks of one database's shadow reads. The worker ends when every clone of its sink is
/// gone; the catalog's reader ends with this.
pub struct ShadowTasks {
    pub worker: JoinHandle<()>,
    /// Asks both sides for plans.
    pub planner: Planner,
    _catalog: AbortOnDropHandle<()>,
}

/// Starts the shadow reads of one database.
pub fn spawn(shadow: Shadow) -> (ShadowSink, ShadowTasks) {
    let catalog = Arc::new(ArcSwap::from_pointee(Catalog::default()));
    let counters = Arc::new(Counters::new(&shadow.database));
    let (sink, queue) = ShadowSink::new(&shadow.reads, catalog.clone(), counters.clone());
    let reader = catalog::keep_current(
        shadow.targets.clone(),
        shadow.control.clone(),
        catalog.clone(),
        sink.0.catalog_changed.clone(),
        shadow.cuts.clone(),
    );
    let worker = Arc::new(Worker {
        database: shadow.database,
        targets: shadow.targets,
        control: shadow.control,
        cuts: shadow.cuts,
        catalog,
        rules: sink.0.rules.clone(),
        counters,
        log: shadow.log,
        pool: connection::Pool::new(),
        deadline: shadow.reads.shadow_timeout,
        confirming: Mutex::new(()),
    });
    let tasks = ShadowTasks {
        planner: Planner(worker.clone()),
        worker: tokio::spawn(worker::run(worker, queue, shadow.reads.shadow_max_concurrency)),
        _catalog: AbortOnDropHandle::new(tokio::spawn(reader)),
    };
    (sink, tasks)
}
