//! Takes reads from the queue, repeats each on the secondary after a round that began after it,
//! and says what became of it.
//!
//! ```text
//! queue ─▶ a round that began after the reads ─▶ the same read on the secondary ─▶ equal: matched
//!                                                                               └▶ different: confirm
//! ```
//! Several run at once; when all are busy the queue fills up, and what does not fit is dropped
//! and counted.

use std::borrow::Cow;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Duration;

use super::catalog::Catalog;
use super::compare::{Difference, same};
use super::confirm::{Confirmed, confirm};
use super::connection::{Connection, ConnectionError, Pool, PoolKey};
use super::cuts::Cuts;
use super::digest::Digest;
use super::log::{BothSides, Mismatch, MismatchLog};
use super::read::{BindValues, Call, ShadowRead};
use super::rules::Rules;
use super::shown::told_apart;
use super::sink::Queued;
use super::stats::{Counters, Failed, Outcome, Skipped, Timing};
use crate::config::DatabaseConfig;
use crate::control::{Control, Side};
use crate::sql::{NotComparable, ReadFacts, Unstable, shadowable};

/// Reads that wait for one round together: one is enough for all that came before it, and a late
/// applier makes each a long wait.
const BATCH: usize = 1024;
/// How long a round is put off for the reads that come meanwhile.
const GATHER: Duration = Duration::from_millis(20);
/// A difference is looked at again at so many cuts, where definitions change meanwhile.
const CUTS_MAX: u32 = 5;
/// Between looks at the idle connections.
const TIDY: Duration = Duration::from_secs(30);

pub(super) struct Worker {
    pub(super) database: String,
    pub(super) targets: DatabaseConfig,
    pub(super) control: watch::Receiver<Control>,
    pub(super) cuts: Arc<dyn Cuts>,
    pub(super) catalog: Arc<ArcSwap<Catalog>>,
    pub(super) rules: Arc<ArcSwap<Rules>>,
    pub(super) counters: Arc<Counters>,
    pub(super) log: MismatchLog,
    pub(super) pool: Pool,
    /// How long a shadow may run.
    pub(super) deadline: Duration,
    /// Confirmations hold the applier for a moment: one at a time.
    pub(super) confirming: Mutex<()>,
}

/// Runs until the last sink is gone and the queue is empty.
pub(super) async fn run(worker: Arc<Worker>, mut queue: mpsc::Receiver<Queued>, concurrency: usize) {
    let permits = Arc::new(Semaphore::new(concurrency));
    let mut running = JoinSet::new();
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        match tokio::time::timeout(TIDY, queue.recv_many(&mut batch, BATCH)).await {
            Ok(0) => break,
            Ok(_) => gather(&mut queue, &mut batch).await,
            Err(_) => worker.pool.close_idle(),
        }
        batch.retain(|queued: &Queued| {
            let current = worker.is_current(&queued.read);
            if !current {
                worker.count(&queued.read, Outcome::Skipped(Skipped::Flip));
            }
            current
        });
        if batch.is_empty() {
            continue;
        }
        if worker.cuts.round_after_now().await.is_err() {
            for queued in batch.drain(..) {
                worker.count(&queued.read, Outcome::Failed(Failed::NoCut));
            }
            continue;
        }
        for queued in batch.drain(..) {
            // The semaphore is never closed.
            let Ok(permit) = permits.clone().acquire_owned().await else {
                return;
            };
            let worker = worker.clone();
            running.spawn(async move {
                let outcome = worker.judge(&queued.read).await;
                worker.count(&queued.read, outcome);
                drop((permit, queued));
            });
            while running.try_join_next().is_some() {}
        }
    }
    while running.join_next().await.is_some() {}
}

/// Whoever waits for a round has the applier run one at once, on the primary too, and nobody waits
/// for a shadow: those that come within a moment share one.
async fn gather(queue: &mut mpsc::Receiver<Queued>, batch: &mut Vec<Queued>) {
    tokio::time::sleep(GATHER).await;
    while batch.len() < BATCH
        && let Ok(queued) = queue.try_recv()
    {
        batch.push(queued);
    }
}

impl Worker {
    pub(super) fn is_current(&self, read: &ShadowRead) -> bool {
        let now = *self.control.borrow();
        now.epoch == read.control.epoch && now.primary == read.control.primary && now.phase.shadows()
    }

    pub(super) fn key(&self, read: &ShadowRead, side: Side) -> PoolKey {
        PoolKey {
            target: self.targets.target(side).clone(),
            login: read.login.clone(),
            settings: read.settings.clone(),
        }
    }

    pub(super) async fn connection(&self, key: &PoolKey) -> Result<Connection, ConnectionError> {
        self.pool.take(key, self.deadline).await
    }

