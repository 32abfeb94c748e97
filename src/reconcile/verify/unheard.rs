//! Verifications that no operator asked for: of what was there before mirroring, once, and of
//! everything over and over.

use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::{Chosen, Options, verify};
use crate::apply::ApplierState;
use crate::config::Verify;
use crate::reconcile::report::{DatabaseReport, TableReport, TableResult};
use crate::reconcile::{Sides, VerifyError};

/// Compares, at the start, the tables that held rows when their capture began; returns the names
/// of those that were found equal.
///
/// # Errors
/// As [`verify`].
pub async fn verify_unseeded(sides: &Sides) -> Result<Vec<String>, VerifyError> {
    let report = verify_unheard(sides, &Options::of(Chosen::Unseeded), std::future::pending()).await?;
    let (equal, others): (Vec<TableReport>, Vec<TableReport>) = report
        .tables
        .into_iter()
        .partition(|table| table.result == TableResult::Equal);
    for table in others {
        tracing::warn!(
            table = table.qualified(),
            "the two sides differ in rows that were there before mirroring; it needs seeding"
        );
    }
    Ok(equal.iter().map(TableReport::qualified).collect())
}

/// All tables, pass after pass, at a rate that nobody feels, while the settings say so; until the
/// applier has stopped, or nobody can change the settings any more. A pass under way when they change
/// is given up.
pub async fn verify_over_and_over(sides: &Sides, mut settings: watch::Receiver<Verify>) {
    loop {
        let config = *settings.borrow_and_update();
        if config.continuous {
            one_of_many(sides, config, &mut settings).await;
        } else {
            tracing::debug!(database = sides.database, "tables are not compared over and over");
        }
        let pause = config.continuous.then_some(config.pause);
        let mut status = sides.applier.status();
        tokio::select! {
            () = sleep_or_for_ever(pause) => {}
            changed = settings.wait_for(|now| *now != config) => if changed.is_err() { return },
            _ = status.wait_for(|status| status.state == ApplierState::Stopped) => return,
        }
    }
}

async fn sleep_or_for_ever(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

/// A pass over all tables.
async fn one_of_many(sides: &Sides, config: Verify, settings: &mut watch::Receiver<Verify>) {
    let options = Options {
        workers: 1,
        rate: Some(config.rate),
        ..Options::of(Chosen::All)
    };
    let changed = async {
        // Without a sender nothing changes any more.
        if settings.wait_for(|now| *now != config).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    match verify_unheard(sides, &options, changed).await {
        Err(VerifyError::Stopped(_) | VerifyError::Abandoned) => {}
        Err(error) => {
            tracing::info!(database = sides.database, %error, "a pass of the continuous verification ended early")
        }
        Ok(report) if report.equal => tracing::debug!(database = sides.database, "both sides were found equal"),
        Ok(report) => {
            for table in report.tables.iter().filter(|table| table.result != TableResult::Equal) {
                tracing::error!(
                    database = sides.database,
                    table = table.qualified(),
                    differing = table.differing.total(),
                    note = table.note,
                    "the two sides are not equal; see `pgtandem verify` and `pgtandem repair`"
                );
            }
            for sequence in report.sequences.iter().filter(|sequence| !sequence.equal) {
                tracing::error!(database = sides.database, ?sequence, "a sequence is not equal");
            }
        }
    }
}

/// Compares, and tells nobody how far it is; gives up when `enough` is over.
async fn verify_unheard(
    sides: &Sides,
    options: &Options,
    enough: impl Future<Output = ()>,
) -> Result<DatabaseReport, VerifyError> {
    let (events, mut heard) = mpsc::channel(16);
    let options = Options {
        keep: 0,
        ..options.clone()
    };
    let verified = async {
        // Dropped at the end, which ends the listening.
        let events = events;
        verify(sides, &options, &events).await
    };
    let listening = async {
        let heard_all = async { while heard.recv().await.is_some() {} };
        tokio::select! {
            () = heard_all => {}
            () = enough => {}
        }
        // Nobody listens any more, and it stops.
        drop(heard);
    };
    let (report, ()) = tokio::join!(verified, listening);
    report
}
