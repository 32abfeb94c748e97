//! Compares tables range by range, at cuts: exact while applications write.
//!
//! A batch is what is read in one pair of snapshots. At its cut every worker takes the round's own
//! snapshot on the primary and a new one on the secondary; the applier goes on at once. The workers
//! then take ranges off one queue, until it is empty or the snapshots are half as old as they may
//! be; the next batch begins at another cut. A range that differs is narrowed down in the same
//! snapshots, so what is found is found once and for all.
//!
//! Why cuts may change within a table: a range that was equal at its cut stays equal, since every
//! later round is exact. So when all ranges were equal, each at its own cut, the table is equal at
//! the last of them.

mod queue;
mod record;
mod scope;
mod unheard;
mod work;

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::time::Instant;
use tokio_postgres::Client;

use self::queue::Queue;
use self::record::mark_synced;
use self::scope::choose;
pub use self::scope::{Chosen, Options, SecondarySnapshot};
pub use self::unheard::{verify_over_and_over, verify_unseeded};
use self::work::prepare_patiently;
use super::compare::{self, Outcome};
use super::readers::{Pair, Readers, reader};
use super::report::{CutReport, DatabaseReport, Event, ServerReport, TableReport, TableResult};
use super::{Sides, VerifyError, now, sequences, was_interrupted};
use crate::apply::{Applier, ApplierState, Stopped};
use crate::config::Target;
use crate::upstream::control::{Control, error_chain};

/// Ranges are begun while their snapshots are younger than this; a range takes far less than as
/// long again. So no snapshot gets older than 30 s, but for a table that cannot be walked.
const BATCH_MAX: Duration = Duration::from_secs(15);
/// With a rate, a batch reads what is due in this time, and then waits without any snapshot.
const PACED_BATCH: Duration = Duration::from_secs(2);

/// Compares what was chosen and reports it. Events go to `events` while it runs; when nobody
/// listens any more, it stops.
///
/// # Errors
/// It cannot begin or go on: no applier here, no connection, an unknown table.
pub async fn verify(
    sides: &Sides,
    options: &Options,
    events: &mpsc::Sender<Event>,
) -> Result<DatabaseReport, VerifyError> {
    let began = now();
    until_it_applies(&sides.applier).await?;
    // A first round has read the tables.
    sides.applier.round_after_now().await?;
    let chosen = choose(&sides.applier, &options.chosen)?;
    let (primary, secondary) = tokio::try_join!(reader(&sides.primary), reader(&sides.secondary))?;
    let mut works = Vec::with_capacity(chosen.len());
    for status in chosen {
        works.push(prepare_patiently(&primary, &secondary, status, options).await?);
    }
    let left: VecDeque<(usize, usize)> = works
        .iter()
        .enumerate()
        .flat_map(|(at, work)| (0..work.ranges.len()).map(move |part| (at, part)))
        .collect();
    say(
        events,
        Event::Begun {
            database: sides.database.clone(),
            tables: works.len() as u64,
            ranges: left.len() as u64,
        },
    )
    .await?;
    let not_compared: Vec<usize> = (0..works.len())
        .filter(|&at| works[at].not_compared.is_some())
        .collect();
    let mut verification = Verification {
        sides,
        options,
        events,
        secondary,
        queue: Mutex::new(Queue {
            works,
            left,
            later: Vec::new(),
            rows: 0,
            finished: not_compared,
        }),
        cuts: Vec::new(),
        reports: Vec::new(),
    };
    verification.finish_tables().await?;
    verification.read_all().await?;
    verification.report(&primary, began).await
}

struct Verification<'a> {
    sides: &'a Sides,
    options: &'a Options,
    events: &'a mpsc::Sender<Event>,
    /// For what is recorded.
    secondary: Control,
    queue: Mutex<Queue>,
    cuts: Vec<CutReport>,
    reports: Vec<TableReport>,
}

