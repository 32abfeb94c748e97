//! What becomes a change in the journal, and how often: INSERT is captured once for a statement,
//! everything else row by row, and tables may become partitions and children all the same.

use pgtandem::apply::{self, Applier, Seeding};
use pgtandem::control::{Epoch, Side};
use pgtandem::journal::{self, SideRole};
use pgtandem::servers::Binaries;
use pgtandem::upstream::control::{Control, error_chain};
use tokio_postgres::error::SqlState;

use crate::bed::{Bed, Pair, caught_up, until};
use crate::ddl::ddl;

const ATTACH: &str = "zzz_pgtandem_attach_by_a_statement_through_the_proxy";

/// Runs each statement as its own transaction and finds both sides equal after it.
async fn each(bed: &Bed, applier: &Applier, client: &Control, statements: &[&str]) {
    for statement in statements {
        client
            .batch_execute(statement)
            .await
            .unwrap_or_else(|error| panic!("{statement}: {}", error_chain(&error)));
        bed.assert_same(applier).await;
    }
}

/// What a transaction with these statements left in the journal. No applier may run, which would
/// empty it.
async fn journaled(bed: &Bed, client: &Control, statements: &str) -> i64 {
    client.batch_execute(&format!("BEGIN; {statements}")).await.unwrap();
    let xid: String = client
        .query_one("SELECT pg_current_xact_id()::text", &[])
        .await
        .unwrap()
        .get(0);
    client.batch_execute("COMMIT").await.unwrap();
    let count = format!(
        "SELECT count(*) FROM (SELECT xid FROM pgtandem.change_0 UNION ALL SELECT xid FROM pgtandem.change_1
                               UNION ALL SELECT xid FROM pgtandem.change_2) c WHERE xid = '{xid}'"
    );
    bed.admin(Side::Legacy)
        .await
        .query_one(&count, &[])
        .await
        .unwrap()
        .get(0)
}

const FAMILY: &str =
    "CREATE TABLE p (id int, k int) PARTITION BY RANGE (k); CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);
    CREATE TABLE p2 (id int, k int); CREATE TABLE parent (id int); CREATE TABLE child (id int, more text)";

#[tokio::test]
async fn what_nobody_made_ready_cannot_become_a_partition_or_a_child() {
    let (bed, applier) = Bed::mirrored("attach_unseen", FAMILY).await;
    let client = bed.app(Side::Legacy).await;
    for statement in [
        "ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20)",
        "DO $$ BEGIN ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20); END $$",
        "ALTER TABLE child INHERIT parent",
        "DO $$ BEGIN ALTER TABLE child INHERIT parent; END $$",
    ] {
        let error = client.batch_execute(statement).await.unwrap_err();
        let error = error.as_db_error().unwrap();
        assert!(error.message().contains(ATTACH), "{statement}: {error}");
    }
    each(
        &bed,
        &applier,
        &client,
        &["INSERT INTO p2 VALUES (1, 11); INSERT INTO child VALUES (1, 'x'); INSERT INTO p VALUES (1, 1)"],
    )
    .await;
}

#[tokio::test]
async fn rows_arrive_through_parents_and_past_them() {
    let (bed, applier) = Bed::mirrored("attach", FAMILY).await;
    let client = bed.app(Side::Legacy).await;
    each(
        &bed,
        &applier,
        &client,
        &["INSERT INTO p SELECT g, g FROM generate_series(0, 9) g; INSERT INTO p2 VALUES (1, 11); INSERT INTO child VALUES (1, 'x')"],
    )
    .await;
    ddl(
        &client,
        "ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20)",
    )
    .await;
    ddl(&client, "ALTER TABLE child INHERIT parent").await;
    each(
        &bed,
        &applier,
        &client,
        &[
            "INSERT INTO p SELECT g, g FROM generate_series(5, 15) g; UPDATE p SET k = k + 3 WHERE k < 15",
            "INSERT INTO p2 VALUES (2, 12); UPDATE parent SET id = id + 1; INSERT INTO child VALUES (2, 'y'); INSERT INTO parent VALUES (3)",
            "MERGE INTO p USING (VALUES (1), (19)) s(k) ON p.k = s.k WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (0, s.k)",
            "DELETE FROM parent WHERE id = 2",
        ],
    )
    .await;
    ddl(&client, "ALTER TABLE p DETACH PARTITION p2").await;
    ddl(&client, "ALTER TABLE child NO INHERIT parent").await;
    each(
        &bed,
        &applier,
        &client,
        &["INSERT INTO p2 VALUES (3, 99), (4, 99); INSERT INTO child VALUES (5, 'z'); INSERT INTO p VALUES (7, 7)"],
    )
    .await;
    ddl(&client, "ALTER TABLE p ATTACH PARTITION p2 DEFAULT").await;
    each(&bed, &applier, &client, &["INSERT INTO p VALUES (8, 1000), (9, 9)"]).await;
}