    /// A little longer than the server's own deadline, which gives the better answer.
    pub(super) fn patience(&self) -> Duration {
        self.deadline + Duration::from_secs(2)
    }

    async fn judge(&self, read: &ShadowRead) -> Outcome {
        let of_its_kind = !read.is_analysed();
        let facts = match crate::sql::single_read(read.script()) {
            Ok(facts) => facts,
            Err(reason) => return Outcome::NotComparable(reason),
        };
        // Others of its kind can be compared; here a constant may say 'now'.
        if of_its_kind && let Err(reason) = shadowable(facts, &self.catalog.load().functions) {
            return Outcome::NotComparable(reason);
        }
        let facts = &*fetched(facts, &read.digest);
        let rules = self.rules.load().about(read.fingerprint().id, facts);
        if rules.ignored {
            return Outcome::NotComparable(NotComparable::Ignored);
        }
        if read.digest.partial {
            return Outcome::NotComparable(NotComparable::PartialAnswer);
        }
        if read.digest.sqlstate().is_some_and(is_circumstance) {
            return Outcome::Skipped(Skipped::PrimaryError);
        }
        let Some(call) = self.call_for_secondary(&read.call) else {
            return Outcome::NotComparable(NotComparable::ParameterType);
        };
        // The side that did not answer the client.
        let other = read.answered_by().other();
        let key = self.key(read, other);
        let again = if read.canary { &read.call } else { &call };
        let asked = async {
            let mut connection = self.connection(&key).await?;
            let answer = tokio::time::timeout(self.patience(), connection.digest(&read.text, again, read.first_rows()))
                .await
                .unwrap_or(Err(ConnectionError::Deadline))?;
            self.pool.give(key, connection);
            Ok(answer)
        };
        let (digest, timing) = match asked.await {
            Ok(answer) => answer,
            Err(error) => return self.failed(&error),
        };
        self.record(read, timing);
        self.counters.of(read.fingerprint()).keep_example(read);
        if same(facts, rules.notices, &read.digest, &digest) {
            self.counters.canary.compared(read, false);
            return Outcome::Matched;
        }
        match digest.sqlstate() {
            Some("57014") => return Outcome::Failed(Failed::Timeout),
            // Some function wanted to write; the primary's transaction may.
            Some("25006") => return Outcome::NotComparable(NotComparable::VolatileFunction),
            // Binary arrays and rows carry OIDs of types, which the secondary does not know.
            Some("42804" | "42704" | "22P03") if has_binary_parameters(&call) => {
                return Outcome::NotComparable(NotComparable::ParameterType);
            }
            Some(code) if is_circumstance(code) => return Outcome::Failed(Failed::Connection),
            _ => {}
        }
        let confirmed = {
            let _one_at_a_time = self.confirming.lock().await;
            let mut confirmed = confirm(self, read, facts, &rules, &call).await;
            for _ in 1..CUTS_MAX {
                if !matches!(confirmed, Ok(Confirmed::Again)) {
                    break;
                }
                confirmed = confirm(self, read, facts, &rules, &call).await;
            }
            confirmed
        };
        match confirmed {
            Ok(Confirmed::Is(outcome)) => {
                if matches!(
                    outcome,
                    Outcome::Transient | Outcome::OrderTies | Outcome::Tolerated | Outcome::Partly(_)
                ) {
                    self.counters.canary.compared(read, false);
                }
                outcome
            }
            Ok(Confirmed::Again) => Outcome::Failed(Failed::NoCut),
            Ok(Confirmed::Mismatch {
                round,
                columns,
                keys,
                found,
                sides,
            }) => {
                self.log_mismatch(read, timing, round, columns, &keys, &found, &sides);
                self.counters.canary.compared(read, true);
                Outcome::Mismatched
            }
            Err(error) => self.failed(&error),
        }
    }

