//! A seeded storm of transactions over hot rows, of the kinds that make copies drift, with a
//! ledger of every acknowledged commit.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

use super::connect;

pub(crate) const SCHEMA: &str = "
CREATE TABLE ledger (worker int, number bigint, PRIMARY KEY (worker, number));
CREATE TABLE receipts (worker int, number bigint);
CREATE TABLE accounts (id int PRIMARY KEY, balance numeric NOT NULL DEFAULT 0, touched timestamptz DEFAULT now());
CREATE TABLE names (id int PRIMARY KEY, name text UNIQUE NOT NULL);
CREATE TABLE parents (id bigserial PRIMARY KEY, note text);
CREATE TABLE children (
    parent bigint NOT NULL REFERENCES parents ON DELETE CASCADE ON UPDATE CASCADE,
    number int, luck double precision DEFAULT random(), PRIMARY KEY (parent, number));
CREATE TABLE jobs (id bigserial PRIMARY KEY, state text NOT NULL DEFAULT 'waiting', token uuid DEFAULT gen_random_uuid());
CREATE TABLE notes (at timestamptz DEFAULT clock_timestamp(), note text);
CREATE TABLE parts (id int, region int, value text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE parts_0 PARTITION OF parts FOR VALUES IN (0);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
CREATE TABLE audit (id bigserial PRIMARY KEY, what text);
CREATE FUNCTION audited() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN INSERT INTO audit (what) VALUES (TG_OP || ' ' || coalesce(NEW.id, OLD.id)); RETURN coalesce(NEW, OLD); END $$;
CREATE TRIGGER audited AFTER INSERT OR UPDATE OR DELETE ON parts FOR EACH ROW EXECUTE FUNCTION audited();
INSERT INTO accounts SELECT i FROM generate_series(1, 20) i;
INSERT INTO names SELECT i, 'name ' || i FROM generate_series(1, 20) i;
";

/// What a storm is made of.
#[derive(Clone)]
pub(crate) struct Weather {
    /// Workers are spread over these: proxies, or the primary itself.
    pub(crate) urls: Vec<String>,
    pub(crate) seed: u64,
    pub(crate) workers: i32,
    /// The first worker's number; storms on the same tables must not share any.
    pub(crate) first_worker: i32,
    /// A lost connection is opened again (for tests that take clients' connections away);
    /// without, it is a failure.
    pub(crate) reconnect: bool,
    /// Clients with `synchronous_commit = off`.
    pub(crate) asynchronous: bool,
}

impl Weather {
    pub(crate) fn over(url: &str, seed: u64, workers: i32) -> Self {
        Self {
            urls: vec![url.to_owned()],
            seed,
            workers,
            first_worker: 0,
            reconnect: false,
            asynchronous: false,
        }
    }
}

/// A running storm.
pub(crate) struct Storm {
    stop: Arc<AtomicBool>,
    workers: JoinSet<Outcome>,
    pub(crate) acknowledged: Arc<AtomicU64>,
    /// Commits acknowledged, by worker.
    progress: Vec<Arc<AtomicU64>>,
    failures: Arc<Mutex<Vec<String>>>,
}

#[derive(Default)]
struct Outcome {
    /// (worker, number) of every transaction whose commit was acknowledged.
    acknowledged: Vec<(i32, i64)>,
    /// Of those whose connection died while the commit was under way.
    unknown: Vec<(i32, i64)>,
}

/// What a storm left behind.
#[derive(Default)]
pub(crate) struct Ledger {
    pub(crate) acknowledged: Vec<(i32, i64)>,
    /// Sent and never answered: there or not, but on both sides alike.
    pub(crate) unknown: Vec<(i32, i64)>,
    /// Errors that no application would expect.
    pub(crate) failures: Vec<String>,
}

impl Storm {
    /// Begins on `workers` connections. With `reconnect`, a lost connection is opened again
    /// (for tests that kill the proxy); without, it is a failure.
    pub(crate) async fn begin(url: &str, seed: u64, workers: i32, reconnect: bool) -> Self {
        Self::under(&Weather {
            reconnect,
            ..Weather::over(url, seed, workers)
        })
        .await
    }

    pub(crate) async fn under(weather: &Weather) -> Self {
        let mut storm = Self {
            stop: Arc::default(),
            workers: JoinSet::new(),
            acknowledged: Arc::default(),
            progress: Vec::new(),
            failures: Arc::default(),
        };
        for index in 0..weather.workers {
            let worker = weather.first_worker + index;
            let url = &weather.urls[usize::try_from(index).unwrap() % weather.urls.len()];
            let progress = Arc::new(AtomicU64::new(0));
            storm.progress.push(progress.clone());
            let mut sailor = Sailor {
                url: url.clone(),
                client: connect(url).await.unwrap(),
                random: StdRng::seed_from_u64(weather.seed ^ u64::try_from(worker).unwrap() << 32),
                worker,
                number: 0,
                committing: false,
                weather: weather.clone(),
                acknowledged: storm.acknowledged.clone(),
                progress,
                failures: storm.failures.clone(),
            };
            let stop = storm.stop.clone();
            storm.workers.spawn(async move {
                let mut outcome = Outcome::default();
                sailor.prepare().await;
                while !stop.load(Relaxed) {
                    sailor.turn(&mut outcome).await;
                }
                outcome
            });
        }
        storm
    }

    /// Returns when this many more commits have been acknowledged.
    pub(crate) async fn rage(&self, commits: u64) {
        let until = self.acknowledged.load(Relaxed) + commits;
        while self.acknowledged.load(Relaxed) < until {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            assert!(!self.workers.is_empty());
        }
    }

    /// Returns when every single worker has had this many more commits acknowledged: nobody is
    /// held up. The bound is far beyond any healthy wait; it turns a hang into a failure.
    pub(crate) async fn everybody_commits(&self, commits: u64) {
        let before: Vec<u64> = self.progress.iter().map(|count| count.load(Relaxed)).collect();
        let still = || {
            let now = self.progress.iter().map(|count| count.load(Relaxed));
            now.zip(&before).filter(|(now, before)| now - *before < commits).count()
        };
        for _ in 0..6000 {
            if still() == 0 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("{} workers are held up", still());
    }

    pub(crate) async fn end(mut self) -> Ledger {
        self.stop.store(true, Relaxed);
        let mut ledger = Ledger::default();
        while let Some(outcome) = self.workers.join_next().await {
            let outcome = outcome.unwrap();
            ledger.acknowledged.extend(outcome.acknowledged);
            ledger.unknown.extend(outcome.unknown);
        }
        ledger.failures = self.failures.lock().await.clone();
        ledger
    }
}

impl Ledger {
    /// Every acknowledged commit is there.
    pub(crate) async fn assert_kept(&self, client: &Client) {
        let kept = kept(client, "ledger").await;
        let kept: HashSet<(i32, i64)> = kept.into_iter().collect();
        let lost: Vec<_> = self.acknowledged.iter().filter(|entry| !kept.contains(entry)).collect();
        assert!(
            lost.is_empty(),
            "{} acknowledged commits are lost: {lost:?}",
            lost.len()
        );
    }

    /// Nothing is there that was never sent or was refused, and nothing twice.
    pub(crate) async fn assert_no_phantoms(&self, client: &Client) {
        let sent: HashSet<&(i32, i64)> = self.acknowledged.iter().chain(&self.unknown).collect();
        for table in ["ledger", "receipts"] {
            let mut seen = HashSet::new();
            for entry in kept(client, table).await {
                assert!(sent.contains(&entry), "{entry:?} in {table} was never committed");
                assert!(seen.insert(entry), "{entry:?} is twice in {table}");
            }
        }
    }

    /// Two storms over the same tables.
    pub(crate) fn join(&mut self, other: Self) {
        self.acknowledged.extend(other.acknowledged);
        self.unknown.extend(other.unknown);
        self.failures.extend(other.failures);
    }
}

async fn kept(client: &Client, table: &str) -> Vec<(i32, i64)> {
    let sql = format!("SELECT worker, number FROM {table}");
    let rows = client.query(&sql, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

struct Sailor {
    url: String,
    client: Client,
    random: StdRng,
    worker: i32,
    number: i64,
    /// The commit was sent and not yet answered.
    committing: bool,
    weather: Weather,
    acknowledged: Arc<AtomicU64>,
    progress: Arc<AtomicU64>,
    failures: Arc<Mutex<Vec<String>>>,
}

impl Sailor {
    async fn prepare(&self) {
        if self.weather.asynchronous {
            // A connection that is lost again is noticed by the next statement.
            self.client.batch_execute("SET synchronous_commit = off").await.ok();
        }
    }

    async fn turn(&mut self, outcome: &mut Outcome) {
        self.number += 1;
        self.committing = false;
        match self.transaction().await {
            Ok(true) => {
                outcome.acknowledged.push((self.worker, self.number));
                self.acknowledged.fetch_add(1, Relaxed);
                self.progress.fetch_add(1, Relaxed);
            }
            Ok(false) => {}
            Err(error) if expected(&error) => {
                self.client.batch_execute("ROLLBACK").await.ok();
            }
            Err(_) if self.weather.reconnect => {
                if self.committing {
                    outcome.unknown.push((self.worker, self.number));
                }
                while let Err(_lost) = connect(&self.url).await.map(|client| self.client = client) {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
                self.prepare().await;
            }
            Err(error) => {
                if self.committing {
                    outcome.unknown.push((self.worker, self.number));
                }
                let text = pgtandem::upstream::control::error_chain(&error);
                self.failures
                    .lock()
                    .await
                    .push(format!("worker {}: {text}", self.worker));
                self.client.batch_execute("ROLLBACK").await.ok();
                // A dead connection must not spin.
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }

    /// One random transaction; whether its commit was acknowledged.
    async fn transaction(&mut self) -> Result<bool, Error> {
        let steps = self.random.random_range(1..=4);
        let isolation = ["READ COMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
            .choose(&mut self.random)
            .unwrap();
        self.client
            .batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}"))
            .await?;
        for _ in 0..steps {
            let sql = self.statement();
            if self.random.random_ratio(1, 8) {
                let end = if self.random.random() {
                    "RELEASE s"
                } else {
                    "ROLLBACK TO s"
                };
                self.client.batch_execute(&format!("SAVEPOINT s; {sql}; {end}")).await?;
            } else {
                self.client.batch_execute(&sql).await?;
            }
        }
        self.client
            .execute(
                "WITH kept AS (INSERT INTO ledger VALUES ($1, $2) RETURNING worker, number) INSERT INTO receipts SELECT * FROM kept",
                &[&self.worker, &self.number],
            )
            .await?;
        // Some commit late: they wrote before others that commit earlier.
        if self.random.random_ratio(1, 10) {
            self.client.batch_execute("SELECT pg_sleep(0.02)").await?;
        }
        if self.random.random_ratio(1, 12) {
            self.client.batch_execute("ROLLBACK").await?;
            return Ok(false);
        }
        self.committing = true;
        self.client.batch_execute("COMMIT").await?;
        Ok(true)
    }

    fn statement(&mut self) -> String {
        let random = &mut self.random;
        let (a, b) = (random.random_range(1..=20), random.random_range(1..=20));
        let (low, high) = (std::cmp::min(a, b), std::cmp::max(a, b));
        match random.random_range(0..16) {
            0 | 1 => format!("UPDATE accounts SET balance = balance + {a}, touched = clock_timestamp() WHERE id = {b}"),
            2 => format!("UPDATE accounts SET balance = balance - random() WHERE id BETWEEN {low} AND {high}"),
            3 => format!("UPDATE names SET name = 'name {a} ' || clock_timestamp() WHERE id = {b}"),
            4 => format!("DELETE FROM names WHERE id = {a}; INSERT INTO names VALUES ({a}, 'again {a}') ON CONFLICT DO NOTHING"),
            5 => format!("INSERT INTO names VALUES ({a}, 'upsert {b}') ON CONFLICT (id) DO UPDATE SET name = excluded.name || {a}"),
            6 => format!(
                "WITH p AS (INSERT INTO parents (note) VALUES ('{a}') RETURNING id) \
                 INSERT INTO children SELECT p.id, n FROM p, generate_series(1, {b}) n"
            ),
            7 => "DELETE FROM parents WHERE id = (SELECT id FROM parents ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED)".into(),
            8 => "UPDATE parents SET id = nextval('parents_id_seq') WHERE id = (SELECT id FROM parents ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED)".into(),
            9 => "INSERT INTO jobs DEFAULT VALUES".into(),
            10 => "UPDATE jobs SET state = 'done' WHERE id = (SELECT id FROM jobs WHERE state = 'waiting' ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)".into(),
            11 => format!("INSERT INTO notes (note) SELECT 'same' FROM generate_series(1, {a})"),
            12 => "DELETE FROM notes WHERE ctid = (SELECT ctid FROM notes ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED)".into(),
            13 => format!("INSERT INTO parts VALUES ({a}, {}, 'p') ON CONFLICT (id, region) DO UPDATE SET value = excluded.value || {b}", a % 2),
            14 => format!("UPDATE parts SET region = 1 - region WHERE id = {a} AND NOT EXISTS (SELECT FROM parts WHERE id = {a} GROUP BY id HAVING count(*) > 1)"),
            _ => format!("UPDATE accounts SET id = -id WHERE id = {a}; UPDATE accounts SET id = -id WHERE id = -{a}"),
        }
    }
}

/// What concurrent transactions do to each other on any Postgres.
fn expected(error: &Error) -> bool {
    error.code().is_some_and(|code| {
        [
            SqlState::T_R_SERIALIZATION_FAILURE,
            SqlState::T_R_DEADLOCK_DETECTED,
            SqlState::UNIQUE_VIOLATION,
            SqlState::FOREIGN_KEY_VIOLATION,
            SqlState::IN_FAILED_SQL_TRANSACTION,
        ]
        .contains(code)
    })
}
