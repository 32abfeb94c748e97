//! Existing rows compared and mended at cuts, while a seeded storm writes.

use std::sync::Arc;

use pgtandem::apply::{self, Applier};
use pgtandem::control::{Epoch, Side};
use pgtandem::reconcile::report::{DatabaseReport, DifferenceKind, Event, TableReport, TableResult};
use pgtandem::reconcile::{Chosen, Options, SecondarySnapshot, Sides, VerifyError, repair, verify};
use tokio::sync::mpsc;

use crate::bed::{Bed, caught_up};
use crate::storm::{FIRST_ROWS, SCHEMA, storm};

/// Rows that stay as they are while the storm rages beside them.
const QUIET: &str = "
    CREATE TABLE quiet (id bigint PRIMARY KEY, v text, at timestamptz DEFAULT '2024-02-03 04:05:06.789+02');
    CREATE TABLE worded (k text PRIMARY KEY, v int);
    CREATE TABLE bag (a int, b text);
    CREATE TABLE fine (id int PRIMARY KEY, f float8, n numeric, j jsonb, t timestamptz);
    CREATE TABLE paired (a int, b uuid, v text, PRIMARY KEY (b, a));
    CREATE SEQUENCE counter;";

const QUIET_ROWS: &str = "
    INSERT INTO quiet SELECT g, 'row ' || g FROM generate_series(1, 20000) g;
    INSERT INTO worded SELECT md5(g::text), g FROM generate_series(1, 3000) g;
    INSERT INTO bag SELECT g % 50, 'b' FROM generate_series(1, 2000) g;
    INSERT INTO fine SELECT g, g / 7.0, g / 8.0, jsonb_build_object('g', g), timestamptz '2024-01-01' + g * interval '1 minute' FROM generate_series(1, 500) g;
    INSERT INTO fine VALUES (9001, 'NaN', 'NaN', 'null', 'infinity'), (9002, '-0', '1.0', '1.0', '-infinity'), (9003, NULL, NULL, NULL, NULL);
    INSERT INTO paired SELECT g, md5(g::text)::uuid, CASE WHEN g % 3 > 0 THEN '' END FROM generate_series(1, 1500) g;
    SELECT setval('counter', 500);";

async fn prepared(name: &str) -> (Bed, Arc<Applier>) {
    let bed = Bed::new(name, &format!("{SCHEMA}; {QUIET}")).await;
    bed.install().await;
    let applier = Arc::new(apply::spawn(bed.config()));
    let app = bed.app(Side::Legacy).await;
    app.batch_execute(&format!("{FIRST_ROWS}; {QUIET_ROWS}")).await.unwrap();
    caught_up(&applier).await;
    (bed, applier)
}

fn options() -> Options {
    Options {
        range_rows: 500,
        ..Options::of(Chosen::All)
    }
}

/// Runs what reports by events, and returns its outcome with them.
async fn heard<T>(
    bed: &Bed,
    applier: &Arc<Applier>,
    run: impl AsyncFnOnce(&Sides, mpsc::Sender<Event>) -> Result<T, VerifyError>,
) -> (Result<T, VerifyError>, Vec<Event>) {
    let sides = bed.sides(Side::Legacy, Epoch::FIRST, applier);
    let (sender, mut receiver) = mpsc::channel(8);
    let listen = async {
        let mut events = Vec::new();
        while let Some(event) = receiver.recv().await {
            events.push(event);
        }
        events
    };
    tokio::join!(run(&sides, sender), listen)
}

async fn verified(bed: &Bed, applier: &Arc<Applier>, options: &Options) -> DatabaseReport {
    let (report, _) = heard(bed, applier, async |sides, events| {
        verify(sides, options, &events).await
    })
    .await;
    report.unwrap()
}

async fn repaired(bed: &Bed, applier: &Arc<Applier>) -> DatabaseReport {
    let (report, _) = heard(bed, applier, async |sides, events| {
        repair(sides, &options(), "a test", &events).await
    })
    .await;
    report.unwrap()
}

fn table<'a>(report: &'a DatabaseReport, name: &str) -> &'a TableReport {
    report.tables.iter().find(|table| table.name == name).unwrap()
}

fn assert_equal(report: &DatabaseReport) {
    for table in &report.tables {
        assert_eq!(table.result, TableResult::Equal, "{table:#?}");
    }
    assert!(report.equal, "{:#?}", report.sequences);
}

