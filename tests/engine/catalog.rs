//! What happens to tables behind the proxy's back: detected before it can corrupt.

use std::time::Duration;

use pgtandem::apply::{self, ApplierState, Seeding};
use pgtandem::config::{Journal, WhenFull};
use pgtandem::control::{Epoch, Side};
use pgtandem::journal::{self, JournalError, SideRole};
use tokio_postgres::error::SqlState;

use crate::bed::{Bed, caught_up, until};

fn table<'a>(status: &'a apply::ApplierStatus, name: &str) -> Option<&'a apply::TableStatus> {
    status.tables.iter().find(|table| table.name == name)
}

#[tokio::test]
async fn a_definition_changed_behind_the_proxy_pauses_the_table() {
    let (bed, applier) = Bed::mirrored(
        "unseen",
        "CREATE TABLE t (id int PRIMARY KEY, a int, b int); CREATE TABLE u (id int PRIMARY KEY)",
    )
    .await;
    let client = bed.app(Side::Legacy).await;
    client.batch_execute("INSERT INTO t VALUES (1, 10, 20)").await.unwrap();
    bed.assert_same(&applier).await;
    // Same types in another order: positions alone would put every value into the wrong column.
    client
        .batch_execute("ALTER TABLE t DROP COLUMN a; ALTER TABLE t ADD COLUMN a int; UPDATE t SET a = 11; INSERT INTO u VALUES (1)")
        .await
        .unwrap();
    caught_up(&applier).await;
    let status = until(&applier, |status| {
        table(status, "t").is_some_and(|t| t.paused.is_some())
    })
    .await;
    assert!(
        table(&status, "t")
            .unwrap()
            .paused
            .as_ref()
            .unwrap()
            .contains("did not see"),
        "{status:#?}"
    );
    // Nothing wrong was written, and the other table goes on.
    let new = bed.admin(Side::New).await;
    let row = new.query_one("SELECT id, a, b FROM t", &[]).await.unwrap();
    assert_eq!(
        (row.get::<_, i32>(0), row.get::<_, i32>(1), row.get::<_, i32>(2)),
        (1, 10, 20)
    );
    assert_eq!(table(&status, "u").unwrap().seeding, Seeding::Synced);

    // Brought in line by hand: it goes on, and says that it needs seeding.
    new.batch_execute("ALTER TABLE t DROP COLUMN a; ALTER TABLE t ADD COLUMN a int")
        .await
        .unwrap();
    let status = until(&applier, |status| {
        table(status, "t").is_some_and(|t| t.paused.is_none())
    })
    .await;
    assert_eq!(table(&status, "t").unwrap().seeding, Seeding::Unseeded);
    client
        .batch_execute("UPDATE t SET b = 7; INSERT INTO t VALUES (2, 2, 2)")
        .await
        .unwrap();
    caught_up(&applier).await;
    // Upserts: the row that had been missed is whole again.
    assert_eq!(bed.differences().await, []);
}

#[tokio::test]
async fn harmless_touches_pause_nothing() {
    let (bed, applier) = Bed::mirrored("harmless", "CREATE TABLE t (id int PRIMARY KEY, a int)").await;
    let client = bed.app(Side::Legacy).await;
    for statement in [
        "VACUUM FULL t",
        "GRANT SELECT (a) ON t TO other",
        "TRUNCATE t",
        "ANALYZE t",
        "ALTER TABLE t ALTER COLUMN a SET STATISTICS 10",
        "CLUSTER t USING t_pkey",
        "CREATE INDEX ON t (a)",
        "VACUUM t",
    ] {
        client.batch_execute(statement).await.unwrap();
        client
            .batch_execute("INSERT INTO t SELECT COALESCE(max(id), 0) + 1, 1 FROM t")
            .await
            .unwrap();
        bed.assert_same(&applier).await;
    }
}

