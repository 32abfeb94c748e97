//! One database's pair at work: its applier, in whichever direction, and what a phase change
//! asks of its two sides. Control connections are opened for each task and closed after it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_util::task::AbortOnDropHandle;

use super::recover::{Observed, Recorded};
use crate::admin::api::{self, DatabaseStatus, Lag, Mirroring, ServerStatus, ShadowReads, TableStatus};
use crate::apply::{self, Applier, ApplierConfig, ApplierState, ApplierStatus};
use crate::catalog::PINNED_SETTINGS;
use crate::config::{Backfill, DatabaseConfig, Journal, StrayWriters, Target, Verify, Writes};
use crate::control::{Control, Epoch, Side};
use crate::journal::{self, SideRole, SideState};
use crate::reconcile::backfill::{self, BackfillStatus, Desk, Order as BackfillOrder};
use crate::reconcile::report::Event;
use crate::reconcile::{self, Sides};
use crate::routing::Pair;
use crate::transform::check::examine;
use crate::upstream::control::{connect, error_chain};

/// How often each server is asked whether it is there.
const WATCH_EVERY: Duration = Duration::from_secs(2);
/// A server that takes longer to answer that is as good as away.
const WATCH_ANSWER_MAX: Duration = Duration::from_secs(10);
/// A last round may take this long even where draining has used up the deadline.
const LAST_ROUND_MIN: Duration = Duration::from_secs(2);
/// How long a fence on the side that nobody writes on may take.
const FENCE_QUIET_SIDE: Duration = Duration::from_secs(2);
/// Between two looks at a side whose turning was cut off.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// One database, as clients name it, on its two sides.
pub struct Tandem {
    pair: Arc<Pair>,
    journal: Journal,
    writes: Writes,
    stray_writers: StrayWriters,
    verify: Verify,
    applier: Mutex<Option<Arc<Applier>>>,
    backfill: Arc<Desk>,
    servers: watch::Receiver<[ServerStatus; 2]>,
    _watching: AbortOnDropHandle<()>,
}

/// Writers are fenced off the old primary while this lives; dropping it lets them go on.
pub struct Fenced {
    turn: oneshot::Sender<SideState>,
    outcome: JoinHandle<Result<(), String>>,
}

/// Proof that the last round under the fence has been applied. Only [`Tandem::last_round`]
/// makes one, and only with it can the roles be turned.
pub struct Drained {
    fenced: Fenced,
}

/// Whether a turn that fails may be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turning {
    MayGoBack,
    /// Another database has been turned already.
    MustFollow,
}

impl Tandem {
    /// Begins to watch the two servers; nothing else runs yet.
    pub fn new(
        pair: Arc<Pair>,
        journal: Journal,
        writes: Writes,
        stray_writers: StrayWriters,
        verify: Verify,
        backfill: Backfill,
    ) -> Arc<Self> {
        let (report, servers) = watch::channel(Default::default());
        let watching = tokio::spawn(watch_servers(pair.config.clone(), report));
        Arc::new(Self {
            pair,
            journal,
            writes,
            stray_writers,
            verify,
            applier: Mutex::default(),
            backfill: Arc::new(Desk::new(backfill)),
            servers,
            _watching: AbortOnDropHandle::new(watching),
        })
    }

    pub fn name(&self) -> &str {
        &self.pair.name
    }

    pub fn targets(&self) -> &DatabaseConfig {
        &self.pair.config
    }

