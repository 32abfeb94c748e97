//! Before a migration begins, on real servers through the built binary: what `check` finds and
//! finds no more, and schemas brought over by `schema copy`, rows in between.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod rig;
#[path = "check/transform.rs"]
mod transform;

use std::time::Duration;

use pgtandem::control::{Phase, Side};
use pgtandem::servers::{Binaries, SUPERUSER};
use rig::storm::{SCHEMA, Storm, Weather};
use rig::{APP, OWN_ROLE, Rig, printed};
use serde_json::Value;

/// The findings of `check --json` that are not fine: level, id and subject.
fn findings(rig: &Rig) -> Vec<(String, String, String)> {
    let output = rig.command(&["check", "--json"]);
    let reports: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", printed(&output)));
    let found = reports[0]["findings"].as_array().unwrap();
    let word = |finding: &Value, field: &str| finding[field].as_str().unwrap().to_owned();
    let found: Vec<_> = found
        .iter()
        .filter(|finding| finding["level"] != "fine")
        .map(|finding| (word(finding, "level"), word(finding, "id"), word(finding, "subject")))
        .collect();
    let blocks = found.iter().any(|(level, ..)| level == "blocks");
    assert_eq!(output.status.code(), Some(i32::from(blocks)), "{found:?}");
    found
}

