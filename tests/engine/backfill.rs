//! Existing rows, copied while somebody writes: afterwards both sides are identical.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pgtandem::apply::{self, Applier, Seeding};
use pgtandem::config::{Backfill, MaxRate};
use pgtandem::control::{Epoch, Side};
use pgtandem::reconcile::Sides;
use pgtandem::reconcile::backfill::{BackfillStatus, Desk, Hook, InsertAt, Order};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::bed::{Bed, as_a_client, caught_up};
use crate::ddl::ddl;

const SCHEMA: &str = r#"
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
    CREATE TABLE ints (id bigint PRIMARY KEY, v text, tags text[], at timestamptz DEFAULT '2020-01-01', f float8);
    CREATE TABLE pairs (a text COLLATE "C", b int, v text, UNIQUE (v), PRIMARY KEY (a, b));
    CREATE TABLE uuids (id uuid PRIMARY KEY, m mood, j jsonb, b bytea);
    CREATE TABLE keyless (v int, t text);
    CREATE TABLE made (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, a int, twice int GENERATED ALWAYS AS (a * 2) STORED);
    CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE parted_low PARTITION OF parted FOR VALUES FROM (MINVALUE) TO (500);
    CREATE TABLE parted_high PARTITION OF parted FOR VALUES FROM (500) TO (MAXVALUE);
    CREATE TABLE mother (id int PRIMARY KEY, v text);
    CREATE TABLE daughter (w int, PRIMARY KEY (id)) INHERITS (mother);
    CREATE TABLE "Odd ""Name" ("the key" int PRIMARY KEY, "a\b" text);
    CREATE TABLE child (id int PRIMARY KEY, parent bigint REFERENCES ints (id) ON UPDATE CASCADE ON DELETE CASCADE);
"#;

const ROWS: &str = r#"
    INSERT INTO ints SELECT i, 'v' || i, ARRAY['a', NULL, E'x\\y\t"' || i], '2020-01-01'::timestamptz + i * '1 s'::interval, i / 3.0::float8
      FROM generate_series(1, 20000) i;
    INSERT INTO pairs SELECT md5((i % 500)::text), i, 'u' || i FROM generate_series(1, 8000) i;
    INSERT INTO worded SELECT (ARRAY['é', 'E', 'e', 'z-', 'Ä', '-a'])[1 + i % 6] || i || E'\\', i FROM generate_series(1, 8000) i;
    INSERT INTO uuids SELECT md5(i::text)::uuid, (ARRAY['sad', 'ok', 'happy'])[1 + i % 3]::mood, jsonb_build_object('i', i), decode(md5(i::text), 'hex')
      FROM generate_series(1, 6000) i;
    INSERT INTO keyless SELECT i % 100, 'same' FROM generate_series(1, 3000) i;
    INSERT INTO made (a) SELECT i FROM generate_series(1, 1000) i;
    INSERT INTO parted SELECT i, E'a\nb' FROM generate_series(1, 1000) i;
    INSERT INTO mother SELECT i, 'm' FROM generate_series(1, 100) i;
    INSERT INTO daughter SELECT i, 'd', i FROM generate_series(1000, 1100) i;
    INSERT INTO "Odd ""Name" SELECT i, E'\\N' FROM generate_series(1, 10) i;
    INSERT INTO child SELECT i, i FROM generate_series(1, 500) i;
"#;

/// A table whose key the two servers sort differently: by language where the server can, by bytes
/// where it cannot.
const WORDED: &str = r#"
    DO $$ BEGIN
        EXECUTE format('CREATE TABLE worded (k text COLLATE %I PRIMARY KEY, v int)',
            (SELECT max(collname) FROM pg_collation WHERE collname IN ('C', 'en-x-icu')));
    END $$;
"#;

/// What stands on the secondary from some earlier attempt.
const STALE: &str = "
    INSERT INTO ints (id, v) VALUES (5, 'old'), (900000, 'never was');
    INSERT INTO pairs VALUES ('elsewhere', 1, 'u7');
    INSERT INTO keyless VALUES (1, 'same'), (-1, 'stale');
    INSERT INTO worded VALUES ('stale', 1)";

