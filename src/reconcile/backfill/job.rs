//! The backfill's own task: plans tables, cuts them into ranges, and at each cut lets the workers
//! copy as much as fits into the time that mirroring may stand still.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::copy::{NotCopied, Part, Worker};
use super::ledger::{self, Onward};
use super::pace::{Measured, Patience, due, hurts};
use super::parts::{Outcome, look_ahead};
use super::plan::{Plan, copying_settings};
use super::status::{BackfillStatus, Meter};
use super::stop::{Ended, Stop};
use super::table::{Stage, TableJob};
use crate::catalog::Oid;
use crate::config::Backfill;
use crate::reconcile::Sides;
use crate::reconcile::copy::rest;
use crate::reconcile::key::KeyRange;
use crate::upstream::control::{Control, connect, error_chain};

const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// When a range is inserted. All but the first is wrong: it is for the test that shows that the
/// others can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InsertAt {
    /// At the end of the round in whose snapshot it was read.
    Cut,
    /// At the end of a later one.
    LaterCut,
}

/// Ranges that were begun at a cut: table and keys.
pub type OpenRanges = Vec<(String, KeyRange)>;

/// Called while a round's ranges are open, and waited for.
pub type Hook = Arc<dyn Fn(OpenRanges) -> BoxFuture<'static, ()> + Send + Sync>;

/// What a job works on.
#[derive(Clone)]
pub(super) struct Setup {
    pub sides: Sides,
    pub settings: watch::Receiver<Backfill>,
    pub cancel: CancellationToken,
    pub insert_at: InsertAt,
    pub hook: Option<Hook>,
}

pub(super) struct Job {
    pub(super) setup: Setup,
    pub(super) tables: Vec<TableJob>,
    pub(super) workers: Vec<Worker>,
    /// Plans on the primary, and measures it.
    pub(super) scout: Control,
    ledger: Control,
    patience: Patience,
    failures: u32,
    pub(super) slowed_by: Option<String>,
    /// Tables that cannot be copied, and why.
    left_out: Vec<(String, String)>,
    /// Statements that follow the rows and were refused, with the error.
    unbuilt: Vec<(String, String)>,
    /// Of the tables' sizes, for the remaining time in all.
    pub(super) meter: Meter,
    pub(super) rows: Meter,
    pub(super) bytes: Meter,
    pub(super) report: Arc<watch::Sender<Option<BackfillStatus>>>,
}

/// What a table is called on the secondary.
async fn name_of(primary: &tokio_postgres::Client, rel: Oid) -> Result<String, tokio_postgres::Error> {
    let row = primary
        .query_opt(
            "SELECT schema || '.' || name FROM pgtandem.mirrored WHERE rel = $1",
            &[&rel],
        )
        .await?;
    Ok(row.map_or_else(|| rel.to_string(), |row| row.get(0)))
}

impl Job {
    /// Plans the tables and records that they are being copied.
    ///
    /// # Errors
    /// In words, why it cannot begin.
    pub(super) async fn begin(
        setup: Setup,
        rels: &[Oid],
        report: Arc<watch::Sender<Option<BackfillStatus>>>,
    ) -> Result<Self, String> {
        let (scout, mut ledger) = connections(&setup).await.map_err(|stop| stop.to_string())?;
        let mut tables = Vec::new();
        let mut left_out = Vec::new();
        for &rel in rels {
            let plan = Plan::make(&scout, &ledger, rel)
                .await
                .map_err(|error| error_chain(&error))?;
            match plan {
                Ok(plan) => tables.push(TableJob::new(plan)),
                Err(why) => left_out.push((name_of(&scout, rel).await.map_err(|error| error_chain(&error))?, why)),
            }
        }
        let plans: Vec<&Plan> = tables.iter().map(|table| &*table.plan).collect();
        ledger::begin(&mut ledger, setup.sides.epoch, &plans)
            .await
            .map_err(|error| error_chain(&error))?;
        for table in &mut tables {
            if let Some(begun) = ledger::begun(&ledger, table.plan.rel)
                .await
                .map_err(|error| error_chain(&error))?
            {
                table.resume(&begun);
            }
        }
        if tables.is_empty()
            && let Some((_, why)) = left_out.first()
        {
            return Err(format!("nothing of it can be copied: {why}"));
        }
        let job = Self {
            setup,
            tables,
            workers: Vec::new(),
            scout,
            ledger,
            patience: Patience::default(),
            failures: 0,
            slowed_by: None,
            left_out,
            unbuilt: Vec::new(),
            meter: Meter::default(),
            rows: Meter::default(),
            bytes: Meter::default(),
            report,
        };
        job.publish(&Ended::Done, true);
        Ok(job)
    }

