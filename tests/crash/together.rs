//! Two faults at once, chosen by seed.

use pgtandem::control::Phase;
use rand::Rng;
use rand::seq::IndexedRandom;

use crate::fault::{Fault, OF_THE_SECONDARY};
use crate::processes;
use crate::stage::{Stage, rounds};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_faults_at_once() {
    let mut stage = Stage::set(Phase::DualWrite).await;
    for _ in 0..4 * rounds() {
        let storm = stage.storm(|weather| weather.reconnect = true).await;
        storm.rage(stage.random.random_range(20..200)).await;
        let first = *OF_THE_SECONDARY.choose(&mut stage.random).unwrap();
        let second = [Fault::ProxyKilled, Fault::PrimaryDown][stage.random.random_range(0..2)];
        eprintln!("{first:?} and {second:?}");
        // The first one is not mended before the second strikes.
        let stopped = match first {
            Fault::SecondaryKilled => {
                processes::kill(&stage.rig.new);
                None
            }
            Fault::SecondaryStopped => Some(processes::stop(&stage.rig.new)),
            Fault::Cut => {
                stage.relay.cut();
                None
            }
            Fault::Reset => {
                stage.relay.reset();
                None
            }
            Fault::Delayed => {
                stage.relay.delay(std::time::Duration::from_millis(100));
                None
            }
            Fault::Forgotten => {
                stage.relay.forget();
                None
            }
            Fault::Swallowed => {
                stage.relay.swallow();
                None
            }
            Fault::ProxyKilled | Fault::PrimaryDown => unreachable!(),
        };
        storm.rage(stage.random.random_range(1..50)).await;
        second.befall(&mut stage, &storm).await;
        if second == Fault::PrimaryDown {
            storm.rage(20).await;
        }
        drop(stopped);
        stage.relay.calm();
        if first == Fault::SecondaryKilled {
            stage.rig.new.start_again().unwrap();
        }
        storm.rage(50).await;
        stage.end(storm).await;
        assert_eq!(stage.ledger.failures, Vec::<String>::new());
        stage.assert_exact().await;
    }
}
