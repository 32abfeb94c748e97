//! Loads that switch triggers off meanwhile, as Rails does for fixtures and pg_restore with
//! --disable-triggers: capture is triggers, too.

use std::process::Command;

use pgtandem::control::{Phase, Side};
use pgtandem::servers::PASSWORD;

use crate::rig::{APP, DATABASE, Rig};

const TABLES: &str = "
    CREATE TABLE a (id int PRIMARY KEY, v text);
    CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a, at timestamptz DEFAULT clock_timestamp());
    CREATE TABLE noted (what text);
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO noted VALUES (TG_OP); RETURN NULL; END $$;
    CREATE TRIGGER note AFTER INSERT OR UPDATE ON a FOR EACH ROW EXECUTE FUNCTION note();
    INSERT INTO a VALUES (1, 'before'); INSERT INTO b VALUES (1, 1)";

async fn rig(attributes: &str) -> Rig {
    let mut rig = Rig::new();
    for side in [Side::Legacy, Side::New] {
        let alter = format!("ALTER ROLE {APP} LOGIN {attributes}");
        rig.server(side).sql("postgres", &alter).unwrap();
    }
    rig.serve(Phase::DualWrite).await;
    rig.client().await.batch_execute(TABLES).await.unwrap();
    rig.assert_identical_after("the tables").await;
    rig
}

/// The application's own triggers do not fire, the proxy's do.
async fn loads(rig: &Rig, which: &str) {
    let client = rig.client().await;
    for statements in [
        format!("ALTER TABLE a DISABLE TRIGGER {which}"),
        "INSERT INTO a VALUES (2, 'loaded'), (3, 'loaded'); UPDATE a SET v = 'changed' WHERE id = 1".to_owned(),
        format!("ALTER TABLE a ENABLE TRIGGER {which}"),
        // In one Query, a transaction that is taken back, and one with a table of its own.
        format!(
            "ALTER TABLE a DISABLE TRIGGER {which}; ALTER TABLE noted DISABLE TRIGGER {which}; INSERT INTO a VALUES (4, 'one query');
             TRUNCATE noted; INSERT INTO noted VALUES ('loaded'); ALTER TABLE noted ENABLE TRIGGER {which}; ALTER TABLE a ENABLE TRIGGER {which}"
        ),
        format!("BEGIN; ALTER TABLE a DISABLE TRIGGER {which}; INSERT INTO a VALUES (5, 'taken back'); ROLLBACK"),
        format!(
            "BEGIN; CREATE TABLE fresh (id int PRIMARY KEY); INSERT INTO fresh VALUES (1); ALTER TABLE fresh DISABLE TRIGGER {which};
             INSERT INTO fresh VALUES (2); ALTER TABLE fresh ENABLE TRIGGER {which}; INSERT INTO fresh VALUES (3); COMMIT"
        ),
        "INSERT INTO a VALUES (6, 'as ever'); DELETE FROM a WHERE id = 2; INSERT INTO fresh VALUES (4)".to_owned(),
    ] {
        client.batch_execute(&statements).await.unwrap();
        rig.assert_identical_after(&statements).await;
    }
    assert_eq!(
        rig.value(Side::New, "SELECT string_agg(what, ',') FROM noted").await,
        "loaded,INSERT"
    );
    assert_eq!(
        rig.value(Side::New, "SELECT string_agg(id::text, ',' ORDER BY id) FROM a")
            .await,
        "1,3,4,6"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fixtures_with_triggers_disabled_by_the_owner() {
    loads(&rig("").await, "USER").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fixtures_with_triggers_disabled_by_a_superuser() {
    loads(&rig("SUPERUSER").await, "ALL").await;
}

/// Rows as pg_dump writes them, children before parents, in a session whose search_path is empty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg_restore_with_triggers_disabled() {
    let rig = rig("SUPERUSER").await;
    rig.legacy.create_database("source", APP).unwrap();
    rig.legacy.sql("source", TABLES).unwrap();
    rig.legacy
        .sql("source", "INSERT INTO a SELECT g, repeat('x', g) FROM generate_series(2, 500) g; INSERT INTO b SELECT g, g FROM generate_series(2, 500) g")
        .unwrap();
    rig.client()
        .await
        .batch_execute("DELETE FROM b; DELETE FROM a; DELETE FROM noted")
        .await
        .unwrap();
    let file = rig.directory.path().join("dump");
    let program = |name: &str| {
        let mut command = Command::new(rig.legacy.binaries().program(name));
        command.env("PGPASSWORD", PASSWORD);
        command
    };
    let dumped = program("pg_dump")
        .args([
            "--format=custom",
            "--data-only",
            "--dbname",
            &rig.legacy.url(APP, "source"),
            "--file",
        ])
        .arg(&file)
        .output()
        .unwrap();
    assert!(dumped.status.success(), "{dumped:?}");
    let port = rig.port.to_string();
    let restored = program("pg_restore")
        .args([
            "--data-only",
            "--disable-triggers",
            "--exit-on-error",
            "-h",
            "127.0.0.1",
            "-p",
            &port,
            "-U",
            APP,
            "-d",
            DATABASE,
        ])
        .arg(&file)
        .output()
        .unwrap();
    assert!(restored.status.success(), "{restored:?}");
    rig.assert_identical_after("pg_restore").await;
    assert_eq!(
        rig.value(Side::New, "SELECT count(*) FROM b JOIN a ON a.id = b.a")
            .await,
        "500"
    );
}

/// Rows that a direct connection wrote while it had switched capture off are missing, and said to
/// be, also where a statement through the proxy switches triggers afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_lost_past_the_proxy_is_told() {
    let rig = rig("").await;
    let direct = rig.direct(Side::Legacy, APP).await;
    let client = rig.client().await;
    // All in one transaction through the proxy, so that no look at the catalogs comes in between.
    client
        .batch_execute(
            "BEGIN; DO $$ BEGIN ALTER TABLE a DISABLE TRIGGER USER; INSERT INTO a VALUES (2, 'lost'); END $$;
             ALTER TABLE a DISABLE TRIGGER USER; INSERT INTO a VALUES (3, 'lost'); ALTER TABLE a ENABLE TRIGGER USER; COMMIT",
        )
        .await
        .unwrap();
    direct
        .batch_execute(
            "BEGIN; ALTER TABLE noted DISABLE TRIGGER USER; INSERT INTO noted VALUES ('lost'); ALTER TABLE noted ENABLE TRIGGER USER; COMMIT",
        )
        .await
        .unwrap();
    let told = |status: &pgtandem::admin::api::Status, name: &str| {
        let mirroring = status.databases[0].mirroring.as_ref().unwrap();
        let table = mirroring.tables.iter().find(|table| table.name == name).unwrap();
        table.seeding == "unseeded" && table.note.as_deref().is_some_and(|note| note.contains("switched off"))
    };
    rig.until(|status| told(status, "public.a") && told(status, "public.noted"))
        .await;
}
