//! An application that writes while its schema is migrated: statements of every version of it,
//! of which at any moment some do not fit. Those fail, as they would without the proxy.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::sync::{RwLock, RwLockWriteGuard};
use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::rig::connect;

/// `#` stands for a number by chance, up to about as many rows as there are.
pub(crate) type Statements = &'static [&'static str];

/// What an older or newer version of the schema answers, and what concurrent DDL leads to on any
/// Postgres: unknown table, column or function; unknown or not yet usable label; a parent that has
/// just gone, a name taken, no value for a column; a deadlock; a plan that no longer fits.
const EXPECTED: &[&str] = &[
    "42P01", "42703", "42883", "22P02", "55P04", "23503", "23505", "23502", "40P01", "0A000",
];

pub(crate) struct Application {
    workers: JoinSet<Vec<String>>,
    stop: Arc<AtomicBool>,
    /// Held for writing while nobody may write.
    open: Arc<RwLock<()>>,
    tried: Arc<AtomicU64>,
    done: Arc<AtomicU64>,
}

impl Application {
    pub(crate) async fn begin(url: &str, statements: Statements, seed: u64, workers: u64) -> Self {
        let mut application = Self {
            workers: JoinSet::new(),
            stop: Arc::default(),
            open: Arc::default(),
            tried: Arc::default(),
            done: Arc::default(),
        };
        for worker in 0..workers {
            let client = connect(url).await.unwrap();
            let (stop, open) = (application.stop.clone(), application.open.clone());
            let (tried, done) = (application.tried.clone(), application.done.clone());
            let mut rng = StdRng::seed_from_u64(seed * 1000 + worker);
            application.workers.spawn(async move {
                let mut failures = Vec::new();
                while !stop.load(Relaxed) {
                    let turn = open.read().await;
                    let statement = statements.choose(&mut rng).unwrap();
                    let statement = statement.replace('#', &rng.random_range(1..300).to_string());
                    match execute(&client, &statement, rng.random_bool(0.5)).await {
                        Ok(()) => {
                            done.fetch_add(1, Relaxed);
                        }
                        Err(failure) => failures.extend(failure),
                    }
                    drop(turn);
                    tried.fetch_add(1, Relaxed);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                failures
            });
        }
        application
    }

    /// Waits for some more statements, fitting or not.
    pub(crate) async fn rage(&self, more: u64) {
        let enough = self.tried.load(Relaxed) + more;
        while self.tried.load(Relaxed) < enough {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Nobody writes while this is held.
    pub(crate) async fn paused(&self) -> RwLockWriteGuard<'_, ()> {
        self.open.write().await
    }

    /// How many statements went well.
    pub(crate) async fn end(mut self) -> u64 {
        self.stop.store(true, Relaxed);
        while let Some(failures) = self.workers.join_next().await {
            assert_eq!(failures.unwrap(), [] as [String; 0]);
        }
        self.done.load(Relaxed)
    }
}

/// By the simple or the extended protocol; what is not expected is told.
async fn execute(client: &Client, statement: &str, extended: bool) -> Result<(), Option<String>> {
    let result = if extended && !statement.contains(';') {
        client.execute(statement, &[]).await.map(drop)
    } else {
        client.batch_execute(statement).await
    };
    let Err(error) = result else { return Ok(()) };
    if statement.contains("BEGIN") {
        client.batch_execute("ROLLBACK").await.ok();
    }
    let code = error.code().map(|code| code.code().to_owned()).unwrap_or_default();
    let expected = EXPECTED.contains(&code.as_str());
    Err((!expected).then(|| format!("{statement}: {error:?}")))
}
