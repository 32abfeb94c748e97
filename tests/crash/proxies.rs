//! Two and three proxies on one pair: one applies, by lease.

use std::time::Duration;

use pgtandem::admin::api::Status;
use pgtandem::control::{Phase, Side};
use pgtandem::servers::SUPERUSER;
use rand::Rng;
use tokio::time::{Instant, sleep};

use crate::another::{Another, mirroring};
use crate::processes;
use crate::rig::storm::Weather;
use crate::rig::{APP, DATABASE, Rig};
use crate::stage::{Stage, rounds};

/// How the status begins to name a proxy.
fn name(pid: u32) -> String {
    format!("pid {pid} on ")
}

/// Also of a proxy that has just been started and knows of no database yet.
fn is_waiting(status: &Status) -> bool {
    let mirroring = status
        .databases
        .first()
        .and_then(|database| database.mirroring.as_ref());
    mirroring.is_some_and(|mirroring| mirroring.state == "waiting" && mirroring.applier.is_some())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_proxies_one_applier_handed_over_when_it_is_killed() {
    let mut stage = Stage::set(Phase::DualWrite).await;
    stage.rig.until(|status| mirroring(status).state == "running").await;
    let mut others = [
        Another::beside(&stage.rig, Phase::DualWrite).await,
        Another::beside(&stage.rig, Phase::DualWrite).await,
    ];
    let holder = name(stage.rig.proxy_pid());
    for other in &others {
        let status = other
            .until(&stage.rig, |status| mirroring(status).state == "waiting")
            .await;
        assert!(
            mirroring(&status).applier.as_ref().unwrap().starts_with(&holder),
            "{status:?}"
        );
    }
    let urls = vec![
        stage.rig.url(),
        others[0].url(),
        others[1].url(),
        stage.rig.server(Side::Legacy).url(APP, DATABASE),
    ];
    let storm = stage
        .storm(|weather| {
            *weather = Weather {
                urls,
                workers: 8,
                reconnect: true,
                ..weather.clone()
            };
        })
        .await;
    for _ in 0..3 * rounds() {
        storm.rage(stage.random.random_range(50..200)).await;
        stage.rig.kill_proxy();
        let killed = Instant::now();
        let next = 'applying: loop {
            for other in &others {
                if mirroring(&other.status().await.unwrap()).state == "running" {
                    break 'applying other;
                }
            }
            sleep(Duration::from_millis(5)).await;
        };
        eprintln!("handed over within {:?}", killed.elapsed());
        let next = name(next.pid());
        storm.rage(50).await;
        // It comes back, as one of those that wait; and the lease comes back to it.
        stage.rig.spawn_proxy();
        let status = stage.rig.until(is_waiting).await;
        assert!(
            mirroring(&status).applier.as_ref().unwrap().starts_with(&next),
            "{status:?}"
        );
        for other in &mut others {
            other.kill();
        }
        stage.rig.until(|status| mirroring(status).state == "running").await;
        for other in &mut others {
            other.spawn();
        }
        for other in &others {
            other.until(&stage.rig, is_waiting).await;
        }
    }
    storm.everybody_commits(5).await;
    stage.end(storm).await;
    assert_eq!(stage.ledger.failures, Vec::<String>::new());
    // Those that wait can say when the one that applies has caught up.
    for other in &others {
        other.wait_caught_up().await;
    }
    stage.assert_exact().await;
}

