//! The faults, each of which strikes and is mended.

use std::time::Duration;

use rand::Rng;
use tokio::time::{Instant, sleep};

use crate::processes;
use crate::rig::storm::Storm;
use crate::stage::{Stage, setting};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    ProxyKilled,
    PrimaryDown,
    SecondaryKilled,
    /// SIGSTOP, for a while.
    SecondaryStopped,
    /// No connection to the secondary, and no new one.
    Cut,
    Reset,
    Delayed,
    /// The connections to the secondary pass nothing any more, for ever; new ones do.
    Forgotten,
    /// Nothing passes to the secondary; later new connections do.
    Swallowed,
}

pub(crate) const OF_THE_SECONDARY: [Fault; 7] = [
    Fault::SecondaryKilled,
    Fault::SecondaryStopped,
    Fault::Cut,
    Fault::Reset,
    Fault::Delayed,
    Fault::Forgotten,
    Fault::Swallowed,
];

impl Fault {
    /// Strikes, looks that clients go on where they must, and mends.
    pub(crate) async fn befall(self, stage: &mut Stage, storm: &Storm) {
        match self {
            Self::ProxyKilled => {
                stage.rig.kill_proxy();
                self.linger(stage).await;
                stage.rig.spawn_proxy();
            }
            Self::PrimaryDown => {
                stage.rig.legacy.stop("immediate").unwrap();
                self.linger(stage).await;
                stage.rig.legacy.start_again().unwrap();
            }
            Self::SecondaryKilled => {
                processes::kill(&stage.rig.new);
                clients_go_on(storm).await;
                stage.rig.new.start_again().unwrap();
            }
            Self::SecondaryStopped => {
                let stopped = processes::stop(&stage.rig.new);
                let until = Instant::now() + Duration::from_secs(setting("PGTANDEM_CRASH_STOP_SECONDS", 5));
                while Instant::now() < until {
                    clients_go_on(storm).await;
                }
                drop(stopped);
            }
            Self::Cut => {
                stage.relay.cut();
                clients_go_on(storm).await;
                stage.relay.calm();
            }
            Self::Reset => {
                for _ in 0..5 {
                    stage.relay.reset();
                    clients_go_on(storm).await;
                }
            }
            Self::Delayed => {
                stage
                    .relay
                    .delay(Duration::from_millis(stage.random.random_range(20..200)));
                clients_go_on(storm).await;
                stage.relay.calm();
            }
            Self::Forgotten => {
                stage.relay.forget();
                clients_go_on(storm).await;
            }
            Self::Swallowed => {
                stage.relay.swallow();
                clients_go_on(storm).await;
                stage.relay.calm();
            }
        }
    }

    /// Some moments between blow and mending; clients cannot go on.
    async fn linger(self, stage: &mut Stage) {
        sleep(Duration::from_millis(stage.random.random_range(0..300))).await;
    }
}

/// Every single client goes on committing.
async fn clients_go_on(storm: &Storm) {
    storm.everybody_commits(10).await;
}
