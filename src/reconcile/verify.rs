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

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::compare::{self, Outcome, Plan};
use super::digest::RowDigest;
use super::key::{self, KeyRange};
use super::place::Place;
use super::readers::{Pair, Readers, reader};
use super::report::{
    CutReport, DatabaseReport, Differing, DifferingRow, Event, RangeReport, ServerReport, TableDigest, TableReport,
    TableResult,
};
use super::{VerifyError, now, sequences};
use crate::apply::{Applier, ApplierState, Seeding, Stopped, TableStatus};
use crate::catalog::quote::identifier;
use crate::config::{Target, Verify};
use crate::control::Epoch;
use crate::upstream::control::{Control, error_chain};

/// Ranges are begun while their snapshots are younger than this; a range takes far less than as
/// long again. So no snapshot gets older than 30 s, but for a table that cannot be walked.
const BATCH_MAX: Duration = Duration::from_secs(15);
/// With a rate, a batch reads what is due in this time, and then waits without any snapshot.
const PACED_BATCH: Duration = Duration::from_secs(2);

/// How often a table's ranges may meet a TRUNCATE.
const PUT_OFF_MAX: u32 = 100;

/// Which tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chosen {
    All,
    /// `schema.name`, or a name that only one schema has.
    Named(Vec<String>),
    /// Those that hold rows from before mirroring and are not synced.
    Unseeded,
}

/// When the secondary's snapshot is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecondarySnapshot {
    AtTheCut,
    /// So many rounds after it: wrong, for the test that must find differences then.
    RoundsLater(u64),
}

/// How a verification is done.
#[derive(Debug, Clone)]
pub struct Options {
    pub chosen: Chosen,
    /// Each has a connection to both sides.
    pub workers: usize,
    /// Rows per second on each side; `None`: as fast as it goes.
    pub rate: Option<u64>,
    /// Rows of a range, about.
    pub range_rows: u64,
    /// Differing rows are shown as they are, not as their hash.
    pub plain: bool,
    /// Differing rows kept for each table; all are counted.
    pub keep: usize,
    pub secondary_snapshot: SecondarySnapshot,
}

impl Options {
    pub const WORKERS: usize = 2;
    /// A differing range is read once more, row by row: smaller ranges make differences cheap,
    /// larger ones their absence.
    pub const RANGE_ROWS: u64 = 8192;
    pub const KEEP: usize = 1000;

    pub const fn of(chosen: Chosen) -> Self {
        Self {
            chosen,
            workers: Self::WORKERS,
            rate: None,
            range_rows: Self::RANGE_ROWS,
            plain: false,
            keep: Self::KEEP,
            secondary_snapshot: SecondarySnapshot::AtTheCut,
        }
    }
}

/// The two sides of one database and who brings one to the other.
#[derive(Clone, Copy)]
pub struct Sides<'a> {
    pub database: &'a str,
    pub applier: &'a Applier,
    pub primary: &'a Target,
    pub secondary: &'a Target,
    pub epoch: Epoch,
}

/// A table, while it is compared.
struct Work {
    status: TableStatus,
    /// Why it is not compared.
    not_compared: Option<String>,
    plan: Option<Arc<Plan>>,
    psql: String,
    bytes: u64,
    ranges: Vec<KeyRange>,
    parts: Vec<Option<RangeReport>>,
    done: usize,
    put_off: u32,
    rows: i64,
    primary: i128,
    secondary: i128,
    differing: Differing,
    found: Vec<DifferingRow>,
    began: Option<Instant>,
    ended: Option<Instant>,
}

impl Work {
    fn name(&self) -> String {
        format!("{}.{}", self.status.schema, self.status.name)
    }

    fn add(&mut self, part: usize, round: u64, mut outcome: Outcome, keep: usize) {
        self.rows += outcome.rows;
        self.primary += outcome.primary;
        self.secondary += outcome.secondary;
        self.differing.missing += outcome.differing.missing;
        self.differing.extra += outcome.differing.extra;
        self.differing.different += outcome.differing.different;
        outcome.found.truncate(keep.saturating_sub(self.found.len()));
        self.found.append(&mut outcome.found);
        self.parts[part] = Some(RangeReport {
            range: self.ranges[part].clone(),
            round,
            rows: outcome.rows as u64,
            digest: outcome.primary.to_string(),
            equal: outcome.equal,
        });
        self.done += 1;
        self.ended = Some(Instant::now());
    }

