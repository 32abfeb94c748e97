//! Sixteen workers at once, everything that makes copies drift, one seed. Afterwards both sides
//! are compared completely. The same storm with rounds read by position must find differences:
//! so the test can fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pgtandem::apply::{self, Applier, ApplierState, ReadBy};
use pgtandem::control::Side;
use pgtandem::upstream::control::Control;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::bed::{Bed, caught_up, until};

pub(crate) const SCHEMA: &str = "
    CREATE TABLE account (id serial PRIMARY KEY, balance bigint NOT NULL DEFAULT 0, at timestamptz DEFAULT clock_timestamp(), r float8 DEFAULT random());
    CREATE TABLE name (id int PRIMARY KEY, name text UNIQUE, slot int4range, EXCLUDE USING gist (slot WITH &&));
    CREATE TABLE parent (id serial PRIMARY KEY, v int);
    CREATE TABLE child (id serial PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE, v int);
    CREATE TABLE queue (id bigserial PRIMARY KEY, job text);
    CREATE TABLE done (id bigint, worker int, at timestamptz DEFAULT now());
    CREATE TABLE keyless (a int, b text);
    CREATE TABLE moved (id int PRIMARY KEY, v int);
    CREATE TABLE swept (id serial PRIMARY KEY, v int);
    CREATE TABLE part (id int, k int, v int, PRIMARY KEY (id, k)) PARTITION BY LIST (k);
    CREATE TABLE part_0 PARTITION OF part FOR VALUES IN (0); CREATE TABLE part_1 PARTITION OF part FOR VALUES IN (1);
    CREATE TABLE touched (id int PRIMARY KEY, v int, n int DEFAULT 0);
    CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE touched SET n = n + 1 WHERE id = NEW.id; RETURN NULL; END $$;
    CREATE TRIGGER aaa AFTER UPDATE OF v ON touched FOR EACH ROW EXECUTE FUNCTION touch();
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO keyless VALUES (NEW.id, TG_OP); RETURN NULL; END $$;
    CREATE TRIGGER zzzzz AFTER INSERT ON child FOR EACH ROW EXECUTE FUNCTION note();
    INSERT INTO name SELECT g, 'n' || g, int4range(g * 10, g * 10 + 5) FROM generate_series(1, 20) g;
    TRUNCATE name";

pub(crate) const FIRST_ROWS: &str = "
    INSERT INTO account (balance) SELECT 100 FROM generate_series(1, 8);
    INSERT INTO name SELECT g, 'n' || g, int4range(g * 10, g * 10 + 5) FROM generate_series(1, 20) g;
    INSERT INTO parent (v) SELECT g FROM generate_series(1, 10) g;
    INSERT INTO moved SELECT g, g FROM generate_series(1, 30) g;
    INSERT INTO part SELECT g, g % 2, 0 FROM generate_series(1, 20) g;
    INSERT INTO touched (id, v) SELECT g, 0 FROM generate_series(1, 5) g";

const WORKERS: u64 = 16;

/// One transaction's statements.
fn transaction(random: &mut StdRng, worker: u64) -> Vec<String> {
    let mut statements = Vec::new();
    for _ in 0..random.random_range(1..4) {
        let n = |random: &mut StdRng, below: u32| random.random_range(0..below);
        statements.push(match n(random, 16) {
            0 | 1 => format!("UPDATE account SET balance = balance + {} WHERE id = {}", n(random, 100), n(random, 8) + 1),
            2 => "INSERT INTO account (balance) VALUES (nextval('account_id_seq'))".into(),
            3 => format!("UPDATE name SET name = 'n' || {}, slot = slot WHERE id = {}", n(random, 30), n(random, 20) + 1),
            4 => {
                let (one, two) = (n(random, 20) + 1, n(random, 20) + 1);
                format!(
                    "UPDATE name SET slot = NULL WHERE id = {one}; UPDATE name SET slot = int4range({0}, {0} + 5) WHERE id = {two}; DELETE FROM name WHERE id = {one}; INSERT INTO name VALUES ({one}, 'fresh' || random(), NULL)",
                    n(random, 40) * 10
                )
            }
            5 => format!("INSERT INTO child (parent, v) SELECT id, {worker} FROM parent ORDER BY random() LIMIT 3"),
            6 => format!("UPDATE parent SET id = id + 1000 * {} WHERE id = (SELECT id FROM parent ORDER BY random() LIMIT 1)", n(random, 50) + 1),
            7 => "DELETE FROM parent WHERE id = (SELECT id FROM parent ORDER BY random() LIMIT 1); INSERT INTO parent (v) VALUES (1)".into(),
            8 => format!("INSERT INTO queue (job) SELECT md5(random()::text) FROM generate_series(1, {})", n(random, 5)),
            9 => format!("WITH job AS (DELETE FROM queue WHERE id IN (SELECT id FROM queue ORDER BY id FOR UPDATE SKIP LOCKED LIMIT 2) RETURNING id) INSERT INTO done (id, worker) SELECT id, {worker} FROM job"),
            10 => "INSERT INTO keyless SELECT g % 2, 'same' FROM generate_series(1, 3) g; DELETE FROM keyless WHERE ctid IN (SELECT ctid FROM keyless LIMIT 2 FOR UPDATE SKIP LOCKED)".into(),
            11 => format!("UPDATE moved SET id = id + {} WHERE id = (SELECT id FROM moved ORDER BY random() LIMIT 1)", n(random, 60)),
            12 => format!("SAVEPOINT s; UPDATE account SET balance = -1; ROLLBACK TO s; SAVEPOINT t; INSERT INTO swept (v) VALUES ({worker}); RELEASE t"),
            13 if n(random, 6) == 0 => "TRUNCATE swept; INSERT INTO swept (v) VALUES (0)".into(),
            13 => format!("UPDATE part SET k = 1 - k, v = v + 1 WHERE id = {}", n(random, 20) + 1),
            14 => format!("UPDATE touched SET v = v + 1 WHERE id = {}", n(random, 5) + 1),
            _ => "SELECT 1".into(),
        });
    }
    statements
}

