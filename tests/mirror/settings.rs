//! What a DBA set for every role, the proxy's own included: time limits, read-only and serializable
//! transactions, a search path with impostors. Whatever it is, clients and the proxy's own
//! connections work as ever. And what clients are set up with changes nothing in what is installed.

use pgtandem::control::{Phase, Side};

use crate::rig::{APP, DATABASE, OWN_ROLE, Rig};

/// Each would by itself keep some of the proxy's own statements from working.
const HOSTILE: &[&str] = &[
    "default_transaction_read_only = on",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_deferrable = on",
    "idle_session_timeout = '500ms'",
    "idle_in_transaction_session_timeout = '200ms'",
    "lock_timeout = '1ms'",
    "statement_timeout = '200ms'",
    "exit_on_error = on",
    "standard_conforming_strings = off",
    "transform_null_equals = on",
    "quote_all_identifiers = on",
    "plpgsql.extra_errors = 'all'",
    "role = 'app'",
    "search_path = 'impostors', 'pg_catalog'",
];

const IMPOSTORS: &str = "
    CREATE SCHEMA impostors AUTHORIZATION app; SET ROLE app; GRANT USAGE ON SCHEMA impostors TO PUBLIC;
    CREATE FUNCTION impostors.format(text, text) RETURNS text LANGUAGE sql AS $$ SELECT 'impostor' $$;
    CREATE FUNCTION impostors.same(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false';
    CREATE OPERATOR impostors.= (LEFTARG = text, RIGHTARG = text, FUNCTION = impostors.same);
    CREATE TABLE impostors.pg_class ()";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dba_set_for_the_proxys_role_changes_nothing() {
    let mut rig = Rig::new();
    for server in [&rig.legacy, &rig.new] {
        server.sql(DATABASE, IMPOSTORS).unwrap();
        for setting in HOSTILE {
            server
                .sql("postgres", &format!("ALTER ROLE {OWN_ROLE} SET {setting}"))
                .unwrap();
        }
    }
    let limit = format!("ALTER ROLE {OWN_ROLE} SET transaction_timeout = '200ms'");
    rig.new.sql("postgres", &limit).unwrap();
    rig.serve(Phase::DualRead).await;

    let client = rig.client().await;
    let schema = "CREATE TABLE a (id serial PRIMARY KEY, at timestamptz DEFAULT now(), v text);
                  CREATE TABLE b (v text DEFAULT 'a\\b'); INSERT INTO a (v) SELECT g::text FROM generate_series(1, 500) g";
    client.batch_execute(schema).await.unwrap();
    for to in [Side::New, Side::Legacy] {
        client
            .batch_execute("UPDATE a SET v = v || '!'; INSERT INTO b DEFAULT VALUES; CREATE INDEX ON b (v)")
            .await
            .unwrap();
        rig.wait_caught_up().await;
        // Longer than any of the time limits: the connections that mostly wait are there, too.
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        rig.check(&["switchover", "--to", &to.to_string()], 0, "switchover to");
        client
            .batch_execute("INSERT INTO a (v) VALUES ('after'); INSERT INTO b VALUES (NULL)")
            .await
            .unwrap();
    }
    rig.assert_identical_after("settings of the proxy's role").await;
    assert_eq!(rig.value(Side::New, "SELECT count(*) FROM a").await, "502");
    rig.check(&["verify"], 0, "");
}

/// A backslash means something else to them, also in the functions that run in their sessions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ddl_of_clients_without_standard_strings() {
    let mut rig = Rig::new();
    rig.spawn_with_every_database(Phase::DualWrite);
    rig.until(|status| status.phase == Phase::DualWrite && status.problem.is_none())
        .await;
    let old = format!(
        "ALTER ROLE {APP} SET standard_conforming_strings = off; ALTER ROLE {APP} SET escape_string_warning = off"
    );
    for server in [&rig.legacy, &rig.new] {
        server.sql("postgres", &old).unwrap();
    }
    let through = rig.client().await;
    let direct = rig.direct(Side::Legacy, APP).await;
    through
        .batch_execute("CREATE TABLE a (id int PRIMARY KEY, v text DEFAULT 'a\\b'); INSERT INTO a VALUES (1)")
        .await
        .unwrap();
    direct
        .batch_execute("DO $$ BEGIN ALTER TABLE a ADD x text DEFAULT 'c\\d'; INSERT INTO a VALUES (2); END $$")
        .await
        .unwrap();
    direct.batch_execute("CREATE INDEX ON a (x)").await.unwrap();
    through
        .batch_execute("REINDEX TABLE a; ALTER TABLE a DROP v")
        .await
        .unwrap();
    through.batch_execute("INSERT INTO a VALUES (3)").await.unwrap();
    rig.assert_identical_after("DDL of clients without standard strings")
        .await;
    assert_eq!(rig.value(Side::New, "SELECT count(*) FROM a").await, "3");
}
