//! What the secondary refuses, end to end through the built binary: clients notice nothing, the
//! rest is mirrored, and the operator's commands show it and mend it.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod rig;

use pgtandem::admin::api::QuarantineList;
use pgtandem::control::{Phase, Side};
use rig::{Rig, connect, printed};

async fn on_new(rig: &Rig, sql: &str) {
    let own = connect(&rig.new.url(rig::OWN_ROLE, rig::DATABASE)).await.unwrap();
    own.batch_execute(sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_listed_mended_retried_and_discarded() {
    let mut rig = Rig::new();
    rig.extra = "mismatch_log: { values: plain }".into();
    rig.serve(Phase::DualWrite).await;
    let client = rig.client().await;
    client
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE u (id int PRIMARY KEY)")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    rig.check(&["quarantine", "list"], 0, "the quarantine is empty");
    on_new(&rig, "ALTER TABLE t ADD CONSTRAINT small CHECK (v < 100)").await;

    client
        .batch_execute("BEGIN; INSERT INTO t VALUES (41, 200); INSERT INTO u VALUES (1); COMMIT")
        .await
        .unwrap();
    client.batch_execute("INSERT INTO u VALUES (2)").await.unwrap();
    rig.wait_caught_up().await;
    assert_eq!(rig.value(Side::New, "SELECT array_agg(id) FROM u").await, "{2}");
    rig.until(|status| {
        let mirroring = status.databases[0].mirroring.as_ref().unwrap();
        mirroring.quarantine.transactions == 1 && mirroring.quarantine.refused == 1
    })
    .await;
    rig.check(&["status"], 1, "1 transactions are in quarantine");
    rig.check(&["status", "--json"], 1, "\"oldest_seconds\"");
    rig.check(&["switchover", "--to", "new", "--dry-run"], 1, "quarantine");
    let listed = rig.check(&["quarantine", "list"], 1, "public.t (41)");
    for part in ["small", "23514", "(41, 200)"] {
        assert!(listed.contains(part), "{part}: {listed}");
    }
    let json = rig.command(&["quarantine", "list", "--json"]);
    let list: QuarantineList = serde_json::from_slice(&json.stdout).unwrap();
    let id = list.entries[0].entry.id.to_string();
    let gauge = "pgtandem_quarantine_transactions{database=\"shop\"} 1";
    let mut published = String::new();
    // Gauges are set once a second.
    for _ in 0..200 {
        published = metrics(&rig).await;
        if published.contains(gauge) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(published.contains(gauge), "{published}");

    rig.check(&["quarantine", "retry"], 1, "refused again");
    rig.check(&["quarantine", "retry", "9999"], 1, "no such entry");
    on_new(&rig, "ALTER TABLE t DROP CONSTRAINT small").await;
    rig.check(&["quarantine", "retry", &id], 0, "1 applied");
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    rig.until(|status| status.gates.iter().all(|gate| gate.open)).await;

    on_new(&rig, "ALTER TABLE t ADD CONSTRAINT small CHECK (v < 300)").await;
    client.batch_execute("INSERT INTO t VALUES (42, 900)").await.unwrap();
    rig.wait_caught_up().await;
    let json = rig.command(&["quarantine", "list", "--json"]);
    let list: QuarantineList = serde_json::from_slice(&json.stdout).unwrap();
    let id = list.entries[0].entry.id.to_string();
    rig.check(&["quarantine", "discard", &id], 2, "--reason");
    rig.check(&["quarantine", "discard", &id, "--reason", "a test"], 0, "1 discarded");
    rig.check(
        &["quarantine", "discard", &id, "--reason", "a test"],
        1,
        "no such entry",
    );
    rig.until(|status| {
        let open = |what: &str| status.gates.iter().any(|gate| gate.name.ends_with(what) && gate.open);
        open("quarantine") && !open("divergences") && !open("tables")
    })
    .await;
    assert_eq!(
        rig.value(
            Side::New,
            "SELECT reason FROM pgtandem.quarantine_history WHERE action = 'discarded'"
        )
        .await,
        "a test"
    );

    // A forced flip leaves what is held behind, and says so of its table.
    client.batch_execute("INSERT INTO u VALUES (3)").await.unwrap();
    on_new(&rig, "ALTER TABLE u ADD CONSTRAINT few CHECK (id < 4)").await;
    client.batch_execute("INSERT INTO u VALUES (4)").await.unwrap();
    rig.wait_caught_up().await;
    rig.check(&["switchover", "--to", "new"], 1, "CLOSED");
    rig.check(
        &["switchover", "--to", "new", "--force", "--reason", "a test"],
        0,
        "switchover to new",
    );
    let status = rig
        .until(|status| {
            let mirroring = status.databases[0].mirroring.as_ref().unwrap();
            mirroring.state == "running" && mirroring.tables.len() == 2
        })
        .await;
    let mirroring = status.databases[0].mirroring.as_ref().unwrap();
    assert_eq!(mirroring.quarantine.transactions, 0);
    assert!(
        mirroring
            .tables
            .iter()
            .all(|table| table.seeding == "unseeded" && table.note.is_some()),
        "{:?}",
        mirroring.tables
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_refusals_stop_mirroring_and_a_reload_goes_on() {
    let rig = Rig::serving(Phase::DualWrite).await;
    let client = rig.client().await;
    client
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, v int)")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    on_new(&rig, "ALTER TABLE t ADD CONSTRAINT small CHECK (v < 100)").await;
    for id in 0..25 {
        client
            .batch_execute(&format!("INSERT INTO t VALUES ({id}, 200)"))
            .await
            .unwrap();
    }
    let halted =
        |status: &pgtandem::admin::api::Status| status.databases[0].mirroring.as_ref().unwrap().state == "halted";
    rig.until(halted).await;
    rig.check(&["status"], 1, "mirroring is halted");
    rig.check(&["status"], 1, "pgtandem quarantine retry");
    // Why is said, and values stay hidden unless asked for.
    let status = printed(&rig.command(&["status"]));
    let list = printed(&rig.command(&["quarantine", "list"]));
    assert!(status.contains("violates check constraint \"small\""), "{status}");
    for text in [status, list, rig.log()] {
        assert!(!text.contains(", 200)"), "{text}");
    }
    on_new(&rig, "ALTER TABLE t DROP CONSTRAINT small").await;
    rig.check(&["reload"], 0, "reloaded");
    rig.until(|status| !halted(status)).await;
    rig.check(&["quarantine", "retry"], 0, "applied");
    rig.wait_caught_up().await;
    rig.assert_equal().await;
}

async fn metrics(rig: &Rig) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", rig.admin_port))
        .await
        .unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}
