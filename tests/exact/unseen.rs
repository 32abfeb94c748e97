//! What no trigger and no proxy sees: DDL past the proxy, and crashes that empty unlogged tables.

use pgtandem::control::{Phase, Side};

use crate::bench::{as_app, assert_identical};
use crate::rig::Rig;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_either_server_empties_unlogged_tables() {
    let mut rig = Rig::serving(Phase::DualWrite).await;
    let client = rig.client().await;
    client
        .batch_execute(
            "CREATE UNLOGGED TABLE u (id serial PRIMARY KEY, t text); CREATE TABLE logged (id int);
             INSERT INTO u (t) SELECT 'before' FROM generate_series(1, 100); INSERT INTO logged VALUES (1)",
        )
        .await
        .unwrap();
    assert_identical(&rig).await;
    rig.legacy.stop("immediate").unwrap();
    rig.legacy.start_again().unwrap();
    let client = rig.client().await;
    client
        .batch_execute("INSERT INTO u (t) VALUES ('after'); INSERT INTO logged VALUES (2)")
        .await
        .unwrap();
    assert_identical(&rig).await;
    assert_eq!(rig.value(Side::New, "SELECT string_agg(t, ',') FROM u").await, "after");
    rig.new.stop("immediate").unwrap();
    client.batch_execute("INSERT INTO u (t) VALUES ('more')").await.unwrap();
    rig.new.start_again().unwrap();
    assert_identical(&rig).await;
    assert_eq!(
        rig.value(Side::New, "SELECT string_agg(t, ',' ORDER BY id) FROM u")
            .await,
        "after,more"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ddl_past_the_proxy_pauses_a_table_until_it_came_to_both_sides() {
    let rig = Rig::serving(Phase::DualWrite).await;
    let client = rig.client().await;
    client
        .batch_execute("CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a VALUES (1)")
        .await
        .unwrap();
    assert_identical(&rig).await;
    // In a block, a function, and by a direct connection.
    client
        .batch_execute(
            "DO $$ BEGIN ALTER TABLE a ADD COLUMN at timestamptz; CREATE TABLE b (id int PRIMARY KEY, d date); END $$",
        )
        .await
        .unwrap();
    as_app(&rig, Side::Legacy)
        .await
        .batch_execute("CREATE TABLE c (v float8)")
        .await
        .unwrap();
    client
        .batch_execute(
            "SET timezone = 'Asia/Tokyo'; SET datestyle = 'German'; INSERT INTO a VALUES (2, now()); INSERT INTO b VALUES (1, now());
             INSERT INTO c VALUES (0.1)",
        )
        .await
        .unwrap();
    rig.until(|status| {
        let mirroring = status.databases[0].mirroring.as_ref();
        mirroring.is_some_and(|mirroring| mirroring.tables.iter().filter(|table| table.paused.is_some()).count() == 3)
    })
    .await;
    // The same on the other side; the rows follow by themselves.
    as_app(&rig, Side::New)
        .await
        .batch_execute("ALTER TABLE a ADD COLUMN at timestamptz; CREATE TABLE b (id int PRIMARY KEY, d date); CREATE TABLE c (v float8)")
        .await
        .unwrap();
    client
        .batch_execute("UPDATE a SET at = at + interval '1 day'; DELETE FROM c; INSERT INTO c VALUES (0.2), (0.2)")
        .await
        .unwrap();
    rig.until(|status| {
        let mirroring = status.databases[0].mirroring.as_ref();
        mirroring.is_some_and(|mirroring| mirroring.tables.iter().all(|table| table.seeding == "synced"))
    })
    .await;
    client
        .batch_execute("UPDATE a SET at = now(); UPDATE b SET d = now()")
        .await
        .unwrap();
    assert_identical(&rig).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_objects_are_named_as_not_mirrored() {
    let rig = Rig::serving(Phase::DualWrite).await;
    let client = rig.client().await;
    client.batch_execute("SELECT lo_from_bytea(0, 'x')").await.unwrap();
    rig.until(|status| {
        let mirroring = status.databases[0].mirroring.as_ref();
        mirroring.is_some_and(|mirroring| mirroring.not_mirrored.iter().any(|what| what.contains("large objects")))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_direct_connections_ddl_is_mirrored_where_event_triggers_may_be() {
    let mut rig = Rig::new();
    for side in [Side::Legacy, Side::New] {
        rig.server(side)
            .sql("postgres", "ALTER ROLE pgtandem SUPERUSER")
            .unwrap();
    }
    rig.serve(Phase::DualWrite).await;
    let direct = as_app(&rig, Side::Legacy).await;
    for statement in [
        "CREATE TABLE a (id int PRIMARY KEY, v text DEFAULT 'x;y')",
        "INSERT INTO a SELECT generate_series(1, 10)",
        "ALTER TABLE a ADD COLUMN r float8 DEFAULT random()",
        "CREATE INDEX ON a (v)",
        "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN 1; END $$",
        "CREATE TABLE b AS SELECT random() AS r FROM generate_series(1, 5)",
        "COMMENT ON TABLE a IS 'it''s; commented'",
        "CREATE TEMP TABLE t (id int)",
        "ALTER TABLE t ADD COLUMN x int",
        "DROP TABLE t",
        "DROP TABLE b;",
        "BEGIN",
        "ALTER TABLE a RENAME TO c",
        "INSERT INTO c VALUES (11)",
        "COMMIT",
        "ALTER TABLE c DROP COLUMN v",
    ] {
        direct.batch_execute(statement).await.unwrap();
    }
    // What comes through the proxy is recorded once.
    let client = rig.client().await;
    client
        .batch_execute(
            "CREATE TABLE once (id serial); INSERT INTO once DEFAULT VALUES; CREATE TEMP TABLE t (id int); DROP TABLE t",
        )
        .await
        .unwrap();
    client
        .batch_execute("CREATE INDEX CONCURRENTLY ON once (id)")
        .await
        .unwrap();
    assert_identical(&rig).await;
    // Inside something else it is not this trigger's: the table is paused, as everywhere.
    direct
        .batch_execute("DO $$ BEGIN ALTER TABLE c ADD COLUMN hidden int; END $$")
        .await
        .unwrap();
    rig.until(|status| {
        let mirroring = status.databases[0].mirroring.as_ref();
        mirroring.is_some_and(|mirroring| mirroring.tables.iter().any(|table| table.paused.is_some()))
    })
    .await;
}
