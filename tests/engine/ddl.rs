//! DDL through the hook, as a proxy's session runs it; at its place among the changes.

use pgtandem::catalog::compare::TableDifference;
use pgtandem::control::Side;
use pgtandem::journal::{DDL_HOOK, DDL_HOOK_BEFORE, DDL_HOOK_OUTSIDE};
use pgtandem::sql::{self, Class};
use pgtandem::upstream::control::{Control, error_chain};

use crate::bed::{Bed, caught_up};

/// What the proxy does: the statement between the hooks, in one transaction (the client's own, if
/// it has one).
pub(crate) async fn ddl(client: &Control, statement: &str) {
    client.batch_execute("BEGIN").await.unwrap();
    ddl_inside(client, statement).await;
    client.batch_execute("COMMIT").await.unwrap();
}

async fn ddl_inside(client: &Control, statement: &str) {
    let failed = |error: tokio_postgres::Error| panic!("{statement}: {}", error_chain(&error));
    try_ddl(client, statement).await.unwrap_or_else(failed);
}

/// The statement between the proxy's hooks, in the caller's transaction.
pub(crate) async fn try_ddl(client: &Control, statement: &str) -> Result<(), tokio_postgres::Error> {
    let script = sql::analyze(statement.as_bytes());
    let Some(Class::Ddl(ddl)) = script.single().map(|statement| &statement.class) else {
        panic!("{statement} is no DDL")
    };
    let before = DDL_HOOK_BEFORE.replace("$1", &format!("'{}'", ddl.facts().replace('\'', "''")));
    client.batch_execute(&before).await?;
    client.batch_execute(statement).await?;
    client.execute(DDL_HOOK, &[&statement]).await.map(drop)
}

