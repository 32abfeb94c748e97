//! Where a backfill is started, changed, cancelled and looked at. One for each database.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::job::{Hook, InsertAt, Job, Setup};
use super::ledger;
use super::status::{BackfillStatus, BackfillTable, Counts};
use crate::apply::{Applier, ApplierState, Seeding, TableStatus};
use crate::catalog::{Oid, PINNED_SETTINGS};
use crate::config::{Backfill, MaxRate};
use crate::reconcile::Sides;
use crate::upstream::control::{connect, error_chain};

/// A first look at the tables may take as long as a backlog does.
const FIRST_ROUND_MAX: Duration = Duration::from_secs(60);

/// What an operator asks for; what is left out stays as proxy.yaml, or the last order, has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// `schema.table` or `table`; none for every table that is not synced.
    #[serde(default)]
    pub tables: Vec<String>,
    #[serde(default)]
    pub workers: Option<usize>,
    /// As [`MaxRate`] is written, or `none`.
    #[serde(default)]
    pub max_rate: Option<String>,
}

/// What was ordered beyond proxy.yaml.
#[derive(Debug, Clone, Copy, Default)]
struct Ordered {
    workers: Option<usize>,
    max_rate: Option<Option<MaxRate>>,
}

struct Running {
    cancel: CancellationToken,
    task: AbortOnDropHandle<()>,
}

pub struct Desk {
    configured: Mutex<(Backfill, Ordered)>,
    settings: watch::Sender<Backfill>,
    running: tokio::sync::Mutex<Option<Running>>,
    status: Arc<watch::Sender<Option<BackfillStatus>>>,
    /// For tests: at what cut ranges are inserted, and what is called while they are open.
    insert_at: InsertAt,
    hook: Option<Hook>,
}

impl Desk {
    pub fn new(settings: Backfill) -> Self {
        Self {
            configured: Mutex::new((settings, Ordered::default())),
            settings: watch::Sender::new(settings),
            running: tokio::sync::Mutex::default(),
            status: Arc::new(watch::Sender::new(None)),
            insert_at: InsertAt::Cut,
            hook: None,
        }
    }

    /// For tests.
    #[must_use]
    pub fn with_hook(self, insert_at: InsertAt, hook: Hook) -> Self {
        Self {
            insert_at,
            hook: Some(hook),
            ..self
        }
    }

    /// proxy.yaml was read again; what was ordered with the command stays.
    pub fn configure(&self, settings: Backfill) {
        self.change(|configured| configured.0 = settings);
    }

    fn change(&self, change: impl FnOnce(&mut (Backfill, Ordered))) {
        let mut configured = self.configured();
        change(&mut configured);
        let (mut settings, ordered) = *configured;
        settings.workers = ordered.workers.unwrap_or(settings.workers);
        settings.max_rate = ordered.max_rate.unwrap_or(settings.max_rate);
        self.settings.send_replace(settings);
    }

    fn configured(&self) -> MutexGuard<'_, (Backfill, Ordered)> {
        self.configured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of the last backfill since the proxy started, or of an interrupted one that is recorded.
    pub fn status(&self) -> Option<BackfillStatus> {
        self.status.borrow().clone()
    }

    /// Changes whenever something was copied.
    pub fn watch(&self) -> watch::Receiver<Option<BackfillStatus>> {
        self.status.subscribe()
    }

    /// Starts a backfill, or changes the one that runs.
    ///
    /// # Errors
    /// In words, why not; nothing was changed then.
    pub async fn start(&self, sides: &Sides, order: &Order) -> Result<BackfillStatus, String> {
        let ordered = Ordered {
            workers: order.workers,
            max_rate: match order.max_rate.as_deref() {
                None => None,
                Some("none") => Some(None),
                Some(text) => Some(Some(text.parse()?)),
            },
        };
        if order.workers == Some(0) {
            return Err("at least one worker is needed".into());
        }
        let mut running = self.running.lock().await;
        let apply = || {
            self.change(|(_, known)| {
                known.workers = ordered.workers.or(known.workers);
                known.max_rate = ordered.max_rate.or(known.max_rate);
            });
        };
        if running.as_ref().is_some_and(|running| !running.task.is_finished()) {
            if !order.tables.is_empty() {
                return Err(
                    "a backfill is running; its tables cannot be changed (cancel it first: what is copied stays)"
                        .into(),
                );
            }
            apply();
            return self.status().ok_or_else(|| "it has just ended".into());
        }
        let tables = wanted(sides, order).await?;
        apply();
        let cancel = CancellationToken::new();
        let setup = Setup {
            sides: sides.clone(),
            settings: self.settings.subscribe(),
            cancel: cancel.clone(),
            insert_at: self.insert_at,
            hook: self.hook.clone(),
        };
        let job = Job::begin(setup, &tables, self.status.clone()).await?;
        *running = Some(Running {
            cancel,
            task: AbortOnDropHandle::new(tokio::spawn(job.run())),
        });
        drop(running);
        self.status().ok_or_else(|| "it has just ended".into())
    }