    fn log_mismatch(
        &self,
        read: &ShadowRead,
        timing: Timing,
        round: u64,
        columns: Vec<String>,
        keys: &[usize],
        found: &Difference,
        sides: &BothSides<Digest>,
    ) {
        let fingerprint = read.fingerprint();
        let (primary, secondary) = in_order(read, timing);
        let values = &self.log.values;
        let first_rows = BothSides {
            primary: values.rows(&columns, &found.primary),
            secondary: values.rows(&columns, &found.secondary),
        };
        let apart = told_apart(&columns, keys, &found.primary, &found.secondary, &first_rows);
        let mismatch = Mismatch {
            seq: 0,
            time: String::new(),
            database: self.database.clone(),
            user: read.login.user.clone(),
            fingerprint: fingerprint.id.to_string(),
            statement: fingerprint.text.clone(),
            sql: values
                .shows_values()
                .then(|| String::from_utf8_lossy(&read.text).into_owned()),
            key: values.hash(&[&read.text, &[0], read.call.parameters()]),
            kind: found.kind,
            primary: read.control.primary,
            rows: BothSides {
                primary: sides.primary.rows,
                secondary: sides.secondary.rows,
            },
            digest: BothSides {
                primary: values.hash(&[&sides.primary.ordered.to_be_bytes()]),
                secondary: values.hash(&[&sides.secondary.ordered.to_be_bytes()]),
            },
            error: BothSides {
                primary: sides.primary.sqlstate().map(str::to_owned),
                secondary: sides.secondary.sqlstate().map(str::to_owned),
            },
            columns,
            // Of all rows, where keys tell which belong together; else of those shown.
            differing_columns: match &found.columns[..] {
                [] => apart.differing_columns,
                columns => columns.to_vec(),
            },
            keys: apart.keys,
            first_rows,
            latency_ms: BothSides {
                primary: primary.total.as_secs_f64() * 1000.0,
                secondary: secondary.total.as_secs_f64() * 1000.0,
            },
            canary: read.canary,
            epoch: read.control.epoch,
            round,
        };
        self.log.write(mismatch, &self.counters);
    }

    fn count(&self, read: &ShadowRead, outcome: Outcome) {
        self.counters.count(&self.counters.of(read.fingerprint()), outcome);
    }

    /// The primary was asked twice in one snapshot.
    pub(super) fn asked_twice(&self, read: &ShadowRead, agreed: bool) {
        self.counters.of(read.fingerprint()).asked_twice(agreed);
    }

    /// How long both sides took; `other` did not answer the client.
    fn record(&self, read: &ShadowRead, other: Timing) {
        let entry = self.counters.of(read.fingerprint());
        let (primary, secondary) = in_order(read, other);
        if read.canary {
            self.counters.canary.took(primary.total, secondary.total);
        }
        for (side, role, timing) in [
            (read.control.primary, "primary", primary),
            (read.control.secondary(), "secondary", secondary),
        ] {
            entry.record(side, timing);
            metrics::histogram!("pgtandem_shadow_read_seconds", "database" => self.database.clone(), "side" => role)
                .record(timing.total.as_secs_f64());
        }
    }

    pub(super) fn failed(&self, error: &ConnectionError) -> Outcome {
        tracing::debug!(database = self.database, %error, "shadow read failed");
        match error {
            ConnectionError::Deadline => Outcome::Failed(Failed::Timeout),
            ConnectionError::Login(_) | ConnectionError::Broken(_) | ConnectionError::Refused { .. } => {
                Outcome::Failed(Failed::Connection)
            }
        }
    }

    /// The call with the secondary's OIDs of custom types.
    pub(super) fn call_for_secondary(&self, call: &Call) -> Option<Call> {
        Some(match call {
            Call::Simple | Call::Prepared { .. } => call.clone(),
            Call::Extended { parameter_types, bind } => Call::Extended {
                parameter_types: self.catalog.load().map_types(parameter_types)?.into(),
                bind: bind.clone(),
            },
        })
    }
}

/// How long the primary and the secondary took, where the side that did not answer the client took
/// `other`.
const fn in_order(read: &ShadowRead, other: Timing) -> (Timing, Timing) {
    if read.canary {
        (other, read.timing)
    } else {
        (read.timing, other)
    }
}

/// What is compared of an answer of which only the first rows were fetched.
fn fetched<'a>(facts: &'a ReadFacts, digest: &Digest) -> Cow<'a, ReadFacts> {
    if !digest.suspended {
        return Cow::Borrowed(facts);
    }
    let unstable = match facts.unstable {
        None if !facts.ordered => Some(Unstable::LimitWithoutOrder),
        unstable => unstable,
    };
    Cow::Owned(ReadFacts {
        limited: true,
        unstable,
        ..facts.clone()
    })
}

fn has_binary_parameters(call: &Call) -> bool {
    match call {
        Call::Simple | Call::Prepared { .. } => false,
        Call::Extended { bind, .. } => BindValues::read(bind).is_some_and(|values| values.any_binary()),
    }
}

/// Errors that tell of a moment or a session, not of data: lost connections (08), invalid
/// transaction state (25), conflicts (40), resources (53), intervention (57), system (58), and
/// prepared statements and cursors that a session does not have (26, 34).
pub(super) fn is_circumstance(sqlstate: &str) -> bool {
    matches!(
        sqlstate.get(..2),
        Some("08" | "25" | "26" | "34" | "40" | "53" | "57" | "58")
    ) || sqlstate == "55P03"
}

/// RFC 3339, UTC.
pub(crate) fn now() -> String {
    time::OffsetDateTime::now_utc()
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default()
}
