//! More than fits into memory: in pieces, through the secondary's own tables; and the journal's
//! rotation.

use pgtandem::apply;
use pgtandem::control::Side;
use pgtandem::journal::{DDL_HOOK, rotation};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::bed::{Bed, Pair, caught_up};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, u int UNIQUE, v text); CREATE TABLE k (v int); CREATE TABLE g (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, b int, c int GENERATED ALWAYS AS (b + 1) STORED)";

#[tokio::test]
async fn a_large_transaction() {
    let (bed, applier) = Bed::mirrored("large", SCHEMA).await;
    let client = bed.app(Side::Legacy).await;
    for statement in [
        "INSERT INTO t SELECT x, x, md5(x::text) FROM generate_series(1, 60000) x; INSERT INTO k SELECT x % 100 FROM generate_series(1, 20000) x; INSERT INTO g (b) SELECT generate_series(1, 20000)",
        "UPDATE t SET u = -u, v = v || 'x'; UPDATE k SET v = v + 1 WHERE v < 50; UPDATE g SET b = -b",
        "BEGIN; DELETE FROM t WHERE id % 2 = 0; UPDATE t SET id = id + 1, u = id; DELETE FROM k WHERE v = 50; COMMIT",
        "BEGIN; TRUNCATE t; INSERT INTO t SELECT x, x, 'again' FROM generate_series(1, 30000) x; COMMIT",
        "DELETE FROM t; DELETE FROM k; DELETE FROM g",
    ] {
        client.batch_execute(statement).await.unwrap();
        bed.assert_same(&applier).await;
    }
}

#[tokio::test]
async fn a_backlog_with_ddl_in_it() {
    let bed = Bed::new("backlog", SCHEMA).await;
    bed.install().await;
    let client = bed.app(Side::Legacy).await;
    let ddl = async |statement: &str| {
        client.batch_execute("BEGIN").await.unwrap();
        client.batch_execute(statement).await.unwrap();
        client.execute(DDL_HOOK, &[&statement]).await.unwrap();
        client.batch_execute("COMMIT").await.unwrap();
    };
    client
        .batch_execute("INSERT INTO t SELECT x, x, 'a' FROM generate_series(1, 20000) x")
        .await
        .unwrap();
    ddl("ALTER TABLE t ADD COLUMN w int DEFAULT 7").await;
    client
        .batch_execute("UPDATE t SET w = id WHERE id <= 10000; TRUNCATE k")
        .await
        .unwrap();
    client
        .batch_execute("CREATE INDEX CONCURRENTLY t_w ON t (w)")
        .await
        .unwrap();
    client
        .execute(
            pgtandem::journal::DDL_HOOK_OUTSIDE,
            &[&"CREATE INDEX CONCURRENTLY t_w ON t (w)"],
        )
        .await
        .unwrap();
    client
        .batch_execute("INSERT INTO k SELECT generate_series(1, 1000)")
        .await
        .unwrap();
    ddl("ALTER TABLE t DROP COLUMN v").await;
    client
        .batch_execute("UPDATE t SET w = -w WHERE id % 2 = 0; DELETE FROM t WHERE id % 5 = 0")
        .await
        .unwrap();
    client
        .batch_execute("CREATE INDEX CONCURRENTLY k_v ON k (v)")
        .await
        .unwrap();
    client
        .execute(
            pgtandem::journal::DDL_HOOK_OUTSIDE,
            &[&"CREATE INDEX CONCURRENTLY k_v ON k (v)"],
        )
        .await
        .unwrap();
    let applier = apply::spawn(bed.config());
    bed.assert_same(&applier).await;
    let indexes = bed
        .admin(Side::New)
        .await
        .query("SELECT 1 FROM pg_indexes WHERE indexname IN ('t_w', 'k_v')", &[])
        .await
        .unwrap();
    assert_eq!(indexes.len(), 2);
}

#[tokio::test]
async fn a_large_backlog_on_a_tampered_secondary() {
    let (bed, applier) = Bed::mirrored("large_tampered", SCHEMA).await;
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("INSERT INTO t SELECT x, x, 'a' FROM generate_series(1, 20000) x")
        .await
        .unwrap();
    bed.assert_same(&applier).await;
    bed.proxy(Side::New)
        .await
        .batch_execute(
            "DELETE FROM t WHERE id = 5; UPDATE t SET v = 'b' WHERE id = 6; INSERT INTO t VALUES (20005, 1000005, 'c')",
        )
        .await
        .unwrap();
    client
        .batch_execute("UPDATE t SET v = 'z'; INSERT INTO t VALUES (20005, 20005, 'ours')")
        .await
        .unwrap();
    caught_up(&applier).await;
    assert_eq!(bed.differences().await, []);
    assert_eq!(applier.status().borrow().diverged, 3);
}

