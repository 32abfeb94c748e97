//! The demo's application: a shop whose clerks write all the time, and whose readers look on.
//! It does what makes copies drift where statements are replayed: serial keys, the clock,
//! random values, a queue with SKIP LOCKED, cascades, savepoints and rollbacks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_postgres::{Client, Error, NoTls};

/// The application's schema, brought to both databases before anything else.
pub(super) const SCHEMA: &str = "
CREATE TABLE products (id int PRIMARY KEY, name text NOT NULL, price numeric(10,2) NOT NULL);
CREATE TABLE customers (id int PRIMARY KEY, name text UNIQUE, spent numeric NOT NULL DEFAULT 0, seen timestamptz);
CREATE TABLE orders (
    id bigserial PRIMARY KEY,
    customer int NOT NULL REFERENCES customers,
    token uuid NOT NULL DEFAULT gen_random_uuid(),
    placed timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE order_lines (
    order_id bigint NOT NULL REFERENCES orders ON DELETE CASCADE,
    line int, product int NOT NULL REFERENCES products, amount int NOT NULL,
    PRIMARY KEY (order_id, line));
CREATE TABLE jobs (id bigserial PRIMARY KEY, order_id bigint, state text NOT NULL DEFAULT 'waiting');
CREATE TABLE visits (at timestamptz NOT NULL DEFAULT now(), page text, luck double precision DEFAULT random());
CREATE TABLE history (id bigint PRIMARY KEY, customer int NOT NULL, placed timestamptz NOT NULL, amount numeric(10,2), note text);
";

/// What the legacy database holds before anybody thought of leaving it.
pub(super) const ROWS: &str = "
INSERT INTO products SELECT i, 'product ' || i, i * 9.99 FROM generate_series(1, 40) i;
INSERT INTO customers SELECT i, 'customer ' || i FROM generate_series(1, 25) i;
INSERT INTO history SELECT i, 1 + i % 25, '2015-01-01'::timestamptz + i * interval '5 minutes', (i % 10000) / 7.0, md5(i::text)
  FROM generate_series(1, 1000000) i;
INSERT INTO orders (customer) SELECT 1 + i % 25 FROM generate_series(1, 20000) i;
INSERT INTO order_lines SELECT id, 1, 1 + id % 40, 1 FROM orders;
INSERT INTO visits (page) SELECT 'home' FROM generate_series(1, 5000);
ANALYZE;
";

/// The tables of [`SCHEMA`], for counting.
pub(super) const TABLES: [&str; 7] = [
    "products",
    "customers",
    "history",
    "orders",
    "order_lines",
    "jobs",
    "visits",
];

const WRITERS: u64 = 6;
const READERS: u64 = 2;
/// What an application does between two transactions.
const THINKING: Duration = Duration::from_millis(4);

/// What the application has seen so far.
#[derive(Default)]
pub(super) struct Ledger {
    pub(super) transactions: AtomicU64,
    pub(super) reads: AtomicU64,
    pub(super) failed: AtomicU64,
    longest_us: AtomicU64,
    /// The first failure, in words.
    pub(super) first_failure: Mutex<Option<String>>,
}

impl Ledger {
    /// The longest any statement or transaction took since the last call.
    pub(super) fn take_longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.swap(0, Relaxed))
    }

    async fn record(&self, began: Instant, outcome: Result<(), Error>, counter: &AtomicU64) {
        let took_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.longest_us.fetch_max(took_us, Relaxed);
        match outcome {
            Ok(()) => {
                counter.fetch_add(1, Relaxed);
            }
            Err(error) => {
                self.failed.fetch_add(1, Relaxed);
                let text = crate::upstream::control::error_chain(&error);
                self.first_failure.lock().await.get_or_insert(text);
            }
        }
    }
}

/// A running application. Its connections are opened once and never again: a dropped one shows
/// as failures.
pub(super) struct Workload {
    pub(super) ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
    clerks: JoinSet<()>,
}

impl Workload {
    pub(super) async fn start(url: &str) -> Result<Self, Error> {
        let mut workload = Self {
            ledger: Arc::default(),
            stop: Arc::default(),
            clerks: JoinSet::new(),
        };
        for number in 0..WRITERS + READERS {
            let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
            let (ledger, stop) = (workload.ledger.clone(), workload.stop.clone());
            workload.clerks.spawn(async move {
                let driver = tokio::spawn(connection);
                let mut clerk = Clerk {
                    client,
                    random: StdRng::seed_from_u64(number),
                };
                while !stop.load(Relaxed) {
                    clerk.turn(number < WRITERS, &ledger).await;
                    tokio::time::sleep(THINKING).await;
                }
                drop(clerk);
                driver.await.ok();
            });
        }
        Ok(workload)
    }