    fn is_done(&self) -> bool {
        self.done == self.ranges.len()
    }

    fn result(&self) -> TableResult {
        let parts_equal = self.parts.iter().flatten().all(|part| part.equal);
        if self.not_compared.is_some() || !self.is_done() {
            TableResult::NotCompared
        } else if parts_equal && self.differing.total() == 0 {
            TableResult::Equal
        } else {
            TableResult::Different
        }
    }

    fn rounds(&self) -> Option<(u64, u64)> {
        let rounds = || self.parts.iter().flatten().map(|part| part.round);
        rounds().min().zip(rounds().max())
    }

    fn report(&self) -> TableReport {
        let duration = match (self.began, self.ended) {
            (Some(began), Some(ended)) => ended - began,
            _ => Duration::ZERO,
        };
        let key = self.plan.as_ref().filter(|plan| plan.ordered);
        TableReport {
            schema: self.status.schema.clone(),
            name: self.status.name.clone(),
            result: self.result(),
            note: self.not_compared.clone(),
            columns: self
                .plan
                .as_ref()
                .map_or_else(Vec::new, |plan| plan.digest.column_names()),
            key: key
                .and_then(|plan| plan.key.as_ref())
                .map_or_else(Vec::new, key::WalkKey::names),
            rows: self.rows as u64,
            bytes: self.bytes,
            ranges: self.ranges.len() as u64,
            digest: TableDigest {
                primary: self.primary.to_string(),
                secondary: self.secondary.to_string(),
            },
            differing: self.differing,
            differing_rows: self.found.clone(),
            parts: self.parts.iter().flatten().cloned().collect(),
            duration_ms: duration.as_secs_f64() * 1000.0,
            rows_per_second: self.rows as f64 / duration.as_secs_f64().max(0.001),
            rounds: self.rounds(),
            now_synced: false,
            psql: self.psql.clone(),
        }
    }
}

/// What the workers share.
struct Queue {
    works: Vec<Work>,
    left: VecDeque<(usize, usize)>,
    rows: u64,
    /// Ranges of tables that were truncated or rewritten: to be read at another cut.
    later: Vec<(usize, usize)>,
    /// Tables that were finished in this batch.
    finished: Vec<usize>,
}