#[tokio::test]
async fn a_table_created_behind_the_proxy_is_found() {
    let (bed, applier) = Bed::mirrored("found", "CREATE TABLE t (id int PRIMARY KEY)").await;
    let schema = "CREATE TABLE late (id int PRIMARY KEY, v int); CREATE TABLE filled (id int PRIMARY KEY, v int)";
    for side in [Side::New, Side::Legacy] {
        bed.app(side).await.batch_execute(schema).await.unwrap();
        if side == Side::Legacy {
            bed.app(side)
                .await
                .batch_execute("INSERT INTO filled VALUES (1, 1)")
                .await
                .unwrap();
        }
    }
    bed.app(Side::Legacy)
        .await
        .batch_execute("CREATE TABLE alone (id int PRIMARY KEY)")
        .await
        .unwrap();
    let status = until(&applier, |status| status.tables.len() == 4).await;
    assert_eq!(table(&status, "late").unwrap().seeding, Seeding::Synced);
    assert_eq!(table(&status, "filled").unwrap().seeding, Seeding::Unseeded);
    assert!(
        table(&status, "alone")
            .unwrap()
            .paused
            .as_ref()
            .unwrap()
            .contains("no such table")
    );
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("INSERT INTO late VALUES (1, 1); UPDATE filled SET v = 2; INSERT INTO filled VALUES (2, 2); INSERT INTO alone VALUES (1)")
        .await
        .unwrap();
    caught_up(&applier).await;
    let differences = bed.differences().await;
    assert_eq!(differences.len(), 1, "{differences:#?}");
    assert_eq!(differences[0].name, "alone");
    // Created over there as well, it goes on from now.
    bed.app(Side::New)
        .await
        .batch_execute("CREATE TABLE alone (id int PRIMARY KEY)")
        .await
        .unwrap();
    until(&applier, |status| {
        table(status, "alone").is_some_and(|t| t.paused.is_none())
    })
    .await;
}

#[tokio::test]
async fn switched_off_triggers_are_noticed() {
    let (bed, applier) = Bed::mirrored(
        "switched_off",
        "CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE u (id int PRIMARY KEY)",
    )
    .await;
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("BEGIN; ALTER TABLE t DISABLE TRIGGER USER; INSERT INTO t VALUES (1, 1); ALTER TABLE t ENABLE TRIGGER USER; COMMIT")
        .await
        .unwrap();
    client
        .batch_execute("DROP TRIGGER zzz_pgtandem_insert ON u; INSERT INTO u VALUES (1)")
        .await
        .unwrap();
    let status = until(&applier, |status| {
        status.tables.iter().all(|table| table.note.is_some())
    })
    .await;
    for table in &status.tables {
        assert_eq!(table.seeding, Seeding::Unseeded);
    }
    // Captured again.
    client
        .batch_execute("UPDATE t SET v = 2; INSERT INTO u VALUES (2)")
        .await
        .unwrap();
    caught_up(&applier).await;
    let differences = bed.differences().await;
    assert_eq!(differences.len(), 1, "{differences:#?}");
    assert_eq!((differences[0].name.as_str(), differences[0].only_first), ("u", 1));
}

#[tokio::test]
async fn tables_that_hold_rows_start_unseeded_and_converge() {
    let bed = Bed::new(
        "unseeded",
        "CREATE TABLE t (id int PRIMARY KEY, u int UNIQUE, v text); CREATE TABLE keyless (v int)",
    )
    .await;
    bed.app(Side::Legacy)
        .await
        .batch_execute(
            "INSERT INTO t SELECT g, g, 'x' FROM generate_series(1, 10) g; INSERT INTO keyless VALUES (1), (1)",
        )
        .await
        .unwrap();
    bed.app(Side::New)
        .await
        .batch_execute("INSERT INTO t VALUES (5, 1, 'stale'), (77, 6, 'stale')")
        .await
        .unwrap();
    bed.install().await;
    let applier = apply::spawn(bed.config());
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute(
            "UPDATE t SET v = 'y'; DELETE FROM keyless; INSERT INTO keyless VALUES (2); DELETE FROM t WHERE id = 9",
        )
        .await
        .unwrap();
    caught_up(&applier).await;
    // Every row was touched: equal although never seeded, with no row counted as a surprise.
    assert_eq!(bed.differences().await, []);
    let status = applier.status().borrow().clone();
    assert_eq!(status.diverged, 0);
    assert_eq!(table(&status, "t").unwrap().seeding, Seeding::Unseeded);
    client
        .batch_execute("TRUNCATE t; INSERT INTO t VALUES (1, 1, 'z')")
        .await
        .unwrap();
    caught_up(&applier).await;
    assert_eq!(table(&applier.status().borrow(), "t").unwrap().seeding, Seeding::Synced);
}

