//! Making a wish for a phase so.

use std::sync::Arc;

use time::OffsetDateTime;

use super::flips::Ordered;
use super::world::World;
use crate::admin::api::{DatabaseStatus, Gate};
use crate::control::{Control, Phase};
use crate::switchover::{Kind, Measured, OfProxy, Plan, gates, in_the_way, plan};

impl World {
    /// Leads the migration to `wish`; what was done, in words. The caller holds `transition`.
    ///
    /// # Errors
    /// Why it could not be done; the phase is then what it was.
    pub(super) async fn make_so(self: &Arc<Self>, wish: Phase, ordered: Ordered) -> Result<Vec<String>, String> {
        let now = self.control_now();
        match plan(now, wish).map_err(|refusal| refusal.to_string())? {
            Plan::Nothing => Ok(Vec::new()),
            Plan::Publish => Ok(vec![self.publish(Control { phase: wish, ..now })]),
            Plan::StartMirroring => self.start_mirroring(Control { phase: wish, ..now }).await,
            Plan::StopMirroring => self.stop_mirroring(Control { phase: wish, ..now }).await,
            Plan::Complete => self.complete(Control { phase: wish, ..now }).await,
            Plan::Flip { to } => {
                self.catch_up_before_flip().await;
                let gates = self.gates().await;
                if let (Some(gate), None) = (in_the_way(&gates, Kind::Flip), &ordered.force) {
                    return Err(format!(
                        "a gate is closed: {}: {} (required: {}); `pgtandem switchover --to {to} --dry-run` shows all",
                        gate.name, gate.measured, gate.required
                    ));
                }
                let target = Control {
                    phase: wish,
                    primary: to,
                    epoch: now.epoch.next(),
                };
                self.flip(Kind::Flip, now, target, ordered).await
            }
        }
    }

    /// Why `wish` is not made so until the operator says yes to it by name: it ends the way back.
    pub(super) fn unconfirmed(&self, wish: Phase) -> Option<String> {
        let ends = plan(self.control_now(), wish) == Ok(Plan::Complete);
        ends.then(|| {
            "phase: complete ends the way back: mirroring to legacy stops, and what pgtandem installed is removed from \
             both sides. `pgtandem reload --yes` or `pgtandem complete --yes` does it"
                .to_owned()
        })
    }

    /// The conditions of a switchover, measured now.
    pub(super) async fn gates(&self) -> Vec<Gate> {
        // First, so that every session that the servers show is known by then.
        self.participant.survey(&self.sessions.registry).await;
        let tandems = self.tandems();
        let looking = tandems.iter().map(|tandem| tandem.look_at_servers());
        futures_util::future::join_all(looking).await;
        self.gates_of(&self.databases().await)
    }

    /// The conditions of a switchover, by what the status has.
    pub(super) fn gates_of(&self, databases: &[DatabaseStatus]) -> Vec<Gate> {
        let config = self.config.load();
        let told = self.sessions_of_proxies();
        let sessions: Vec<OfProxy<'_>> = told
            .iter()
            .map(|(name, answers, survey)| OfProxy {
                name,
                answers: *answers,
                survey,
            })
            .collect();
        gates(&Measured {
            databases,
            proxies: &self.proxies(),
            sessions: &sessions,
            primary: self.control_now().primary,
            policy: &config.switchover,
            journal_max: config.journal.max_bytes,
            now: OffsetDateTime::now_utc(),
        })
    }

    /// An applier that has just started, or is a little behind, is no reason to refuse: it is
    /// given as long as open transactions are. What it does not reach, the gates measure.
    pub(super) async fn catch_up_before_flip(&self) {
        let patience = self.config.load().switchover.drain_timeout;
        for tandem in self.tandems().iter() {
            if let Err(why) = tandem.catch_up(patience).await {
                tracing::warn!(database = tandem.name(), why, "not caught up before a switchover");
            }
        }
    }

    pub(super) fn publish(&self, control: Control) -> String {
        let was = self.control.send_replace(control);
        format!("phase {} -> {}", was.phase, control.phase)
    }

    async fn start_mirroring(&self, control: Control) -> Result<Vec<String>, String> {
        for tandem in self.tandems().iter() {
            tandem
                .start_mirroring(control)
                .await
                .map_err(|error| format!("database {}: {error}", tandem.name()))?;
        }
        Ok(vec![self.publish(control)])
    }

    async fn stop_mirroring(&self, control: Control) -> Result<Vec<String>, String> {
        let published = self.publish(control);
        for tandem in self.tandems().iter() {
            tandem
                .stop_mirroring()
                .await
                .map_err(|error| format!("database {}: remove capture: {error}", tandem.name()))?;
        }
        Ok(vec![
            published,
            "capture was removed; the secondary must be seeded again before it is mirrored again".into(),
        ])
    }

    async fn complete(&self, control: Control) -> Result<Vec<String>, String> {
        let published = self.publish(control);
        for tandem in self.tandems().iter() {
            tandem
                .complete()
                .await
                .map_err(|error| format!("database {}: remove what was installed: {error}", tandem.name()))?;
        }
        Ok(vec![
            published,
            "mirroring has ended and what pgtandem installed was removed; only schema pgtandem with a marker is left on legacy".into(),
            "the legacy server is no longer needed by pgtandem, and nothing keeps writers off it any more: \
             revoke CONNECT there or stop it, keep its last backup for as long as you must, then switch it off"
                .into(),
        ])
    }
}
