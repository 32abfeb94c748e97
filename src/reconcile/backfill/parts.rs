//! What is copied at one cut: parts of tables, handed to the workers, while the ranges that come next
//! are cut off.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use super::copy::{Copied, NotCopied, Part, Tolerance, Worker};
use super::job::{InsertAt, Job, OpenRanges};
use super::ledger::Onward;
use super::plan::{Plan, Range};
use super::stop::{Ended, Stop};
use super::table::{Stage, TableJob};
use crate::apply::{Cut, HeldCut};
use crate::config::Backfill;
use crate::reconcile::key::{Boundary, KeyRange};
use crate::upstream::control::Control;

/// One part for one worker.
pub(super) struct Task {
    pub table: usize,
    plan: Arc<Plan>,
    pub part: Part,
    tolerance: Tolerance,
}

pub(super) struct Outcome {
    pub task: Task,
    pub took: Duration,
    pub result: Result<Copied, NotCopied>,
}

impl Job {
    /// A part for each worker and a few more for those who are done early; of as many tables as
    /// there are workers.
    pub(super) fn take_tasks(&mut self, settings: &Backfill) -> VecDeque<Task> {
        let mut tasks = VecDeque::new();
        let per_cent = settings.error_threshold;
        let wanted = settings.workers.max(1);
        let mut again = true;
        while again && tasks.len() < wanted * 4 {
            again = false;
            for (index, table) in self.tables.iter_mut().enumerate() {
                let large = tasks
                    .iter()
                    .filter(|task: &&Task| matches!(task.part, Part::Range(_)))
                    .count();
                let Some(part) = table.ready.front() else { continue };
                if !table.is_open() || (matches!(part, Part::Range(_)) && large >= wanted) {
                    continue;
                }
                let Some(part) = table.ready.pop_front() else { continue };
                table.out += 1;
                again = true;
                tasks.push_back(Task {
                    table: index,
                    plan: table.plan.clone(),
                    part,
                    tolerance: Tolerance {
                        expected: table.plan.rows_expected,
                        per_cent,
                        failed: table.counts.failed,
                    },
                });
                if tasks.len() >= wanted * 4 {
                    break;
                }
            }
        }
        tasks
    }

    /// Has the tasks done at one cut, and meanwhile cuts off what comes next.
    pub(super) async fn copy(&mut self, tasks: VecDeque<Task>, settings: &Backfill) -> Result<Vec<Outcome>, Stop> {
        let tasks = Mutex::new(tasks);
        let copied = self.copy_at_a_cut(&tasks, settings).await;
        // Whatever nobody came to goes back to its table.
        let left = tasks.into_inner().unwrap_or_else(PoisonError::into_inner);
        for task in left.into_iter().rev() {
            let table = &mut self.tables[task.table];
            table.out -= 1;
            table.ready.push_front(task.part);
        }
        copied
    }

    async fn copy_at_a_cut(
        &mut self,
        tasks: &Mutex<VecDeque<Task>>,
        settings: &Backfill,
    ) -> Result<Vec<Outcome>, Stop> {
        let held = self.hold_a_cut().await?;
        let entering = self.workers.iter().map(|worker| worker.enter(&held.primary_snapshot));
        let entered: Result<Vec<()>, NotCopied> = join_all(entering).await.into_iter().collect();
        if let Err(error) = entered {
            self.leave().await;
            return Err(error.into());
        }
        if let Some(hook) = &self.setup.hook {
            let open = open_ranges(&lock(tasks));
            hook(open).await;
        }
        let held = match self.setup.insert_at {
            InsertAt::Cut => held,
            InsertAt::LaterCut => {
                drop(held);
                self.hold_a_cut().await?
            }
        };
        let enough = settings.hold_max / 2;
        let began = Instant::now();
        let cut = &held.cut;
        let working = self
            .workers
            .iter_mut()
            .map(|worker| work(worker, tasks, cut, began, enough));
        let (outcomes, planned) = tokio::join!(join_all(working), look_ahead(&self.scout, &mut self.tables, *settings));
        drop(held);
        self.leave().await;
        // A plan that failed is made again.
        if let Err(Stop::Failing(why) | Stop::Busy(why)) = planned {
            tracing::debug!(why, "ranges could not be cut off ahead");
        }
        Ok(outcomes.into_iter().flatten().collect())
    }

    async fn hold_a_cut(&self) -> Result<HeldCut, Stop> {
        tokio::select! {
            held = self.setup.sides.applier.cut() => held.map_err(|stopped| Stop::Ended(Ended::Interrupted(stopped.to_string()))),
            () = self.setup.cancel.cancelled() => Err(Stop::Ended(Ended::Cancelled)),
        }
    }

    /// Connections that fail at this are replaced before the next round.
    async fn leave(&self) {
        for left in join_all(self.workers.iter().map(Worker::leave)).await {
            if let Err(error) = left {
                tracing::debug!(?error, "a worker's reading could not be ended");
            }
        }
    }
}

/// Takes parts until there is none, or the time at this cut is used up.
async fn work(
    worker: &mut Worker,
    tasks: &Mutex<VecDeque<Task>>,
    cut: &Cut,
    began: Instant,
    enough: Duration,
) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    while outcomes.is_empty() || began.elapsed() < enough {
        let Some(task) = lock(tasks).pop_front() else { break };
        let started = Instant::now();
        let result = worker.copy(&task.plan, &task.part, cut, task.tolerance).await;
        let failed = result.is_err();
        outcomes.push(Outcome {
            task,
            took: started.elapsed(),
            result,
        });
        if failed {
            break;
        }
    }
    outcomes
}

fn open_ranges(tasks: &VecDeque<Task>) -> OpenRanges {
    let open = tasks.iter().filter_map(|task| match &task.part {
        Part::Begin => None,
        Part::Whole => Some((task.plan.target(), KeyRange::default())),
        Part::Range(range) => Some((task.plan.target(), range.keys.clone())),
    });
    open.collect()
}

fn lock(tasks: &Mutex<VecDeque<Task>>) -> std::sync::MutexGuard<'_, VecDeque<Task>> {
    tasks.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cuts off ranges for the next round: one for each worker, of the first tables that are being
/// copied. Bounds are only values, so it does not matter in which snapshot they are found.
pub(super) async fn look_ahead(scout: &Control, tables: &mut [TableJob], settings: Backfill) -> Result<(), Stop> {
    let wanted = settings.workers.max(1);
    let open = |table: &TableJob| table.stage == Stage::Copying && !table.reshaped;
    let active = tables
        .iter()
        .filter(|table| open(table) && table.next.is_some())
        .count();
    let mut cut_off = 0;
    for table in tables.iter_mut().filter(|table| open(table)) {
        let each = wanted.div_ceil(active.clamp(1, wanted));
        while cut_off < wanted && table.ready.len() < each {
            let Some(Onward { after, number }) = table.next.clone() else {
                break;
            };
            let Some(key) = &table.plan.key else { break };
            let sql = table.plan.step(key, after.as_ref(), table.size.rows(&settings));
            let found = match scout.query_opt(&sql, &[]).await {
                Ok(found) => found,
                Err(error) => {
                    // Perhaps DDL that the secondary is still to have.
                    table.reshaped = error.code() != Some(&SqlState::LOCK_NOT_AVAILABLE);
                    return Err(error.into());
                }
            };
            let upto: Option<Boundary> = found.map(|row| row.get(0));
            table.next = Onward::behind(upto.as_ref(), number);
            let keys = KeyRange { after, upto };
            table.ready.push_back(Part::Range(Range { number, keys }));
            cut_off += 1;
        }
    }
    Ok(())
}
