//! Existing rows through the built binary: compared, reported, mended, and compared over and over.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod rig;

use pgtandem::admin::api::Status;
use pgtandem::control::{Phase, Side};
use pgtandem::reconcile::report::{DifferenceKind, Event, TableReport, TableResult, VerificationReport};
use rig::storm::{self, Storm};
use rig::{APP, DATABASE, OWN_ROLE, Rig, connect, printed};

const SCHEMA: &str = "
    CREATE TABLE orders (id bigint PRIMARY KEY, customer text NOT NULL, total numeric(12, 2), at timestamptz, weight float8, tags text[], extra jsonb);
    INSERT INTO orders SELECT g, 'customer ' || g % 100, g / 3.0, '2024-01-01'::timestamptz + g * interval '1 second', g / 7.0,
        CASE g % 4 WHEN 0 THEN NULL WHEN 1 THEN '{}' ELSE ARRAY['a,b', E'\\x1F', NULL] END, jsonb_build_object('n', g) FROM generate_series(1, 20000) g;
    CREATE TABLE lines (at timestamptz DEFAULT '2024-01-01', line text);
    INSERT INTO lines (line) SELECT 'line ' || g % 10 FROM generate_series(1, 500) g;";

fn report(rig: &Rig, file: &str) -> VerificationReport {
    serde_json::from_slice(&std::fs::read(rig.directory.path().join(file)).unwrap()).unwrap()
}

fn table<'a>(report: &'a VerificationReport, name: &str) -> &'a TableReport {
    let mut tables = report.databases[0].tables.iter();
    tables.find(|table| table.name == name).unwrap()
}

async fn plant(rig: &Rig, sql: &str) {
    let own = connect(&rig.new.url(OWN_ROLE, DATABASE)).await.unwrap();
    own.batch_execute(&format!("SET session_replication_role = replica; {sql}"))
        .await
        .unwrap();
}

