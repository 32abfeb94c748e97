//! Whatever happens to the secondary or on the way to it.

use pgtandem::control::Phase;
use rand::Rng;

use crate::fault::OF_THE_SECONDARY;
use crate::stage::{Stage, rounds};

async fn clients_notice_nothing(phase: Phase) {
    let mut stage = Stage::set(phase).await;
    for _ in 0..rounds() {
        for fault in OF_THE_SECONDARY {
            let storm = stage.storm(|_| ()).await;
            storm.rage(stage.random.random_range(20..200)).await;
            fault.befall(&mut stage, &storm).await;
            storm.rage(50).await;
            stage.end(storm).await;
            assert_eq!(stage.ledger.failures, Vec::<String>::new(), "{fault:?}");
            assert_eq!(stage.ledger.unknown, [], "{fault:?}");
            stage.assert_exact().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_notice_nothing_of_the_secondary_while_writes_are_mirrored() {
    clients_notice_nothing(Phase::DualWrite).await;
}

/// With shadow reads, which have connections of their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_notice_nothing_of_the_secondary_while_reads_are_compared() {
    clients_notice_nothing(Phase::DualRead).await;
}
