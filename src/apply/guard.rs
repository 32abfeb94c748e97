//! What must be looked at on the primary whatever becomes of the rounds: the journal's bound,
//! which holds while the secondary is away, stands still or refuses, and in every proxy; and how
//! far the secondary is behind.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::session::connect_primary;
use super::status::{ApplierState, ApplierStatus, JournalStatus, Lag, MIRRORING_STOPPED, Seeding, TableStatus};
use super::task::Shared;
use super::{ApplierConfig, ApplyError, doing};
use crate::catalog::snapshot::Snapshot;
use crate::journal::read::Unsigned;
use crate::journal::{SideRole, rotation};
use crate::upstream::control::Control;

const INTERVAL: Duration = Duration::from_secs(1);

/// Rounds follow each other within this while all is well; up to there, what they have not yet
/// read is no lag.
const ROUND_USUAL: Duration = Duration::from_secs(1);

/// A primary that does not answer such a look for this long is taken for cut off.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// Where the primary stood at one look.
struct Head {
    journal: JournalStatus,
    /// Those that were mirrored, once mirroring has been stopped: a proxy that has never seen
    /// the secondary must tell of them, too.
    stopped_tables: Vec<TableStatus>,
    /// The first transaction id not given out.
    xmax: u64,
    /// The end of the log.
    position: u64,
}

/// Looks until dropped. Errors are those of the connection, which the rounds have, too, and
/// report.
pub(super) async fn keep(config: Arc<ApplierConfig>, shared: Arc<Shared>, status: Arc<watch::Sender<ApplierStatus>>) {
    loop {
        let Err(error) = look_again_and_again(&config, &shared, &status).await;
        tracing::debug!(%error, "the journal's bound is not looked at for a moment");
        sleep(INTERVAL).await;
    }
}

async fn look_again_and_again(
    config: &ApplierConfig,
    shared: &Shared,
    status: &watch::Sender<ApplierStatus>,
) -> Result<Infallible, ApplyError> {
    let mut primary = connect_primary(config, "guard").await?;
    // Cut off in the middle of a change, it would hold the lock on the side's state.
    primary
        .batch_execute("SET idle_in_transaction_session_timeout = '30s'")
        .await
        .map_err(doing("prepare the guard's connection"))?;
    loop {
        let Ok(head) = timeout(SILENCE_MAX, look(&mut primary, config)).await else {
            // Its other connections may wait for ever, too.
            shared.primary_silent.notify_waiters();
            return Err(ApplyError::Silent("primary"));
        };
        report(&head?, status);
        sleep(INTERVAL).await;
    }
}

async fn look(primary: &mut Control, config: &ApplierConfig) -> Result<Head, ApplyError> {
    let bytes = rotation::measure(primary).await?;
    let state = rotation::enforce_limit(primary, &config.journal, bytes).await?;
    let row = primary
        .query_one(
            "SELECT pg_snapshot_xmax(pg_current_snapshot())::text, pg_current_wal_insert_lsn()",
            &[],
        )
        .await
        .map_err(doing("measure the lag"))?;
    let stopped = state.side.role == SideRole::Off;
    Ok(Head {
        journal: JournalStatus {
            bytes,
            full: state.full,
            stopped,
        },
        stopped_tables: if stopped {
            captured_tables(primary).await?
        } else {
            Vec::new()
        },
        xmax: row.get::<_, &str>(0).parse().unwrap_or_default(),
        position: row.get::<_, Unsigned>(1).0,
    })
}

async fn captured_tables(primary: &Control) -> Result<Vec<TableStatus>, ApplyError> {
    let rows = primary
        .query("SELECT schema, name FROM pgtandem.captured ORDER BY schema, name", &[])
        .await
        .map_err(doing("list captured tables"))?;
    Ok(rows
        .iter()
        .map(|row| TableStatus {
            schema: row.get(0),
            name: row.get(1),
            seeding: Seeding::Unseeded,
            paused: None,
            note: Some(MIRRORING_STOPPED.into()),
            diverged: 0,
            verified: None,
        })
        .collect())
}

fn report(head: &Head, status: &watch::Sender<ApplierStatus>) {
    status.send_modify(|status| {
        status.journal = head.journal;
        if status.tables.is_empty() {
            status.tables.clone_from(&head.stopped_tables);
        }
        let recent = status.caught_up_at.is_some_and(|at| at.elapsed() < ROUND_USUAL);
        if recent || (status.state == ApplierState::Waiting && !status.behind) {
            status.lag = Lag::default();
            return;
        }
        let Some(watermark) = &status.watermark else { return };
        if let Ok(since) = watermark.snapshot.parse::<Snapshot>() {
            status.lag.transactions = head.xmax.saturating_sub(since.xmax());
            status.lag.bytes = head.position.saturating_sub(parse_lsn(&watermark.position));
        }
        status.lag.seconds = status.caught_up_at.map_or(0.0, |at| at.elapsed().as_secs_f64());
    });
}

fn parse_lsn(text: &str) -> u64 {
    let Some((high, low)) = text.split_once('/') else {
        return 0;
    };
    let parse = |part| u64::from_str_radix(part, 16).unwrap_or_default();
    parse(high) << 32 | parse(low)
}
