//! What no trigger and no proxy sees: DDL past the proxy, and crashes that empty unlogged tables.

use pgtandem::admin::api::{HealAnswer, HealRequest, Mirroring, Status, TableStatus};
use pgtandem::control::{Phase, Side};
use pgtandem::servers::{Binaries, SUPERUSER};

use crate::bench::{as_app, assert_identical};
use crate::rig::storm::{self, Storm};
use crate::rig::{OWN_ROLE, Rig};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_either_server_empties_unlogged_tables() {
    let mut rig = Rig::serving(Phase::DualWrite).await;
    rig.run(
        "CREATE UNLOGGED TABLE u (id serial PRIMARY KEY, t text); CREATE TABLE logged (id int);
             INSERT INTO u (t) SELECT 'before' FROM generate_series(1, 100); INSERT INTO logged VALUES (1)",
    )
    .await;
    assert_identical(&rig).await;
    rig.legacy.stop("immediate").unwrap();
    rig.legacy.start_again().unwrap();
    let client = rig
        .client_after("INSERT INTO u (t) VALUES ('after'); INSERT INTO logged VALUES (2)")
        .await;
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
    let client = rig
        .client_after("CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a VALUES (1)")
        .await;
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
    let is_paused = |table: &&TableStatus| table.paused.is_some();
    rig.until(|status| mirroring(status).tables.iter().filter(is_paused).count() == 3)
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
    let is_synced = |table: &TableStatus| table.seeding == "synced";
    rig.until(|status| mirroring(status).tables.iter().all(is_synced)).await;
    client
        .batch_execute("UPDATE a SET at = now(); UPDATE b SET d = now()")
        .await
        .unwrap();
    assert_identical(&rig).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_objects_are_named_as_not_mirrored() {
    let rig = Rig::serving(Phase::DualWrite).await;
    rig.run("SELECT lo_from_bytea(0, 'x')").await;
    let is_told = |what: &String| what.contains("large objects");
    rig.until(|status| mirroring(status).not_mirrored.iter().any(is_told))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn materialized_views_of_the_moment_are_named() {
    let rig = Rig::serving(Phase::DualWrite).await;
    rig.run(
        "CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a VALUES (1), (2);
             CREATE MATERIALIZED VIEW steady AS SELECT count(*) FROM a; CREATE VIEW via AS SELECT id, random() AS r FROM a;
             CREATE MATERIALIZED VIEW chance AS SELECT * FROM via; CREATE MATERIALIZED VIEW first AS SELECT id FROM a LIMIT 1",
    )
    .await;
    let status = rig
        .until(|status| {
            mirroring(status)
                .not_mirrored
                .iter()
                .filter(|what| what.contains("materialized view"))
                .count()
                == 2
        })
        .await;
    let told = mirroring(&status).not_mirrored.join("\n");
    assert!(told.contains("public.chance") && told.contains("volatile"), "{told}");
    assert!(
        told.contains("public.first") && told.contains("LIMIT without ORDER BY"),
        "{told}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_direct_connections_ddl_is_mirrored_where_event_triggers_may_be() {
    let rig = Rig::serving_as_superuser(Phase::DualWrite).await;
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
    let once =
        "CREATE TABLE once (id serial); INSERT INTO once DEFAULT VALUES; CREATE TEMP TABLE t (id int); DROP TABLE t";
    let client = rig.client_after(once).await;
    client
        .batch_execute("CREATE INDEX CONCURRENTLY ON once (id)")
        .await
        .unwrap();
    assert_identical(&rig).await;
    // What has no text of its own is mirrored by what it left.
    direct
        .batch_execute("DO $$ BEGIN ALTER TABLE c ADD COLUMN hidden int; END $$; ALTER TABLE c ADD COLUMN other int DEFAULT 4; INSERT INTO c (id) VALUES (12)")
        .await
        .unwrap();
    assert_identical(&rig).await;
}

fn mirroring(status: &Status) -> &Mirroring {
    status.databases[0].mirroring.as_ref().unwrap()
}

/// What nobody sees, of every kind, in blocks, in a function, and by a direct connection.
const HIDDEN: [&str; 3] = [
    "DO $$ BEGIN
        ALTER TABLE a ADD COLUMN more int NOT NULL DEFAULT 7; ALTER TABLE a ALTER COLUMN v TYPE int USING length(v);
        INSERT INTO a (id, v) SELECT g, g FROM generate_series(100, 110) g; ALTER TABLE a DROP COLUMN gone; ALTER TABLE a RENAME COLUMN old TO fresh;
        CREATE TABLE made (id serial PRIMARY KEY, at timestamptz DEFAULT clock_timestamp()); INSERT INTO made (at) SELECT now() FROM generate_series(1, 20);
        DROP TABLE dropped; CREATE TABLE copied AS SELECT id, random() AS r FROM a; CREATE INDEX ON a (more); DROP INDEX a_v;
     END $$",
    "SELECT run_ddl($$ CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TABLE typed (m mood, n numeric); INSERT INTO typed VALUES ('ok', 1.5);
        CREATE VIEW seen AS SELECT id, more FROM a; CREATE FUNCTION f(x int) RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN x; END';
        COMMENT ON FUNCTION f(int) IS 'new'; GRANT SELECT ON seen TO reader; DROP VIEW unseen; ALTER TABLE b ADD CHECK (id > 0) $$)",
    "CALL act()",
];

const BEFORE: &str = "CREATE TABLE a (id int PRIMARY KEY, v text, gone int, old text); CREATE INDEX a_v ON a (v); INSERT INTO a SELECT g, repeat('x', g) FROM generate_series(1, 50) g;
    CREATE TABLE b (id serial PRIMARY KEY); INSERT INTO b DEFAULT VALUES; CREATE TABLE dropped (id int); CREATE VIEW unseen AS SELECT id FROM b;
    CREATE FUNCTION run_ddl(text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE $1; END $$;
    CREATE PROCEDURE act() LANGUAGE plpgsql AS $$ BEGIN ALTER TABLE b ADD COLUMN c text DEFAULT 'c'; COMMIT; INSERT INTO b (c) VALUES ('d');
        CREATE TABLE parts (id int) PARTITION BY LIST (id); CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1); INSERT INTO parts VALUES (1); END $$";

async fn hidden_ddl(new: &Binaries, attributes: &str) -> Rig {
    let mut rig = Rig::between(&Binaries::legacy().unwrap(), new);
    let alter = format!("ALTER ROLE {OWN_ROLE} LOGIN {attributes}; CREATE ROLE reader");
    rig.on_both("postgres", &alter);
    rig.serve(Phase::DualWrite).await;
    let client = rig.client_after(BEFORE).await;
    assert_identical(&rig).await;
    for statement in HIDDEN {
        client.batch_execute(statement).await.unwrap();
    }
    let direct = as_app(&rig, Side::Legacy).await;
    direct
        .batch_execute("ALTER TABLE b ADD COLUMN direct float8; UPDATE b SET direct = 0.1")
        .await
        .unwrap();
    client
        .batch_execute("UPDATE a SET more = id WHERE id < 10; DELETE FROM b WHERE id = 1")
        .await
        .unwrap();
    rig
}

/// `schema heal`, of everything.
async fn heal(rig: &Rig) -> HealAnswer {
    let request = HealRequest::default();
    rig.admin().post("/api/v1/schema/heal", &request).await.unwrap()
}

async fn heals(new: &Binaries) {
    let rig = hidden_ddl(new, "").await;
    rig.until(|status| {
        !mirroring(status).different.is_empty() && mirroring(status).tables.iter().any(|table| table.paused.is_some())
    })
    .await;
    let gate = rig.status().await.unwrap().gates;
    let gate = gate.iter().find(|gate| gate.name == "shop: definitions").unwrap();
    assert!(!gate.open && gate.measured.contains("schema heal"), "{gate:?}");
    let told = rig.command(&["status"]);
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(text.contains("pgtandem schema heal --table public.a"), "{text}");
    assert!(
        text.contains("function public.f(x integer)") || text.contains("defined otherwise on the secondary"),
        "{text}"
    );
    rig.check(&["schema", "diff"], 1, "");
    let dry = rig.command(&["schema", "heal", "--dry-run", "--json"]);
    let dry: HealAnswer = serde_json::from_slice(&dry.stdout).unwrap();
    assert!(!dry.databases["shop"].statements.is_empty());
    rig.check(&["schema", "heal", "--json"], 0, "");
    assert_identical(&rig).await;
    rig.run("UPDATE a SET more = 0; INSERT INTO made DEFAULT VALUES; INSERT INTO typed VALUES ('sad', 2)")
        .await;
    assert_identical(&rig).await;
    rig.until(|status| {
        let mut gates = status.gates.iter();
        mirroring(status).different.is_empty() && gates.any(|gate| gate.name == "shop: definitions" && gate.open)
    })
    .await;
    // What the trigger of no kind tells apart from something new: another name.
    let direct = as_app(&rig, Side::Legacy).await;
    direct
        .batch_execute("ALTER TYPE mood RENAME TO feeling; ALTER VIEW seen RENAME TO looked; ALTER TABLE made RENAME TO done; ALTER TABLE done RENAME COLUMN at TO since")
        .await
        .unwrap();
    rig.check(&["schema", "heal", "--json"], 0, "");
    assert_identical(&rig).await;
    let again = heal(&rig).await;
    assert!(again.done && again.databases["shop"].statements.is_empty(), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_command_heals_what_nobody_saw_from_15_to_18() {
    heals(&Binaries::new_side().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_command_heals_what_nobody_saw_from_15_to_15() {
    heals(&Binaries::legacy().unwrap()).await;
}

/// DDL by a direct connection in the middle of a storm, and the command in the middle of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn healing_in_a_storm_ends_identical() {
    let rig = Rig::serving(Phase::DualWrite).await;
    rig.run(storm::SCHEMA).await;
    assert_identical(&rig).await;
    let storm = Storm::begin(&rig.url(), 1511, 4, false).await;
    let direct = as_app(&rig, Side::Legacy).await;
    for ddl in [
        "ALTER TABLE accounts ADD COLUMN extra int NOT NULL DEFAULT 3",
        "ALTER TABLE names ADD COLUMN length int GENERATED ALWAYS AS (length(name)) STORED",
        "ALTER TABLE notes ALTER COLUMN note TYPE varchar(2000)",
        "CREATE TABLE late AS SELECT id, balance FROM accounts",
        "ALTER TABLE audit ADD COLUMN at timestamptz DEFAULT clock_timestamp()",
    ] {
        direct.batch_execute(ddl).await.unwrap();
        storm.rage(30).await;
        let healed = heal(&rig).await;
        assert!(!healed.databases["shop"].statements.is_empty(), "{ddl}: {healed:?}");
    }
    let ledger = storm.end().await;
    assert!(ledger.failures.is_empty(), "{:?}", ledger.failures);
    assert_identical(&rig).await;
}

/// With event triggers nothing has to be healed.
async fn mirrors(new: &Binaries) {
    let rig = hidden_ddl(new, "SUPERUSER").await;
    assert_identical(&rig).await;
    let client = rig.client().await;
    for block in [
        "ALTER TABLE a RENAME TO z; ALTER TABLE z RENAME COLUMN v TO w; INSERT INTO z (id, w) VALUES (1000, 1); CREATE SCHEMA s; ALTER TABLE z SET SCHEMA s; UPDATE s.z SET w = 2 WHERE id = 1000",
        "ALTER TYPE mood ADD VALUE 'late'; COMMENT ON TABLE b IS 'b'; GRANT INSERT ON b TO reader; GRANT UPDATE (c) ON b TO reader",
        "CREATE TEMP TABLE mine (id int); ALTER TABLE mine ADD COLUMN x int; DROP TABLE mine",
        "CREATE MATERIALIZED VIEW mv AS SELECT count(*) FROM b; INSERT INTO b DEFAULT VALUES; REFRESH MATERIALIZED VIEW mv",
        "ALTER TABLE parts DETACH PARTITION parts_1; CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2); INSERT INTO parts VALUES (2); ALTER TABLE parts ADD COLUMN note text DEFAULT 'n'",
        "ALTER TABLE b ALTER COLUMN c TYPE varchar(10); ALTER TABLE b ADD COLUMN r float8 DEFAULT random(); ALTER TABLE b DROP COLUMN direct CASCADE; DROP VIEW seen CASCADE",
        "DROP FUNCTION f(int); DROP TABLE typed; DROP TYPE mood; DROP SCHEMA s CASCADE",
    ] {
        client
            .batch_execute(&format!("DO $do$ BEGIN {block}; END $do$"))
            .await
            .unwrap();
        client.batch_execute("INSERT INTO b DEFAULT VALUES").await.unwrap();
        assert_identical(&rig).await;
    }
    // Rolled back, it never was.
    client
        .batch_execute("DO $$ BEGIN BEGIN ALTER TABLE b ADD COLUMN gone int; RAISE 'no'; EXCEPTION WHEN OTHERS THEN NULL; END; ALTER TABLE b ADD COLUMN kept int; END $$")
        .await
        .unwrap();
    assert_identical(&rig).await;
    let status = rig.status().await.unwrap();
    assert!(mirroring(&status).different.is_empty(), "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_superuser_sees_what_is_hidden_from_15_to_18() {
    mirrors(&Binaries::new_side().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_superuser_sees_what_is_hidden_from_15_to_15() {
    mirrors(&Binaries::legacy().unwrap()).await;
}

/// The same storm where event triggers may be: nothing has to be healed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_superuser_sees_what_is_hidden_in_a_storm() {
    let rig = Rig::serving_as_superuser(Phase::DualWrite).await;
    rig.run(storm::SCHEMA).await;
    let storm = Storm::begin(&rig.url(), 1512, 4, false).await;
    let direct = as_app(&rig, Side::Legacy).await;
    for block in [
        "ALTER TABLE accounts ADD COLUMN extra int NOT NULL DEFAULT 3; UPDATE accounts SET extra = id",
        "ALTER TABLE notes ALTER COLUMN note TYPE varchar(2000)",
        "CREATE TABLE late AS SELECT id, balance FROM accounts; CREATE INDEX ON late (id)",
        "ALTER TABLE audit ADD COLUMN at timestamptz DEFAULT clock_timestamp()",
        "DROP TABLE late; ALTER TABLE accounts RENAME COLUMN extra TO more",
    ] {
        let ddl = format!("DO $do$ BEGIN {block}; END $do$");
        direct.batch_execute(&ddl).await.unwrap();
        storm.rage(30).await;
    }
    let ledger = storm.end().await;
    assert!(ledger.failures.is_empty(), "{:?}", ledger.failures);
    assert_identical(&rig).await;
}

/// DDL on the side that is not the primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ddl_on_the_secondary_is_refused_where_event_triggers_may_be() {
    let mut rig = Rig::serving_as_superuser(Phase::DualWrite).await;
    let client = rig.client().await;
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE FUNCTION make() RETURNS void LANGUAGE plpgsql AS 'BEGIN CREATE TABLE made (); END'";
    client.batch_execute(schema).await.unwrap();
    assert_identical(&rig).await;
    let text = rig.command(&["check"]);
    assert!(!String::from_utf8_lossy(&text.stdout).contains("DDL past the proxy"));
    for to in [Side::New, Side::Legacy] {
        refuses_ddl(&rig, to).await;
        rig.check(&["switchover", "--to", &to.to_string()], 0, "switchover to");
    }
    // The primary takes DDL by any way, and the secondary follows.
    let direct = as_app(&rig, Side::Legacy).await;
    direct.batch_execute("ALTER TABLE t ADD COLUMN w int").await.unwrap();
    rig.client()
        .await
        .batch_execute("ALTER TABLE t ADD COLUMN x int")
        .await
        .unwrap();
    assert_identical(&rig).await;
    // By hand, a DBA may, and pgtandem can be removed.
    let dba = rig.direct(Side::New, SUPERUSER).await;
    dba.batch_execute("SET session_replication_role = replica; CREATE TABLE by_hand (); DROP TABLE by_hand; SET session_replication_role = origin")
        .await
        .unwrap();
    rig.kill_proxy();
    dba.batch_execute("DROP SCHEMA pgtandem CASCADE; CREATE TABLE by_hand ()")
        .await
        .unwrap();
}

async fn refuses_ddl(rig: &Rig, secondary: Side) {
    for role in [crate::rig::APP, SUPERUSER] {
        let direct = rig.direct(secondary, role).await;
        for sql in [
            "CREATE TABLE x (id int)",
            "CREATE TABLE x AS SELECT 1",
            "SELECT 1 AS one INTO x",
            "ALTER TABLE t ADD COLUMN w int",
            "ALTER TABLE t DISABLE TRIGGER USER",
            "DROP TABLE t",
            "CREATE INDEX CONCURRENTLY ON t (v)",
            "CREATE VIEW w AS SELECT 1",
            "CREATE SCHEMA s",
            "GRANT SELECT ON t TO PUBLIC",
            "COMMENT ON TABLE t IS 'x'",
            "DROP FUNCTION make()",
            "SELECT make()",
            "DO $$ BEGIN EXECUTE 'CREATE TYPE e AS ENUM ()'; END $$",
        ] {
            let refused = direct.batch_execute(sql).await.unwrap_err();
            let error = refused.as_db_error().unwrap();
            assert_eq!(error.code().code(), "25006", "{secondary} {role} {sql}: {error:?}");
            let says = format!("DDL goes to the primary ({})", secondary.other());
            assert!(error.message().contains(&says), "{error:?}");
        }
        // What stays in the session, or is of this server only, is nobody's business.
        direct
            .batch_execute("CREATE TEMP TABLE mine (id serial PRIMARY KEY); ALTER TABLE mine ADD COLUMN v text; CREATE INDEX ON mine (v); DROP TABLE mine; CREATE TEMP VIEW w AS SELECT 1; DROP VIEW w; CREATE TEMP TABLE u AS SELECT 1; ANALYZE t")
            .await
            .unwrap();
    }
}

/// Elsewhere it is found by comparing the catalogs; `check` says so beforehand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ddl_on_the_secondary_is_found_where_event_triggers_may_not_be() {
    let rig = Rig::serving(Phase::DualWrite).await;
    rig.run("CREATE TABLE t (id int PRIMARY KEY, v text)").await;
    assert_identical(&rig).await;
    rig.check(&["check"], 0, "on legacy and new DDL past the proxy is not refused");
    let direct = as_app(&rig, Side::New).await;
    direct.batch_execute("CREATE INDEX stray ON t (v)").await.unwrap();
    let different = |status: &Status| mirroring(status).different.clone();
    rig.until(|status| different(status).iter().any(|object| object.contains("stray")))
        .await;
    rig.check(&["switchover", "--to", "new", "--dry-run"], 1, "stray");
    direct.batch_execute("DROP INDEX stray").await.unwrap();
    rig.until(|status| different(status).is_empty()).await;
    rig.check(&["switchover", "--to", "new", "--dry-run"], 0, "the flip could begin");
}
