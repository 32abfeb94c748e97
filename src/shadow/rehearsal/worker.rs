//! Takes transactions from the queue, rehearses each at once, and says what became of its writes.

use std::sync::{Arc, Weak};

use dashmap::DashMap;
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant, sleep, timeout};

use super::super::compare::Kind;
use super::super::connection::{Columns, ConnectionError, Pool};
use super::super::log::{BothSides, Mismatch, MismatchLog};
use super::super::stats::Counters as ReadCounters;
use super::super::worker::is_circumstance;
use super::confirm::is_about_definitions;
use super::desk::Desk;
use super::run::{Run, run as run_once};
use super::sink::{Queued, Shared};
use super::stats::{Failed, Outcome, Skipped};
use super::{Said, Step, Transaction};
use crate::config::DatabaseConfig;
use crate::control::{Control, Side};
use crate::sql::{FingerprintId, LeftOut, REACH_QUERY, Reach};
use crate::upstream::control::connect;

/// Between looks at the idle connections.
const TIDY: Duration = Duration::from_secs(30);
/// How often what the secondary's functions do is read again without being asked to.
const REACH_REFRESH: Duration = Duration::from_secs(10);
/// For a copy of the sequences; somebody's open DDL may stand in its way.
const SEQUENCES_PATIENCE: Duration = Duration::from_secs(2);
/// How long the columns of a write's RETURNING are taken to be the same on both sides.
const ASK_COLUMNS_AGAIN: Duration = Duration::from_secs(30);
/// Of so many writes.
const ALIKE_MAX: usize = 4096;
/// At most so often.
const REACH_REFRESH_MIN: Duration = Duration::from_millis(500);

pub(super) struct Worker {
    pub(super) database: String,
    pub(super) targets: DatabaseConfig,
    pub(super) control: watch::Receiver<Control>,
    pub(super) shared: Arc<Shared>,
    pub(super) log: MismatchLog,
    /// Where lines that the log loses are counted.
    pub(super) log_counters: Arc<ReadCounters>,
    pub(super) pool: Pool,
    pub(super) desk: Desk,
    /// Writes whose RETURNING gave the same columns on both sides, and when that was asked.
    pub(super) alike: DashMap<FingerprintId, Instant>,
    /// How long a statement may run.
    pub(super) deadline: Duration,
    /// How often this primary's journal tables had been emptied when it was last asked.
    pub(super) truncations: Mutex<Option<(Side, i64)>>,
}

/// Runs until the last sink is gone and the queue is empty.
pub(super) async fn run(worker: Arc<Worker>, mut queue: mpsc::Receiver<Queued>, concurrency: usize) {
    let permits = Arc::new(Semaphore::new(concurrency));
    let mut running = JoinSet::new();
    loop {
        let queued = match timeout(TIDY, queue.recv()).await {
            Ok(Some(queued)) => queued,
            Ok(None) => break,
            Err(_) => {
                worker.pool.close_idle();
                continue;
            }
        };
        // The semaphore is never closed.
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let worker = worker.clone();
        running.spawn(async move {
            worker.rehearse(&queued.transaction).await;
            drop((permit, queued));
        });
        while running.try_join_next().is_some() {}
    }
    while running.join_next().await.is_some() {}
}

