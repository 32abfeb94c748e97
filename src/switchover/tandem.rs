//! One database's pair at work: its applier, in whichever direction, and what a phase change
//! asks of its two sides. Control connections are opened for each task and closed after it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_util::task::AbortOnDropHandle;

use super::crossing::make_primary_again;
use super::records::recorded;
use super::recover::Observed;
use super::report::{describe_delay, mirroring};
use super::servers;
use crate::admin::api::{DatabaseStatus, ServerStatus, ShadowReads};
use crate::apply::{self, Applier, ApplierConfig, ApplierState, Awaited};
use crate::catalog::PINNED_SETTINGS;
use crate::config::{Backfill, DatabaseConfig, Journal, StrayWriters, Target, Verify, Writes};
use crate::control::{Control, Epoch, Side};
use crate::journal::{self, SideRole, Stray};
use crate::reconcile::backfill::{BackfillStatus, Desk, Order as BackfillOrder};
use crate::reconcile::report::Event;
use crate::reconcile::{self, Sides};
use crate::routing::Pair;
use crate::transform::check::examine;
use crate::upstream::control::{Control as Connection, connect, error_chain};

/// One database, as clients name it, on its two sides.
pub struct Tandem {
    pair: Arc<Pair>,
    journal: Journal,
    writes: Writes,
    stray_writers: StrayWriters,
    verify: watch::Sender<Verify>,
    /// Whether the other side's database may still have to be created by another one's round.
    awaited: Awaited,
    applier: Mutex<Option<Arc<Applier>>>,
    backfill: Arc<Desk>,
    servers: watch::Sender<[ServerStatus; 2]>,
    _watching: AbortOnDropHandle<()>,
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
        awaited: Awaited,
    ) -> Arc<Self> {
        let servers = watch::Sender::default();
        let watching = tokio::spawn(servers::watch(pair.config.clone(), servers.clone()));
        Arc::new(Self {
            pair,
            journal,
            writes,
            stray_writers,
            verify: watch::Sender::new(verify),
            awaited,
            applier: Mutex::default(),
            backfill: Arc::new(Desk::new(backfill)),
            servers,
            _watching: AbortOnDropHandle::new(watching),
        })
    }

    /// Whether the database is on one side only, and may still come to the other.
    pub fn is_awaited(&self) -> bool {
        self.awaited.is()
    }

    /// Whether nothing that was committed before `then` is still to be applied; also where nothing is
    /// mirrored.
    pub fn has_caught_up_since(&self, then: Instant) -> bool {
        let Some(applier) = self.applier() else { return true };
        applier.status().borrow().caught_up_at.is_some_and(|at| at >= then)
    }

    pub fn name(&self) -> &str {
        &self.pair.name
    }

    pub fn stray_writers(&self) -> StrayWriters {
        self.stray_writers
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
            Ok(Some(state)) => Observed::Role(recorded(state.role, state.epoch)),
            Ok(None) => match journal::is_completed(&client).await {
                Ok(true) => Observed::Completed,
                Ok(false) => Observed::Nothing,
                Err(error) => Observed::Unreachable(error.to_string()),
            },
            Err(error) => Observed::Unreachable(error.to_string()),
        }
    }

    /// Makes a side primary again that was turned by a flip of which there is no record.
    pub async fn restore(&self, side: Side, epoch: Epoch) -> Result<(), String> {
        make_primary_again(self, side, epoch).await
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

    pub fn start_applier(&self, control: Control) {
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
            awaited: self.awaited.clone(),
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

    fn sides(&self, applier: Arc<Applier>, control: Control) -> Sides {
        Sides {
            database: self.name().to_owned(),
            primary: self.targets().target(control.primary).clone(),
            secondary: self.targets().target(control.secondary()).clone(),
            epoch: control.epoch,
            applier,
        }
    }

    /// How tables are compared over and over, from now on.
    pub fn configure_verify(&self, verify: Verify) {
        self.verify.send_replace(verify);
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
    /// and as long as `verify: continuous` says so all of them over and over; it ends with the applier.
    fn compare_existing_rows(&self, applier: Arc<Applier>, control: Control) {
        let sides = self.sides(applier, control);
        let settings = self.verify.subscribe();
        tokio::spawn(async move {
            let database = &sides.database;
            match reconcile::verify_unseeded(&sides).await {
                Ok(equal) if equal.is_empty() => {}
                Ok(equal) => tracing::info!(database, tables = ?equal, "found equal at a cut and synced from there on"),
                Err(error) => tracing::info!(database, %error, "existing rows were not compared to the end"),
            }
            reconcile::verify_over_and_over(&sides, settings).await;
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
        let sides = self.sides(applier, control);
        let done = match mend {
            None => reconcile::verify(&sides, options, events).await,
            Some(actor) => reconcile::repair(&sides, options, &actor, events).await,
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

    /// Returns when a round that began after this call has been applied, and the sequences copied.
    pub async fn catch_up(&self, timeout: Duration) -> Result<(), String> {
        self.within(timeout, Applier::catch_up).await
    }

    /// The same without the sequences.
    pub async fn round_after_now(&self, timeout: Duration) -> Result<(), String> {
        self.within(timeout, Applier::round_after_now).await
    }

    async fn within(
        &self,
        timeout: Duration,
        round: impl AsyncFnOnce(&Applier) -> Result<apply::Cut, apply::Stopped>,
    ) -> Result<(), String> {
        let applier = self.applier().ok_or("nothing is mirrored")?;
        match tokio::time::timeout(timeout, round(&applier)).await {
            Ok(Ok(_cut)) => Ok(()),
            Ok(Err(stopped)) => Err(stopped.to_string()),
            Err(_elapsed) => Err(describe_delay(&applier.status().borrow())),
        }
    }

    /// What is in quarantine on the secondary, oldest first.
    pub async fn quarantine(&self, primary: Side) -> Result<Vec<apply::Entry>, String> {
        let target = self.targets().target(primary.other());
        let client = connect(target, "quarantine").await.map_err(|error| error.to_string())?;
        apply::list_quarantine(&client)
            .await
            .map_err(|error| error_chain(&error))
    }

    /// The proxy that applies, where it is another one.
    pub fn applied_by_another(&self) -> Option<String> {
        let applier = self.applier()?;
        let status = applier.status();
        let status = status.borrow();
        let waits = status.state == ApplierState::Waiting;
        status.applier.clone().filter(|_| waits)
    }

    /// Writes past pgtandem that either side recorded and nobody acknowledged.
    pub async fn strays(&self) -> Result<Vec<(Side, Stray)>, String> {
        let mut found = Vec::new();
        for side in [Side::Legacy, Side::New] {
            let client = self.connect_about_strays(side).await?;
            let strays = journal::strays(&client).await.map_err(|error| error_chain(&error))?;
            found.extend(strays.into_iter().map(|stray| (side, stray)));
        }
        Ok(found)
    }

    /// Acknowledges all of them, on both sides; returns which.
    pub async fn acknowledge_strays(&self, by: &str, reason: &str) -> Result<Vec<(Side, Stray)>, String> {
        let mut done = Vec::new();
        for side in [Side::Legacy, Side::New] {
            let client = self.connect_about_strays(side).await?;
            let strays = journal::acknowledge_strays(&client, by, reason).await;
            let strays = strays.map_err(|error| error_chain(&error))?;
            done.extend(strays.into_iter().map(|stray| (side, stray)));
        }
        Ok(done)
    }

    async fn connect_about_strays(&self, side: Side) -> Result<Connection, String> {
        connect(self.targets().target(side), "strays")
            .await
            .map_err(|error| error.to_string())
    }

    /// Has an order about the quarantine carried out, by whichever proxy applies.
    pub async fn order(&self, order: apply::Order, timeout: Duration) -> Result<apply::Outcome, String> {
        let applier = self.applier().ok_or("nothing is mirrored in this phase")?;
        tokio::time::timeout(timeout, applier.order(order))
            .await
            .map_err(|_elapsed| format!("not within {timeout:?}: {}", describe_delay(&applier.status().borrow())))?
    }

    /// Has the secondary's definitions brought in line, by whichever proxy applies.
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

    /// Asks both servers anew what a switchover depends on; [`Self::status`] tells it.
    pub async fn look_at_servers(&self) {
        let looked = servers::look(&self.pair.config).await;
        self.servers.send_replace(looked);
    }

    /// Everything but the shadow reads, which others count.
    pub fn status(&self) -> DatabaseStatus {
        let [mut legacy, mut new] = self.servers.borrow().clone();
        if self.awaited.is() {
            for server in [&mut legacy, &mut new] {
                server.error = server.error.take().filter(|_| !server.missing);
            }
        }
        DatabaseStatus {
            name: self.name().to_owned(),
            legacy,
            new,
            mirroring: self.applier().map(|applier| mirroring(&applier.status().borrow())),
            rehearsed_writes: None,
            shadow_reads: ShadowReads::default(),
            acknowledge: None,
            canary: None,
            backfill: self.backfill.status(),
        }
    }
}