    /// The applier, while the phase mirrors.
    pub fn applier(&self) -> Option<Arc<Applier>> {
        self.slot().clone()
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<Applier>>> {
        self.applier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each side records of itself.
    pub async fn observe_both(&self) -> (Observed, Observed) {
        tokio::join!(self.observe(Side::Legacy), self.observe(Side::New))
    }

    async fn observe(&self, side: Side) -> Observed {
        let client = match connect(self.targets().target(side), "recovery").await {
            Ok(client) => client,
            Err(error) => return Observed::Unreachable(error.to_string()),
        };
        match journal::read_state(&client).await {
            Ok(Some(state)) => Observed::Role(match state.role {
                SideRole::Primary | SideRole::Off => Recorded::Primary(state.epoch),
                SideRole::Secondary { .. } | SideRole::Fenced => Recorded::Secondary(state.epoch),
            }),
            Ok(None) => match journal::is_completed(&client).await {
                Ok(true) => Observed::Completed,
                Ok(false) => Observed::Nothing,
                Err(error) => Observed::Unreachable(error.to_string()),
            },
            Err(error) => Observed::Unreachable(error.to_string()),
        }
    }

    /// Makes a side primary again after a flip that was interrupted before its point of no
    /// return.
    pub async fn restore(&self, side: Side, epoch: Epoch) -> Result<(), String> {
        self.set_state(side, primary_at(epoch)).await
    }

    /// Installs capture on the primary and starts the applier, which installs it on the
    /// secondary as soon as that can be reached.
    pub async fn start_mirroring(&self, control: Control) -> Result<(), String> {
        let target = self.targets().target(control.primary);
        let mut client = connect(target, "capture").await.map_err(|error| error.to_string())?;
        let install = journal::install(&mut client, control.primary, SideRole::Primary, control.epoch);
        install
            .await
            .map_err(|error| format!("{}: {error}", target.describe()))?;
        self.refuse_wrong_mapping().await?;
        self.capture_all(&client, target).await?;
        self.start_applier(control);
        Ok(())
    }

    /// A mapping of the two schemas that is wrong is told at once. Where a side is away, the applier
    /// tells it when it comes.
    async fn refuse_wrong_mapping(&self) -> Result<(), String> {
        let DatabaseConfig { legacy, new, transform } = self.targets();
        if transform.is_empty() {
            return Ok(());
        }
        let (Ok(legacy), Ok(new)) = tokio::join!(connect(legacy, "check"), connect(new, "check")) else {
            return Ok(());
        };
        for client in [&legacy, &new] {
            client
                .batch_execute(PINNED_SETTINGS)
                .await
                .map_err(|error| error_chain(&error))?;
        }
        let plan = examine(transform, &legacy, &new)
            .await
            .map_err(|error| error_chain(&error))?;
        match &plan.faults[..] {
            [] => Ok(()),
            [first, rest @ ..] => Err(format!("{first} ({} more; `pgtandem check` lists them)", rest.len())),
        }
    }

    /// Returns when every table that can be captured is. Tables whose lock is not to be had
    /// within short waits are tried again; the applier reports those that never can be.
    async fn capture_all(&self, client: &Client, target: &Target) -> Result<(), String> {
        loop {
            let report = journal::capture_tables(client)
                .await
                .map_err(|error| error.to_string())?;
            if let [(table, cause), ..] = &report.failed[..] {
                return Err(format!(
                    "{}: table {table} cannot be captured: {cause}; a DBA must run: {}",
                    target.describe(),
                    report.sql_for_dba.join(" ")
                ));
            }
            if report.busy.is_empty() {
                return Ok(());
            }
            tracing::warn!(tables = ?report.busy, "waiting for locks to install capture");
        }
    }

    fn start_applier(&self, control: Control) {
        let config = ApplierConfig::new(
            self.targets().target(control.primary).clone(),
            self.targets().target(control.secondary()).clone(),
            control.epoch,
            self.journal,
            self.writes,
            self.stray_writers,
        );
        let applier = apply::spawn(ApplierConfig {
            transform: self.targets().transform.clone(),
            ..config
        });
        let applier = Arc::new(applier);
        *self.slot() = Some(applier.clone());
        self.compare_existing_rows(applier.clone(), control);
        self.look_for_unfinished_backfill(applier, control);
    }

    /// What an earlier proxy, or this one before a flip, left half copied is told in the status.
    fn look_for_unfinished_backfill(&self, applier: Arc<Applier>, control: Control) {
        let sides = self.sides(applier, control);
        let (desk, database) = (self.backfill.clone(), self.name().to_owned());
        tokio::spawn(async move {
            if let Err(error) = desk.look_for_unfinished(&sides).await {
                tracing::warn!(database, error, "whether a backfill is unfinished is not known");
            }
        });
    }

    fn sides(&self, applier: Arc<Applier>, control: Control) -> backfill::Sides {
        backfill::Sides {
            primary: self.targets().target(control.primary).clone(),
            secondary: self.targets().target(control.secondary()).clone(),
            epoch: control.epoch,
            applier,
        }
    }

    /// Where this database's backfill is ordered.
    pub fn backfill(&self) -> &Desk {
        &self.backfill
    }

    /// Starts a backfill, or changes the one that runs.
    pub async fn start_backfill(&self, control: Control, order: &BackfillOrder) -> Result<BackfillStatus, String> {
        let applier = self.applier().ok_or("nothing is mirrored in this phase")?;
        self.backfill.start(&self.sides(applier, control), order).await
    }

    /// Tables that held rows when their capture began are compared once, beside everything else,
    /// and with `verify: continuous` all of them over and over; it ends with the applier.
    fn compare_existing_rows(&self, applier: Arc<Applier>, control: Control) {
        let primary = self.targets().target(control.primary).clone();
        let secondary = self.targets().target(control.secondary()).clone();
        let database = self.name().to_owned();
        let verify = self.verify;
        tokio::spawn(async move {
            let sides = Sides {
                database: &database,
                applier: &applier,
                primary: &primary,
                secondary: &secondary,
                epoch: control.epoch,
            };
            match reconcile::verify_unseeded(sides).await {
                Ok(equal) if equal.is_empty() => {}
                Ok(equal) => tracing::info!(database, tables = ?equal, "found equal at a cut and synced from there on"),
                Err(error) => tracing::info!(database, %error, "existing rows were not compared to the end"),
            }
            if verify.continuous {
                reconcile::verify_over_and_over(sides, verify).await;
            }
        });
    }

    /// Compares, or with `mend` also mends, existing rows; events tell how far it is.
    ///
    /// # Errors
    /// Why it could not be done, or not to the end.
    pub async fn reconcile(
        &self,
        control: Control,
        options: &reconcile::Options,
        mend: Option<String>,
        events: &mpsc::Sender<Event>,
    ) -> Result<(), String> {
        let applier = self.applier().ok_or("nothing is mirrored in this phase")?;
        {
            let status = applier.status();
            let status = status.borrow();
            if status.state != ApplierState::Running {
                return Err(match &status.applier {
                    Some(other) => format!("{other} applies, and only that proxy has cuts: ask it"),
                    None => describe_delay(&status),
                });
            }
        }
        let sides = Sides {
            database: self.name(),
            applier: &applier,
            primary: self.targets().target(control.primary),
            secondary: self.targets().target(control.secondary()),
            epoch: control.epoch,
        };
        let done = match mend {
            None => reconcile::verify(sides, options, events).await,
            Some(actor) => reconcile::repair(sides, options, &actor, events).await,
        };
        done.map(|_| ()).map_err(|error| error.to_string())
    }

    /// Lets the applier finish its round and give its lease back.
    pub async fn stop_applier(&self) {
        let applier = self.slot().take();
        if let Some(applier) = applier {
            applier.stop().await;
        }
    }

    /// Stops the applier and removes capture from both sides.
    pub async fn stop_mirroring(&self) -> Result<(), String> {
        self.stop_applier().await;
        // The primary first: no writer shall wait for anything on the secondary.
        for side in [Side::Legacy, Side::New] {
            self.uninstall(side).await?;
        }
        Ok(())
    }

    /// As [`Self::stop_mirroring`], and leaves the marker by which a proxy started later knows
    /// that legacy is no longer the truth.
    pub async fn complete(&self) -> Result<(), String> {
        self.stop_applier().await;
        self.uninstall(Side::New).await?;
        let mut legacy = connect(self.targets().target(Side::Legacy), "complete")
            .await
            .map_err(|error| error.to_string())?;
        journal::uninstall(&mut legacy)
            .await
            .map_err(|error| error.to_string())?;
        journal::mark_completed(&legacy)
            .await
            .map_err(|error| error.to_string())
    }

    async fn uninstall(&self, side: Side) -> Result<(), String> {
        let mut client = connect(self.targets().target(side), "uninstall")
            .await
            .map_err(|error| error.to_string())?;
        journal::uninstall(&mut client).await.map_err(|error| error.to_string())
    }

    /// Returns when a round that began after this call has been applied.
    pub async fn catch_up(&self, timeout: Duration) -> Result<(), String> {
        let applier = self.applier().ok_or("nothing is mirrored")?;
        match tokio::time::timeout(timeout, applier.catch_up()).await {
            Ok(Ok(_cut)) => Ok(()),
            Ok(Err(stopped)) => Err(stopped.to_string()),
            Err(_elapsed) => Err(describe_delay(&applier.status().borrow())),
        }
    }

    /// Waits until no writer is in flight on `side` and lets none begin.
    pub async fn fence(&self, side: Side, deadline: Instant) -> Result<Fenced, String> {
        let target = self.targets().target(side).clone();
        let (raised, is_raised) = oneshot::channel();
        let (turn, turned) = oneshot::channel();
        // A task of its own owns the connection whose transaction is the fence.
        let outcome = tokio::spawn(async move {
            let mut client = connect(&target, "switchover")
                .await
                .map_err(|error| error.to_string())?;
            let left = deadline.saturating_duration_since(Instant::now());
            let fence = journal::fence(&mut client, left)
                .await
                .map_err(|error| error.to_string())?;
            raised.send(()).ok();
            match turned.await {
                Ok(state) => fence.turn(state).await.map_err(|error| error.to_string()),
                // Dropped: the flip was abandoned.
                Err(_) => fence.release().await.map_err(|error| error.to_string()),
            }
        });
        if is_raised.await.is_ok() {
            return Ok(Fenced { turn, outcome });
        }
        match outcome.await {
            Ok(Ok(())) => Err("the fence was not raised".into()),
            Ok(Err(cause)) => Err(cause),
            Err(panicked) => Err(panicked.to_string()),
        }
    }

    /// Applies what the fenced side has committed, sequences included.
    ///
    /// # Errors
    /// It took too long; or, unless `forced`, the secondary is not equal after it: something was
    /// put into quarantine since the gates were measured.
    pub async fn last_round(&self, fenced: Fenced, deadline: Instant, forced: bool) -> Result<Drained, String> {
        let left = deadline.saturating_duration_since(Instant::now()).max(LAST_ROUND_MIN);
        self.catch_up(left).await?;
        let applier = self.applier().ok_or("nothing is mirrored")?;
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
        Ok(Drained { fenced })
    }

    /// What is in quarantine on the secondary, oldest first.
    pub async fn quarantine(&self, primary: Side) -> Result<Vec<apply::Entry>, String> {
        let target = self.targets().target(primary.other());
        let client = connect(target, "quarantine").await.map_err(|error| error.to_string())?;
        apply::list_quarantine(&client)
            .await
            .map_err(|error| error_chain(&error))
    }

    /// Has an order about the quarantine carried out.
    pub async fn order(&self, order: apply::Order, timeout: Duration) -> Result<apply::Outcome, String> {
        let applier = self.applier().ok_or("nothing is mirrored in this phase")?;
        tokio::time::timeout(timeout, applier.order(order))
            .await
            .map_err(|_elapsed| format!("not within {timeout:?}: {}", describe_delay(&applier.status().borrow())))?
    }

    /// Has the secondary's definitions brought in line.
    pub async fn heal(&self, order: apply::HealOrder, timeout: Duration) -> Result<apply::Healed, String> {
        let applier = self.applier().ok_or("nothing is mirrored in this phase")?;
        tokio::time::timeout(timeout, applier.heal(order))
            .await
            .map_err(|_elapsed| format!("not within {timeout:?}: {}", describe_delay(&applier.status().borrow())))?
    }

    /// Makes an applier go on that stopped because too much was refused.
    pub fn go_on(&self) {
        if let Some(applier) = self.applier() {
            applier.go_on();
        }
    }

    /// Turns the roles: first the old side, then the new one, which is the point of no return.
    /// Between the two nobody can write, so an error there is not final: what the sides say is
    /// looked at until one of them is primary.
    ///
    /// # Errors
    /// The roles are as they were; only where they may go back.
    pub async fn turn(&self, drained: Drained, from: Control, to: Control, mode: Turning) -> Result<(), String> {
        self.stop_applier().await;
        let turned = self.turn_both(drained.fenced, from, to, mode).await;
        self.start_applier(if turned.is_ok() { to } else { from });
        turned
    }

    async fn turn_both(&self, fenced: Fenced, from: Control, to: Control, mode: Turning) -> Result<(), String> {
        while let Err(cause) = self.arm_reverse(to).await {
            match mode {
                Turning::MayGoBack => return Err(cause),
                Turning::MustFollow => self.trouble(&cause).await,
            }
        }
        let Fenced { turn, outcome } = fenced;
        turn.send(self.secondary_at(to.epoch)).ok();
        if let Ok(Err(cause)) = outcome.await {
            // Cut off: whether it was turned is not known, so it is turned again, either way.
            self.trouble(&cause).await;
            while let Err(cause) = self.set_state(from.primary, self.secondary_at(to.epoch)).await {
                self.trouble(&cause).await;
            }
        }
        while let Err(cause) = self.set_state(to.primary, primary_at(to.epoch)).await {
            self.trouble(&cause).await;
            if mode == Turning::MayGoBack && self.go_back(from, to).await.is_ok() {
                return Err(cause);
            }
        }
        Ok(())
    }

    /// Only once the new side can be told for certain not to be primary may the old one be it.
    async fn go_back(&self, from: Control, to: Control) -> Result<(), String> {
        self.set_state(to.primary, self.secondary_at(from.epoch)).await?;
        while let Err(cause) = self.set_state(from.primary, primary_at(from.epoch)).await {
            self.trouble(&cause).await;
        }
        Ok(())
    }

    async fn trouble(&self, cause: &str) {
        tracing::error!(
            database = self.name(),
            cause,
            "turning the roles was cut off; clients wait"
        );
        tokio::time::sleep(LOOK_AGAIN).await;
    }

    fn secondary_at(&self, epoch: Epoch) -> SideState {
        SideState {
            epoch,
            role: SideRole::from(self.stray_writers),
        }
    }

    /// Makes sure that every table of the new primary is captured, and stores on the old side from
    /// where its changes are to be applied; nobody writes on either side now.
    async fn arm_reverse(&self, to: Control) -> Result<(), String> {
        let primary = connect(self.targets().target(to.primary), "switchover")
            .await
            .map_err(|error| error.to_string())?;
        let report = journal::capture_tables(&primary)
            .await
            .map_err(|error| error.to_string())?;
        let failed = report.failed.iter().map(|(table, _)| table);
        let missing: Vec<&String> = report.busy.iter().chain(failed).collect();
        if !missing.is_empty() {
            return Err(format!(
                "on {} these tables could not be captured: {missing:?}",
                to.primary
            ));
        }
        let mut secondary = connect(self.targets().target(to.secondary()), "switchover")
            .await
            .map_err(|error| error.to_string())?;
        apply::begin_direction(&primary, &mut secondary, to.primary, to.epoch)
            .await
            .map_err(|error| error.to_string())
    }

    async fn set_state(&self, side: Side, state: SideState) -> Result<(), String> {
        let mut client = connect(self.targets().target(side), "switchover")
            .await
            .map_err(|error| error.to_string())?;
        let fence = journal::fence(&mut client, FENCE_QUIET_SIDE)
            .await
            .map_err(|error| error.to_string())?;
        fence.turn(state).await.map_err(|error| error.to_string())
    }

    /// Everything but the shadow reads, which others count.
    pub fn status(&self) -> DatabaseStatus {
        let [legacy, new] = self.servers.borrow().clone();
        DatabaseStatus {
            name: self.name().to_owned(),
            legacy,
            new,
            mirroring: self.applier().map(|applier| mirroring(&applier.status().borrow())),
            shadow_reads: ShadowReads::default(),
            acknowledge: None,
            backfill: self.backfill.status(),
        }
    }
}

const fn primary_at(epoch: Epoch) -> SideState {
    SideState {
        epoch,
        role: SideRole::Primary,
    }
}

/// Why a catch-up takes long, from what the applier says of itself.
fn describe_delay(status: &ApplierStatus) -> String {
    match &status.state {
        ApplierState::Connecting { error: Some(error) } => format!("no connection: {error}"),
        ApplierState::Connecting { error: None } => "connecting".into(),
        ApplierState::Waiting => "another proxy holds the applier's lease".into(),
        ApplierState::Running => format!("{} transactions behind", status.lag.transactions),
        ApplierState::Failing { error } => format!("rounds fail: {error}"),
        ApplierState::Halted { error } => error.clone(),
        ApplierState::Stopped => "the applier is stopped".into(),
    }
}

/// The applier's status as the admin API tells it.
fn mirroring(status: &ApplierStatus) -> Mirroring {
    let (state, error) = match &status.state {
        ApplierState::Connecting { error } => ("connecting", error.clone()),
        ApplierState::Waiting => ("waiting", None),
        ApplierState::Running => ("running", None),
        ApplierState::Failing { error } => ("failing", Some(error.clone())),
        ApplierState::Halted { error } => ("halted", Some(error.clone())),
        ApplierState::Stopped => ("stopped", None),
    };
    let lag = status.lag_now();
    Mirroring {
        state: state.into(),
        error,
        applier: status.applier.clone(),
        round: status.round,
        watermark: status.watermark.as_ref().map(|watermark| watermark.snapshot.clone()),
        position: status.watermark.as_ref().map(|watermark| watermark.position.clone()),
        changes_applied: status.changes_applied,
        transactions_applied: status.transactions_applied,
        lag: Lag {
            transactions: lag.transactions,
            bytes: lag.bytes,
            seconds: lag.seconds,
        },
        journal: api::Journal {
            bytes: status.journal.bytes,
            full: status.journal.full,
            stopped: status.journal.stopped,
        },
        tables: status
            .tables_now()
            .into_iter()
            .map(|table| TableStatus {
                name: format!("{}.{}", table.schema, table.name),
                seeding: table.seeding.as_str().into(),
                paused: table.paused,
                note: table.note,
                diverged: table.diverged,
                verified: table.verified,
            })
            .collect(),
        not_mirrored: status
            .not_mirrored
            .iter()
            .map(|object| format!("{}: {}", object.what, object.reason))
            .collect(),
        sql_for_dba: status.sql_for_dba.clone(),
        different: status.different.clone(),
        one_way: status.one_way.clone(),
        sequence_errors: status.sequence_errors.clone(),
        divergences: status.diverged,
        stray_writes: status.strays,
        quarantine: api::Quarantine {
            transactions: status.quarantine.transactions,
            refused: status.quarantine.refused,
            changes: status.quarantine.changes,
            oldest: status.quarantine.oldest.clone(),
            oldest_seconds: status.quarantine.oldest_seconds,
            error: status.quarantine.error.clone(),
        },
    }
}

/// Asks both servers from time to time whether they are there, for the status alone: nothing
/// is decided by it.
async fn watch_servers(targets: DatabaseConfig, report: watch::Sender<[ServerStatus; 2]>) {
    loop {
        let (legacy, new) = tokio::join!(
            look_at(targets.target(Side::Legacy)),
            look_at(targets.target(Side::New))
        );
        if report.send([legacy, new]).is_err() {
            return;
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

async fn look_at(target: &Target) -> ServerStatus {
    let found = async {
        let client = connect(target, "watch").await.map_err(|error| error.to_string())?;
        let row = client.query_one("SHOW server_version", &[]).await;
        row.map(|row| row.get::<_, String>(0))
            .map_err(|error| error_chain(&error))
    };
    let (version, error) = match tokio::time::timeout(WATCH_ANSWER_MAX, found).await {
        Ok(Ok(version)) => (Some(version), None),
        Ok(Err(error)) => (None, Some(error)),
        Err(_elapsed) => (None, Some(format!("no answer within {WATCH_ANSWER_MAX:?}"))),
    };
    ServerStatus {
        address: format!("{}:{}/{}", target.host, target.port, target.dbname()),
        version,
        error,
    }
}