/// Keeps known what the secondary's functions and tables reach, while anything is rehearsed.
pub(super) async fn keep_reach(shared: Weak<Shared>, targets: DatabaseConfig, mut control: watch::Receiver<Control>) {
    loop {
        let now = *control.borrow_and_update();
        let Some(strong) = shared.upgrade() else { return };
        if now.phase.mirrors() && strong.is_on() {
            // What changed on the primary before this must be there.
            strong.pace.round_after_now().await;
            let before = strong.reach.load_full();
            match read_reach(&targets, now.secondary()).await {
                // Where it was voided meanwhile, it is read once more.
                Ok(reach) if Arc::ptr_eq(&before, &strong.reach.load()) => strong.reach.store(Arc::new(reach)),
                Ok(_) => strong.look.notify_one(),
                Err(error) => {
                    // Of another server nothing is known.
                    tracing::warn!(
                        database = targets.legacy.dbname(),
                        error,
                        "cannot read what writes would reach"
                    );
                }
            }
        }
        drop(strong);
        sleep(REACH_REFRESH_MIN).await;
        let Some(strong) = shared.upgrade() else { return };
        tokio::select! {
            () = sleep(REACH_REFRESH) => {}
            () = strong.look.notified() => {}
            ended = control.changed() => if ended.is_err() { return } else { strong.reach.store(Arc::default()) },
        }
    }
}

/// What the functions and tables of the secondary reach.
///
/// # Errors
/// The server cannot be asked.
pub async fn read_reach(targets: &DatabaseConfig, secondary: Side) -> Result<Reach, String> {
    let client = connect(targets.target(secondary), "rehearsals")
        .await
        .map_err(|error| error.to_string())?;
    let rows = client
        .query(REACH_QUERY, &[])
        .await
        .map_err(|error| error.to_string())?;
    Ok(Reach::new(
        rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect(),
    ))
}

impl Worker {
    /// A little longer than the server's own deadline, which gives the better answer.
    pub(super) fn patience(&self) -> Duration {
        self.deadline + Duration::from_secs(2)
    }

    fn is_current(&self, transaction: &Transaction) -> bool {
        let now = *self.control.borrow();
        now.epoch == transaction.control.epoch && now.primary == transaction.control.primary && now.phase.mirrors()
    }

    async fn rehearse(&self, transaction: &Transaction) {
        if !self.is_current(transaction) {
            self.shared.count_all(transaction, Outcome::Skipped(Skipped::Flip));
            return;
        }
        if self.shared.pace.sequences_are_compared() {
            self.shared
                .count_all(transaction, Outcome::Skipped(Skipped::Verification));
            return;
        }
        let catalog = self.shared.catalog.load_full();
        let types: Option<Vec<Vec<u8>>> = transaction
            .steps
            .iter()
            .map(|step| catalog.map_types(&step.types))
            .collect();
        let Some(types) = types else {
            self.shared
                .count_all(transaction, Outcome::LeftOut(LeftOut::ParameterType));
            return;
        };
        match self.run_and_judge(transaction, &types).await {
            Ok(()) => {}
            Err(error) => {
                tracing::debug!(database = self.database, %error, "rehearsal failed");
                let failed = match error {
                    ConnectionError::Deadline => Failed::Timeout,
                    ConnectionError::Login(_) | ConnectionError::Broken(_) | ConnectionError::Refused { .. } => {
                        Failed::Connection
                    }
                };
                self.shared.count_all(transaction, Outcome::Failed(failed));
            }
        }
    }

    /// An error leaves nothing counted.
    async fn run_and_judge(&self, transaction: &Transaction, types: &[Vec<u8>]) -> Result<(), ConnectionError> {
        self.note_truncations(transaction.control.primary)
            .await
            .map_err(|error| ConnectionError::Refused {
                what: "ask the primary",
                error,
            })?;
        let mut run = self.run(transaction, types).await?;
        // Whether no number is to blame that the secondary's sequences gave a second time.
        let mut known = false;
        let refused = |run: &Run| {
            run.difference(transaction)
                .and_then(|at| run.said[at].0.sqlstate().map(str::to_owned))
        };
        if refused(&run).as_deref() == Some("23505") && self.sequences_follow(transaction.control).await {
            run = self.run(transaction, types).await?;
            known = true;
        }
        let found = match run.difference(transaction) {
            Some(at) if !known && refused(&run).as_deref() == Some("23505") => Some((at, Outcome::Unsettled)),
            Some(at) => Some((at, self.judge(transaction, types, &run, at).await?)),
            None => self.judge_columns(transaction, types, &run).await?,
        };
        self.count(transaction, &run, found);
        Ok(())
    }

