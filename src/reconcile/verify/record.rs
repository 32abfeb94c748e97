//! What is recorded on the secondary of a table that was compared: that it is equal, and as of which
//! cut; or that it needs to be mended.

use tokio_postgres::Client;

use super::{SecondarySnapshot, Verification};
use crate::apply::{Seeding, TableStatus};
use crate::reconcile::VerifyError;
use crate::reconcile::report::TableReport;

impl Verification<'_> {
    /// A table that was taken for synced and is not closes the flip's gate until it is mended;
    /// unless it is only what is in quarantine.
    pub(super) async fn note_different(
        &self,
        report: &TableReport,
        status: &TableStatus,
    ) -> Result<String, VerifyError> {
        if let Some(held) = held_note(&self.secondary, status).await? {
            return Ok(held);
        }
        let note = format!(
            "verification found {} rows different (round {}); see `pgtandem repair`",
            report.differing.total(),
            report.rounds.map_or(0, |(_, last)| last)
        );
        if status.seeding == Seeding::Synced && self.options.secondary_snapshot == SecondarySnapshot::AtTheCut {
            self.secondary
                .execute(
                    "UPDATE pgtandem.seeding SET state = 'unseeded', note = $3
                      WHERE schema = $1 AND name = $2 AND state = 'synced' AND paused IS NULL",
                    &[&status.schema, &status.name, &note],
                )
                .await?;
            self.sides.applier.tables_changed();
        }
        Ok(note)
    }

    /// On the secondary, where `status` finds it: when and at which cut a table was last equal.
    pub(super) async fn record(&self, report: &TableReport) -> Result<(), VerifyError> {
        let Some((_, last)) = report.rounds else { return Ok(()) };
        let Some(cut) = self.cuts.iter().find(|cut| cut.round == last) else {
            return Ok(());
        };
        self.secondary
            .execute(
                "INSERT INTO pgtandem.verified (schema, name, epoch, at, round, snapshot, position, rows, digest)
                 VALUES ($1, $2, $3, $4::text::timestamptz, $5, $6, $7::text::pg_lsn, $8, $9)
                 ON CONFLICT (schema, name) DO UPDATE SET epoch = excluded.epoch, at = excluded.at, round = excluded.round,
                    snapshot = excluded.snapshot, position = excluded.position, rows = excluded.rows, digest = excluded.digest",
                &[
                    &report.schema,
                    &report.name,
                    &(self.sides.epoch.0 as i64),
                    &cut.at,
                    &(cut.round as i64),
                    &cut.primary_snapshot,
                    &cut.position,
                    &(report.rows as i64),
                    &report.digest.primary,
                ],
            )
            .await?;
        Ok(())
    }
}

/// Unless something happened to the table since it was looked at. Whether it was unseeded.
pub(super) async fn mark_synced(secondary: &Client, table: &TableStatus) -> Result<bool, VerifyError> {
    if table.seeding == Seeding::Synced {
        return Ok(false);
    }
    let marked = secondary
        .execute(
            "UPDATE pgtandem.seeding SET state = 'synced', note = NULL
              WHERE schema = $1 AND name = $2 AND state = 'unseeded' AND paused IS NULL AND note IS NOT DISTINCT FROM $3",
            &[&table.schema, &table.name, &table.note],
        )
        .await?;
    Ok(marked > 0)
}

/// Rows of a table that differ because what touches them is in quarantine.
async fn held_note(secondary: &Client, table: &TableStatus) -> Result<Option<String>, VerifyError> {
    let row = secondary
        .query_one(
            "SELECT count(DISTINCT k.id) FROM pgtandem.quarantine_key k JOIN pgtandem.seeding s ON s.rel = k.rel
              WHERE s.schema = $1 AND s.name = $2",
            &[&table.schema, &table.name],
        )
        .await?;
    Ok(match row.get::<_, i64>(0) {
        0 => None,
        held => Some(format!("{held} transactions in quarantine concern it")),
    })
}