#[tokio::test]
async fn each_row_is_journaled_once_whoever_writes_it() {
    let bed = Bed::new("journaled_once", "CREATE TABLE t (id int PRIMARY KEY, v int)").await;
    bed.install().await;
    let writes = "INSERT INTO t SELECT g, g FROM generate_series(1, 5) g; UPDATE t SET v = -v WHERE id < 3; DELETE FROM t WHERE id > 2";
    let client = bed.app(Side::Legacy).await;
    assert_eq!(journaled(&bed, &client, writes).await, 5 + 2 + 3);
    let replica = bed.admin(Side::Legacy).await;
    replica
        .batch_execute("SET session_replication_role = replica")
        .await
        .unwrap();
    let again = writes.replace("1, 5", "6, 9");
    assert_eq!(journaled(&bed, &replica, &again).await, 4 + 2 + 4);
    let applier = apply::spawn(bed.config());
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn triggers_that_are_all_switched_on_capture_once_and_are_noticed() {
    let (bed, applier) = Bed::mirrored("enabled_all", "CREATE TABLE t (id int PRIMARY KEY, v int)").await;
    applier.stop().await;
    let client = bed.app(Side::Legacy).await;
    client.batch_execute("ALTER TABLE t ENABLE TRIGGER ALL").await.unwrap();
    let writes =
        "INSERT INTO t VALUES (1, 1), (2, 2), (3, 3); UPDATE t SET v = 0 WHERE id < 3; DELETE FROM t WHERE id = 1";
    assert_eq!(journaled(&bed, &client, writes).await, 3 + 2 + 1);
    let applier = apply::spawn(bed.config());
    // A replica's writes may have passed unseen meanwhile.
    let status = until(&applier, |status| {
        status.tables.iter().any(|table| table.seeding == Seeding::Unseeded)
    })
    .await;
    assert!(
        status.tables[0]
            .note
            .as_ref()
            .is_some_and(|note| note.contains("capture was switched off")),
        "{:?}",
        status.tables[0]
    );
    caught_up(&applier).await;
    assert_eq!(bed.differences().await, []);
    let armed = "SELECT string_agg(tgname || tgenabled::text, ' ' ORDER BY tgname) FROM pg_trigger WHERE tgrelid = 't'::regclass AND tgname LIKE 'zzz%'";
    let armed: String = bed
        .admin(Side::Legacy)
        .await
        .query_one(armed, &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(
        armed,
        format!("{ATTACH}D zzz_pgtandem_insertO zzz_pgtandem_replicaR zzz_pgtandem_rowO zzz_pgtandem_truncateA")
    );
}

#[tokio::test]
async fn every_way_to_insert() {
    let schema = "CREATE TABLE dropped (a int, id int PRIMARY KEY, b text, c int); ALTER TABLE dropped DROP COLUMN a; ALTER TABLE dropped DROP COLUMN b;
        CREATE TABLE named (pgtandem_new text, id int PRIMARY KEY, pgtandem_old int);
        CREATE TABLE pgtandem_new (pgtandem_new int, id int);
        CREATE TABLE variables (state text, tg_op text, found bool, rel int, op text, old text, new text);
        CREATE TABLE stored (id int PRIMARY KEY, v int, twice int GENERATED ALWAYS AS (v * 2) STORED, last text);
        CREATE TABLE a (id int PRIMARY KEY, v int); CREATE TABLE b (id int, v int)";
    let (bed, applier) = Bed::mirrored("inserts", schema).await;
    let client = bed.app(Side::Legacy).await;
    each(
        &bed,
        &applier,
        &client,
        &[
            "INSERT INTO dropped VALUES (1, 2), (3, NULL); UPDATE dropped SET c = 9 WHERE id = 1",
            "INSERT INTO named VALUES ('x', 1, 2), (NULL, 2, NULL); INSERT INTO pgtandem_new VALUES (1, 2), (NULL, NULL)",
            "INSERT INTO variables (state, new) VALUES ('queued', 'x'), (NULL, NULL); UPDATE variables SET tg_op = 'y', found = true",
            "INSERT INTO stored (id, v, last) VALUES (1, 1, 'x'), (2, NULL, ''); UPDATE stored SET v = 7; DELETE FROM stored WHERE id = 2",
            "INSERT INTO a VALUES (1, 1), (2, 2); INSERT INTO a VALUES (2, 0), (3, 0) ON CONFLICT (id) DO UPDATE SET v = a.v + 10",
            "INSERT INTO a VALUES (3, 5) ON CONFLICT DO NOTHING; INSERT INTO a SELECT 99 WHERE false",
            "MERGE INTO a USING (VALUES (1), (2), (50)) s(id) ON a.id = s.id WHEN MATCHED AND s.id = 1 THEN DELETE
               WHEN MATCHED THEN UPDATE SET v = -1 WHEN NOT MATCHED THEN INSERT VALUES (s.id, 5)",
            "WITH x AS (INSERT INTO b VALUES (1, 1), (2, 2) RETURNING *), y AS (INSERT INTO b SELECT id + 10, v FROM x RETURNING *)
               INSERT INTO b SELECT id + 100, v FROM y",
            "WITH x AS (INSERT INTO a VALUES (60, 1) RETURNING *), y AS (UPDATE a SET v = 77 WHERE id = 3 RETURNING *), z AS (DELETE FROM a WHERE id = 50)
               INSERT INTO a SELECT id + 10, v FROM x",
            "CREATE FUNCTION pg_temp.more() RETURNS void LANGUAGE sql AS 'INSERT INTO b VALUES (7, 7), (8, 8)'; SELECT pg_temp.more() FROM generate_series(1, 3)",
        ],
    )
    .await;
    let copy = client.copy_in::<_, &[u8]>("COPY b FROM STDIN").await.unwrap();
    let mut copy = std::pin::pin!(copy);
    futures_util::SinkExt::send(&mut copy, &b"21\t1\n22\t\\N\n"[..])
        .await
        .unwrap();
    copy.finish().await.unwrap();
    bed.assert_same(&applier).await;
    // On the secondary: nothing written is nothing to refuse.
    let stray = bed.app(Side::New).await;
    stray
        .batch_execute("INSERT INTO b SELECT 1, 1 WHERE false")
        .await
        .unwrap();
    for insert in [
        "INSERT INTO b VALUES (1, 1)",
        "INSERT INTO variables (state) VALUES ('x')",
    ] {
        let refused = stray.batch_execute(insert).await.unwrap_err();
        assert_eq!(
            refused.code(),
            Some(&SqlState::READ_ONLY_SQL_TRANSACTION),
            "{refused:?}"
        );
    }
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn prepared_inserts_go_on_when_columns_come_and_go() {
    let (bed, applier) = Bed::mirrored(
        "prepared_insert",
        "CREATE TABLE t (id int PRIMARY KEY, gone text, v int)",
    )
    .await;
    let client = bed.app(Side::Legacy).await;
    let insert = client.prepare("INSERT INTO t (id, v) VALUES ($1, $1)").await.unwrap();
    for round in 0..3 {
        client.execute(&insert, &[&(round * 10)]).await.unwrap();
        client.execute(&insert, &[&(round * 10 + 1)]).await.unwrap();
        bed.assert_same(&applier).await;
        ddl(
            &client,
            &format!("ALTER TABLE t ADD COLUMN c{round} timestamptz DEFAULT now()"),
        )
        .await;
        client.execute(&insert, &[&(round * 10 + 2)]).await.unwrap();
        bed.assert_same(&applier).await;
        let gone = if round == 0 {
            "gone".to_owned()
        } else {
            format!("c{}", round - 1)
        };
        ddl(&client, &format!("ALTER TABLE t DROP COLUMN {gone}")).await;
        client.execute(&insert, &[&(round * 10 + 3)]).await.unwrap();
        bed.assert_same(&applier).await;
        // By another session.
        let other = bed.app(Side::Legacy).await;
        ddl(&other, &format!("ALTER TABLE t ADD COLUMN d{round} int DEFAULT 1")).await;
        client.execute(&insert, &[&(round * 10 + 4)]).await.unwrap();
        bed.assert_same(&applier).await;
        ddl(&other, &format!("ALTER TABLE t ALTER COLUMN d{round} TYPE text")).await;
        client.execute(&insert, &[&(round * 10 + 5)]).await.unwrap();
        bed.assert_same(&applier).await;
    }
}

/// From 18, as after a flip.
#[tokio::test]
async fn virtual_generated_columns() {
    let newest = || Binaries::new_side().unwrap();
    let bed = Bed::on(
        Pair::between(newest(), newest()),
        "virtual",
        "CREATE TABLE t (id int PRIMARY KEY, v int, twice int GENERATED ALWAYS AS (v * 2) VIRTUAL, s int GENERATED ALWAYS AS (v * 3) STORED, last text);
         CREATE TABLE keyless (v int, twice int GENERATED ALWAYS AS (v * 2) VIRTUAL)",
    )
    .await;
    for (side, role) in [
        (Side::New, SideRole::Primary),
        (Side::Legacy, SideRole::from(pgtandem::config::StrayWriters::Refuse)),
    ] {
        let mut client = bed.proxy(side).await;
        journal::install(&mut client, side, role, Epoch::FIRST).await.unwrap();
        assert_eq!(journal::capture_tables(&client).await.unwrap().failed, []);
    }
    let applier = apply::spawn(bed.config_towards(Side::Legacy, Epoch::FIRST));
    caught_up(&applier).await;
    let client = bed.app(Side::New).await;
    each(
        &bed,
        &applier,
        &client,
        &[
            "INSERT INTO t (id, v, last) SELECT g, g, 'x' || g FROM generate_series(1, 20) g",
            "INSERT INTO t (id, v) VALUES (1, 5), (21, 21) ON CONFLICT (id) DO UPDATE SET v = t.v + EXCLUDED.v + EXCLUDED.twice",
            "UPDATE t SET v = v + 1 WHERE twice > 10; DELETE FROM t WHERE twice > 30",
            "INSERT INTO keyless VALUES (1), (1), (2); DELETE FROM keyless WHERE ctid = (SELECT min(ctid) FROM keyless); UPDATE keyless SET v = 5 WHERE v = 2",
            "MERGE INTO t USING (VALUES (1), (90)) s(id) ON t.id = s.id WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT (id, v) VALUES (s.id, s.id)",
            "TRUNCATE keyless; INSERT INTO keyless VALUES (8)",
        ],
    )
    .await;
}

/// A later version's functions take the place of an earlier one's, without a gap in between.
#[tokio::test]
async fn an_older_installation_gets_the_functions_of_now() {
    let (bed, applier) = Bed::mirrored("upgraded", "CREATE TABLE t (id int PRIMARY KEY)").await;
    let admin = bed.admin(Side::Legacy).await;
    let sources = "SELECT proname::text, prosrc FROM pg_proc
                    WHERE pronamespace = 'pgtandem'::regnamespace AND proname LIKE 'capture\\_%' ORDER BY 1";
    let read = async || -> Vec<(String, String)> {
        let rows = admin.query(sources, &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    };
    let now = read().await;
    let rel: u32 = admin.query_one("SELECT 't'::regclass::oid", &[]).await.unwrap().get(0);
    admin
        .batch_execute(&format!(
            "CREATE OR REPLACE FUNCTION pgtandem.capture_{rel}_insert() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
                 AS 'BEGIN RETURN NULL; END';
             UPDATE pgtandem.side SET version = version - 1"
        ))
        .await
        .unwrap();
    assert_ne!(read().await, now);
    bed.install().await;
    assert_eq!(read().await, now);
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    bed.assert_same(&applier).await;
}

/// Where the event triggers of a superuser's installation see how a later version takes its place.
#[tokio::test]
async fn an_installation_is_no_clients_ddl() {
    let (bed, applier) = Bed::mirrored("reinstalled", "CREATE TABLE t (id int PRIMARY KEY)").await;
    for statement in [
        "ALTER ROLE pgtandem SUPERUSER",
        "UPDATE pgtandem.side SET version = version - 1",
    ] {
        for side in [Side::Legacy, Side::New] {
            bed.admin(side).await.batch_execute(statement).await.unwrap();
        }
        bed.install().await;
    }
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    bed.assert_same(&applier).await;
    assert_eq!(applier.status().borrow().quarantine.transactions, 0);
}
