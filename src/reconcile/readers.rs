//! Connections that read one cut: on the primary in the round's own snapshot, on the secondary in
//! one taken right after that round. The applier stands still only until all of them have their
//! snapshot.

use tokio::time::Instant;
use tokio_postgres::Client;

use super::VerifyError;
use super::report::CutReport;
use super::verify::SecondarySnapshot;
use crate::apply::Applier;
use crate::catalog::PINNED_SETTINGS;
use crate::config::Target;
use crate::journal::read::lsn;
use crate::upstream::control::{Control, connect};

/// Which of the two a statement is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Primary,
    Secondary,
}

/// One worker's two connections.
pub(super) struct Pair {
    pub primary: Control,
    pub secondary: Control,
}

impl Pair {
    pub(super) const fn client(&self, role: Role) -> &Control {
        match role {
            Role::Primary => &self.primary,
            Role::Secondary => &self.secondary,
        }
    }

    /// Asks both sides the same, each in its own words.
    pub(super) async fn query(
        &self,
        sql: impl Fn(Role) -> String,
    ) -> Result<(Vec<tokio_postgres::Row>, Vec<tokio_postgres::Row>), tokio_postgres::Error> {
        let (on_primary, on_secondary) = (sql(Role::Primary), sql(Role::Secondary));
        tokio::try_join!(
            self.primary.query(&on_primary, &[]),
            self.secondary.query(&on_secondary, &[])
        )
    }
}

/// Ranges are small and read by index; a plan that is compiled or run in parallel costs more.
const SETTINGS: &str = "\
    SET row_security = off; SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
    SET default_transaction_isolation = 'repeatable read'; SET jit = off; SET max_parallel_workers_per_gather = 0; \
    SET client_min_messages = warning;";

pub(super) async fn reader(target: &Target) -> Result<Control, VerifyError> {
    let client = connect(target, "verify").await?;
    client.batch_execute(&format!("{PINNED_SETTINGS} {SETTINGS}")).await?;
    Ok(client)
}

/// The connections of all workers.
pub(super) struct Readers {
    pub pairs: Vec<Pair>,
    /// Since when the snapshots are there.
    taken: Instant,
}

impl Readers {
    pub(super) async fn connect(primary: &Target, secondary: &Target, workers: usize) -> Result<Self, VerifyError> {
        let mut pairs = Vec::with_capacity(workers);
        for _ in 0..workers.max(1) {
            let (primary, secondary) = tokio::try_join!(reader(primary), reader(secondary))?;
            pairs.push(Pair { primary, secondary });
        }
        Ok(Self {
            pairs,
            taken: Instant::now(),
        })
    }

    /// Takes every connection's snapshot at the end of a round.
    pub(super) async fn open(&mut self, applier: &Applier, when: SecondarySnapshot) -> Result<CutReport, VerifyError> {
        let held = applier.cut().await?;
        let since = Instant::now();
        let import = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{}'",
            held.primary_snapshot
        );
        let on_primary = self.pairs.iter().map(|pair| pair.primary.batch_execute(&import));
        let cut = held.cut.clone();
        let (secondary_snapshot, held_for) = match when {
            SecondarySnapshot::AtTheCut => {
                let (_, snapshots) =
                    tokio::try_join!(futures_util::future::try_join_all(on_primary), self.open_secondary())?;
                if !held.still_held() {
                    return Err(VerifyError::TooSlow);
                }
                let held_for = since.elapsed();
                drop(held);
                (snapshots, held_for)
            }
            SecondarySnapshot::RoundsLater(rounds) => {
                futures_util::future::try_join_all(on_primary).await?;
                let held_for = since.elapsed();
                drop(held);
                let mut status = applier.status();
                let later = status.wait_for(|status| status.round >= cut.round + rounds).await;
                later.map_err(|_| crate::apply::Stopped)?;
                (self.open_secondary().await?, held_for)
            }
        };
        self.taken = since;
        Ok(CutReport {
            round: cut.round,
            at: super::now(),
            primary_snapshot: cut.snapshot,
            secondary_snapshot,
            position: lsn(cut.position),
            held_ms: held_for.as_secs_f64() * 1000.0,
            age_ms: 0.0,
        })
    }

    /// The snapshot of the first one; the others' show the same rounds.
    async fn open_secondary(&self) -> Result<String, tokio_postgres::Error> {
        let open = async |client: &Client| {
            client
                .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                .await?;
            let row = client.query_one("SELECT pg_current_snapshot()::text", &[]).await?;
            Ok::<String, tokio_postgres::Error>(row.get(0))
        };
        let opened = futures_util::future::try_join_all(self.pairs.iter().map(|pair| open(&pair.secondary))).await?;
        Ok(opened.into_iter().next().unwrap_or_default())
    }

    /// How old the snapshots are.
    pub(super) fn age(&self) -> std::time::Duration {
        self.taken.elapsed()
    }

    /// Lets the snapshots go.
    pub(super) async fn close(&self) -> Result<(), VerifyError> {
        let ends = self
            .pairs
            .iter()
            .flat_map(|pair| [&pair.primary, &pair.secondary])
            .map(|client| client.batch_execute("ROLLBACK"));
        futures_util::future::try_join_all(ends).await?;
        Ok(())
    }
}