/// The lag of a proxy that does not apply comes from the databases; that of the one that applies
/// shows also while a round hangs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_proxy_tells_how_far_the_secondary_is() {
    let stage = Stage::set(Phase::DualWrite).await;
    let rig = &stage.rig;
    rig.until(|status| mirroring(status).state == "running").await;
    let other = Another::beside(rig, Phase::DualWrite).await;
    other
        .until(rig, |status| {
            let mirroring = mirroring(status);
            mirroring.state == "waiting"
                && mirroring.lag.transactions == 0
                && mirroring.lag.seconds == 0.0
                && mirroring.watermark.is_some()
                && mirroring.tables.len() == 11
                && mirroring.tables.iter().all(|table| table.seeding == "synced")
        })
        .await;

    // What only the one that applies can do, the other one sends there.
    let refused = other.retry_quarantine().await.unwrap_err().to_string();
    for says in [
        name(rig.proxy_pid()),
        format!("which listens on 127.0.0.1:{}", rig.port),
    ] {
        assert!(refused.contains(&says), "{refused} does not say {says}");
    }
    rig.check(&["quarantine", "retry"], 0, "");

    let locking = rig.direct(Side::New, SUPERUSER).await;
    locking.batch_execute("BEGIN; LOCK TABLE jobs").await.unwrap();
    let client = rig.client().await;
    for _ in 0..20 {
        client.batch_execute("INSERT INTO jobs DEFAULT VALUES").await.unwrap();
    }
    let behind = |status: &_| {
        let lag = &mirroring(status).lag;
        lag.transactions >= 20 && lag.bytes > 0 && lag.seconds > 0.0
    };
    rig.until(behind).await;
    other.until(rig, behind).await;

    locking.batch_execute("ROLLBACK").await.unwrap();
    let caught_up = |status: &_| {
        let lag = &mirroring(status).lag;
        (lag.transactions, lag.bytes, lag.seconds) == (0, 0, 0.0)
    };
    rig.until(caught_up).await;
    let told = other.until(rig, caught_up).await;
    let round = mirroring(&told).round;
    assert!(round > 0);
    // What is committed is read by the other one before the one that applied it has told it.
    rig.until(|status| mirroring(status).round >= round).await;
    stage.assert_exact().await;
}

/// Under load there need be no moment at which nothing waits in the journal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_does_not_apply_tells_under_load_what_is_applied() {
    let mut stage = Stage::set(Phase::DualWrite).await;
    stage.rig.until(|status| mirroring(status).state == "running").await;
    let other = Another::beside(&stage.rig, Phase::DualWrite).await;
    other.until(&stage.rig, is_waiting).await;
    let client = stage.rig.client().await;
    client
        .batch_execute("CREATE TABLE marks (id int PRIMARY KEY)")
        .await
        .unwrap();
    let secondary = stage.rig.direct(Side::New, APP).await;
    let storm = stage.storm(|_| {}).await;
    for mark in 1..=10 {
        storm.rage(20).await;
        client
            .batch_execute(&format!("INSERT INTO marks VALUES ({mark})"))
            .await
            .unwrap();
        other.wait_caught_up().await;
        let found = secondary.query_one("SELECT max(id) FROM marks", &[]).await.unwrap();
        assert_eq!(found.get::<_, i32>(0), mark);
    }
    stage.end(storm).await;
    assert_eq!(stage.ledger.failures, Vec::<String>::new());
    stage.assert_exact().await;
}

/// Its process lives and is cut off from the secondary; the other proxy is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_is_cut_off_is_deposed() {
    let mut stage = Stage::set(Phase::DualWrite).await;
    stage.rig.until(|status| mirroring(status).state == "running").await;
    let other = Another::past_the_relay(&stage.rig, Phase::DualWrite).await;
    other
        .until(&stage.rig, |status| mirroring(status).state == "waiting")
        .await;
    let url = other.url();
    let storm = stage.storm(|weather| weather.urls.push(url)).await;
    storm.rage(100).await;
    stage.relay.swallow();
    other
        .until(&stage.rig, |status| mirroring(status).state == "running")
        .await;
    storm.everybody_commits(10).await;
    stage.relay.calm();
    stage.rig.until(|status| mirroring(status).state == "waiting").await;
    stage.end(storm).await;
    assert_eq!(stage.ledger.failures, Vec::<String>::new());
    other.wait_caught_up().await;
    stop_and_check(stage, other).await;
}

/// Its process stands still, whatever it was in the middle of; then it goes on as if nothing
/// had happened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_stands_still_is_deposed() {
    let mut stage = Stage::set(Phase::DualWrite).await;
    stage.rig.until(|status| mirroring(status).state == "running").await;
    let other = Another::beside(&stage.rig, Phase::DualWrite).await;
    other
        .until(&stage.rig, |status| mirroring(status).state == "waiting")
        .await;
    let url = other.url();
    let storm = stage.storm(|weather| weather.urls = vec![url]).await;
    storm.rage(100).await;
    let paused = processes::pause(stage.rig.proxy_pid());
    other
        .until(&stage.rig, |status| mirroring(status).state == "running")
        .await;
    storm.everybody_commits(10).await;
    drop(paused);
    stage.rig.until(|status| mirroring(status).state == "waiting").await;
    stage.end(storm).await;
    assert_eq!(stage.ledger.failures, Vec::<String>::new());
    stop_and_check(stage, other).await;
}