    /// Copies everything; whatever happens, the report says how it ended.
    pub(super) async fn run(mut self) {
        let ended = self.run_to_the_end().await;
        let recorded = match &ended {
            Ended::Done => Some(("done", None)),
            Ended::Cancelled => Some(("cancelled", None)),
            Ended::Stopped(why) => Some(("stopped", Some(why.as_str()))),
            Ended::Interrupted(_) => None,
        };
        if let Some((state, note)) = recorded
            && let Err(error) = ledger::end(&self.ledger, state, note).await
        {
            tracing::warn!(
                error = error_chain(&error),
                "the end of a backfill could not be recorded"
            );
        }
        match &ended {
            Ended::Done => tracing::info!(tables = self.tables.len(), "the backfill is done"),
            Ended::Cancelled => tracing::info!("the backfill was cancelled"),
            Ended::Stopped(why) | Ended::Interrupted(why) => tracing::error!(why, "the backfill has stopped"),
        }
        self.publish(&ended, false);
    }

    async fn run_to_the_end(&mut self) -> Ended {
        let mut backoff = RETRY_MIN;
        loop {
            let attempt = self.step().await;
            match attempt {
                Ok(true) => {
                    self.failures = 0;
                    backoff = RETRY_MIN;
                }
                Ok(false) => return self.outcome(),
                Err(Stop::Ended(ended)) => return ended,
                Err(Stop::Busy(why)) => {
                    self.slowed_by = Some(why);
                    self.publish(&Ended::Done, true);
                    let pause = self.patience.pause();
                    if self.pause(pause).await.is_err() {
                        return Ended::Cancelled;
                    }
                }
                Err(Stop::Failing(why)) => {
                    self.failures += 1;
                    let attempts = self.setup.settings.borrow().retry_attempts;
                    tracing::warn!(why, attempt = self.failures, "copying of rows is interrupted");
                    if self.failures > attempts {
                        return Ended::Stopped(format!("{why} (tried {} times)", self.failures));
                    }
                    self.slowed_by = Some(format!("trying again: {why}"));
                    self.publish(&Ended::Done, true);
                    if self.pause(backoff).await.is_err() {
                        return Ended::Cancelled;
                    }
                    backoff = (backoff * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// What is said at the end, when no table is left to copy.
    fn outcome(&self) -> Ended {
        let left: Vec<&TableJob> = self
            .tables
            .iter()
            .filter(|table| matches!(table.stage, Stage::Failed | Stage::Refused))
            .collect();
        match left.first() {
            None => match (self.unbuilt.first(), self.left_out.first()) {
                (None, None) => Ended::Done,
                (None, Some((name, why))) => Ended::Stopped(format!(
                    "all other rows are in; {} tables cannot be copied; {name}: {why}",
                    self.left_out.len()
                )),
                (Some((name, why)), _) => Ended::Stopped(format!(
                    "the rows are in; {} statements of the schema (pgtandem.schema_rest) were refused; {name}: {why}",
                    self.unbuilt.len()
                )),
            },
            Some(first) => Ended::Stopped(format!(
                "{} of {} tables are not synced; {}: {}",
                left.len(),
                self.tables.len(),
                first.name(),
                first.note.as_deref().unwrap_or_default()
            )),
        }
    }

    /// One round of copying; false when there is nothing left.
    async fn step(&mut self) -> Result<bool, Stop> {
        if self.setup.cancel.is_cancelled() {
            return Err(Stop::Ended(Ended::Cancelled));
        }
        self.mend_connections().await?;
        self.plan_reshaped().await?;
        self.finish_tables().await?;
        if !self.tables.iter().any(TableJob::is_open) {
            self.build_the_rest().await?;
            return Ok(false);
        }
        let settings = *self.setup.settings.borrow();
        if let Some(why) = self.what_hurts(&settings).await? {
            self.slowed_by = Some(why);
            self.publish(&Ended::Done, true);
            let pause = self.patience.pause();
            self.pause(pause).await?;
            return Ok(true);
        }
        self.patience.relieve();
        self.slowed_by = None;

        let began = Instant::now();
        look_ahead(&self.scout, &mut self.tables, settings).await?;
        let tasks = self.take_tasks(&settings);
        if tasks.is_empty() {
            return Ok(true);
        }
        let outcomes = self.copy(tasks, &settings).await?;
        let (rows, bytes) = self.settle(outcomes, &settings)?;
        self.publish(&Ended::Done, true);
        self.keep_rate(began, rows, bytes).await?;
        Ok(true)
    }

    async fn mend_connections(&mut self) -> Result<(), Stop> {
        if self.scout.is_closed() || self.ledger.is_closed() {
            (self.scout, self.ledger) = connections(&self.setup).await?;
        }
        self.workers.retain(|worker| !worker.is_lost());
        let wanted = self.setup.settings.borrow().workers.max(1);
        self.workers.truncate(wanted);
        while self.workers.len() < wanted {
            let sides = &self.setup.sides;
            let worker = Worker::connect(&sides.primary, &sides.secondary, sides.epoch).await?;
            self.workers.push(worker);
        }
        Ok(())
    }

    /// DDL that was applied meanwhile; the ranges that are done stay done, unless their key is
    /// another one.
    async fn plan_reshaped(&mut self) -> Result<(), Stop> {
        for table in self.tables.iter_mut().filter(|table| table.reshaped && table.is_open()) {
            table.reshaped = false;
            self.workers
                .iter_mut()
                .for_each(|worker| worker.forget_stage(table.plan.rel));
            match Plan::make(&self.scout, &self.ledger, table.plan.rel).await? {
                Ok(plan) => {
                    let signature = |plan: &Plan| plan.key.as_ref().map(super::plan::Key::signature);
                    let same_key = signature(&plan) == signature(&table.plan);
                    table.plan = Arc::new(plan);
                    if !same_key {
                        table.begin_anew();
                    }
                }
                Err(why) => {
                    ledger::note_table(&self.ledger, table.plan.rel, "failed", Some(&why)).await?;
                    table.fail(Stage::Failed, Some(why));
                }
            }
        }
        Ok(())
    }

    /// Tables of which all rows are in.
    async fn finish_tables(&mut self) -> Result<(), Stop> {
        let mut turned = false;
        for table in &mut self.tables {
            if table.is_copied() {
                table.stage = Stage::Copied;
            }
            if table.stage != Stage::Copied {
                continue;
            }
            // Before it counts as synced: a flip waits for that.
            let name = format!("{}.{}", table.plan.schema, table.plan.name);
            note_unbuilt(
                &mut self.unbuilt,
                rest::build(&mut self.ledger, Some(&name), true).await?.failed,
            );
            let (state, why) = ledger::finish(&mut self.ledger, table.plan.rel, table.counts.failed).await?;
            table.stage = match state {
                "done" => Stage::Done,
                "refused" => Stage::Refused,
                _ => Stage::Failed,
            };
            table.note = why;
            turned = true;
            tracing::info!(
                table = table.name(),
                state,
                rows = table.counts.read,
                note = table.note,
                "a table's rows are copied"
            );
        }
        if turned {
            self.setup.sides.applier.tables_changed();
            self.publish(&Ended::Done, true);
        }
        Ok(())
    }

    /// What `schema copy` left for after the rows, of tables that had none to copy.
    async fn build_the_rest(&mut self) -> Result<(), Stop> {
        self.unbuilt.clear();
        let built = rest::build(&mut self.ledger, None, true).await?;
        note_unbuilt(&mut self.unbuilt, built.failed);
        Ok(())
    }

    async fn what_hurts(&self, settings: &Backfill) -> Result<Option<String>, Stop> {
        let began = Instant::now();
        self.scout.simple_query("SELECT version FROM pgtandem.side").await?;
        let primary_latency = began.elapsed();
        let lag = self.setup.sides.applier.status().borrow().lag_now().seconds;
        let measured = Measured {
            lag: Duration::try_from_secs_f64(lag).unwrap_or_default(),
            primary_latency,
        };
        Ok(hurts(measured, settings))
    }

    /// Takes over what became of each part. Rows and bytes that were copied.
    fn settle(&mut self, outcomes: Vec<Outcome>, settings: &Backfill) -> Result<(u64, u64), Stop> {
        let now = Instant::now();
        let (mut rows, mut bytes) = (0, 0);
        let mut stop = None;
        for Outcome { task, took, result } in outcomes {
            let table = &mut self.tables[task.table];
            table.out -= 1;
            match result {
                Ok(copied) => {
                    rows += copied.read;
                    bytes += copied.bytes;
                    table.counts.add(copied);
                    table.meter.note(now, table.counts.read as f64);
                    match task.part {
                        Part::Begin => {
                            table.stage = Stage::Copying;
                            table.next = Some(Onward::BEGINNING);
                            self.setup.sides.applier.tables_changed();
                        }
                        Part::Whole => {
                            table.stage = Stage::Copying;
                            self.setup.sides.applier.tables_changed();
                        }
                        Part::Range(_) => table.size.learn(copied.read, copied.bytes, took, settings.hold_max),
                    }
                }
                Err(NotCopied::Moved) => table.ready.push_front(task.part),
                Err(NotCopied::Reshaped) => {
                    table.reshaped = true;
                    table.ready.push_front(task.part);
                }
                Err(NotCopied::Turned { state, why }) => {
                    match state.as_str() {
                        "synced" => table.fail(Stage::Done, None),
                        _ => table.fail(
                            Stage::Failed,
                            Some(why.unwrap_or_else(|| {
                                format!("something happened to it while it was copied: it is {state}")
                            })),
                        ),
                    }
                }
                Err(NotCopied::Never(why)) => table.fail(Stage::Failed, Some(why)),
                Err(NotCopied::TooMany(why)) => {
                    table.ready.push_front(task.part);
                    stop = Some(Stop::Ended(Ended::Stopped(why)));
                }
                Err(NotCopied::Failing(why)) => {
                    table.ready.push_front(task.part);
                    stop.get_or_insert(Stop::Failing(why));
                }
                Err(NotCopied::Busy(why)) => {
                    table.ready.push_front(task.part);
                    stop.get_or_insert(Stop::Busy(why));
                }
            }
        }
        self.measure(now);
        stop.map_or(Ok((rows, bytes)), Err)
    }

    /// Sleeps until what was copied has taken as long as the rate asks for; a new rate counts at
    /// once.
    async fn keep_rate(&self, began: Instant, rows: u64, bytes: u64) -> Result<(), Stop> {
        let mut settings = self.setup.settings.clone();
        loop {
            let now = *settings.borrow_and_update();
            let left = due(rows, bytes, &now).saturating_sub(began.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            tokio::select! {
                paused = self.pause(left) => return paused,
                changed = settings.changed() => if changed.is_err() {
                    return Ok(());
                },
            }
        }
    }

    async fn pause(&self, time: Duration) -> Result<(), Stop> {
        tokio::select! {
            () = sleep(time) => Ok(()),
            () = self.setup.cancel.cancelled() => Err(Stop::Ended(Ended::Cancelled)),
        }
    }
}

fn note_unbuilt(unbuilt: &mut Vec<(String, String)>, failed: Vec<(String, String)>) {
    for (name, why) in failed {
        if !unbuilt.iter().any(|(known, _)| *known == name) {
            tracing::error!(name, why, "a statement that follows the rows was refused");
            unbuilt.push((name, why));
        }
    }
}

/// To the primary for planning, to the secondary for what is recorded.
async fn connections(setup: &Setup) -> Result<(Control, Control), Stop> {
    let (scout, ledger) = tokio::try_join!(
        connect(&setup.sides.primary, "backfill"),
        connect(&setup.sides.secondary, "backfill")
    )?;
    let settings = copying_settings();
    tokio::try_join!(scout.batch_execute(&settings), ledger.batch_execute(&settings))?;
    Ok((scout, ledger))
}