/// Runs one worker's transactions. Conflicts are part of it: what fails is rolled back.
async fn work(client: Control, worker: u64, seed: u64, transactions: u32, committed: Arc<AtomicU64>) {
    let mut random = StdRng::seed_from_u64(seed * 1000 + worker);
    for _ in 0..transactions {
        let late = random.random_range(0..10) == 0;
        client.batch_execute("BEGIN").await.unwrap();
        let mut failed = false;
        for statement in transaction(&mut random, worker) {
            failed |= client.batch_execute(&statement).await.is_err();
            if failed {
                break;
            }
        }
        if late {
            // Many others begin and commit meanwhile, at later positions.
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        let end = if failed || random.random_range(0..12) == 0 {
            "ROLLBACK"
        } else {
            "COMMIT"
        };
        if client.batch_execute(end).await.is_ok() && end == "COMMIT" {
            committed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

pub(crate) async fn storm(bed: &Bed, seed: u64, transactions: u32) -> u64 {
    let committed = Arc::new(AtomicU64::new(0));
    let mut workers = Vec::new();
    for worker in 0..WORKERS {
        let client = bed.app(Side::Legacy).await;
        workers.push(tokio::spawn(work(
            client,
            worker,
            seed,
            transactions,
            committed.clone(),
        )));
    }
    for worker in workers {
        worker.await.unwrap();
    }
    committed.load(Ordering::Relaxed)
}

async fn prepare(name: &str, read_by: ReadBy) -> (Bed, Applier) {
    let bed = Bed::new(name, SCHEMA).await;
    bed.install().await;
    let mut config = bed.config();
    config.read_by = read_by;
    let applier = apply::spawn(config);
    bed.app(Side::Legacy).await.batch_execute(FIRST_ROWS).await.unwrap();
    caught_up(&applier).await;
    (bed, applier)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_at_once_ends_identical() {
    for seed in [1, 2] {
        let (bed, applier) = prepare(&format!("storm_{seed}"), ReadBy::Snapshot).await;
        let committed = storm(&bed, seed, 120).await;
        assert!(committed > 500, "only {committed} transactions committed");
        bed.assert_same(&applier).await;
        let status = applier.status().borrow().clone();
        tracing::info!(
            "seed {seed}: {committed} transactions committed, {} rounds, {} changes, 0 rows different",
            status.round,
            status.changes_applied
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_applier_killed_again_and_again() {
    let (bed, applier) = prepare("storm_killed", ReadBy::Snapshot).await;
    let mut applier = Some(applier);
    let mut weather = Box::pin(storm(&bed, 3, 100));
    loop {
        tokio::select! {
            _ = &mut weather => break,
            () = tokio::time::sleep(Duration::from_millis(150)) => {
                drop(applier.take());
                applier = Some(apply::spawn(bed.config()));
            }
        }
    }
    drop(weather);
    bed.assert_same(&applier.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rounds_read_by_position_lose_transactions() {
    let (bed, applier) = prepare("storm_by_position", ReadBy::Position).await;
    storm(&bed, 1, 120).await;
    // What is lost makes the secondary refuse rounds, too, or stops mirroring altogether.
    let stands = |state: &ApplierState| matches!(state, ApplierState::Failing { .. } | ApplierState::Halted { .. });
    tokio::select! {
        cut = applier.catch_up() => drop(cut.unwrap()),
        _ = until(&applier, |status| stands(&status.state)) => {}
    }
    let differences = bed.differences().await;
    assert!(
        !differences.is_empty(),
        "the storm cannot tell a wrong applier from a right one"
    );
}