/// A server process notices only at its statement's end that its client is gone; until then it
/// would keep the watermark's row locked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_killed_in_the_middle_of_a_statement_leaves_nothing_behind() {
    let mut stage = Stage::set(Phase::DualWrite).await;
    stage.rig.until(|status| mirroring(status).state == "running").await;
    let other = Another::beside(&stage.rig, Phase::DualWrite).await;
    other.until(&stage.rig, is_waiting).await;
    stage.rig.wait_caught_up().await;
    let locking = stage.rig.direct(Side::New, SUPERUSER).await;
    locking.batch_execute("BEGIN; LOCK TABLE jobs").await.unwrap();
    let client = crate::rig::connect(&other.url()).await.unwrap();
    client.batch_execute("INSERT INTO jobs DEFAULT VALUES").await.unwrap();
    let stuck = "SELECT COALESCE(min(pid), 0) FROM pg_stat_activity WHERE application_name LIKE 'pgtandem applier%' AND wait_event_type = 'Lock'";
    let left = until_changed(&stage, stuck, "0").await;
    stage.rig.kill_proxy();
    let successor = name(other.pid());
    other
        .until(&stage.rig, |status| {
            let applier = mirroring(status).applier.as_ref();
            applier.is_some_and(|applier| applier.starts_with(&successor))
        })
        .await;
    let still = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {left}");
    until_changed(&stage, &still, "1").await;
    locking.batch_execute("ROLLBACK").await.unwrap();
    other.wait_caught_up().await;
    stage.rig.spawn_proxy();
    stage.rig.until(is_waiting).await;
    stop_and_check(stage, other).await;
}

/// Asks the secondary until it answers something else.
async fn until_changed(stage: &Stage, sql: &str, from: &str) -> String {
    for _ in 0..1200 {
        let value = stage.rig.value(Side::New, sql).await;
        if value != from {
            return value;
        }
        sleep(Duration::from_millis(50)).await;
    }
    panic!("always {from}: {sql}\n{}", stage.rig.log());
}

/// The lease goes back to the rig's proxy, which then answers for sequences, too.
async fn stop_and_check(stage: Stage, mut other: Another) {
    other.kill();
    stage.rig.until(|status| mirroring(status).state == "running").await;
    stage.assert_exact().await;
}

/// As a rehearsal does, which another proxy may run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_else_drew_from_the_secondarys_sequences_is_set_right() {
    let stage = Stage::set(Phase::DualWrite).await;
    let client = stage.rig.client().await;
    client.batch_execute("INSERT INTO jobs DEFAULT VALUES").await.unwrap();
    stage.rig.wait_caught_up().await;
    let value = "SELECT last_value FROM jobs_id_seq";
    let primary = stage.rig.value(Side::Legacy, value).await;
    stage
        .rig
        .value(Side::New, "nextval('jobs_id_seq') + nextval('jobs_id_seq')")
        .await;
    assert_ne!(stage.rig.value(Side::New, value).await, primary);
    stage.rig.wait_caught_up().await;
    assert_eq!(stage.rig.value(Side::New, value).await, primary);
}

/// Each of them is connected to it for purposes of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_two_proxies_serve_is_dropped_through_one() {
    let mut rig = Rig::new();
    for server in [&rig.legacy, &rig.new] {
        server.sql("postgres", &format!("ALTER ROLE {APP} CREATEDB")).unwrap();
    }
    rig.spawn_with_every_database(Phase::DualWrite);
    rig.until(|status| status.phase == Phase::DualWrite && status.problem.is_none())
        .await;
    let other = Another::beside(&rig, Phase::DualWrite).await;
    let client = rig.client().await;
    client.batch_execute("CREATE DATABASE spare").await.unwrap();
    let knows = |status: &Status| {
        let spare = status.databases.iter().find(|database| database.name == "spare");
        spare.is_some_and(|spare| spare.mirroring.as_ref().is_some_and(|m| m.error.is_none()))
    };
    rig.until(knows).await;
    other.until(&rig, knows).await;
    client.batch_execute("DROP DATABASE spare").await.unwrap();
    rig.wait_caught_up().await;
    let there = "SELECT count(*) FROM pg_database WHERE datname = 'spare'";
    while rig.value(Side::New, there).await != "0" {
        sleep(Duration::from_millis(50)).await;
    }
    other
        .until(&rig, |status| {
            !status.databases.iter().any(|database| database.name == "spare")
        })
        .await;
}