    /// Ends a backfill at the end of its round; what is copied stays, and the next one goes on
    /// from there. False where none runs.
    pub async fn cancel(&self) -> bool {
        let mut running = self.running.lock().await;
        match running.take() {
            Some(running) if !running.task.is_finished() => {
                running.cancel.cancel();
                running.task.await.is_ok()
            }
            _ => false,
        }
    }

    /// For a proxy that has just begun to apply: says in the status that a backfill was
    /// interrupted, where the secondary records one.
    pub async fn look_for_unfinished(&self, sides: &Sides) -> Result<(), String> {
        if !applies(&sides.applier).await {
            return Ok(());
        }
        let secondary = connect(&sides.secondary, "backfill")
            .await
            .map_err(|error| error.to_string())?;
        secondary
            .batch_execute(PINNED_SETTINGS)
            .await
            .map_err(|error| error_chain(&error))?;
        let found = ledger::unfinished(&secondary, sides.epoch)
            .await
            .map_err(|error| error_chain(&error))?;
        let Some(tables) = found else { return Ok(()) };
        let _running = self.running.lock().await;
        if self.status.borrow().is_some() {
            return Ok(());
        }
        tracing::warn!("a backfill is unfinished; `pgtandem backfill` goes on where it was");
        self.status
            .send_replace(Some(interrupted(&self.settings.borrow(), tables)));
        Ok(())
    }
}

/// What stands recorded, as a status.
fn interrupted(settings: &Backfill, tables: Vec<ledger::RecordedTable>) -> BackfillStatus {
    let mut counts = Counts::default();
    tables.iter().for_each(|table| counts.merge(table.counts));
    BackfillStatus {
        state: "interrupted".into(),
        note: Some("the proxy that ran it is gone; `pgtandem backfill` goes on where it was".into()),
        workers: settings.workers,
        max_rate: settings.max_rate.map(|rate| rate.to_string()),
        slowed_by: None,
        rows_expected: tables.iter().map(|table| table.rows_expected).sum(),
        counts,
        rows_per_second: 0.0,
        bytes_per_second: 0.0,
        remaining_seconds: None,
        tables: tables
            .into_iter()
            .map(|table| BackfillTable {
                name: table.name,
                state: table.state,
                note: table.note,
                rows_expected: table.rows_expected,
                counts: table.counts,
                rows_per_second: 0.0,
                remaining_seconds: None,
            })
            .collect(),
    }
}

/// Whether this proxy is the one that applies; waits until that is known.
async fn applies(applier: &Applier) -> bool {
    let mut status = applier.status();
    let decided = status
        .wait_for(|status| matches!(status.state, ApplierState::Running | ApplierState::Stopped))
        .await;
    decided.is_ok_and(|status| status.state == ApplierState::Running)
}

/// The tables to copy, by the primary's OID: the largest first.
async fn wanted(sides: &Sides, order: &Order) -> Result<Vec<Oid>, String> {
    let status = sides.applier.status();
    if let ApplierState::Waiting = status.borrow().state {
        let who = status.borrow().applier.clone().unwrap_or_else(|| "another one".into());
        return Err(format!("this proxy does not apply; ask the one that does: {who}"));
    }
    // A round has read the tables, and those that were just created.
    match tokio::time::timeout(FIRST_ROUND_MAX, sides.applier.round_after_now()).await {
        Ok(Ok(_cut)) => {}
        Ok(Err(stopped)) => return Err(stopped.to_string()),
        Err(_elapsed) => return Err("mirroring does not get through a round; see `pgtandem status`".into()),
    }
    let tables = status.borrow().tables.clone();
    let mut chosen: Vec<TableStatus> = Vec::new();
    for name in &order.tables {
        let named = |table: &&TableStatus| *name == table.name || *name == format!("{}.{}", table.schema, table.name);
        let found: Vec<&TableStatus> = tables.iter().filter(named).collect();
        match found[..] {
            [] => return Err(format!("no mirrored table is called {name}")),
            [table] => chosen.push(table.clone()),
            _ => return Err(format!("several tables are called {name}; write schema.table")),
        }
    }
    if order.tables.is_empty() {
        chosen = tables;
    }
    let to_copy = |table: &TableStatus| table.seeding != Seeding::Synced && table.paused.is_none();
    if let Some(table) = chosen.iter().find(|table| table.paused.is_some()) {
        tracing::warn!(table = table.name, "a paused table is left out of the backfill");
    }
    chosen.retain(to_copy);
    rels(sides, &chosen).await
}

async fn rels(sides: &Sides, tables: &[TableStatus]) -> Result<Vec<Oid>, String> {
    let names = |pick: fn(&TableStatus) -> &String| -> Vec<String> { tables.iter().map(pick).cloned().collect() };
    let (schemas, tables) = (names(|table| &table.schema), names(|table| &table.name));
    let primary = connect(&sides.primary, "backfill")
        .await
        .map_err(|error| error.to_string())?;
    let rows = primary
        .query(
            "SELECT m.rel FROM unnest($1::text[], $2::text[]) AS w(schema, name) JOIN pgtandem.mirrored m USING (schema, name)
              ORDER BY pg_catalog.pg_table_size(m.source) DESC, m.rel",
            &[&schemas, &tables],
        )
        .await
        .map_err(|error| error_chain(&error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