struct Case {
    level: &'static str,
    id: &'static str,
    subject: &'static str,
    /// Planted as a DBA on legacy, on new; and mended there.
    plant: [&'static str; 2],
    mend: [&'static str; 2],
}

const fn case(
    level: &'static str,
    id: &'static str,
    subject: &'static str,
    plant: [&'static str; 2],
    mend: [&'static str; 2],
) -> Case {
    Case {
        level,
        id,
        subject,
        plant,
        mend,
    }
}

const CASES: &[Case] = &[
    case(
        "blocks",
        "role.replica",
        OWN_ROLE,
        ["", "REVOKE SET ON PARAMETER session_replication_role FROM pgtandem"],
        ["", "GRANT SET ON PARAMETER session_replication_role TO pgtandem"],
    ),
    case(
        "blocks",
        "role.create",
        OWN_ROLE,
        [
            "ALTER DATABASE shop OWNER TO postgres; REVOKE CREATE ON DATABASE shop FROM pgtandem",
            "",
        ],
        [
            "ALTER DATABASE shop OWNER TO app; GRANT CREATE ON DATABASE shop TO pgtandem",
            "",
        ],
    ),
    case(
        "blocks",
        "role.ownership",
        APP,
        ["REVOKE app FROM pgtandem", ""],
        ["GRANT app TO pgtandem", ""],
    ),
    case(
        "blocks",
        "role.client",
        APP,
        ["", "ALTER ROLE app NOLOGIN"],
        ["", "ALTER ROLE app LOGIN"],
    ),
    case(
        "blocks",
        "role.missing",
        "reader",
        ["CREATE ROLE reader; GRANT SELECT ON t TO reader", ""],
        ["DROP OWNED BY reader; DROP ROLE reader", ""],
    ),
    case(
        "blocks",
        "table.missing",
        "public.alone",
        ["CREATE TABLE alone (id int PRIMARY KEY)", ""],
        ["DROP TABLE alone", ""],
    ),
    case(
        "blocks",
        "table.columns",
        "public.t",
        ["", "ALTER TABLE t ALTER v TYPE varchar(9)"],
        ["", "ALTER TABLE t ALTER v TYPE text"],
    ),
    case(
        "blocks",
        "table.row_security",
        "public.t",
        ["ALTER TABLE t ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY", ""],
        [
            "ALTER TABLE t DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY",
            "",
        ],
    ),
    case(
        "blocks",
        "server.read_only",
        "",
        ["", "ALTER DATABASE shop SET default_transaction_read_only = on"],
        [
            "",
            "SET default_transaction_read_only = off; ALTER DATABASE shop RESET default_transaction_read_only",
        ],
    ),
    case(
        "blocks",
        "connections",
        "",
        ["", "ALTER ROLE pgtandem CONNECTION LIMIT 3"],
        ["", "ALTER ROLE pgtandem CONNECTION LIMIT -1"],
    ),
    case(
        "warns",
        "timezone",
        "TimeZone",
        ["", "ALTER DATABASE shop SET TimeZone = 'Asia/Tokyo'"],
        ["", "ALTER DATABASE shop RESET TimeZone"],
    ),
    case(
        "warns",
        "setting",
        "IntervalStyle",
        ["", "ALTER DATABASE shop SET IntervalStyle = iso_8601"],
        ["", "ALTER DATABASE shop RESET IntervalStyle"],
    ),
    case(
        "warns",
        "extension.extra",
        "plpgsql",
        ["DROP EXTENSION plpgsql", ""],
        ["CREATE EXTENSION plpgsql", ""],
    ),
    case(
        "blocks",
        "extension.missing",
        "plpgsql",
        ["", "DROP EXTENSION plpgsql"],
        ["", "CREATE EXTENSION plpgsql"],
    ),
    case(
        "warns",
        "table.key",
        "public.loose",
        ["CREATE TABLE loose (v int)", ""],
        ["DROP TABLE loose", ""],
    ),
    case(
        "warns",
        "table.unlogged",
        "public.t",
        ["ALTER TABLE t SET UNLOGGED", ""],
        ["ALTER TABLE t SET LOGGED", ""],
    ),
    case(
        "warns",
        "table.trigger",
        "public.t",
        [
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END'; CREATE TRIGGER tr BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION note(); ALTER TABLE t ENABLE ALWAYS TRIGGER tr",
            "",
        ],
        ["DROP TRIGGER tr ON t; DROP FUNCTION note()", ""],
    ),
    case(
        "warns",
        "table.rule",
        "public.t",
        [
            "CREATE RULE r AS ON DELETE TO t DO ALSO NOTHING; ALTER TABLE t ENABLE ALWAYS RULE r",
            "",
        ],
        ["DROP RULE r ON t", ""],
    ),
    case(
        "warns",
        "table.foreign",
        "public.far",
        [
            "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER far FOREIGN DATA WRAPPER w; CREATE FOREIGN TABLE far (id int) SERVER far",
            "",
        ],
        ["DROP FOREIGN DATA WRAPPER w CASCADE", ""],
    ),
    case(
        "warns",
        "sequence.cycles",
        "public.s",
        ["ALTER SEQUENCE s CYCLE", ""],
        ["ALTER SEQUENCE s NO CYCLE", ""],
    ),
    case(
        "warns",
        "sequence.end",
        "public.s",
        ["SELECT setval('s', 95)", ""],
        ["SELECT setval('s', 5)", ""],
    ),
    case(
        "warns",
        "large_objects",
        "",
        ["SELECT lo_create(4711)", ""],
        ["SELECT lo_unlink(4711)", ""],
    ),
    case(
        "warns",
        "event_trigger",
        "watch",
        [
            "CREATE FUNCTION seen() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; CREATE EVENT TRIGGER watch ON ddl_command_end EXECUTE FUNCTION seen()",
            "",
        ],
        ["DROP EVENT TRIGGER watch; DROP FUNCTION seen()", ""],
    ),
    case(
        "warns",
        "definitions",
        "index",
        ["CREATE INDEX by_v ON t (v)", ""],
        ["DROP INDEX by_v", ""],
    ),
    case(
        "warns",
        "definitions",
        "trigger",
        [
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END'; CREATE TRIGGER tr BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION note()",
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END'",
        ],
        ["DROP FUNCTION note() CASCADE", "DROP FUNCTION note()"],
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_finding_has_a_cause_and_goes_with_it() {
    let rig = Rig::new();
    rig.write_config(Phase::Initial);
    rig.check(&["check"], 0, "nothing blocks");
    for side in [Side::Legacy, Side::New] {
        let client = rig.direct(side, APP).await;
        let schema = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE SEQUENCE s MAXVALUE 100";
        client.batch_execute(schema).await.unwrap();
    }
    let before = findings(&rig);
    assert!(before.iter().all(|(level, ..)| level != "blocks"), "{before:?}");
    let plant = |statements: [&str; 2]| {
        for (side, sql) in [Side::Legacy, Side::New].into_iter().zip(statements) {
            rig.server(side)
                .sql("shop", sql)
                .unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
    };
    let mut problems = Vec::new();
    for case in CASES {
        plant(case.plant);
        let found = findings(&rig);
        let wanted = (case.level.to_owned(), case.id.to_owned(), case.subject.to_owned());
        if !found.contains(&wanted) {
            problems.push(format!("{wanted:?} is not found: {found:?}"));
        }
        plant(case.mend);
        let after = findings(&rig);
        if after != before {
            problems.push(format!("{wanted:?} mended, and still: {after:?} instead of {before:?}"));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_statements_mend_what_blocks() {
    let rig = Rig::new();
    rig.write_config(Phase::Initial);
    let create = "CREATE TABLE t (id int PRIMARY KEY, v text)";
    rig.direct(Side::Legacy, APP).await.batch_execute(create).await.unwrap();
    let spoil = "CREATE ROLE reader; GRANT SELECT ON t TO reader; REVOKE app FROM pgtandem";
    rig.legacy.sql("shop", spoil).unwrap();
    let revoke = "REVOKE SET ON PARAMETER session_replication_role FROM pgtandem";
    rig.new.sql("shop", revoke).unwrap();
    rig.check(&["check"], 1, "schema copy");
    let sql = rig.check(&["check", "--sql"], 1, "-- database shop, on legacy");
    let (legacy, new) = sql.split_once("-- database shop, on new").unwrap();
    rig.legacy.sql("shop", legacy).unwrap();
    rig.new.sql("shop", &format!("--{new}")).unwrap();
    rig.check(&["check"], 0, "nothing blocks");
    rig.check(&["schema", "diff"], 0, "both sides define the same");
}

/// Of everything that makes an order matter.
const NASTY: &str = "
    CREATE SCHEMA s; CREATE TYPE s.mood AS ENUM ('sad', 'ok'); CREATE DOMAIN s.small AS int CHECK (value < 1000);
    CREATE FUNCTION s.twice(x int) RETURNS int LANGUAGE sql IMMUTABLE AS 'select x * 2';
    CREATE FUNCTION s.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
--
-- Name: not_an; Type: ENTRY
--
    RETURN new; END $$;
    CREATE TABLE s.a (id serial PRIMARY KEY, m s.mood DEFAULT 'ok', n s.small NOT NULL, v text COLLATE \"C\" DEFAULT 'it''s', t int GENERATED ALWAYS AS (s.twice(n)) STORED,
        CONSTRAINT v_is CHECK (v <> ''), UNIQUE (n, v));
    CREATE TABLE s.\"B b\" (id int GENERATED BY DEFAULT AS IDENTITY, a int REFERENCES s.a ON DELETE CASCADE DEFERRABLE, k int NOT NULL, UNIQUE (k), EXCLUDE USING btree (id WITH =));
    ALTER TABLE s.a ADD back int; ALTER TABLE s.a ADD FOREIGN KEY (back) REFERENCES s.\"B b\" (k) NOT VALID;
    CREATE TABLE s.p (id int, at date NOT NULL, w text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
    CREATE TABLE s.p1 PARTITION OF s.p FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
    CREATE TABLE s.p2 (id int NOT NULL, at date NOT NULL, w text); CREATE INDEX \"Odd name\" ON s.p2 (w); CREATE INDEX by_w ON s.p (w);
    ALTER TABLE s.p ATTACH PARTITION s.p2 DEFAULT; ALTER TABLE s.p ADD FOREIGN KEY (id) REFERENCES s.a;
    CREATE TABLE s.keyless (v int, w text); CREATE UNLOGGED TABLE s.u (id int PRIMARY KEY) WITH (fillfactor = 70);
    CREATE INDEX ON s.a (lower(v)) WHERE n > 3; CREATE UNIQUE INDEX \"I i\" ON s.a (m, id DESC) INCLUDE (v); ALTER TABLE s.a CLUSTER ON \"I i\";
    CREATE UNIQUE INDEX whole ON s.a (n); COMMENT ON INDEX s.whole IS 'ix'; COMMENT ON CONSTRAINT v_is ON s.a IS 'con';
    CREATE VIEW s.grouped AS SELECT a.id, a.v, count(*) AS c FROM s.a GROUP BY a.id; CREATE VIEW s.over AS SELECT id FROM s.grouped; COMMENT ON VIEW s.grouped IS 'rests on a key';
    CREATE MATERIALIZED VIEW s.mv AS SELECT id, v FROM s.a; CREATE UNIQUE INDEX ON s.mv (id); CREATE MATERIALIZED VIEW s.of_mv AS SELECT count(*) AS c FROM s.mv;
    CREATE RULE r AS ON INSERT TO s.over DO INSTEAD NOTHING;
    CREATE TRIGGER tr BEFORE UPDATE ON s.a FOR EACH ROW EXECUTE FUNCTION s.note(); ALTER TABLE s.a ENABLE ALWAYS TRIGGER tr; COMMENT ON TRIGGER tr ON s.a IS 'trig';
    CREATE POLICY pol ON s.keyless FOR SELECT USING (v > 1); ALTER TABLE s.keyless ENABLE ROW LEVEL SECURITY;
    CREATE STATISTICS s.st (dependencies) ON m, n FROM s.a; ALTER TABLE s.a ALTER m SET STATISTICS 50;
    GRANT SELECT ON s.a TO reader; GRANT USAGE ON SCHEMA s TO reader; GRANT SELECT ON s.mv TO reader; ALTER DEFAULT PRIVILEGES IN SCHEMA s GRANT SELECT ON TABLES TO reader;
    INSERT INTO s.a (n, v) SELECT i, i::text FROM generate_series(1, 300) i; INSERT INTO s.\"B b\" (a, k) SELECT i, i FROM generate_series(1, 200) i;
    UPDATE s.a SET back = id WHERE id < 100; INSERT INTO s.p SELECT i, '2020-06-01'::date + i, 'w' FROM generate_series(1, 300) i;
    INSERT INTO s.keyless SELECT i % 3, 'x' FROM generate_series(1, 50) i; REFRESH MATERIALIZED VIEW s.mv; REFRESH MATERIALIZED VIEW s.of_mv";

async fn with_nasty_legacy(new: &Binaries) -> Rig {
    let rig = Rig::between(&Binaries::legacy().unwrap(), new);
    rig.write_config(Phase::Initial);
    rig.legacy.sql("shop", "CREATE ROLE reader").unwrap();
    rig.direct(Side::Legacy, APP).await.batch_execute(NASTY).await.unwrap();
    rig
}

async fn copied_at_once(new: &Binaries) {
    let rig = with_nasty_legacy(new).await;
    rig.check(&["schema", "copy"], 2, "CREATE ROLE \"reader\";");
    rig.new.sql("shop", "CREATE ROLE reader").unwrap();
    rig.check(&["schema", "copy", "--dry-run"], 0, "CREATE TABLE s.a");
    rig.check(&["schema", "diff"], 1, "only on the primary");
    rig.check(&["schema", "copy"], 0, "0 wait for rows");
    rig.check(&["schema", "diff"], 0, "both sides define the same");
    rig.check(&["schema", "copy"], 2, "objects already");
    rig.check(&["schema", "copy", "--after-rows"], 0, "0 statements");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_is_copied_from_15_to_18() {
    copied_at_once(&Binaries::new_side().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_is_copied_from_15_to_15() {
    copied_at_once(&Binaries::legacy().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_way_under_a_storm() {
    let mut rig = with_nasty_legacy(&Binaries::new_side().unwrap()).await;
    let legacy = rig.direct(Side::Legacy, APP).await;
    legacy.batch_execute(SCHEMA).await.unwrap();
    rig.new.sql("shop", "CREATE ROLE reader").unwrap();
    rig.check(&["check"], 1, "schema copy");
    rig.check(&["schema", "copy", "--before-rows"], 0, "statements follow the rows");
    // Only what rows need: no index but keys.
    let indexes = "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relkind = 'i' AND relnamespace = 's'::regnamespace";
    assert_eq!(
        rig.value(Side::New, indexes).await,
        "B b_k_key a_pkey p1_pkey p2_pkey u_pkey"
    );
    rig.serve(Phase::DualWrite).await;
    let storm = Storm::under(&Weather::over(&rig.url(), 21, 4)).await;
    rig.check(&["schema", "copy", "--after-rows"], 1, "wait for rows");
    rig.check(&["backfill"], 0, "");
    let ledger = storm.end().await;
    assert!(ledger.acknowledged.len() > 20, "{}", ledger.acknowledged.len());
    assert_eq!(ledger.failures, [] as [String; 0]);
    rig.wait_caught_up().await;
    rig.check(&["schema", "diff"], 0, "both sides define the same");
    rig.check(&["verify"], 0, "");
    rig.assert_equal().await;
    let left = "SELECT count(*) FROM pgtandem.schema_rest WHERE done_at IS NULL OR note IS NOT NULL";
    assert_eq!(rig.value(Side::New, left).await, "0");
    rig.check(&["check"], 0, "exact");
}

/// The victim of a deadlock (a round holds the same tables in another order) tries again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_follows_the_rows_survives_a_deadlock() {
    let rig = Rig::new();
    rig.write_config(Phase::Initial);
    let schema = "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY REFERENCES a)";
    let legacy = rig.direct(Side::Legacy, APP).await;
    legacy.batch_execute(schema).await.unwrap();
    rig.check(&["schema", "copy", "--before-rows"], 0, "1 statements follow the rows");
    // Only the command looks for deadlocks, so only it is their victim.
    let patience = format!("ALTER ROLE {OWN_ROLE} SET deadlock_timeout = '2s'");
    rig.new.sql("shop", &patience).unwrap();
    let other = rig.direct(Side::New, SUPERUSER).await;
    let lock = |table| format!("SET LOCAL deadlock_timeout = '1h'; LOCK TABLE {table}");
    other.batch_execute("BEGIN").await.unwrap();
    other.batch_execute(&lock("a")).await.unwrap();
    let cross = tokio::spawn(async move {
        let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted";
        while other.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        other.batch_execute(&lock("b")).await.unwrap();
        other.batch_execute("COMMIT").await.unwrap();
    });
    tokio::task::block_in_place(|| rig.check(&["schema", "copy", "--after-rows"], 0, "1 statements"));
    cross.await.unwrap();
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = 'shop'";
    assert_eq!(rig.value(Side::New, deadlocks).await, "1");
}

/// The rows of no table are there while the applier has not reached the new side yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_follows_the_rows_waits_where_mirroring_has_just_begun() {
    let mut rig = Rig::new();
    rig.write_config(Phase::Initial);
    let schema = "CREATE TABLE a (id int PRIMARY KEY, v int); CREATE INDEX ON a (v); INSERT INTO a VALUES (1, 1)";
    let legacy = rig.direct(Side::Legacy, APP).await;
    legacy.batch_execute(schema).await.unwrap();
    rig.check(&["schema", "copy", "--before-rows"], 0, "1 statements follow the rows");
    rig.new.stop("fast").unwrap();
    rig.write_config(Phase::DualWrite);
    rig.spawn_proxy();
    rig.until(|status| status.phase == Phase::DualWrite).await;
    rig.kill_proxy();
    rig.new.start_again().unwrap();
    rig.check(
        &["schema", "copy", "--after-rows"],
        1,
        "0 statements that follow the rows were run, 1 wait",
    );
}
