//! The applier killed in the middle, servers going away, two proxies, late starts.

use std::time::Duration;

use pgtandem::apply::{self, ApplierState};
use pgtandem::control::Side;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::bed::{Bed, Pair, caught_up, until};

const SCHEMA: &str = "CREATE TABLE t (id serial PRIMARY KEY, v int); CREATE TABLE k (v int)";
const WRITES: &str = "INSERT INTO t (v) SELECT generate_series(1, 30); UPDATE t SET v = v + 1 WHERE id % 5 = 0; INSERT INTO k VALUES (1), (2); DELETE FROM k WHERE v = 2";

#[tokio::test]
async fn killed_in_the_middle_of_rounds() {
    let (bed, mut applier) = Bed::mirrored("killed", SCHEMA).await;
    let client = bed.app(Side::Legacy).await;
    let mut random = StdRng::seed_from_u64(7);
    for _ in 0..25 {
        client.batch_execute(WRITES).await.unwrap();
        tokio::time::sleep(Duration::from_micros(random.random_range(0..15_000))).await;
        // Dropped, not stopped: wherever it is.
        drop(applier);
        applier = apply::spawn(bed.config());
        client.batch_execute(WRITES).await.unwrap();
    }
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn the_secondary_goes_and_comes() {
    let mut pair = Pair::start();
    let bed = Bed::on(pair.clone(), "away", SCHEMA).await;
    bed.install().await;
    let applier = apply::spawn(bed.config());
    let client = bed.app(Side::Legacy).await;
    client.batch_execute(WRITES).await.unwrap();
    caught_up(&applier).await;
    let dbname = bed.dbname.clone();
    drop(bed);
    for mode in ["fast", "immediate"] {
        let servers = std::sync::Arc::get_mut(&mut pair).unwrap();
        servers.new.stop(mode).unwrap();
        client.batch_execute(WRITES).await.unwrap();
        until(&applier, |status| match &status.state {
            ApplierState::Connecting { error: Some(error) } => error.contains("new ("),
            _ => false,
        })
        .await;
        client.batch_execute(WRITES).await.unwrap();
        let servers = std::sync::Arc::get_mut(&mut pair).unwrap();
        servers.new.start_again().unwrap();
        applier.catch_up().await.unwrap();
    }
    // The primary dies without a goodbye.
    let servers = std::sync::Arc::get_mut(&mut pair).unwrap();
    servers.legacy.stop("immediate").unwrap();
    servers.legacy.start_again().unwrap();
    let bed = Bed {
        pair: pair.clone(),
        dbname,
    };
    bed.app(Side::Legacy).await.batch_execute(WRITES).await.unwrap();
    applier.catch_up().await.unwrap();
    assert_eq!(bed.differences().await, []);
    assert_eq!(applier.status().borrow().diverged, 0);
}

#[tokio::test]
async fn two_proxies_one_applier() {
    let (bed, first) = Bed::mirrored("leases", SCHEMA).await;
    let second = apply::spawn(bed.config());
    until(&second, |status| status.state == ApplierState::Waiting).await;
    let client = bed.app(Side::Legacy).await;
    client.batch_execute(WRITES).await.unwrap();
    // The one that waits can say when the other has caught up.
    second.catch_up().await.unwrap();
    // Sequences follow a moment later; only the lease's holder can copy them at once.
    let mut rows = bed.differences().await;
    rows.retain(|difference| !difference.name.ends_with("_seq"));
    assert_eq!(rows, []);
    assert!(second.cut().await.is_err());
    drop(first);
    until(&second, |status| status.state == ApplierState::Running).await;
    client.batch_execute(WRITES).await.unwrap();
    bed.assert_same(&second).await;
    let held = second.cut().await.unwrap();
    second.stop().await;
    drop(held);
}

#[tokio::test]
async fn the_applier_comes_late_and_ddl_was_before_it() {
    let bed = Bed::new("late", SCHEMA).await;
    bed.install().await;
    let client = bed.app(Side::Legacy).await;
    client.batch_execute(WRITES).await.unwrap();
    for statement in [
        "ALTER TABLE t ADD COLUMN w int DEFAULT 3",
        "ALTER TABLE k RENAME TO kk",
        "CREATE TABLE x (id int)",
    ] {
        client.batch_execute("BEGIN").await.unwrap();
        client.batch_execute(statement).await.unwrap();
        client
            .execute(pgtandem::journal::DDL_HOOK, &[&statement])
            .await
            .unwrap();
        client.batch_execute("COMMIT").await.unwrap();
    }
    client
        .batch_execute("UPDATE t SET w = 4; INSERT INTO kk VALUES (5); INSERT INTO x VALUES (1)")
        .await
        .unwrap();
    let applier = apply::spawn(bed.config());
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn a_cut_is_the_primary_as_of_its_snapshot() {
    let (bed, applier) = Bed::mirrored("cuts", SCHEMA).await;
    let client = bed.app(Side::Legacy).await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writing = tokio::spawn({
        let stop = stop.clone();
        async move {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                client
                    .batch_execute(
                        "INSERT INTO t (v) VALUES (1); UPDATE t SET v = v + 1 WHERE id = (SELECT max(id) FROM t)",
                    )
                    .await
                    .unwrap();
            }
        }
    });
    let primary = bed.admin(Side::Legacy).await;
    let secondary = bed.admin(Side::New).await;
    for _ in 0..20 {
        let held = applier.cut().await.unwrap();
        primary
            .batch_execute(&format!(
                "BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{}'",
                held.primary_snapshot
            ))
            .await
            .unwrap();
        let sql = "SELECT count(*), COALESCE(sum(v), 0), COALESCE(max(id), 0) FROM t";
        let (here, there) = (
            primary.query_one(sql, &[]).await.unwrap(),
            secondary.query_one(sql, &[]).await.unwrap(),
        );
        let values = |row: &tokio_postgres::Row| (row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i32>(2));
        assert_eq!(values(&here), values(&there));
        assert!(held.still_held());
        drop(held);
        primary.batch_execute("COMMIT").await.unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writing.await.unwrap();
    bed.assert_same(&applier).await;
}