/// A bed with rows on legacy that new does not have, mirrored.
async fn with_rows(name: &str, schema: &str, rows: &str, stale: &str) -> (Bed, Applier) {
    let bed = Bed::new(name, schema).await;
    bed.app(Side::Legacy).await.batch_execute(rows).await.unwrap();
    bed.app(Side::New).await.batch_execute(stale).await.unwrap();
    bed.install().await;
    let applier = apply::spawn(bed.config());
    caught_up(&applier).await;
    (bed, applier)
}

fn sides(bed: &Bed, applier: &Arc<Applier>) -> Sides {
    bed.sides(Side::Legacy, Epoch::FIRST, applier)
}

/// Small ranges, so that there are many.
fn settings() -> Backfill {
    Backfill {
        hold_max: Duration::from_millis(20),
        max_lag: Duration::from_secs(600),
        max_primary_latency: Duration::from_secs(600),
        ..Backfill::default()
    }
}

async fn ended(desk: &Desk) -> BackfillStatus {
    let mut watch = desk.watch();
    let status = watch
        .wait_for(|status| status.as_ref().is_some_and(|status| !status.is_running()))
        .await
        .unwrap();
    status.clone().unwrap()
}

async fn backfill(desk: &Desk, sides: &Sides) -> BackfillStatus {
    desk.start(sides, &Order::default()).await.unwrap();
    ended(desk).await
}

/// Writes by the seed until told to stop: inserts, updates, deletes, key changes, re-inserts.
struct Storm {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<u64>>,
}

impl Storm {
    async fn begin(bed: &Bed, seed: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        for worker in 0..3 {
            let client = bed.app(Side::Legacy).await;
            let mut rng = StdRng::seed_from_u64(seed + worker);
            let stop = stop.clone();
            tasks.push(tokio::spawn(async move {
                let mut writes = 0;
                while !stop.load(Ordering::Relaxed) {
                    let sql = random_write(&mut rng);
                    match client.batch_execute(&sql).await {
                        Ok(()) => writes += 1,
                        Err(error) => assert!(error.code().is_some(), "{error}: {sql}"),
                    }
                }
                writes
            }));
        }
        Self { stop, tasks }
    }

    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let mut writes = 0;
        for task in self.tasks {
            writes += task.await.unwrap();
        }
        writes
    }
}

fn random_write(rng: &mut StdRng) -> String {
    let id = rng.random_range(1..21_000);
    let other = rng.random_range(1..21_000);
    match rng.random_range(0..14) {
        0 => format!("DELETE FROM ints WHERE id = {id}"),
        1 => format!("INSERT INTO ints (id, v) VALUES ({id}, 'again') ON CONFLICT (id) DO UPDATE SET v = 'twice'"),
        2 => {
            format!("UPDATE ints SET id = {other} WHERE id = {id} AND NOT EXISTS (SELECT FROM ints WHERE id = {other})")
        }
        3 => format!(
            "BEGIN; DELETE FROM ints WHERE id = {id}; INSERT INTO ints (id, v) VALUES ({id}, 'reborn') ON CONFLICT DO NOTHING; COMMIT"
        ),
        4 => format!("UPDATE ints SET v = v || '+' WHERE id BETWEEN {id} AND {id} + 20"),
        5 => format!("UPDATE pairs SET a = md5('{other}') WHERE b = {id}"),
        6 => format!("DELETE FROM pairs WHERE b = {id}"),
        7 => format!(
            "BEGIN; UPDATE pairs SET v = 'tmp{id}' WHERE b = {id}; UPDATE pairs SET v = 'u{id}' WHERE b = {other} AND NOT EXISTS (SELECT FROM pairs WHERE v = 'u{id}'); COMMIT"
        ),
        8 => format!("UPDATE worded SET k = 'ö' || k WHERE v = {id}"),
        9 => format!("DELETE FROM worded WHERE v = {id}"),
        10 => format!("UPDATE uuids SET id = md5('n{other}')::uuid WHERE id = md5('{id}')::uuid"),
        11 => format!("INSERT INTO keyless VALUES ({}, 'same')", id % 100),
        12 => format!(
            "DELETE FROM keyless WHERE ctid = (SELECT ctid FROM keyless WHERE v = {} LIMIT 1)",
            id % 100
        ),
        _ => format!(
            "UPDATE parted SET id = {} WHERE id = {} AND NOT EXISTS (SELECT FROM parted WHERE id = {})",
            other % 1000,
            id % 1000,
            other % 1000
        ),
    }
}

