//! Verifications that no operator asked for: of what was there before mirroring, once, and of
//! everything over and over.

use tokio::sync::mpsc;

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
    let report = verify_unheard(sides, &Options::of(Chosen::Unseeded)).await?;
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

/// All tables, pass after pass, at a rate that nobody feels; until the applier has stopped.
pub async fn verify_over_and_over(sides: &Sides, config: Verify) {
    let options = Options {
        workers: 1,
        rate: Some(config.rate),
        ..Options::of(Chosen::All)
    };
    loop {
        match verify_unheard(sides, &options).await {
            Err(VerifyError::Stopped(_)) => return,
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
        tokio::time::sleep(config.pause).await;
        if sides.applier.status().borrow().state == ApplierState::Stopped {
            return;
        }
    }
}

async fn verify_unheard(sides: &Sides, options: &Options) -> Result<DatabaseReport, VerifyError> {
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
    let (report, ()) = tokio::join!(verified, async { while heard.recv().await.is_some() {} });
    report
}