    /// Of a transaction that went alike: the first write whose RETURNING gives other columns there.
    async fn judge_columns(
        &self,
        transaction: &Transaction,
        types: &[Vec<u8>],
        run: &Run,
    ) -> Result<Option<(usize, Outcome)>, ConnectionError> {
        for (at, step) in transaction.steps.iter().enumerate() {
            let done = matches!(run.said.get(at), Some((Said::Done(_), _)));
            if !done || !step.is_write() || !returns(&step.text) {
                continue;
            }
            let id = step.script.fingerprint(&step.text).id;
            if self
                .alike
                .get(&id)
                .is_some_and(|asked| asked.elapsed() < ASK_COLUMNS_AGAIN)
            {
                continue;
            }
            match self.other_columns(transaction, types, at).await? {
                Some(columns) => {
                    let round = self.shared.pace.applied_round();
                    self.log_mismatch(transaction, step, &run.said[at], round, Some(columns));
                    return Ok(Some((at, Outcome::Mismatched)));
                }
                None => {
                    if self.alike.len() >= ALIKE_MAX {
                        self.alike.clear();
                    }
                    self.alike.insert(id, Instant::now());
                }
            }
        }
        Ok(None)
    }

    async fn run(&self, transaction: &Transaction, types: &[Vec<u8>]) -> Result<Run, ConnectionError> {
        let Some(key) = self.key(transaction, transaction.control.secondary()) else {
            return Err(ConnectionError::Deadline);
        };
        let mut connection = self.pool.take(&key, self.deadline).await?;
        let run = run_once(self, &mut connection, transaction, types).await?;
        self.pool.give(key, connection);
        Ok(run)
    }

    /// The secondary's sequences follow the primary's at a distance, so what they give may be in use.
    /// Returns whether they are known not to be behind now.
    async fn sequences_follow(&self, control: Control) -> bool {
        if self.sequences_are_even(control).await.unwrap_or(false) {
            return true;
        }
        timeout(SEQUENCES_PATIENCE, self.shared.pace.catch_up())
            .await
            .unwrap_or(false)
    }

    /// What the first difference is.
    async fn judge(
        &self,
        transaction: &Transaction,
        types: &[Vec<u8>],
        run: &Run,
        at: usize,
    ) -> Result<Outcome, ConnectionError> {
        let step = &transaction.steps[at];
        let here = &run.said[at].0;
        if step.said.as_ref().and_then(Said::sqlstate).is_some_and(is_circumstance) {
            return Ok(Outcome::Skipped(Skipped::PrimaryError));
        }
        match here.sqlstate() {
            Some("57014") if run.gave_way => return Ok(Outcome::Failed(Failed::GaveWay)),
            Some("57014") => return Ok(Outcome::Failed(Failed::Timeout)),
            Some("55P03" | "40001" | "40P01") => return Ok(Outcome::Failed(Failed::Locked)),
            Some(code) if is_circumstance(code) => return Ok(Outcome::Failed(Failed::Connection)),
            _ => {}
        }
        let by_definitions = match here.sqlstate() {
            Some(code) if is_about_definitions(code) => {
                self.proven_by_definitions(transaction, types, at, code).await?
            }
            _ => false,
        };
        let round = if by_definitions {
            Some(self.shared.pace.applied_round())
        } else {
            let proven = self.proven_by_state(transaction, run, at).await;
            // Another rehearsal, or a lock that its statements skip, may have been in the way.
            match proven {
                Some(round) if self.comes_again(transaction, types, run, at).await? => Some(round),
                _ => None,
            }
        };
        Ok(match round {
            Some(round) => {
                self.log_mismatch(transaction, step, &run.said[at], round, None);
                Outcome::Mismatched
            }
            None => Outcome::Unsettled,
        })
    }