fn seeding(status: &Status, name: &str) -> Option<String> {
    let tables = &status.databases[0].mirroring.as_ref()?.tables;
    let table = tables.iter().find(|table| table.name == name)?;
    Some(table.seeding.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn differences_are_found_reported_and_mended_while_clients_write() {
    let mut rig = Rig::new();
    for side in [Side::Legacy, Side::New] {
        rig.direct(side, APP).await.batch_execute(SCHEMA).await.unwrap();
    }
    let new = rig.direct(Side::New, APP).await;
    new.batch_execute("UPDATE orders SET customer = 'somebody else' WHERE id = 77; DELETE FROM orders WHERE id = 78")
        .await
        .unwrap();
    rig.serve(Phase::DualWrite).await;
    rig.client().await.batch_execute(storm::SCHEMA).await.unwrap();
    rig.until(|status| seeding(status, "public.lines").as_deref() == Some("synced"))
        .await;
    let storm = Storm::begin(&rig.url(), 11, 4, false).await;
    storm.rage(50).await;

    let file = rig.directory.path().join("report.json");
    let file = file.to_str().unwrap();
    let said = rig.check(
        &["verify", "--report", file],
        1,
        "public.orders: 2 rows differ (1 missing, 0 extra, 1 different)",
    );
    assert!(
        !said.contains("somebody else"),
        "a value where hashes were asked for: {said}"
    );
    let found = report(&rig, "report.json");
    assert!(!found.equal);
    let orders = table(&found, "orders");
    let mut rows: Vec<(DifferenceKind, String)> = orders
        .differing_rows
        .iter()
        .map(|row| (row.kind, row.key.as_ref().unwrap()[0].clone()))
        .collect();
    rows.sort_by(|one, other| one.1.cmp(&other.1));
    assert_eq!(
        rows,
        [
            (DifferenceKind::Different, "77".to_owned()),
            (DifferenceKind::Missing, "78".to_owned())
        ]
    );
    assert_eq!(orders.rows, 20_000);
    let others = found.databases[0].tables.iter().filter(|table| table.name != "orders");
    others.for_each(|table| assert_eq!(table.result, TableResult::Equal, "{table:#?}"));
    for cut in &found.databases[0].cuts {
        assert!(cut.age_ms < 30_000.0, "{cut:?}");
    }
    rig.check(
        &["verify", "--table", "orders", "--values", "plain"],
        1,
        "somebody else",
    );
    rig.check(
        &["verify", "--table", "nothing"],
        2,
        "no mirrored table is called nothing",
    );
    rig.check(&["repair", "--dry-run"], 1, "would be inserted (78)");

    rig.check(&["repair"], 0, "public.orders: mended at the cut of round");
    plant(
        &rig,
        "UPDATE orders SET weight = 'NaN' WHERE id = 79; INSERT INTO lines (line) VALUES ('extra')",
    )
    .await;
    let json = rig.command(&["verify", "--json"]);
    let events: Vec<Event> = String::from_utf8_lossy(&json.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        matches!(events.first(), Some(Event::Begun { .. })),
        "{}",
        printed(&json)
    );
    let Some(Event::Done { report: done }) = events.last() else {
        panic!("{}", printed(&json));
    };
    let differing: Vec<(&str, u64)> = done
        .tables
        .iter()
        .filter(|table| table.result == TableResult::Different)
        .map(|table| (table.name.as_str(), table.differing.total()))
        .collect();
    assert_eq!(differing, [("lines", 1), ("orders", 1)]);
    rig.until(|status| seeding(status, "public.orders").as_deref() == Some("unseeded"))
        .await;
    rig.check(
        &["repair", "--table", "public.orders", "--table", "lines"],
        0,
        "0 different",
    );
    rig.check(&["verify", "--report", file], 0, "0 different");
    rig.until(|status| seeding(status, "public.orders").as_deref() == Some("synced"))
        .await;
    let ledger = storm.end().await;
    assert_eq!(ledger.failures, [] as [String; 0]);
    rig.wait_caught_up().await;
    rig.assert_equal().await;

    // An auditor with psql finds the digest that the report has, on either side.
    rig.check(&["verify", "--report", file], 0, "0 different");
    let found = report(&rig, "report.json");
    assert!(found.equal);
    for table in &found.databases[0].tables {
        let expected = format!("{} {}", table.rows, table.digest.primary);
        for server in [&rig.legacy, &rig.new] {
            assert_eq!(
                server.sql(DATABASE, &table.psql).unwrap().trim(),
                expected,
                "{}",
                table.name
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_quarantine_is_mended_as_a_whole_or_not_at_all() {
    let mut rig = Rig::new();
    rig.serve(Phase::DualWrite).await;
    let client = rig.client().await;
    client
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE u (a text); INSERT INTO t VALUES (3, 3)",
        )
        .await
        .unwrap();
    rig.wait_caught_up().await;
    let own = connect(&rig.new.url(OWN_ROLE, DATABASE)).await.unwrap();
    own.batch_execute("ALTER TABLE t ADD CONSTRAINT small CHECK (v < 100)")
        .await
        .unwrap();
    client
        .batch_execute(
            "BEGIN; INSERT INTO t VALUES (1, 200), (2, 2); INSERT INTO u VALUES ('x'), ('x'), ('y'); DELETE FROM t WHERE id = 3; COMMIT;
             UPDATE t SET id = 4 WHERE id = 2; DELETE FROM u WHERE a = 'y'",
        )
        .await
        .unwrap();
    rig.wait_caught_up().await;
    rig.check(&["verify"], 1, "2 transactions in quarantine concern it");
    rig.check(&["repair", "--table", "t"], 2, "quarantine retry");
    rig.check(&["repair"], 2, "the secondary refuses");
    assert_eq!(
        rig.value(Side::New, "SELECT count(*) FROM pgtandem.quarantine").await,
        "2"
    );
    own.batch_execute("ALTER TABLE t DROP CONSTRAINT small").await.unwrap();
    rig.check(&["repair"], 0, "all that was in quarantine: mended at the cut of round");
    rig.check(&["quarantine", "list"], 0, "the quarantine is empty");
    let history = "SELECT count(*) FROM pgtandem.quarantine_history WHERE action = 'repaired'";
    assert_eq!(rig.value(Side::New, history).await, "2");
    // What comes next on the same keys is mirrored again.
    client
        .batch_execute("UPDATE t SET v = v + 1; INSERT INTO u VALUES ('x'); DELETE FROM t WHERE id = 4")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    rig.check(&["verify"], 0, "public.t: equal");
    rig.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn continuously_at_a_rate_and_remembered() {
    let mut rig = Rig::new();
    rig.serve(Phase::DualWrite).await;
    let client = rig.client().await;
    client
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT g, g FROM generate_series(1, 2000) g",
        )
        .await
        .unwrap();
    let verified = |status: &Status| {
        let tables = &status.databases[0].mirroring.as_ref()?.tables;
        tables.iter().find(|table| table.name == "public.t")?.verified.clone()
    };
    rig.wait_caught_up().await;
    let of_new_table = verified(&rig.status().await.unwrap());
    assert!(of_new_table.is_none(), "{of_new_table:?}");
    // A reload begins it; at a rate at which a pass takes half an hour.
    rig.extra = "verify: { continuous: true, rate: 1, pause: 100ms }".into();
    let answer = rig.set_phase(Phase::DualWrite).await.unwrap();
    assert!(answer.changed.iter().any(|what| what == "verify changed"), "{answer:?}");
    let first = verified(&rig.until(|status| verified(status).is_some()).await).unwrap();
    client.batch_execute("UPDATE t SET v = v + 1").await.unwrap();
    // Another one ends that pass.
    rig.extra = "verify: { continuous: true, rate: 20000, pause: 100ms }".into();
    rig.set_phase(Phase::DualWrite).await.unwrap();
    rig.until(|status| verified(status).is_some_and(|later| later.round > first.round))
        .await;
    rig.check(&["status"], 0, "verified   1 of 1 tables");

    plant(&rig, "UPDATE t SET v = 0 WHERE id = 1000").await;
    rig.until(|status| seeding(status, "public.t").as_deref() == Some("unseeded"))
        .await;
    rig.check(&["switchover", "--to", "new", "--dry-run"], 1, "public.t is not");
    rig.check(&["repair"], 0, "mended");
    rig.until(|status| seeding(status, "public.t").as_deref() == Some("synced"))
        .await;

    let last = verified(&rig.status().await.unwrap()).unwrap();
    rig.kill_proxy();
    rig.extra = String::new();
    rig.serve(Phase::DualWrite).await;
    let after = rig.until(|status| verified(status).is_some()).await;
    assert!(verified(&after).unwrap().round >= last.round);
}
