//! End to end: the storm, the flip under load, and crashes, through the built binary.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "mirror/canary.rs"]
mod canary;
#[path = "shadow/places.rs"]
mod places;
#[path = "mirror/reads.rs"]
mod reads;
#[path = "mirror/rehearsals.rs"]
mod rehearsals;
mod rig;
#[path = "mirror/settings.rs"]
mod settings;

use pgtandem::admin::api::Status;
use pgtandem::control::{Phase, Side};
use rig::storm::{SCHEMA, Storm};
use rig::{APP, Rig};

/// Repeats a run that failed.
const SEED: u64 = 20_261_121;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_ends_with_both_sides_identical() {
    let rig = Rig::serving(Phase::DualWrite).await;
    rig.client().await.batch_execute(SCHEMA).await.unwrap();
    let storm = Storm::begin(&rig.url(), SEED, 16, false).await;
    storm.rage(2000).await;
    let ledger = storm.end().await;
    assert_eq!(ledger.failures, Vec::<String>::new());
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    for side in [Side::Legacy, Side::New] {
        ledger.assert_kept(&rig.direct(side, APP).await).await;
    }
    let status = rig.status().await.unwrap();
    let mirroring = status.databases[0].mirroring.as_ref().unwrap();
    assert_eq!(mirroring.divergences, 0);
    assert!(
        mirroring.tables.iter().all(|table| table.seeding == "synced"),
        "{:?}",
        mirroring.tables
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_primary_flips_under_load_and_back() {
    let rig = Rig::serving(Phase::DualRead).await;
    rig.client().await.batch_execute(SCHEMA).await.unwrap();
    let storm = Storm::begin(&rig.url(), SEED + 1, 8, false).await;
    for phase in [Phase::Switchover, Phase::DualRead, Phase::Switchover] {
        storm.rage(400).await;
        if let Err(error) = rig.set_phase(phase).await {
            panic!("{error}\n{:#?}\n{}", rig.status().await, rig.log());
        }
        assert_eq!(rig.status().await.unwrap().primary, phase.primary());
    }
    storm.rage(400).await;
    let ledger = storm.end().await;
    assert_eq!(ledger.failures, Vec::<String>::new());
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    for side in [Side::Legacy, Side::New] {
        ledger.assert_kept(&rig.direct(side, APP).await).await;
    }
    let refused = rig
        .direct(Side::Legacy, APP)
        .await
        .batch_execute("INSERT INTO jobs DEFAULT VALUES")
        .await;
    assert_eq!(
        refused
            .unwrap_err()
            .code()
            .map(|code| code.code().to_owned())
            .as_deref(),
        Some("25006")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_the_proxy_loses_and_doubles_nothing() {
    let mut rig = Rig::serving(Phase::DualWrite).await;
    rig.client().await.batch_execute(SCHEMA).await.unwrap();
    let storm = Storm::begin(&rig.url(), SEED + 2, 8, true).await;
    for commits in [150, 400, 70, 290] {
        storm.rage(commits).await;
        rig.kill_proxy();
        rig.spawn_proxy();
    }
    storm.rage(200).await;
    let ledger = storm.end().await;
    rig.until(|status| status.phase == Phase::DualWrite).await;
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    for side in [Side::Legacy, Side::New] {
        ledger.assert_kept(&rig.direct(side, APP).await).await;
    }
    let status = rig.status().await.unwrap();
    assert_eq!(status.databases[0].mirroring.as_ref().unwrap().divergences, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_secondary_may_be_away_at_start_and_later() {
    let mut rig = Rig::new();
    rig.new.stop("fast").unwrap();
    rig.serve(Phase::DualWrite).await;
    let client = rig.client().await;
    client
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'away')")
        .await
        .unwrap();
    rig.new.start_again().unwrap();
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    rig.new.stop("immediate").unwrap();
    client
        .batch_execute("INSERT INTO t SELECT i, 'again' FROM generate_series(2, 500) i; DELETE FROM t WHERE id % 7 = 0")
        .await
        .unwrap();
    rig.new.start_again().unwrap();
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    assert_eq!(
        rig.value(Side::New, "SELECT count(*) FROM t").await,
        rig.value(Side::Legacy, "SELECT count(*) FROM t").await
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_proxy_believes_the_databases_and_not_its_file() {
    let mut rig = Rig::serving(Phase::DualWrite).await;
    rig.client()
        .await
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY)")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    rig.set_phase(Phase::Switchover).await.unwrap();
    rig.kill_proxy();
    rig.write_config(Phase::DualWrite);
    rig.spawn_proxy();
    // It serves where the databases say, flips nothing, and says what is wrong.
    rig.until(|status| {
        let says = status
            .problem
            .as_ref()
            .is_some_and(|problem| problem.contains("proxy.yaml still says dual_write"));
        says && status.phase == Phase::Switchover && status.primary == Side::New
    })
    .await;
    rig.set_phase(Phase::Switchover).await.unwrap();
    rig.until(|status| status.problem.is_none()).await;
    let version: String = rig
        .client()
        .await
        .query_one("SHOW server_version", &[])
        .await
        .unwrap()
        .get(0);
    assert!(version.starts_with(&rig.new.major.to_string()), "{version}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn complete_removes_what_was_installed_and_is_final() {
    let mut rig = Rig::serving(Phase::DualWrite).await;
    let client = rig.client().await;
    client
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    assert!(
        rig.set_phase(Phase::Complete)
            .await
            .unwrap_err()
            .to_string()
            .contains("switchover")
    );
    rig.set_phase(Phase::Switchover).await.unwrap();
    // Not by a reload that does not say so, nor by a signal, nor by starting a proxy.
    rig.write_config(Phase::Complete);
    rig.check(&["reload"], 1, "pgtandem reload --yes");
    let hangup = format!("kill -HUP {}", rig.proxy_pid());
    let refused = rig.log().matches("pgtandem reload --yes").count();
    std::process::Command::new("sh").args(["-c", &hangup]).status().unwrap();
    while rig.log().matches("pgtandem reload --yes").count() == refused {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    rig.kill_proxy();
    rig.spawn_proxy();
    let asks = |status: &Status| {
        let problem = status.problem.as_deref();
        problem.is_some_and(|problem| problem.contains("pgtandem reload --yes"))
    };
    rig.until(|status| status.phase == Phase::Switchover && asks(status))
        .await;
    let client = rig.client().await;
    client.batch_execute("INSERT INTO t VALUES (10)").await.unwrap();
    rig.wait_caught_up().await;
    assert_eq!(rig.value(Side::Legacy, "SELECT count(*) FROM t").await, "2");
    client.batch_execute("DELETE FROM t WHERE id = 10").await.unwrap();
    rig.wait_caught_up().await;
    rig.check(&["reload", "--yes"], 0, "complete");
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    assert_eq!(rig.value(Side::New, "SELECT count(*) FROM t").await, "2");
    assert_eq!(rig.value(Side::Legacy, "SELECT count(*) FROM t").await, "1");
    for side in [Side::Legacy, Side::New] {
        let triggers = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE '%pgtandem%'";
        assert_eq!(rig.value(side, triggers).await, "0", "{side}");
    }
    assert!(
        rig.set_phase(Phase::DualWrite)
            .await
            .unwrap_err()
            .to_string()
            .contains("over")
    );
}
