//! The mark of a rehearsal: who may set it, and that nothing which has it is ever committed.

use pgtandem::control::Side;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::bed::Bed;

const SCHEMA: &str = "
    CREATE TABLE t (id serial PRIMARY KEY, v int);
    CREATE FUNCTION told() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.v < 0 THEN RAISE EXCEPTION 'the trigger of the application'; END IF;
        PERFORM pg_notify('told', NEW.v::text);
        RETURN NEW;
    END $$;
    CREATE TRIGGER told AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION told()";

/// As a proxy does it.
async fn key(proxy: &Client) -> String {
    proxy
        .batch_execute("INSERT INTO pgtandem.rehearsal_key (key) VALUES ('secret') ON CONFLICT DO NOTHING")
        .await
        .unwrap();
    let row = proxy.query_one("SELECT key FROM pgtandem.rehearsal_key", &[]).await;
    row.unwrap().get(0)
}

async fn refused(client: &Client, sql: &str) -> SqlState {
    let error = client.batch_execute(sql).await.unwrap_err();
    let code = error.code().unwrap().clone();
    client.batch_execute("ROLLBACK").await.unwrap();
    code
}

#[tokio::test]
async fn what_has_the_mark_may_write_and_never_commits() {
    let (bed, applier) = Bed::mirrored("rehearse_mark", SCHEMA).await;
    let proxy = bed.proxy(Side::New).await;
    let client = bed.app(Side::New).await;
    let begin = format!("BEGIN; SELECT pgtandem.rehearse('{}')", key(&proxy).await);
    let told = "SELECT count(*) FROM pg_listening_channels()";
    client.batch_execute("LISTEN told").await.unwrap();

    // It writes, whatever the fence says, and the application's triggers fire.
    client
        .batch_execute(&format!(
            "{begin}; INSERT INTO t (v) VALUES (1), (2); UPDATE t SET v = v + 1; DELETE FROM t WHERE v = 2; ROLLBACK"
        ))
        .await
        .unwrap();
    let raised = refused(&client, &format!("{begin}; INSERT INTO t (v) VALUES (-1)")).await;
    assert_eq!(raised, SqlState::RAISE_EXCEPTION);
    // No way to keep it.
    for end in [
        "COMMIT",
        "SET CONSTRAINTS ALL IMMEDIATE",
        "PREPARE TRANSACTION 'kept'",
        "SAVEPOINT a; RELEASE a; COMMIT",
        "SET LOCAL search_path = pg_temp; COMMIT",
    ] {
        let code = refused(&client, &format!("{begin}; INSERT INTO t (v) VALUES (3); {end}")).await;
        assert_eq!(code, SqlState::READ_ONLY_SQL_TRANSACTION, "{end}");
    }
    // With the mark goes what it allowed, and without it the fence stands.
    let key = key(&proxy).await;
    let sql = format!(
        "BEGIN; SAVEPOINT a; SELECT pgtandem.rehearse('{key}'); INSERT INTO t (v) VALUES (3); ROLLBACK TO a; INSERT INTO t (v) VALUES (4)"
    );
    assert_eq!(refused(&client, &sql).await, SqlState::READ_ONLY_SQL_TRANSACTION);
    client
        .batch_execute(&format!(
            "BEGIN; SAVEPOINT a; SELECT pgtandem.rehearse('{key}'); INSERT INTO t (v) VALUES (3); ROLLBACK TO a; COMMIT"
        ))
        .await
        .unwrap();

    for (sql, expected) in [
        ("SELECT count(*) FROM t", 0_i64),
        ("SELECT count(*) FROM pgtandem.rehearsing", 0),
        ("SELECT count(*) FROM pgtandem.stray", 0),
        (
            "SELECT (SELECT count(*) FROM pgtandem.change_0) + (SELECT count(*) FROM pgtandem.change_1) + (SELECT count(*) FROM pgtandem.change_2)",
            0,
        ),
    ] {
        assert_eq!(
            proxy.query_one(sql, &[]).await.unwrap().get::<_, i64>(0),
            expected,
            "{sql}"
        );
    }
    assert_eq!(client.query_one(told, &[]).await.unwrap().get::<_, i64>(0), 1);
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t (v) VALUES (1)")
        .await
        .unwrap();
    applier.catch_up().await.unwrap();
}

#[tokio::test]
async fn nobody_else_gets_the_mark() {
    let (bed, _applier) = Bed::mirrored("rehearse_forged", SCHEMA).await;
    let proxy = bed.proxy(Side::New).await;
    let key = key(&proxy).await;
    let client = bed.app(Side::New).await;
    for sql in [
        "SELECT pgtandem.rehearse('guessed')",
        "SELECT pgtandem.rehearse(NULL)",
        "INSERT INTO pgtandem.rehearsing DEFAULT VALUES",
        "SELECT key FROM pgtandem.rehearsal_key",
        "UPDATE pgtandem.rehearsal_key SET key = 'mine'",
        "ALTER TABLE pgtandem.rehearsing DISABLE TRIGGER never_commit",
    ] {
        let code = refused(&client, &format!("BEGIN; {sql}")).await;
        assert_eq!(code, SqlState::INSUFFICIENT_PRIVILEGE, "{sql}");
    }
    // What another transaction has marked is of no use to this one.
    let rehearsing = bed.app(Side::New).await;
    rehearsing
        .batch_execute(&format!("BEGIN; SELECT pgtandem.rehearse('{key}')"))
        .await
        .unwrap();
    for sql in [
        "INSERT INTO t (v) VALUES (1)",
        "BEGIN ISOLATION LEVEL SERIALIZABLE; INSERT INTO t (v) VALUES (1)",
        "BEGIN; SET LOCAL pgtandem.rehearsing = on; INSERT INTO t (v) VALUES (1)",
    ] {
        assert_eq!(
            refused(&client, sql).await,
            SqlState::READ_ONLY_SQL_TRANSACTION,
            "{sql}"
        );
    }
    // On the primary nothing is rehearsed.
    let primary = bed.app(Side::Legacy).await;
    let proxy = bed.proxy(Side::Legacy).await;
    let here = super::rehearse::key(&proxy).await;
    let code = refused(&primary, &format!("BEGIN; SELECT pgtandem.rehearse('{here}')")).await;
    assert_eq!(code, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
}