    /// Lets every clerk finish what it is at.
    pub(super) async fn stop(mut self) -> Arc<Ledger> {
        self.stop.store(true, Relaxed);
        while self.clerks.join_next().await.is_some() {}
        self.ledger
    }
}

struct Clerk {
    client: Client,
    random: StdRng,
}

impl Clerk {
    async fn turn(&mut self, writes: bool, ledger: &Ledger) {
        let began = Instant::now();
        if writes {
            let outcome = match self.random.random_range(0..10) {
                0..5 => self.place_order().await,
                5 => self.cancel_order().await,
                6 => self.think_twice().await,
                7..9 => self.take_job().await,
                _ => self.visit().await,
            };
            ledger.record(began, outcome, &ledger.transactions).await;
        } else {
            let outcome = self.look().await;
            ledger.record(began, outcome, &ledger.reads).await;
        }
    }

    async fn place_order(&mut self) -> Result<(), Error> {
        let customer: i32 = self.random.random_range(1..=25);
        let lines: i32 = self.random.random_range(1..=4);
        let transaction = self.client.transaction().await?;
        let order: i64 = transaction
            .query_one("INSERT INTO orders (customer) VALUES ($1) RETURNING id", &[&customer])
            .await?
            .get(0);
        for line in 1..=lines {
            let product: i32 = self.random.random_range(1..=40);
            transaction
                .execute(
                    "INSERT INTO order_lines VALUES ($1, $2, $3, 1 + (random() * 5)::int)",
                    &[&order, &line, &product],
                )
                .await?;
        }
        transaction
            .execute(
                "UPDATE customers SET seen = clock_timestamp(), spent = spent + (SELECT sum(l.amount * p.price) \
                 FROM order_lines l JOIN products p ON p.id = l.product WHERE l.order_id = $2) WHERE id = $1",
                &[&customer, &order],
            )
            .await?;
        transaction
            .execute("INSERT INTO jobs (order_id) VALUES ($1)", &[&order])
            .await?;
        transaction.commit().await
    }

    async fn cancel_order(&mut self) -> Result<(), Error> {
        self.client
            .execute(
                "DELETE FROM orders WHERE id = (SELECT id FROM orders ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED)",
                &[],
            )
            .await
            .map(drop)
    }

    /// Rolls half of it back, and then all of it or nothing.
    async fn think_twice(&mut self) -> Result<(), Error> {
        let commit: bool = self.random.random();
        let mut transaction = self.client.transaction().await?;
        transaction
            .execute("INSERT INTO visits (page) VALUES ('basket')", &[])
            .await?;
        let savepoint = transaction.savepoint("basket").await?;
        savepoint
            .execute("INSERT INTO visits (page) VALUES ('never mind')", &[])
            .await?;
        savepoint.rollback().await?;
        if commit {
            transaction.commit().await
        } else {
            transaction.rollback().await
        }
    }

    async fn take_job(&mut self) -> Result<(), Error> {
        self.client
            .execute(
                "UPDATE jobs SET state = 'done' WHERE id = \
                 (SELECT id FROM jobs WHERE state = 'waiting' ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)",
                &[],
            )
            .await
            .map(drop)
    }

    async fn visit(&mut self) -> Result<(), Error> {
        self.client
            .batch_execute("INSERT INTO visits (page) VALUES ('home'); INSERT INTO visits (page) VALUES ('shop')")
            .await
    }

    async fn look(&mut self) -> Result<(), Error> {
        let customer: i32 = self.random.random_range(1..=25);
        match self.random.random_range(0..3) {
            0 => self
                .client
                .query(
                    "SELECT id, name, price FROM products WHERE id <= $1 ORDER BY id",
                    &[&customer],
                )
                .await
                .map(drop),
            1 => self
                .client
                .query("SELECT name, spent FROM customers WHERE id = $1", &[&customer])
                .await
                .map(drop),
            _ => self
                .client
                .simple_query("SELECT state, count(*) FROM jobs GROUP BY state")
                .await
                .map(drop),
        }
    }
}