impl Verification<'_> {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Batch after batch, until nothing is left.
    async fn read_all(&mut self) -> Result<(), VerifyError> {
        if self.queue().left.is_empty() {
            return Ok(());
        }
        let workers = self.options.workers.min(self.queue().left.len());
        let mut readers = Readers::connect(&self.sides.primary, &self.sides.secondary, workers).await?;
        loop {
            let began = Instant::now();
            let rows_before = self.queue().rows;
            let mut cut = readers
                .open(&self.sides.applier, self.options.secondary_snapshot)
                .await?;
            let most = self.options.rate.map(|rate| {
                let due = rate as f64 * PACED_BATCH.as_secs_f64();
                rows_before + (due as u64).max(1)
            });
            let workers = readers
                .pairs
                .iter()
                .map(|pair| self.work(pair, cut.round, &readers, most));
            futures_util::future::try_join_all(workers).await?;
            readers.close().await?;
            cut.age_ms = readers.age().as_secs_f64() * 1000.0;
            self.cuts.push(cut);
            self.finish_tables().await?;
            let (rows, empty) = {
                let mut queue = self.queue();
                let later = std::mem::take(&mut queue.later);
                queue.left.extend(later);
                (queue.rows - rows_before, queue.left.is_empty())
            };
            if let Some(rate) = self.options.rate {
                let due = Duration::from_secs_f64(rows as f64 / rate.max(1) as f64);
                self.pause(due.saturating_sub(began.elapsed())).await?;
            }
            if empty {
                return Ok(());
            }
        }
    }

    /// Sleeps, unless nobody listens any more.
    async fn pause(&self, time: Duration) -> Result<(), VerifyError> {
        tokio::select! {
            () = tokio::time::sleep(time) => Ok(()),
            () = self.events.closed() => Err(VerifyError::Abandoned),
        }
    }

    /// One worker's share of a batch.
    async fn work(&self, pair: &Pair, round: u64, readers: &Readers, most: Option<u64>) -> Result<(), VerifyError> {
        loop {
            if readers.age() > BATCH_MAX || most.is_some_and(|most| self.queue().rows >= most) {
                return Ok(());
            }
            let Some((at, part, plan, range)) = self.queue().next() else {
                return Ok(());
            };
            match compare::compare(pair, &plan, &range).await {
                Ok(Some(outcome)) => self.note(at, part, round, outcome).await?,
                Ok(None) => self.queue().put_off(at, part),
                Err(error) if was_interrupted(&error) => {
                    self.queue().put_off(at, part);
                    return Ok(());
                }
                Err(error) if error.code().is_some() && !pair.primary.is_closed() && !pair.secondary.is_closed() => {
                    // The transaction is void: this worker rests until the next cut.
                    self.queue().give_up(at, error_chain(&error));
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn note(&self, at: usize, part: usize, round: u64, outcome: Outcome) -> Result<(), VerifyError> {
        let event = {
            let mut queue = self.queue();
            queue.rows += outcome.rows as u64;
            let rows = queue.rows;
            let work = &mut queue.works[at];
            work.add(part, round, outcome, self.options.keep);
            let event = Event::Progress {
                database: self.sides.database.clone(),
                table: work.name(),
                ranges_done: work.done as u64,
                ranges: work.ranges.len() as u64,
                rows,
            };
            if work.is_done() {
                queue.finished.push(at);
            }
            event
        };
        say(self.events, event).await
    }

    /// Reports the tables that are through, and records those that are equal.
    async fn finish_tables(&mut self) -> Result<(), VerifyError> {
        let finished = std::mem::take(&mut self.queue().finished);
        for at in finished {
            let (mut report, status) = {
                let mut queue = self.queue();
                let work = &mut queue.works[at];
                let report = work.report();
                // What was kept of it is in the report now.
                work.found = Vec::new();
                work.parts = Vec::new();
                work.ranges = Vec::new();
                (report, work.status.clone())
            };
            match report.result {
                TableResult::Equal => {
                    self.record(&report).await?;
                    report.now_synced = mark_synced(&self.secondary, &status).await?;
                    self.sides.applier.tables_changed();
                }
                TableResult::Different => report.note = Some(self.note_different(&report, &status).await?),
                TableResult::NotCompared => {}
            }
            let event = Event::Table {
                database: self.sides.database.clone(),
                table: Box::new(report.clone()),
            };
            say(self.events, event).await?;
            self.reports.push(report);
        }
        Ok(())
    }

    async fn report(self, primary: &Client, began: String) -> Result<DatabaseReport, VerifyError> {
        let sequences = match self.options.chosen {
            Chosen::All => sequences::compare(&self.sides.applier, primary, &self.secondary).await?,
            Chosen::Named(_) | Chosen::Unseeded => Vec::new(),
        };
        let mut tables = self.reports;
        tables.sort_by(|one, other| (&one.schema, &one.name).cmp(&(&other.schema, &other.name)));
        let not_mirrored = {
            let status = self.sides.applier.status();
            let status = status.borrow();
            let listed = status.not_mirrored.iter();
            listed
                .map(|object| format!("{}: {}", object.what, object.reason))
                .collect()
        };
        let report = DatabaseReport {
            database: self.sides.database.clone(),
            equal: tables.iter().all(|table| table.result == TableResult::Equal)
                && sequences.iter().all(|sequence| sequence.equal),
            began,
            ended: now(),
            epoch: self.sides.epoch,
            primary: server(&self.sides.primary, primary).await?,
            secondary: server(&self.sides.secondary, &self.secondary).await?,
            method: METHOD.into(),
            cuts: self.cuts,
            tables,
            sequences,
            not_mirrored,
        };
        say(
            self.events,
            Event::Done {
                report: Box::new(report.clone()),
            },
        )
        .await?;
        Ok(report)
    }
}

const METHOD: &str = "each range was read in one snapshot on either side, taken at the end of one round of mirroring; \
    a row's text is its columns by name, under pinned settings, joined by 0x1F (nulls as 0x1E, text preceded by its length in bytes); \
    its hash is hashtextextended(text, 0); a digest is the sum of the hashes; each table's `psql` computes it";

/// Nobody listening means that nobody wants it any more.
async fn say(events: &mpsc::Sender<Event>, event: Event) -> Result<(), VerifyError> {
    if matches!(event, Event::Progress { .. }) {
        // Snapshots do not wait for a slow listener.
        return match events.try_send(event) {
            Err(TrySendError::Closed(_)) => Err(VerifyError::Abandoned),
            Ok(()) | Err(TrySendError::Full(_)) => Ok(()),
        };
    }
    events.send(event).await.map_err(|_| VerifyError::Abandoned)
}

/// Only the proxy that applies can hold a cut; another one compares when it comes to apply.
async fn until_it_applies(applier: &Applier) -> Result<(), Stopped> {
    let mut status = applier.status();
    let decided = status
        .wait_for(|status| matches!(status.state, ApplierState::Running | ApplierState::Stopped))
        .await
        .map_err(|_| Stopped)?;
    match decided.state {
        ApplierState::Running => Ok(()),
        _ => Err(Stopped),
    }
}

async fn server(target: &Target, client: &Client) -> Result<ServerReport, tokio_postgres::Error> {
    let row = client
        .query_one(
            "SELECT current_setting('server_version'), current_setting('server_encoding')",
            &[],
        )
        .await?;
    Ok(ServerReport {
        side: target.side,
        address: target.describe(),
        server_version: row.get(0),
        encoding: row.get(1),
    })
}