/// Changes rows of the secondary behind the applier's back.
async fn plant(bed: &Bed, sql: &str) {
    let own = bed.proxy(Side::New).await;
    own.batch_execute(&format!("SET session_replication_role = replica; {sql}"))
        .await
        .unwrap();
}

const PLANTED: &str = "
    DELETE FROM quiet WHERE id IN (1, 777, 20000);
    INSERT INTO quiet VALUES (0, 'extra'), (30001, 'extra');
    UPDATE quiet SET v = 'other' WHERE id IN (500, 501, 12345);
    UPDATE quiet SET at = at + interval '1 microsecond' WHERE id = 4000;
    DELETE FROM worded WHERE v = 17; UPDATE worded SET v = -1 WHERE v = 18; INSERT INTO worded VALUES ('extra', 0);
    DELETE FROM bag WHERE ctid = (SELECT ctid FROM bag WHERE a = 7 LIMIT 1); INSERT INTO bag VALUES (8, 'b'), (8, 'new');
    UPDATE fine SET f = 0 WHERE id = 9001; UPDATE fine SET f = '0' WHERE id = 9002;
    UPDATE fine SET n = 0.50 WHERE id = 4; UPDATE fine SET j = '\"g\"' WHERE id = 5; UPDATE fine SET t = t + interval '1 microsecond' WHERE id = 6;
    UPDATE fine SET n = 0 WHERE id = 9003;
    UPDATE paired SET v = NULL WHERE a = 1; UPDATE paired SET v = '' WHERE a = 3;";

