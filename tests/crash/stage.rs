//! The pair with a relay before the secondary, storm after storm over the same tables, and the
//! checks at the end.

use std::env;

use pgtandem::control::{Phase, Side};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::another::mirroring;
use crate::relay::Relay;
use crate::rig::storm::{Ledger, SCHEMA, Storm, Weather};
use crate::rig::{APP, Rig};

pub(crate) const WORKERS: i32 = 6;

/// `default`, or what the environment says.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// How often each fault is repeated.
pub(crate) fn rounds() -> u64 {
    setting("PGTANDEM_CRASH_ROUNDS", 1)
}

/// Repeats a run that failed.
pub(crate) fn seed() -> u64 {
    setting("PGTANDEM_CRASH_SEED", 20_261_121)
}

pub(crate) struct Stage {
    pub(crate) rig: Rig,
    pub(crate) relay: Relay,
    pub(crate) random: StdRng,
    pub(crate) ledger: Ledger,
    first_worker: i32,
}

impl Stage {
    pub(crate) async fn set(phase: Phase) -> Self {
        Self::set_with(phase, "").await
    }

    /// With more lines for proxy.yaml.
    pub(crate) async fn set_with(phase: Phase, extra: &str) -> Self {
        let mut rig = Rig::new();
        rig.extra = extra.to_owned();
        let relay = Relay::towards(rig.new.port).await;
        rig.new_port = Some(relay.port);
        rig.serve(phase).await;
        rig.client().await.batch_execute(SCHEMA).await.unwrap();
        Self {
            rig,
            relay,
            random: StdRng::seed_from_u64(seed()),
            ledger: Ledger::default(),
            first_worker: 0,
        }
    }

    /// A storm with workers of its own, through the proxy unless told otherwise.
    pub(crate) async fn storm(&mut self, alter: impl FnOnce(&mut Weather)) -> Storm {
        let mut weather = Weather::over(
            &self.rig.url(),
            seed() ^ self.first_worker.unsigned_abs() as u64,
            WORKERS,
        );
        alter(&mut weather);
        weather.first_worker = self.first_worker;
        self.first_worker += weather.workers;
        Storm::under(&weather).await
    }

    /// Ends a storm; what it did is checked with all that went before.
    pub(crate) async fn end(&mut self, storm: Storm) {
        self.ledger.join(storm.end().await);
    }

    /// The proxy serves, and all of this holds.
    pub(crate) async fn assert_exact(&self) {
        self.assert_alike().await;
        for side in [Side::Legacy, Side::New] {
            self.ledger.assert_kept(&self.rig.direct(side, APP).await).await;
        }
    }

    /// The same without "no acknowledged commit is lost": clients that commit with
    /// `synchronous_commit = off` accept that the primary loses some.
    pub(crate) async fn assert_alike(&self) {
        let rig = &self.rig;
        rig.until(|status| status.phase.mirrors() && status.problem.is_none())
            .await;
        rig.wait_caught_up().await;
        rig.assert_equal().await;
        for side in [Side::Legacy, Side::New] {
            self.ledger.assert_no_phantoms(&rig.direct(side, APP).await).await;
        }
        let status = rig.status().await.unwrap();
        let mirroring = mirroring(&status);
        assert_eq!(mirroring.divergences, 0, "{}", rig.log());
        for table in &mirroring.tables {
            assert_eq!((table.seeding.as_str(), &table.paused), ("synced", &None), "{table:?}");
        }
    }
}