#[tokio::test]
async fn killed_in_the_middle_of_a_backlog() {
    let (bed, mut applier) = Bed::mirrored("backlog_killed", SCHEMA).await;
    let client = bed.app(Side::Legacy).await;
    for turn in 0..6_u64 {
        client.batch_execute("INSERT INTO t SELECT x, x, md5(x::text) FROM generate_series((SELECT COALESCE(max(id), 0) + 1 FROM t), (SELECT COALESCE(max(id), 0) + 15000 FROM t)) x; UPDATE t SET v = 'u' WHERE id % 3 = 0").await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(60 * turn)).await;
        drop(applier);
        applier = apply::spawn(bed.config());
    }
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn killed_between_the_pieces_of_a_backlog() {
    let bed = Bed::new("pieces_killed", SCHEMA).await;
    bed.install().await;
    let client = bed.app(Side::Legacy).await;
    for turn in 0..60 {
        client
            .batch_execute(&format!(
                "BEGIN; INSERT INTO t SELECT x, x, md5(x::text) FROM generate_series({turn} * 300 + 1, {turn} * 300 + 300) x;
                 UPDATE t SET u = -u, v = v || {turn} WHERE id % 60 = {turn}; DELETE FROM t WHERE id % 97 = {turn};
                 INSERT INTO k SELECT x % 7 FROM generate_series(1, 50) x; DELETE FROM k WHERE v = {turn} % 7;
                 INSERT INTO g (b) VALUES ({turn}); COMMIT"
            ))
            .await
            .unwrap();
    }
    let mut config = bed.config();
    config.piece_bytes = 100_000;
    let mut random = StdRng::seed_from_u64(11);
    let secondary = bed.admin(Side::New).await;
    let mut pieces = std::collections::BTreeSet::new();
    for _ in 0..12 {
        let applier = apply::spawn(config.clone());
        // Not before it has begun: its first round connects and looks at both catalogs.
        let status = applier.status();
        for _ in 0..random.random_range(1..400) {
            if status.borrow().watermark.is_some() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        drop(applier);
        let piece = secondary.query_opt(
            "SELECT piece::text FROM pgtandem.watermark WHERE target IS NOT NULL",
            &[],
        );
        pieces.extend(piece.await.unwrap().map(|row| row.get::<_, String>(0)));
    }
    assert!(pieces.len() > 1, "never killed in the middle: {pieces:?}");
    let applier = apply::spawn(config);
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn thousands_of_rounds_leave_the_journal_small_and_nothing_to_vacuum() {
    // On servers of its own: an old transaction in any database of a server holds up rotation.
    let bed = Bed::on(Pair::start(), "rounds", SCHEMA).await;
    bed.install().await;
    let mut config = bed.config();
    config.poll_min = std::time::Duration::ZERO;
    config.rest = 0;
    config.journal.max_bytes = 16 << 20;
    let applier = apply::spawn(config);
    caught_up(&applier).await;
    let client = bed.app(Side::Legacy).await;
    let first = caught_up(&applier).await.round;
    client
        .batch_execute("INSERT INTO t SELECT x, x, '' FROM generate_series(1, 10) x")
        .await
        .unwrap();
    // A transaction that changes nothing in the end would make no round.
    while applier.status().borrow().round < first + 2000 {
        client
            .batch_execute("UPDATE t SET v = md5(random()::text)")
            .await
            .unwrap();
    }
    bed.assert_same(&applier).await;
    let primary = bed.admin(Side::Legacy).await;
    let bytes = rotation::measure(&primary).await.unwrap();
    assert!(bytes < 16 << 20, "{bytes}");
    let emptied: i64 = primary
        .query_one("SELECT truncations FROM pgtandem.side", &[])
        .await
        .unwrap()
        .get(0);
    assert!(emptied > 1, "{emptied}");
    assert!(!applier.status().borrow().journal.full);
    for side in [Side::Legacy, Side::New] {
        let admin = bed.admin(side).await;
        let sql = "SELECT c.relname::text, pg_total_relation_size(c.oid), pg_stat_get_dead_tuples(c.oid)
                     FROM pg_class c WHERE c.relnamespace = 'pgtandem'::regnamespace AND c.relkind = 'r'
                      AND c.relname NOT LIKE 'change%'";
        for row in admin.query(sql, &[]).await.unwrap() {
            let (name, bytes, dead): (String, i64, i64) = (row.get(0), row.get(1), row.get(2));
            assert!(
                bytes <= 256 * 1024 && dead < 500,
                "{side}: {name}: {bytes} bytes, {dead} dead rows"
            );
        }
    }
}

#[tokio::test]
async fn the_journal_rotates_and_empties() {
    let (bed, applier) = Bed::mirrored("rotation", SCHEMA).await;
    let client = bed.app(Side::Legacy).await;
    let proxy = bed.proxy(Side::Legacy).await;
    let mut slots = std::collections::BTreeSet::new();
    let mut largest = 0;
    // A transaction that stays open holds what it may have written.
    let mut late = bed.app(Side::Legacy).await;
    let open = late.transaction().await.unwrap();
    open.batch_execute("INSERT INTO k VALUES (-1)").await.unwrap();
    let mut open = Some(open);
    for turn in 0..40 {
        client
            .batch_execute(
                "INSERT INTO t SELECT x, x, repeat(md5(x::text), 30) FROM generate_series(1, 5000) x; DELETE FROM t",
            )
            .await
            .unwrap();
        caught_up(&applier).await;
        let state: i64 = proxy
            .query_one("SELECT pg_sequence_last_value('pgtandem.state')", &[])
            .await
            .unwrap()
            .get(0);
        slots.insert(state & 3);
        if turn == 10
            && let Some(open) = open.take()
        {
            open.commit().await.unwrap();
        }
        if turn > 20 {
            largest = largest.max(rotation::measure(&proxy).await.unwrap());
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    bed.assert_same(&applier).await;
    assert_eq!(slots.len(), 3, "{slots:?}");
    let written: i64 = proxy
        .query_one("SELECT truncations FROM pgtandem.side", &[])
        .await
        .unwrap()
        .get(0);
    assert!(written > 0);
    assert!(largest < 400 << 20, "{largest}");
}
