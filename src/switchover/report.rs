//! What the status tells of a database's mirroring.

use crate::admin::api::{self, Lag, Mirroring, TableStatus};
use crate::apply::{ApplierState, ApplierStatus};

/// Why a catch-up takes long, from what the applier says of itself.
pub(super) fn describe_delay(status: &ApplierStatus) -> String {
    match &status.state {
        ApplierState::Connecting { error: Some(error) } => format!("no connection: {error}"),
        ApplierState::Connecting { error: None } => "connecting".into(),
        ApplierState::Waiting => "another proxy holds the applier's lease".into(),
        ApplierState::Running => format!("{} transactions behind", status.lag.transactions),
        ApplierState::Failing { error } => format!("rounds fail: {error}"),
        ApplierState::Halted { error } => error.clone(),
        ApplierState::Stopped => "the applier is stopped".into(),
    }
}

/// The applier's status as the admin API tells it.
pub(super) fn mirroring(status: &ApplierStatus) -> Mirroring {
    let (state, error) = match &status.state {
        ApplierState::Connecting { error } => ("connecting", error.clone()),
        ApplierState::Waiting => ("waiting", None),
        ApplierState::Running => ("running", None),
        ApplierState::Failing { error } => ("failing", Some(error.clone())),
        ApplierState::Halted { error } => ("halted", Some(error.clone())),
        ApplierState::Stopped => ("stopped", None),
    };
    let lag = status.lag_now();
    Mirroring {
        state: state.into(),
        error,
        applier: status.applier.clone(),
        round: status.round,
        watermark: status.watermark.as_ref().map(|watermark| watermark.snapshot.clone()),
        position: status.watermark.as_ref().map(|watermark| watermark.position.clone()),
        changes_applied: status.changes_applied,
        transactions_applied: status.transactions_applied,
        lag: Lag {
            transactions: lag.transactions,
            bytes: lag.bytes,
            seconds: lag.seconds,
        },
        journal: api::Journal {
            bytes: status.journal.bytes,
            full: status.journal.full,
            stopped: status.journal.stopped,
        },
        tables: status
            .tables_now()
            .into_iter()
            .map(|table| TableStatus {
                name: format!("{}.{}", table.schema, table.name),
                seeding: table.seeding.as_str().into(),
                paused: table.paused,
                note: table.note,
                diverged: table.diverged,
                verified: table.verified,
            })
            .collect(),
        not_mirrored: status
            .not_mirrored
            .iter()
            .map(|object| format!("{}: {}", object.what, object.reason))
            .collect(),
        sql_for_dba: status.sql_for_dba.clone(),
        different: status.different.clone(),
        one_way: status.one_way.clone(),
        sequence_errors: status.sequence_errors.clone(),
        divergences: status.diverged,
        stray_writes: status.strays,
        quarantine: api::Quarantine {
            transactions: status.quarantine.transactions,
            refused: status.quarantine.refused,
            changes: status.quarantine.changes,
            oldest: status.quarantine.oldest.clone(),
            oldest_seconds: status.quarantine.oldest_seconds,
            error: status.quarantine.error.clone(),
        },
    }
}