/// Compares what was chosen and reports it. Events go to `events` while it runs; when nobody
/// listens any more, it stops.
///
/// # Errors
/// It cannot begin or go on: no applier here, no connection, an unknown table.
pub async fn verify(
    sides: Sides<'_>,
    options: &Options,
    events: &mpsc::Sender<Event>,
) -> Result<DatabaseReport, VerifyError> {
    let began = now();
    until_it_applies(sides.applier).await?;
    // A first round has read the tables.
    sides.applier.round_after_now().await?;
    let chosen = choose(sides.applier, &options.chosen)?;
    let (primary, secondary) = tokio::try_join!(reader(sides.primary), reader(sides.secondary))?;
    let mut works = Vec::with_capacity(chosen.len());
    for status in chosen {
        works.push(prepare(&primary, &secondary, status, options).await?);
    }
    let left: VecDeque<(usize, usize)> = works
        .iter()
        .enumerate()
        .flat_map(|(at, work)| (0..work.ranges.len()).map(move |part| (at, part)))
        .collect();
    say(
        events,
        Event::Begun {
            database: sides.database.to_owned(),
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
    sides: Sides<'a>,
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
        let mut readers = Readers::connect(self.sides.primary, self.sides.secondary, workers).await?;
        loop {
            let began = Instant::now();
            let rows_before = self.queue().rows;
            let mut cut = readers
                .open(self.sides.applier, self.options.secondary_snapshot)
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
                database: self.sides.database.to_owned(),
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
                database: self.sides.database.to_owned(),
                table: Box::new(report.clone()),
            };
            say(self.events, event).await?;
            self.reports.push(report);
        }
        Ok(())
    }

    /// A table that was taken for synced and is not closes the flip's gate until it is mended;
    /// unless it is only what is in quarantine.
    async fn note_different(&self, report: &TableReport, status: &TableStatus) -> Result<String, VerifyError> {
        if let Some(held) = held_note(&self.secondary, status).await? {
            return Ok(held);
        }
        let note = format!(
            "verification found {} rows different (round {}); see `pgtandem repair`",
            report.differing.total(),
            report.rounds.map_or(0, |(_, last)| last)
        );
        if status.seeding == Seeding::Synced && self.options.secondary_snapshot == SecondarySnapshot::AtTheCut {
            self.secondary
                .execute(
                    "UPDATE pgtandem.seeding SET state = 'unseeded', note = $3
                      WHERE schema = $1 AND name = $2 AND state = 'synced' AND paused IS NULL",
                    &[&status.schema, &status.name, &note],
                )
                .await?;
            self.sides.applier.tables_changed();
        }
        Ok(note)
    }

    /// On the secondary, where `status` finds it: when and at which cut a table was last equal.
    async fn record(&self, report: &TableReport) -> Result<(), VerifyError> {
        let Some((_, last)) = report.rounds else { return Ok(()) };
        let Some(cut) = self.cuts.iter().find(|cut| cut.round == last) else {
            return Ok(());
        };
        self.secondary
            .execute(
                "INSERT INTO pgtandem.verified (schema, name, epoch, at, round, snapshot, position, rows, digest)
                 VALUES ($1, $2, $3, $4::text::timestamptz, $5, $6, $7::text::pg_lsn, $8, $9)
                 ON CONFLICT (schema, name) DO UPDATE SET epoch = excluded.epoch, at = excluded.at, round = excluded.round,
                    snapshot = excluded.snapshot, position = excluded.position, rows = excluded.rows, digest = excluded.digest",
                &[
                    &report.schema,
                    &report.name,
                    &(self.sides.epoch.0 as i64),
                    &cut.at,
                    &(cut.round as i64),
                    &cut.primary_snapshot,
                    &cut.position,
                    &(report.rows as i64),
                    &report.digest.primary,
                ],
            )
            .await?;
        Ok(())
    }

    async fn report(self, primary: &Client, began: String) -> Result<DatabaseReport, VerifyError> {
        let sequences = match self.options.chosen {
            Chosen::All => sequences::compare(self.sides.applier, primary, &self.secondary).await?,
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
            database: self.sides.database.to_owned(),
            equal: tables.iter().all(|table| table.result == TableResult::Equal)
                && sequences.iter().all(|sequence| sequence.equal),
            began,
            ended: now(),
            epoch: self.sides.epoch,
            primary: server(self.sides.primary, primary).await?,
            secondary: server(self.sides.secondary, &self.secondary).await?,
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

impl Queue {
    fn next(&mut self) -> Option<(usize, usize, Arc<Plan>, KeyRange)> {
        let (at, part) = self.left.pop_front()?;
        let work = &mut self.works[at];
        work.began.get_or_insert_with(Instant::now);
        let range = work.ranges[part].clone();
        work.plan.clone().map(|plan| (at, part, plan, range))
    }

    fn put_off(&mut self, at: usize, part: usize) {
        self.works[at].put_off += 1;
        if self.works[at].put_off > PUT_OFF_MAX {
            self.give_up(at, "it was truncated or rewritten whenever it was to be read".into());
        } else {
            self.later.push((at, part));
        }
    }

    /// A table that cannot be read, on whichever side.
    fn give_up(&mut self, at: usize, why: String) {
        self.left.retain(|(other, _)| *other != at);
        self.later.retain(|(other, _)| *other != at);
        let work = &mut self.works[at];
        if work.not_compared.is_none() {
            work.not_compared = Some(why);
            self.finished.push(at);
        }
    }
}

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

fn choose(applier: &Applier, chosen: &Chosen) -> Result<Vec<TableStatus>, VerifyError> {
    let status = applier.status();
    let tables = &status.borrow().tables;
    match chosen {
        Chosen::All => Ok(tables.clone()),
        Chosen::Unseeded => Ok(tables
            .iter()
            .filter(|table| table.seeding == Seeding::Unseeded && table.paused.is_none())
            .cloned()
            .collect()),
        Chosen::Named(names) => {
            let mut found = BTreeSet::new();
            for name in names {
                let matching: Vec<usize> = (0..tables.len())
                    .filter(|&at| {
                        let table = &tables[at];
                        *name == table.name || *name == format!("{}.{}", table.schema, table.name)
                    })
                    .collect();
                match matching[..] {
                    [only] => found.insert(only),
                    [] => return Err(VerifyError::NoSuchTable(name.clone())),
                    _ => return Err(VerifyError::Ambiguous(name.clone())),
                };
            }
            Ok(found.into_iter().map(|at| tables[at].clone()).collect())
        }
    }
}

/// What is known of a table before it is read.
async fn prepare(
    primary: &Client,
    secondary: &Client,
    status: TableStatus,
    options: &Options,
) -> Result<Work, VerifyError> {
    let mut work = Work {
        not_compared: status
            .paused
            .as_ref()
            .map(|why| format!("its mirroring is paused: {why}")),
        status,
        plan: None,
        psql: String::new(),
        bytes: 0,
        ranges: Vec::new(),
        parts: Vec::new(),
        done: 0,
        put_off: 0,
        rows: 0,
        primary: 0,
        secondary: 0,
        differing: Differing::default(),
        found: Vec::new(),
        began: None,
        ended: None,
    };
    if work.not_compared.is_some() {
        return Ok(work);
    }
    let (schema, name) = (work.status.schema.clone(), work.status.name.clone());
    let (here, there) = tokio::try_join!(
        Place::on_primary(primary, &schema, &name),
        Place::table(secondary, &schema, &name)
    )?;
    let digest = RowDigest::load(primary, &here, &schema, &name).await?;
    let ordered = here
        .key
        .as_ref()
        .zip(there.key.as_ref())
        .is_some_and(|(here, there)| here.agrees(there));
    // Whatever a face is of, its rows are told apart by the secondary's key.
    let key = match here.is_face {
        true => there.key,
        false => here
            .key
            .filter(|here| there.key.is_some_and(|there| there.names() == here.names())),
    };
    work.bytes = size(primary, &here.table).await?;
    work.ranges = match &key {
        // A face cannot be sampled; any boundaries will do.
        Some(key) if ordered && here.is_face => {
            key::ranges(key::boundaries(secondary, key, &schema, &name, options.range_rows).await?)
        }
        Some(key) if ordered => key::ranges(key::boundaries(primary, key, &schema, &name, options.range_rows).await?),
        _ => vec![KeyRange::default()],
    };
    work.parts.resize(work.ranges.len(), None);
    work.psql = digest.psql();
    work.plan = Some(Arc::new(Plan {
        image: image(primary, secondary, &here.relation, &there.table).await?,
        digest,
        key,
        ordered,
        plain: options.plain,
        keep: options.keep,
    }));
    Ok(work)
}

async fn size(client: &Client, table: &str) -> Result<u64, tokio_postgres::Error> {
    let sql = "SELECT COALESCE(pg_table_size(to_regclass($1::text)), 0)";
    let row = client.query_one(sql, &[&table]).await?;
    Ok(row.get::<_, i64>(0) as u64)
}

/// A row `t` as the applier's images have it: in the primary's column order, without what the
/// secondary computes when it is read.
async fn image(primary: &Client, secondary: &Client, relation: &str, table: &str) -> Result<String, VerifyError> {
    const COLUMNS: &str = "\
        SELECT a.attname::text, a.attgenerated::text FROM pg_attribute a
         WHERE a.attrelid = to_regclass($1::text) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";
    let here = primary.query(COLUMNS, &[&relation]).await?;
    let there = secondary.query(COLUMNS, &[&table]).await?;
    let is_virtual = |name: &str| {
        let mut columns = there.iter();
        columns.any(|row| row.get::<_, &str>(0) == name && row.get::<_, &str>(1) == "v")
    };
    let fields: Vec<String> = here
        .iter()
        .map(|row| row.get::<_, &str>(0))
        .map(|name| match is_virtual(name) {
            true => "NULL".to_owned(),
            false => format!("t.{}", identifier(name)),
        })
        .collect();
    Ok(format!("ROW({})::text", fields.join(", ")))
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

/// Unless something happened to the table since it was looked at. Whether it was unseeded.
async fn mark_synced(secondary: &Client, table: &TableStatus) -> Result<bool, VerifyError> {
    if table.seeding == Seeding::Synced {
        return Ok(false);
    }
    let marked = secondary
        .execute(
            "UPDATE pgtandem.seeding SET state = 'synced', note = NULL
              WHERE schema = $1 AND name = $2 AND state = 'unseeded' AND paused IS NULL AND note IS NOT DISTINCT FROM $3",
            &[&table.schema, &table.name, &table.note],
        )
        .await?;
    Ok(marked > 0)
}

/// Rows of a table that differ because what touches them is in quarantine.
async fn held_note(secondary: &Client, table: &TableStatus) -> Result<Option<String>, VerifyError> {
    let row = secondary
        .query_one(
            "SELECT count(DISTINCT k.id) FROM pgtandem.quarantine_key k JOIN pgtandem.seeding s ON s.rel = k.rel
              WHERE s.schema = $1 AND s.name = $2",
            &[&table.schema, &table.name],
        )
        .await?;
    Ok(match row.get::<_, i64>(0) {
        0 => None,
        held => Some(format!("{held} transactions in quarantine concern it")),
    })
}

/// Compares, at the start, the tables that held rows when their capture began; returns the names
/// of those that were found equal.
///
/// # Errors
/// As [`verify`].
pub async fn verify_unseeded(sides: Sides<'_>) -> Result<Vec<String>, VerifyError> {
    let report = verify_unheard(sides, &Options::of(Chosen::Unseeded), std::future::pending()).await?;
    let (equal, others): (Vec<TableReport>, Vec<TableReport>) = report
        .tables
        .into_iter()
        .partition(|table| table.result == TableResult::Equal);
    for table in others {
        tracing::warn!(
            table = table.qualified(),
            "the two sides differ in rows that were there before mirroring; it needs seeding"
        );
    }
    Ok(equal.iter().map(TableReport::qualified).collect())
}

/// All tables, pass after pass, at a rate that nobody feels, while the settings say so; until the
/// applier has stopped, or nobody can change the settings any more. A pass under way when they change
/// is given up.
pub async fn verify_over_and_over(sides: Sides<'_>, mut settings: watch::Receiver<Verify>) {
    loop {
        let config = *settings.borrow_and_update();
        if config.continuous {
            one_of_many(sides, config, &mut settings).await;
        } else {
            tracing::debug!(database = sides.database, "tables are not compared over and over");
        }
        let pause = config.continuous.then_some(config.pause);
        let mut status = sides.applier.status();
        tokio::select! {
            () = sleep_or_for_ever(pause) => {}
            changed = settings.wait_for(|now| *now != config) => if changed.is_err() { return },
            _ = status.wait_for(|status| status.state == ApplierState::Stopped) => return,
        }
    }
}

async fn sleep_or_for_ever(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

/// A pass over all tables.
async fn one_of_many(sides: Sides<'_>, config: Verify, settings: &mut watch::Receiver<Verify>) {
    let options = Options {
        workers: 1,
        rate: Some(config.rate),
        ..Options::of(Chosen::All)
    };
    let changed = async {
        // Without a sender nothing changes any more.
        if settings.wait_for(|now| *now != config).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    match verify_unheard(sides, &options, changed).await {
        Err(VerifyError::Stopped(_) | VerifyError::Abandoned) => {}
        Err(error) => {
            tracing::info!(database = sides.database, %error, "a pass of the continuous verification ended early")
        }
        Ok(report) if report.equal => tracing::debug!(database = sides.database, "both sides were found equal"),
        Ok(report) => {
            for table in report.tables.iter().filter(|table| table.result != TableResult::Equal) {
                tracing::error!(
                    database = sides.database,
                    table = table.qualified(),
                    differing = table.differing.total(),
                    note = table.note,
                    "the two sides are not equal; see `pgtandem verify` and `pgtandem repair`"
                );
            }
            for sequence in report.sequences.iter().filter(|sequence| !sequence.equal) {
                tracing::error!(database = sides.database, ?sequence, "a sequence is not equal");
            }
        }
    }
}

/// Compares, and tells nobody how far it is; gives up when `enough` is over.
async fn verify_unheard(
    sides: Sides<'_>,
    options: &Options,
    enough: impl Future<Output = ()>,
) -> Result<DatabaseReport, VerifyError> {
    let (events, mut heard) = mpsc::channel(16);
    let options = Options {
        keep: 0,
        ..options.clone()
    };
    let verified = async {
        // Dropped at the end, which ends the listening.
        let events = events;
        verify(sides, &options, &events).await
    };
    let listening = async {
        let heard_all = async { while heard.recv().await.is_some() {} };
        tokio::select! {
            () = heard_all => {}
            () = enough => {}
        }
        // Nobody listens any more, and it stops.
        drop(heard);
    };
    let (report, ()) = tokio::join!(verified, listening);
    report
}