/// One that may not go as far as on the primary, or the applier would set it right before it is
/// found.
async fn assert_found_behind(bed: &Bed, applier: &Arc<Applier>) {
    plant(
        bed,
        "SELECT setval('counter', 400); ALTER SEQUENCE counter MAXVALUE 400",
    )
    .await;
    let report = verified(bed, applier, &options()).await;
    let mut sequences = report.sequences.iter();
    let counter = sequences.find(|sequence| sequence.name == "counter").unwrap();
    assert!(counter.behind && !counter.equal && !report.equal, "{counter:?}");
    plant(bed, "ALTER SEQUENCE counter NO MAXVALUE; SELECT setval('counter', 500)").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_under_a_storm_and_planted_differences_are_found_exactly_and_mended() {
    let (bed, applier) = prepared("verify_storm").await;
    let mut weather = Box::pin(storm(&bed, 7, 120));
    let watch = async {
        for _ in 0..3 {
            assert_equal(&verified(&bed, &applier, &options()).await);
        }
        plant(&bed, PLANTED).await;
        let report = verified(&bed, &applier, &options()).await;
        for (name, missing, extra, different) in [
            ("quiet", 3, 2, 4),
            ("worded", 1, 1, 1),
            ("bag", 1, 2, 0),
            ("fine", 0, 0, 6),
            ("paired", 0, 0, 2),
        ] {
            let found = table(&report, name);
            let counts = (
                found.differing.missing,
                found.differing.extra,
                found.differing.different,
            );
            assert_eq!(counts, (missing, extra, different), "{found:#?}");
            assert_eq!(found.differing.total() as usize, found.differing_rows.len());
        }
        let others = report
            .tables
            .iter()
            .filter(|table| table.result == TableResult::Different)
            .count();
        assert_eq!(others, 5, "only what was planted");
        let rows = &table(&report, "quiet").differing_rows;
        let keys = |kind: DifferenceKind| {
            let mut keys: Vec<&str> = rows
                .iter()
                .filter(|row| row.kind == kind)
                .map(|row| row.key.as_ref().unwrap()[0].as_str())
                .collect();
            keys.sort_unstable();
            keys
        };
        assert_eq!(keys(DifferenceKind::Missing), ["1", "20000", "777"]);
        assert_eq!(keys(DifferenceKind::Extra), ["0", "30001"]);
        assert_eq!(keys(DifferenceKind::Different), ["12345", "4000", "500", "501"]);
        assert_found_behind(&bed, &applier).await;
        assert_equal(&repaired(&bed, &applier).await);
        assert_equal(&verified(&bed, &applier, &options()).await);
    };
    tokio::pin!(watch);
    loop {
        tokio::select! {
            () = &mut watch => break,
            _ = &mut weather => weather = Box::pin(storm(&bed, 8, 120)),
        }
    }
    weather.await;
    bed.assert_same(&applier).await;
    let recorded: i64 = bed
        .admin(Side::New)
        .await
        .query_one(
            "SELECT count(*) FROM pgtandem.mended WHERE actor = 'a test' AND name = 'quiet'",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(recorded, 1);
    let status = applier.status().borrow().clone();
    let quiet = status.tables.iter().find(|table| table.name == "quiet").unwrap();
    assert!(
        quiet.verified.as_ref().is_some_and(|verified| verified.round > 0),
        "{quiet:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secondary_read_at_a_wrong_round_differs() {
    let (bed, applier) = prepared("verify_wrong_round").await;
    let wrong = Options {
        secondary_snapshot: SecondarySnapshot::RoundsLater(3),
        ..options()
    };
    let mut weather = Box::pin(storm(&bed, 9, 200));
    let report = tokio::select! {
        report = verified(&bed, &applier, &wrong) => report,
        _ = &mut weather => panic!("the storm ended first"),
    };
    weather.await;
    assert!(
        !report.equal,
        "the verification cannot tell a wrong snapshot from a right one"
    );
    bed.assert_same(&applier).await;
}

/// Tables that are not alike on both sides though they hold the same rows, and keys whose order is
/// not known to be the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_column_orders_generated_columns_and_unordered_keys() {
    let bed = Bed::new(
        "verify_shapes",
        "CREATE TABLE odd (k int[] PRIMARY KEY, v text);
         CREATE TABLE bare ();
         CREATE TABLE wide (id int PRIMARY KEY);
         DO $$ BEGIN FOR i IN 1..150 LOOP EXECUTE format('ALTER TABLE wide ADD c%s text', i); END LOOP; END $$",
    )
    .await;
    for (side, columns) in [
        (
            Side::Legacy,
            "id int, a text, b int GENERATED ALWAYS AS (id * 2) STORED, c name",
        ),
        (
            Side::New,
            "c name, b int GENERATED ALWAYS AS (id * 2) STORED, a text, id int",
        ),
    ] {
        bed.app(side)
            .await
            .batch_execute(&format!(
                "CREATE TABLE turned ({columns}, PRIMARY KEY (id)); CREATE TABLE turned_bag ({columns})"
            ))
            .await
            .unwrap();
    }
    bed.install().await;
    let applier = Arc::new(apply::spawn(bed.config()));
    bed.app(Side::Legacy)
        .await
        .batch_execute(
            "INSERT INTO odd SELECT ARRAY[g, g % 7], 'v' FROM generate_series(1, 3000) g;
             INSERT INTO bare SELECT FROM generate_series(1, 5);
             INSERT INTO wide (id, c1, c150) SELECT g, 'x', E'\\x1F' FROM generate_series(1, 300) g;
             INSERT INTO turned (id, a, c) SELECT g, CASE WHEN g % 2 = 0 THEN '' END, 'c' FROM generate_series(1, 3000) g;
             INSERT INTO turned_bag (id, a, c) SELECT g % 100, 'a', 'c' FROM generate_series(1, 3000) g",
        )
        .await
        .unwrap();
    caught_up(&applier).await;
    assert_equal(&verified(&bed, &applier, &options()).await);

    plant(
        &bed,
        "UPDATE odd SET v = 'w' WHERE k = '{5,5}'; DELETE FROM odd WHERE k = '{6,6}'; INSERT INTO odd VALUES ('{}', NULL);
         DELETE FROM bare WHERE ctid = (SELECT ctid FROM bare LIMIT 1);
         UPDATE wide SET c75 = '' WHERE id = 7; UPDATE wide SET c149 = c150, c150 = NULL WHERE id = 8;
         UPDATE turned SET a = '' WHERE id = 1; UPDATE turned SET a = NULL WHERE id = 2; UPDATE turned SET id = 9000 WHERE id = 3;
         UPDATE turned_bag SET a = 'b' WHERE ctid = (SELECT ctid FROM turned_bag LIMIT 1)",
    )
    .await;
    let report = verified(&bed, &applier, &options()).await;
    for (name, missing, extra, different) in [
        ("odd", 1, 1, 1),
        ("bare", 1, 0, 0),
        ("wide", 0, 0, 2),
        ("turned", 1, 1, 2),
        ("turned_bag", 1, 1, 0),
    ] {
        let found = table(&report, name).differing;
        assert_eq!(
            (found.missing, found.extra, found.different),
            (missing, extra, different),
            "{name}"
        );
    }
    assert_equal(&repaired(&bed, &applier).await);
    bed.assert_same(&applier).await;
}
