//! The primary dies without a goodbye; so does the proxy.

use pgtandem::control::Phase;
use rand::Rng;

use crate::fault::Fault;
use crate::stage::{Stage, rounds};

async fn after(fault: Fault, times: u64, asynchronous: bool) -> Stage {
    let mut stage = Stage::set(Phase::DualWrite).await;
    let storm = stage
        .storm(|weather| {
            weather.reconnect = true;
            weather.asynchronous = asynchronous;
        })
        .await;
    for _ in 0..times * rounds() {
        storm.rage(stage.random.random_range(20..300)).await;
        fault.befall(&mut stage, &storm).await;
    }
    storm.rage(100).await;
    stage.end(storm).await;
    assert_eq!(stage.ledger.failures, Vec::<String>::new());
    stage
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_the_proxy_loses_and_doubles_nothing() {
    after(Fault::ProxyKilled, 5, false).await.assert_exact().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_the_primary_loses_nothing() {
    after(Fault::PrimaryDown, 4, false).await.assert_exact().await;
}

/// An acknowledged commit may be lost there; then the secondary never had it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_the_primary_under_asynchronous_commits_leaves_both_sides_alike() {
    after(Fault::PrimaryDown, 6, true).await.assert_alike().await;
}