    /// Whether the same comes out once more, in the same state.
    async fn comes_again(
        &self,
        transaction: &Transaction,
        types: &[Vec<u8>],
        run: &Run,
        at: usize,
    ) -> Result<bool, ConnectionError> {
        let again = self.run(transaction, types).await?;
        let same = again.difference(transaction) == Some(at) && again.said[at].0 == run.said[at].0;
        Ok(same && again.round == run.round)
    }

    fn count(&self, transaction: &Transaction, run: &Run, found: Option<(usize, Outcome)>) {
        for (place, step) in transaction.steps.iter().enumerate() {
            let outcome = match found {
                Some((at, _)) if place > at => Outcome::Skipped(Skipped::AfterDifference),
                Some((at, outcome)) if place == at => outcome,
                _ => Outcome::Matched,
            };
            let differs = matches!(outcome, Outcome::Mismatched | Outcome::Unsettled);
            if !step.is_write() && !differs {
                continue;
            }
            let fingerprint = step.script.fingerprint(&step.text);
            if let Some((here, took)) = run.said.get(place) {
                if differs {
                    let code = |said: &Said| said.sqlstate().unwrap_or("00000").to_owned();
                    let codes = [step.said.as_ref().map(code).unwrap_or_default(), code(here)];
                    self.shared
                        .counters
                        .note_difference(fingerprint, [&codes[0], &codes[1]]);
                } else if outcome == Outcome::Matched {
                    let took = [step.took, *took];
                    self.shared
                        .counters
                        .record(fingerprint, transaction.control.primary, took);
                }
            }
            self.shared.count(step, outcome);
        }
    }

    /// `columns`: both sides', where it is they that differ.
    fn log_mismatch(
        &self,
        transaction: &Transaction,
        step: &Step,
        here: &(Said, Duration),
        round: u64,
        columns: Option<[Columns; 2]>,
    ) {
        let fingerprint = step.script.fingerprint(&step.text);
        let values = &self.log.values;
        let there = step.said.as_ref();
        let error = BothSides {
            primary: there.and_then(Said::sqlstate).map(str::to_owned),
            secondary: here.0.sqlstate().map(str::to_owned),
        };
        let kind = if columns.is_some() {
            Kind::WriteColumns
        } else if error.primary == error.secondary {
            Kind::WriteTag
        } else {
            Kind::WriteError
        };
        let [of_primary, of_secondary] = columns.unwrap_or_default();
        let name = |column: &(String, Option<u32>)| column.0.clone();
        let differing = of_primary.iter().enumerate();
        let differing = differing.filter(|(at, column)| of_secondary.get(*at) != Some(column));
        let mismatch = Mismatch {
            seq: 0,
            time: String::new(),
            database: self.database.clone(),
            user: transaction.login.user.clone(),
            fingerprint: fingerprint.id.to_string(),
            statement: fingerprint.text.clone(),
            sql: values
                .shows_values()
                .then(|| String::from_utf8_lossy(&step.text).into_owned()),
            key: values.hash(&[&step.text, &[0], &step.bind]),
            kind,
            primary: transaction.control.primary,
            canary: false,
            rows: BothSides {
                primary: there.map_or(0, Said::rows),
                secondary: here.0.rows(),
            },
            digest: BothSides::default(),
            error,
            differing_columns: differing.map(|(_, column)| name(column)).collect(),
            columns: of_primary.iter().map(name).collect(),
            keys: Vec::new(),
            first_rows: BothSides::default(),
            latency_ms: BothSides {
                primary: step.took.as_secs_f64() * 1000.0,
                secondary: here.1.as_secs_f64() * 1000.0,
            },
            epoch: transaction.control.epoch,
            round,
        };
        self.log.write(mismatch, &self.log_counters);
    }
}

/// Whether a write may give rows.
fn returns(text: &[u8]) -> bool {
    const WORD: &[u8] = b"returning";
    text.windows(WORD.len()).any(|part| part.eq_ignore_ascii_case(WORD))
}