#[tokio::test]
async fn a_secondary_tampered_with_is_reported_and_mended() {
    let (bed, applier) = Bed::mirrored(
        "tampered",
        "CREATE TABLE t (id int PRIMARY KEY, u int UNIQUE, v text); CREATE TABLE k (v text)",
    )
    .await;
    let client = bed.app(Side::Legacy).await;
    client.batch_execute("INSERT INTO t SELECT g, g, 'x' FROM generate_series(1, 20) g; INSERT INTO k SELECT 'k' || g FROM generate_series(1, 5) g").await.unwrap();
    bed.assert_same(&applier).await;
    bed.admin(Side::New)
        .await
        .batch_execute("SET session_replication_role = replica; ALTER TABLE t DISABLE TRIGGER ALL; ALTER TABLE k DISABLE TRIGGER ALL;
             DELETE FROM t WHERE id = 1; UPDATE t SET v = 'other' WHERE id = 2; INSERT INTO t VALUES (30, 130, 'mine'); INSERT INTO t VALUES (40, 31, 'unique'); DELETE FROM k WHERE v = 'k3';
             ALTER TABLE t ENABLE TRIGGER ALL; ALTER TABLE k ENABLE TRIGGER ALL; ALTER TABLE t ENABLE REPLICA TRIGGER zzz_pgtandem_replica, ENABLE ALWAYS TRIGGER zzz_pgtandem_truncate; ALTER TABLE k ENABLE REPLICA TRIGGER zzz_pgtandem_replica, ENABLE ALWAYS TRIGGER zzz_pgtandem_truncate")
        .await
        .unwrap();
    client.batch_execute("UPDATE t SET v = 'y'; DELETE FROM t WHERE id = 20; INSERT INTO t VALUES (30, 30, 'ours'), (31, 31, 'ours'); DELETE FROM k").await.unwrap();
    caught_up(&applier).await;
    assert_eq!(bed.differences().await, []);
    let status = applier.status().borrow().clone();
    assert_eq!(table(&status, "t").unwrap().diverged, 4, "{status:#?}");
    assert_eq!(table(&status, "k").unwrap().diverged, 1, "{status:#?}");
    let kinds = bed
        .admin(Side::New)
        .await
        .query("SELECT kind, name, key FROM pgtandem.divergence ORDER BY 2, 1, 3", &[])
        .await
        .unwrap();
    let kinds: Vec<String> = kinds.iter().map(|row| row.get(0)).collect();
    assert_eq!(kinds, ["missing", "different", "missing", "unexpected", "unexpected"]);
}

#[tokio::test]
async fn another_column_order_on_the_secondary() {
    let bed = Bed::new("reordered", "CREATE TABLE x (id int)").await;
    bed.app(Side::Legacy)
        .await
        .batch_execute(
            "CREATE TABLE t (id int, a text, b int, g int GENERATED ALWAYS AS (b + 1) STORED, PRIMARY KEY (id))",
        )
        .await
        .unwrap();
    bed.app(Side::New).await.batch_execute("CREATE TABLE t (g int GENERATED ALWAYS AS (b + 1) STORED, dropped int, b int, id int, a text, PRIMARY KEY (id)); ALTER TABLE t DROP COLUMN dropped").await.unwrap();
    bed.install().await;
    let applier = apply::spawn(bed.config());
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("INSERT INTO t SELECT g, 'a' || g, -g FROM generate_series(1, 9) g")
        .await
        .unwrap();
    bed.assert_same(&applier).await;
    client
        .batch_execute(
            "UPDATE t SET b = id, a = NULL WHERE id < 5; DELETE FROM t WHERE id = 9; UPDATE t SET id = id + 10",
        )
        .await
        .unwrap();
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn what_a_dba_must_run_is_said() {
    let bed = Bed::new("privileges", "CREATE TABLE t (id int PRIMARY KEY)").await;
    let admin = bed.admin(Side::Legacy).await;
    admin
        .batch_execute("CREATE ROLE barest LOGIN PASSWORD 'secret'; CREATE ROLE outsider; GRANT CREATE ON SCHEMA public TO outsider; SET ROLE outsider; CREATE TABLE foreign_to_us (id int); RESET ROLE")
        .await
        .unwrap();
    let mut barest =
        pgtandem::upstream::control::connect(&bed.pair.target(Side::Legacy, "barest", &bed.dbname), "test")
            .await
            .unwrap();
    match journal::install(&mut barest, Side::Legacy, SideRole::Primary, Epoch::FIRST).await {
        Err(JournalError::Privileges(sql)) => {
            assert_eq!(sql, "GRANT CREATE ON DATABASE \"privileges\" TO \"barest\";");
            admin.batch_execute(&sql).await.unwrap();
        }
        other => panic!("{other:?}"),
    }
    let mut proxy = bed.proxy(Side::Legacy).await;
    journal::install(&mut proxy, Side::Legacy, SideRole::Primary, Epoch::FIRST)
        .await
        .unwrap();
    match journal::install(&mut proxy, Side::New, SideRole::Primary, Epoch::FIRST).await {
        Err(JournalError::WrongSide { .. }) => {}
        other => panic!("{other:?}"),
    }
    let report = journal::capture_tables(&proxy).await.unwrap();
    assert_eq!(report.failed.len(), 1, "{report:?}");
    assert_eq!(report.sql_for_dba, ["GRANT \"outsider\" TO \"pgtandem\";"]);
    admin.batch_execute(&report.sql_for_dba[0]).await.unwrap();
    assert_eq!(journal::capture_tables(&proxy).await.unwrap().failed, []);
    journal::uninstall(&mut proxy).await.unwrap();
    assert_eq!(journal::read_state(&proxy).await.unwrap(), None);
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    admin
        .batch_execute("DROP OWNED BY outsider; DROP ROLE outsider; DROP OWNED BY barest; DROP ROLE barest")
        .await
        .unwrap();
}

#[tokio::test]
async fn a_busy_table_is_captured_without_queueing_the_application() {
    let bed = Bed::new("busy", "CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut proxy = bed.proxy(Side::Legacy).await;
    journal::install(&mut proxy, Side::Legacy, SideRole::Primary, Epoch::FIRST)
        .await
        .unwrap();
    let mut writer = bed.app(Side::Legacy).await;
    let open = writer.transaction().await.unwrap();
    open.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    let report = journal::capture_tables(&proxy).await.unwrap();
    assert_eq!(report.busy, ["\"public\".\"t\""]);
    open.commit().await.unwrap();
    let report = journal::capture_tables(&proxy).await.unwrap();
    assert_eq!((report.busy.len(), report.new.len()), (0, 1));
}

#[tokio::test]
async fn a_full_journal_blocks_and_opens_again() {
    let bed = Bed::new("full", "CREATE TABLE t (id serial PRIMARY KEY, v text)").await;
    bed.install().await;
    let mut config = bed.config();
    config.journal = Journal {
        max_bytes: 4 << 20,
        when_full: WhenFull::Block,
    };
    let client = bed.app(Side::Legacy).await;
    // The lease is held elsewhere while the journal fills; then that one measures it.
    client
        .batch_execute("INSERT INTO t (v) SELECT repeat(md5(g::text), 30) FROM generate_series(1, 8000) g")
        .await
        .unwrap();
    let mut proxy = bed.proxy(Side::Legacy).await;
    let bytes = journal::rotation::measure(&proxy).await.unwrap();
    let state = journal::rotation::enforce_limit(&mut proxy, &config.journal, bytes)
        .await
        .unwrap();
    assert!(state.full);
    let error = client
        .batch_execute("INSERT INTO t (v) VALUES ('x')")
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::DISK_FULL));
    assert!(error.as_db_error().unwrap().message().contains("journal.max_bytes"));
    let applier = apply::spawn(config);
    loop {
        // Drained, rotated, emptied: writes are accepted again.
        if client.batch_execute("INSERT INTO t (v) VALUES ('x')").await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn a_full_journal_stops_mirroring() {
    let bed = Bed::new("stopped", "CREATE TABLE t (id serial PRIMARY KEY, v text)").await;
    bed.install().await;
    let mut config = bed.config();
    config.journal = Journal {
        max_bytes: 1 << 20,
        when_full: WhenFull::StopMirroring,
    };
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t (v) SELECT repeat(md5(g::text), 30) FROM generate_series(1, 8000) g")
        .await
        .unwrap();
    let applier = apply::spawn(config);
    let status = until(&applier, |status| status.journal.stopped && !status.tables.is_empty()).await;
    // Told at once, whatever the secondary has recorded by then.
    assert_eq!(status.tables_now()[0].seeding, Seeding::Unseeded);
    until(&applier, |status| status.state == ApplierState::Running).await;
    let status = until(&applier, |status| status.tables[0].seeding == Seeding::Unseeded).await;
    assert!(status.tables[0].note.as_ref().unwrap().contains("journal was full"));
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t (v) VALUES ('not captured')")
        .await
        .unwrap();
}