/// The definitions of both sides, as the catalogs give them.
async fn definitions(bed: &Bed, side: Side) -> Vec<String> {
    let sql = "
        SELECT concat_ws(' ', 'column', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated,
                         pg_get_expr(d.adbin, d.adrelid), c.relkind, pg_get_userbyid(c.relowner))
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
          LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
         WHERE n.nspname NOT IN ('pgtandem', 'information_schema') AND n.nspname NOT LIKE 'pg\\_%' AND a.attnum > 0 AND NOT a.attisdropped
        UNION ALL SELECT concat_ws(' ', 'index', pg_get_indexdef(i.indexrelid), i.indisvalid) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname NOT IN ('pgtandem', 'pg_catalog', 'pg_toast', 'information_schema')
        UNION ALL SELECT concat_ws(' ', 'constraint', k.conrelid::regclass, k.conname, pg_get_constraintdef(k.oid)) FROM pg_constraint k
         WHERE k.conrelid <> 0 AND k.contype <> 'n' AND k.connamespace::regnamespace::text NOT IN ('pgtandem', 'pg_catalog', 'information_schema')
        UNION ALL SELECT concat_ws(' ', 'trigger', t.tgrelid::regclass, t.tgname, t.tgenabled) FROM pg_trigger t WHERE NOT t.tgisinternal
        UNION ALL SELECT concat_ws(' ', 'label', e.enumtypid::regtype, e.enumlabel) FROM pg_enum e
        UNION ALL SELECT concat_ws(' ', 'function', p.proname, p.prosrc) FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace
        ORDER BY 1";
    let rows = bed.admin(side).await.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn assert_same_definitions(bed: &Bed) {
    assert_eq!(definitions(bed, Side::Legacy).await, definitions(bed, Side::New).await);
}

#[tokio::test]
async fn tables_come_change_and_go() {
    let (bed, applier) = Bed::mirrored("ddl_tables", "CREATE TABLE old (id int PRIMARY KEY, v text)").await;
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("INSERT INTO old SELECT g, g FROM generate_series(1, 20) g")
        .await
        .unwrap();
    for (statement, then) in [
        (
            "CREATE TABLE t (id serial PRIMARY KEY, v int)",
            "INSERT INTO t (v) SELECT generate_series(1, 10)",
        ),
        (
            "ALTER TABLE t ADD COLUMN w timestamptz DEFAULT now()",
            "UPDATE t SET v = 5 WHERE id = 1",
        ),
        (
            "ALTER TABLE t ADD COLUMN r float8 DEFAULT random()",
            "UPDATE t SET v = 6 WHERE id = 2",
        ),
        (
            "ALTER TABLE t ALTER COLUMN v TYPE text USING v || '!'",
            "INSERT INTO t (v) VALUES ('text')",
        ),
        (
            "ALTER TABLE t RENAME COLUMN v TO vv",
            "INSERT INTO t (vv) VALUES ('renamed')",
        ),
        ("ALTER TABLE t DROP COLUMN w", "DELETE FROM t WHERE id < 3"),
        (
            "ALTER TABLE t RENAME TO \"T 2\"",
            "INSERT INTO \"T 2\" (vv) VALUES ('renamed table')",
        ),
        ("CREATE SCHEMA s", "SELECT 1"),
        (
            "ALTER TABLE \"T 2\" SET SCHEMA s",
            "UPDATE s.\"T 2\" SET vv = 'moved' WHERE id = 5",
        ),
        (
            "CREATE TABLE copied AS SELECT *, random() AS x, clock_timestamp() AS y FROM old",
            "INSERT INTO copied SELECT *, 1, now() FROM old LIMIT 2",
        ),
        ("SELECT id INTO intoed FROM old", "DELETE FROM intoed WHERE id > 10"),
        ("CREATE TABLE p (id int, k int) PARTITION BY RANGE (k)", "SELECT 1"),
        (
            "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)",
            "INSERT INTO p SELECT g, g FROM generate_series(0, 9) g",
        ),
        ("CREATE TABLE p2 (id int, k int)", "INSERT INTO p2 VALUES (1, 15)"),
        (
            "ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20)",
            "UPDATE p SET k = k + 4",
        ),
        ("ALTER TABLE p DETACH PARTITION p1", "INSERT INTO p1 VALUES (99, 99)"),
        ("CREATE TYPE mood AS ENUM ('sad', 'ok')", "SELECT 1"),
        (
            "CREATE TABLE moods (id int PRIMARY KEY, m mood)",
            "INSERT INTO moods VALUES (1, 'sad'), (2, 'ok')",
        ),
        (
            "ALTER TYPE mood RENAME VALUE 'ok' TO 'fine'",
            "UPDATE moods SET m = 'fine'",
        ),
        ("CREATE INDEX ON moods (m)", "SELECT 1"),
        (
            "ALTER TABLE old ADD CONSTRAINT positive CHECK (id > 0)",
            "INSERT INTO old VALUES (100, NULL)",
        ),
        (
            "ALTER TABLE old ADD COLUMN at timestamp, ALTER COLUMN v SET DEFAULT 'd'",
            "SET DateStyle = 'German'; INSERT INTO old (id, at) VALUES (101, now()); RESET DateStyle",
        ),
        (
            "CREATE VIEW view AS SELECT * FROM old",
            "INSERT INTO view (id) VALUES (102)",
        ),
        ("CREATE MATERIALIZED VIEW mat AS SELECT count(*) FROM old", "SELECT 1"),
        ("REFRESH MATERIALIZED VIEW mat", "SELECT 1"),
        (
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.v := 'from a trigger'; RETURN NEW; END $$",
            "SELECT 1",
        ),
        (
            "CREATE TRIGGER f BEFORE INSERT ON old FOR EACH ROW EXECUTE FUNCTION f()",
            "INSERT INTO old (id) VALUES (103)",
        ),
        ("GRANT SELECT ON old TO other", "SELECT 1"),
        ("COMMENT ON TABLE old IS 'it''s \\ commented'", "SELECT 1"),
        (
            "CREATE TEMP TABLE temporary (id int)",
            "INSERT INTO temporary VALUES (1)",
        ),
        (
            "CREATE TABLE IF NOT EXISTS old (different int)",
            "UPDATE old SET v = 'still'",
        ),
        ("DROP TABLE moods, copied CASCADE", "SELECT 1"),
        ("DROP SCHEMA s CASCADE", "SELECT 1"),
    ] {
        if statement.starts_with("CREATE TEMP") {
            // The proxy knows it as temporary and does not run the hook.
            client.batch_execute(statement).await.unwrap();
        } else {
            ddl(&client, statement).await;
        }
        client
            .batch_execute(then)
            .await
            .unwrap_or_else(|error| panic!("{then}: {}", error_chain(&error)));
        bed.assert_same(&applier).await;
    }
    assert_same_definitions(&bed).await;
}

#[tokio::test]
async fn within_one_transaction_and_one_round() {
    let (bed, applier) = Bed::mirrored("ddl_round", "CREATE TABLE t (id int PRIMARY KEY, v int)").await;
    let client = bed.app(Side::Legacy).await;
    // Nothing is applied until all of it is in the journal.
    let held = applier.cut().await.unwrap();
    client
        .batch_execute("INSERT INTO t SELECT g, g FROM generate_series(1, 10) g")
        .await
        .unwrap();
    client.batch_execute("BEGIN; UPDATE t SET v = v + 1").await.unwrap();
    ddl_inside(&client, "ALTER TABLE t ADD COLUMN w text DEFAULT 'w'").await;
    client
        .batch_execute("UPDATE t SET w = 'x' WHERE id < 5; SAVEPOINT a")
        .await
        .unwrap();
    ddl_inside(&client, "CREATE TABLE gone (id int)").await;
    client
        .batch_execute("INSERT INTO gone VALUES (1); ROLLBACK TO a; SAVEPOINT b")
        .await
        .unwrap();
    ddl_inside(&client, "CREATE TABLE kept (id int)").await;
    client
        .batch_execute("INSERT INTO kept VALUES (1); RELEASE b; TRUNCATE t; INSERT INTO t VALUES (1, 1, 'new')")
        .await
        .unwrap();
    ddl_inside(&client, "ALTER TABLE t DROP COLUMN v").await;
    client
        .batch_execute("INSERT INTO t VALUES (2, 'after'); COMMIT")
        .await
        .unwrap();
    client
        .batch_execute("BEGIN; INSERT INTO t VALUES (3, 'rolled back')")
        .await
        .unwrap();
    ddl_inside(&client, "DROP TABLE kept").await;
    client.batch_execute("ROLLBACK").await.unwrap();
    client.batch_execute("UPDATE t SET w = w || id").await.unwrap();
    drop(held);
    bed.assert_same(&applier).await;
    assert_same_definitions(&bed).await;
}

#[tokio::test]
async fn outside_transactions() {
    let (bed, applier) = Bed::mirrored("ddl_outside", "CREATE TABLE t (id int PRIMARY KEY, v int)").await;
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("INSERT INTO t SELECT g, g FROM generate_series(1, 100) g")
        .await
        .unwrap();
    for statement in [
        "CREATE INDEX CONCURRENTLY t_v ON t (v)",
        "REINDEX TABLE CONCURRENTLY t",
        "DROP INDEX CONCURRENTLY t_v",
        "CREATE UNIQUE INDEX CONCURRENTLY t_vu ON t (v)",
    ] {
        client.batch_execute(statement).await.unwrap();
        client.execute(DDL_HOOK_OUTSIDE, &[&statement]).await.unwrap();
        client.batch_execute("UPDATE t SET v = v + 1000").await.unwrap();
        bed.assert_same(&applier).await;
        assert_same_definitions(&bed).await;
    }
}

#[tokio::test]
async fn a_forged_record_can_do_no_more_than_its_writer() {
    let (bed, applier) = Bed::mirrored("ddl_forged", "CREATE TABLE t (id int PRIMARY KEY)").await;
    let other = bed.other(Side::Legacy).await;
    // Under another's name: refused at once.
    let refused = other
        .execute("SELECT pgtandem.ddl('DROP TABLE public.t', '', 'app')", &[])
        .await
        .unwrap_err();
    assert_eq!(
        refused.code(),
        Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE)
    );
    // Under its own: the secondary refuses, and nothing happens there.
    other
        .execute(
            DDL_HOOK,
            &[&"DO $$ BEGIN EXECUTE 'RESET ROLE'; EXECUTE 'DROP TABLE public.t'; END $$"],
        )
        .await
        .unwrap();
    caught_up(&applier).await;
    let entries = pgtandem::apply::list_quarantine(&*bed.admin(Side::New).await)
        .await
        .unwrap();
    assert_eq!(entries.len(), 1, "{entries:#?}");
    assert!(
        entries[0].error.contains("within security-definer function"),
        "{entries:#?}"
    );
    assert_eq!(bed.differences().await, [] as [TableDifference; 0]);
    // Nor may it write the journal, or call what is not its own.
    for statement in [
        "INSERT INTO pgtandem.change_0 (rel, op) VALUES (0, 'S')",
        "SELECT pgtandem.append(0, 'S', '', '')",
        "SELECT pgtandem.ddl_effects('', '{}')",
        "SELECT pgtandem.capture(1)",
        "SELECT setval('pgtandem.state', 1)",
        "CREATE TABLE pgtandem.x ()",
    ] {
        assert!(other.batch_execute(statement).await.is_err(), "{statement}");
    }
}

