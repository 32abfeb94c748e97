//! Rather than fill the quarantine, mirroring stops, until an operator says to go on.

use crate::apply::session::Session;
use crate::apply::{ApplyError, doing, errands};

impl Session {
    /// Asked before a commit: rather than fill the quarantine, mirroring stops.
    pub(in crate::apply) async fn judge(&mut self) -> Result<(), ApplyError> {
        let diverged: u64 = self.diverged_in_round.values().sum();
        let errors = self.held_in_round + diverged.min(self.transactions_in_round);
        let counted = self
            .memory
            .count(self.transactions_in_round, errors, &self.config.writes);
        let Err(too_many) = counted else { return Ok(()) };
        self.secondary
            .batch_execute("ROLLBACK")
            .await
            .map_err(doing("roll back a round"))?;
        let last = self
            .last_refusal
            .as_ref()
            .map_or_else(String::new, |error| format!("; the last error: {error}"));
        let reason = format!(
            "{too_many}{last}. Nothing is lost, the journal keeps what comes: mend the secondary, then `pgtandem quarantine retry` or `pgtandem reload`"
        );
        self.secondary
            .execute(
                "INSERT INTO pgtandem.halted (reason) VALUES ($1) ON CONFLICT (one) DO UPDATE SET reason = EXCLUDED.reason",
                &[&reason],
            )
            .await
            .map_err(doing("record that mirroring stops"))?;
        tracing::error!(reason, "mirroring stops");
        Err(ApplyError::Halted(reason))
    }

    /// At the beginning of a session: a halt lasts until an operator says to go on.
    pub(in crate::apply) async fn heed_halt(&self) -> Result<(), ApplyError> {
        let row = self
            .secondary
            .query_opt("SELECT reason FROM pgtandem.halted", &[])
            .await
            .map_err(doing("ask whether mirroring was stopped"))?;
        let Some(row) = row else { return Ok(()) };
        if errands::retry_waits(&self.secondary, self.config.epoch).await? {
            self.memory.say_go_on();
        }
        if !self.memory.may_go_on() {
            return Err(ApplyError::Halted(row.get(0)));
        }
        self.secondary
            .batch_execute("DELETE FROM pgtandem.halted")
            .await
            .map_err(doing("go on with mirroring"))?;
        tracing::warn!("mirroring goes on by an operator's order");
        Ok(())
    }
}