/// Deletes, key changes and re-inserts at the first keys of each range of `ints` that is open,
/// committed before its rows are read.
fn aimed(bed: &Bed, calls: &Arc<AtomicU64>, sql: fn(i64) -> String) -> Hook {
    let target = bed.pair.target(Side::Legacy, "app", &bed.dbname);
    let calls = calls.clone();
    Arc::new(move |open| {
        let (target, calls) = (target.clone(), calls.clone());
        Box::pin(async move {
            let client = as_a_client(&target).await;
            for (table, keys) in open {
                if table != "\"public\".\"ints\"" {
                    continue;
                }
                let low: i64 = keys.after.map_or(0, |after| after[0].parse().unwrap());
                client.batch_execute(&sql(low)).await.unwrap();
                calls.fetch_add(1, Ordering::Relaxed);
            }
        })
    })
}

fn nasty(low: i64) -> String {
    format!(
        "DELETE FROM ints WHERE id = {low} + 1;
         BEGIN; DELETE FROM ints WHERE id = {low} + 2; INSERT INTO ints (id, v) VALUES ({low} + 2, 'back'); COMMIT;
         UPDATE ints SET id = -{low} - 3 WHERE id = {low} + 3;
         UPDATE ints SET id = 5000000 + {low} WHERE id = {low} + 4;
         UPDATE ints SET v = 'touched' WHERE id BETWEEN {low} + 5 AND {low} + 9"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_copied_while_others_are_written() {
    let (bed, applier) = with_rows("backfill_storm", &format!("{SCHEMA}{WORDED}"), ROWS, STALE).await;
    let applier = Arc::new(applier);
    let storm = Storm::begin(&bed, 7).await;
    let calls = Arc::new(AtomicU64::new(0));
    let desk = Desk::new(settings()).with_hook(InsertAt::Cut, aimed(&bed, &calls, nasty));
    let status = backfill(&desk, &sides(&bed, &applier)).await;
    let writes = storm.end().await;
    assert_eq!(status.state, "done", "{status:#?}");
    assert!(calls.load(Ordering::Relaxed) > 1, "no range was aimed at");
    assert!(writes > 100, "only {writes} writes meanwhile");
    let counts = status.counts;
    assert_eq!(counts.read, counts.written + counts.skipped + counts.failed);
    assert!(counts.read > 40_000 && counts.failed == 0, "{counts:?}");
    bed.assert_same(&applier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_inserted_after_its_round_brings_deleted_rows_back() {
    let schema = "CREATE TABLE ints (id bigint PRIMARY KEY, v text)";
    let rows = "INSERT INTO ints SELECT i, 'v' FROM generate_series(1, 20000) i";
    let (bed, applier) = with_rows("backfill_wrong", schema, rows, "").await;
    let applier = Arc::new(applier);
    let calls = Arc::new(AtomicU64::new(0));
    let gone = |low| format!("DELETE FROM ints WHERE id = {low} + 1; UPDATE ints SET v = 'new' WHERE id = {low} + 2");
    let desk = Desk::new(settings()).with_hook(InsertAt::LaterCut, aimed(&bed, &calls, gone));
    backfill(&desk, &sides(&bed, &applier)).await;
    caught_up(&applier).await;
    assert!(calls.load(Ordering::Relaxed) > 1);
    assert_ne!(bed.differences().await, [], "the test of the right way proves nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_rows_are_set_aside() {
    let schema = &format!("CREATE TABLE plain (id int PRIMARY KEY, v text); {WORDED}");
    let rows = "INSERT INTO plain SELECT i, CASE WHEN i IN (1, 4000, 4001, 20000) THEN 'bad' ELSE 'good' END FROM generate_series(1, 20000) i;
        INSERT INTO worded SELECT 'k' || i, CASE WHEN i IN (17, 6000) THEN -1 ELSE i END FROM generate_series(1, 8000) i";
    let only_there = "ALTER TABLE plain ADD CHECK (v <> 'bad'); ALTER TABLE worded ADD CHECK (v > 0)";
    let (bed, applier) = with_rows("backfill_refused", schema, rows, only_there).await;
    let applier = Arc::new(applier);
    let desk = Desk::new(settings());
    let status = backfill(&desk, &sides(&bed, &applier)).await;
    assert_eq!(status.state, "stopped", "{status:#?}");
    assert!(status.note.as_deref().unwrap().contains("refused"), "{status:#?}");
    assert_eq!((status.counts.read, status.counts.failed), (28_000, 6));
    let new = bed.admin(Side::New).await;
    let aside = new
        .query(
            "SELECT name, sqlstate, convert_from(line, 'UTF8') FROM pgtandem.backfill_refused ORDER BY 1, 3",
            &[],
        )
        .await
        .unwrap();
    let aside: Vec<(String, String, String)> = aside.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    let refused = |name: &str, line: &str| (name.to_owned(), "23514".to_owned(), line.to_owned());
    assert_eq!(
        aside,
        [
            refused("plain", "1\tbad"),
            refused("plain", "20000\tbad"),
            refused("plain", "4000\tbad"),
            refused("plain", "4001\tbad"),
            refused("worded", "k17\t-1"),
            refused("worded", "k6000\t-1"),
        ]
    );
    let counts = new
        .query_one(
            "SELECT (SELECT count(*) FROM plain), (SELECT count(*) FROM worded)",
            &[],
        )
        .await
        .unwrap();
    assert_eq!((counts.get::<_, i64>(0), counts.get::<_, i64>(1)), (19_996, 7_998));
    caught_up(&applier).await;
    for table in &applier.status().borrow().tables {
        assert_eq!(table.seeding, Seeding::Unseeded, "{table:?}");
        assert!(table.note.as_deref().unwrap().contains("refused"), "{table:?}");
    }
    // The cause is mended, and it goes well.
    new.batch_execute(
        "ALTER TABLE plain DROP CONSTRAINT plain_v_check; ALTER TABLE worded DROP CONSTRAINT worded_v_check",
    )
    .await
    .unwrap();
    let status = backfill(&desk, &sides(&bed, &applier)).await;
    assert_eq!(status.state, "done", "{status:#?}");
    bed.assert_same(&applier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_refused_rows_stop_it() {
    let schema = "CREATE TABLE plain (id int PRIMARY KEY, v text)";
    let rows = "INSERT INTO plain SELECT i, 'bad' FROM generate_series(1, 2000) i; ANALYZE plain";
    let only_there = "ALTER TABLE plain ADD CHECK (v <> 'bad')";
    let (bed, applier) = with_rows("backfill_too_many", schema, rows, only_there).await;
    let applier = Arc::new(applier);
    let desk = Desk::new(settings());
    let status = backfill(&desk, &sides(&bed, &applier)).await;
    assert_eq!(status.state, "stopped");
    let note = status.note.unwrap();
    assert!(
        note.contains("backfill.error_threshold") && note.contains("plain_v_check"),
        "{note}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_copied_is_not_copied_again() {
    let schema = "CREATE TABLE ints (id bigint PRIMARY KEY, v text); CREATE TABLE small (id int PRIMARY KEY)";
    let rows = "INSERT INTO ints SELECT i, 'v' FROM generate_series(1, 20000) i; INSERT INTO small VALUES (1)";
    let (bed, applier) = with_rows("backfill_resume", schema, rows, "").await;
    let applier = Arc::new(applier);
    let slow = Backfill {
        max_rate: Some(MaxRate::Rows(8_000)),
        ..settings()
    };
    let desk = Desk::new(slow);
    desk.start(&sides(&bed, &applier), &Order::default()).await.unwrap();
    desk.watch()
        .wait_for(|status| status.as_ref().is_some_and(|status| status.counts.read >= 4_000))
        .await
        .unwrap();
    assert!(desk.cancel().await);
    let copied = desk.status().unwrap();
    assert_eq!(copied.state, "cancelled");
    assert!(copied.counts.read < 20_000);
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("DELETE FROM ints WHERE id % 10 = 0")
        .await
        .unwrap();
    ddl(&client, "ALTER TABLE ints ADD COLUMN w int DEFAULT 5").await;
    caught_up(&applier).await;

    // A new desk is a new process: all it knows is on the secondary.
    let desk = Desk::new(settings());
    let status = backfill(&desk, &sides(&bed, &applier)).await;
    assert_eq!(status.state, "done", "{status:#?}");
    // Some were deleted after they had been copied.
    assert!((18_000..20_000).contains(&status.counts.read), "{status:#?}");
    bed.assert_same(&applier).await;
}

/// DDL that comes while a table is being copied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_is_reshaped_while_it_is_copied() {
    let schema = "CREATE TABLE ints (id bigint PRIMARY KEY, v text)";
    let rows = "INSERT INTO ints SELECT i, 'v' FROM generate_series(1, 30000) i";
    let (bed, applier) = with_rows("backfill_reshaped", schema, rows, "").await;
    let applier = Arc::new(applier);
    let slow = Backfill {
        max_rate: Some(MaxRate::Rows(8_000)),
        ..settings()
    };
    let desk = Desk::new(slow);
    let sides = sides(&bed, &applier);
    desk.start(&sides, &Order::default()).await.unwrap();
    let client = bed.app(Side::Legacy).await;
    for (read, statement) in [
        (4_000, "ALTER TABLE ints ADD COLUMN w int DEFAULT 5"),
        (8_000, "ALTER TABLE ints RENAME v TO vv"),
        (12_000, "ALTER TABLE ints RENAME TO integers"),
        (16_000, "ALTER TABLE integers RENAME id TO number"),
    ] {
        desk.watch()
            .wait_for(|status| status.as_ref().is_some_and(|status| status.counts.read >= read))
            .await
            .unwrap();
        ddl(&client, statement).await;
    }
    let faster = Order {
        max_rate: Some("none".into()),
        workers: Some(3),
        ..Order::default()
    };
    desk.start(&sides, &faster).await.unwrap();
    let status = ended(&desk).await;
    assert_eq!((status.state.as_str(), status.workers), ("done", 3), "{status:#?}");
    bed.assert_same(&applier).await;
}

/// An emptied table is equal at once; what comes afterwards is mirrored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_is_truncated_while_it_is_copied() {
    let schema = "CREATE TABLE ints (id bigint PRIMARY KEY, v text)";
    let rows = "INSERT INTO ints SELECT i, 'v' FROM generate_series(1, 30000) i";
    let (bed, applier) = with_rows("backfill_truncated", schema, rows, "").await;
    let applier = Arc::new(applier);
    let slow = Backfill {
        max_rate: Some(MaxRate::Rows(8_000)),
        ..settings()
    };
    let desk = Desk::new(slow);
    desk.start(&sides(&bed, &applier), &Order::default()).await.unwrap();
    desk.watch()
        .wait_for(|status| status.as_ref().is_some_and(|status| status.counts.read >= 4_000))
        .await
        .unwrap();
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("TRUNCATE ints; INSERT INTO ints SELECT i, 'w' FROM generate_series(1, 100) i")
        .await
        .unwrap();
    let status = ended(&desk).await;
    assert_eq!(status.state, "done", "{status:#?}");
    bed.assert_same(&applier).await;
}

/// Connections that are lost, and a lock that somebody holds, are only waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_passes_is_waited_for() {
    let schema = "CREATE TABLE ints (id bigint PRIMARY KEY, v text)";
    let rows = "INSERT INTO ints SELECT i, 'v' FROM generate_series(1, 20000) i";
    let (bed, applier) = with_rows("backfill_passing", schema, rows, "").await;
    let applier = Arc::new(applier);
    let desk = Desk::new(Backfill {
        max_rate: Some(MaxRate::Rows(8_000)),
        ..settings()
    });
    desk.start(&sides(&bed, &applier), &Order::default()).await.unwrap();
    let read = async |rows: u64| {
        desk.watch()
            .wait_for(|status| status.as_ref().is_some_and(|status| status.counts.read >= rows))
            .await
            .unwrap();
    };
    for (side, rows) in [(Side::New, 1_000), (Side::Legacy, 3_000), (Side::New, 5_000)] {
        read(rows).await;
        bed.admin(side)
            .await
            .batch_execute(&format!(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                  WHERE application_name LIKE 'pgtandem %' AND application_name <> 'pgtandem test' AND datname = '{}'",
                bed.dbname
            ))
            .await
            .unwrap();
    }
    read(7_000).await;
    let locker = bed.app(Side::Legacy).await;
    locker
        .batch_execute("BEGIN; LOCK TABLE ints IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    desk.watch()
        .wait_for(|status| {
            let status = status.as_ref().unwrap();
            status
                .slowed_by
                .as_deref()
                .is_some_and(|why| why.contains("lock timeout"))
        })
        .await
        .unwrap();
    locker.batch_execute("COMMIT").await.unwrap();
    let status = ended(&desk).await;
    assert_eq!(
        (status.state.as_str(), status.counts.read),
        ("done", 20_000),
        "{status:#?}"
    );
    bed.assert_same(&applier).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_backfill_goes_on_where_it_was() {
    let schema = "CREATE TABLE ints (id bigint PRIMARY KEY, v text)";
    let rows = "INSERT INTO ints SELECT i, 'v' FROM generate_series(1, 20000) i";
    let (bed, applier) = with_rows("backfill_interrupted", schema, rows, "").await;
    let applier = Arc::new(applier);
    let slow = Backfill {
        max_rate: Some(MaxRate::Rows(8_000)),
        ..settings()
    };
    let desk = Desk::new(slow);
    desk.start(&sides(&bed, &applier), &Order::default()).await.unwrap();
    desk.watch()
        .wait_for(|status| status.as_ref().is_some_and(|status| status.counts.read >= 4_000))
        .await
        .unwrap();
    // As if the process were killed: nothing is recorded of it.
    drop(desk);
    let desk = Desk::new(settings());
    desk.look_for_unfinished(&sides(&bed, &applier)).await.unwrap();
    let told = desk.status().unwrap();
    assert_eq!(told.state, "interrupted", "{told:#?}");
    assert!(told.counts.read >= 4_000);
    let new = bed.admin(Side::New).await;
    let marked = "UPDATE ints SET v = 'marked' WHERE id = 1";
    new.batch_execute(&format!("SET session_replication_role = replica; ALTER TABLE ints DISABLE TRIGGER ALL; {marked}; ALTER TABLE ints ENABLE ALWAYS TRIGGER zzz_pgtandem_row; ALTER TABLE ints ENABLE ALWAYS TRIGGER zzz_pgtandem_truncate"))
        .await
        .unwrap();
    let status = backfill(&desk, &sides(&bed, &applier)).await;
    assert_eq!(
        (status.state.as_str(), status.counts.read),
        ("done", 20_000),
        "{status:#?}"
    );
    let found: i64 = new
        .query_one("SELECT count(*) FROM ints WHERE v = 'marked'", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(found, 1, "a range that was done was copied again");
}

/// What cannot be copied is said, also where everything else is.
#[tokio::test]
async fn a_table_that_cannot_be_copied_is_named() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE bare ();";
    let rows = "INSERT INTO t SELECT generate_series(1, 10); INSERT INTO bare DEFAULT VALUES";
    let (bed, applier) = with_rows("backfill_left_out", schema, rows, "").await;
    let applier = Arc::new(applier);
    let status = backfill(&Desk::new(settings()), &sides(&bed, &applier)).await;
    assert_eq!(status.state, "stopped", "{status:#?}");
    let note = status.note.unwrap_or_default();
    assert!(
        note.contains("1 tables cannot be copied; public.bare: it has no column"),
        "{note}"
    );
    assert_eq!(status.counts.written, 10);
}