#[tokio::test]
async fn a_new_table_that_cannot_be_captured_is_refused() {
    let (bed, _applier) = Bed::mirrored("ddl_refused", "CREATE TABLE t (id int PRIMARY KEY)").await;
    let admin = bed.admin(Side::Legacy).await;
    admin
        .batch_execute("DROP ROLE IF EXISTS stranger; CREATE ROLE stranger; GRANT CREATE ON SCHEMA public TO stranger; SET ROLE stranger; BEGIN; CREATE TABLE mine (id int)")
        .await
        .unwrap();
    let error = admin
        .execute(DDL_HOOK, &[&"CREATE TABLE mine (id int)"])
        .await
        .unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.code(), &tokio_postgres::error::SqlState::FEATURE_NOT_SUPPORTED);
    assert!(
        error.hint().unwrap().contains("GRANT stranger TO pgtandem;"),
        "{error:?}"
    );
}

/// The comparison of all definitions reads some of them behind locks that DDL takes.
#[tokio::test]
async fn a_clients_open_ddl_holds_up_nobody() {
    let (bed, applier) = Bed::mirrored(
        "open_ddl",
        "CREATE TABLE changing (id int PRIMARY KEY, v int DEFAULT 1 CHECK (v > 0)); CREATE VIEW seen AS SELECT * FROM changing; CREATE TABLE t (id int PRIMARY KEY); CREATE SEQUENCE free; CREATE SEQUENCE locked",
    )
    .await;
    let slow = bed.app(Side::Legacy).await;
    slow.batch_execute("BEGIN").await.unwrap();
    ddl_inside(&slow, "ALTER TABLE changing ADD COLUMN w int").await;
    ddl_inside(&slow, "DROP SEQUENCE locked").await;
    let client = bed.app(Side::Legacy).await;
    // Definitions are compared every two seconds, and only when they have changed.
    for round in 0..30 {
        ddl(&client, &format!("CREATE TABLE new_{round} (id int PRIMARY KEY)")).await;
        client
            .batch_execute(&format!("INSERT INTO t VALUES ({round}); SELECT nextval('free')"))
            .await
            .unwrap();
        applier.round_after_now().await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    // All but the locked one are copied meanwhile; whoever wants all of them waits.
    let new = bed.admin(Side::New).await;
    let behind = "SELECT last_value < 30 FROM free";
    while new.query_one(behind, &[]).await.unwrap().get(0) {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    slow.batch_execute("COMMIT").await.unwrap();
    bed.assert_same(&applier).await;
    assert_same_definitions(&bed).await;
}
