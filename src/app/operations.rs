//! What the admin server asks, answered.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::shadows::Shadows;
use super::world::World;
use crate::admin::Operations;
use crate::admin::api::{
    DatabaseStatus, ExplainAnswer, ReloadAnswer, Sessions, Status, SwitchoverAnswer, SwitchoverRequest, WaitAnswer,
};
use crate::control::{Phase, Side};
use crate::sql::{ExplainContext, explain};

/// The admin server hands out clones of the one world.
impl Operations for World {
    fn ready(&self) -> Result<(), String> {
        let facts = self.facts();
        match (&facts.problem, facts.serving) {
            (_, true) => Ok(()),
            (problem, false) => Err(problem.clone().unwrap_or_else(|| "starting".into())),
        }
    }

    async fn status(&self) -> Status {
        let control = self.control_now();
        let config = self.config.load_full();
        let databases = self.databases().await;
        let (problem, last_flip) = {
            let facts = self.facts();
            (facts.problem.clone(), facts.last_flip.clone())
        };
        let gates = if control.phase.mirrors() {
            crate::switchover::gates(&databases)
        } else {
            Vec::new()
        };
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            phase: control.phase,
            wish: config.phase,
            primary: control.primary,
            epoch: control.epoch,
            problem,
            sessions: Sessions {
                open: self.sessions.registry.len(),
                limit: config.limits.max_connections,
            },
            databases,
            gates,
            last_flip,
        }
    }

    async fn reload(self: Arc<Self>) -> Result<ReloadAnswer, String> {
        self.reload_config().await
    }

    async fn switchover(self: Arc<Self>, request: SwitchoverRequest) -> Result<SwitchoverAnswer, String> {
        let _changing = self.transition.lock().await;
        if !request.dry_run {
            self.catch_up_before_flip().await;
        }
        let gates = self.gates().await;
        let unchanged = |gates| SwitchoverAnswer {
            gates,
            flip: None,
            done: false,
        };
        if request.dry_run || (request.force.is_none() && gates.iter().any(|gate| !gate.open)) {
            return Ok(unchanged(gates));
        }
        let wish = match request.to {
            Side::New => Phase::Switchover,
            Side::Legacy => Phase::DualRead,
        };
        if self.control_now().primary == request.to {
            return Err(format!("{} is primary already", request.to));
        }
        let outcome = self.make_so(wish, request.force).await;
        self.facts().problem = match &outcome {
            Ok(_) if self.config.load().phase != wish => Some(format!(
                "the switchover command led to phase {wish}, proxy.yaml still says {}; change it, or the next reload leads back",
                self.config.load().phase
            )),
            Ok(_) => None,
            Err(why) => Some(why.clone()),
        };
        outcome?;
        let flip = self.facts().last_flip.clone();
        Ok(SwitchoverAnswer {
            gates,
            flip,
            done: true,
        })
    }

    async fn wait_caught_up(&self, timeout: Duration) -> Result<WaitAnswer, String> {
        let began = Instant::now();
        let control = self.control_now();
        if !control.phase.mirrors() {
            return Err(format!(
                "phase {} mirrors nothing, so there is nothing to wait for",
                control.phase
            ));
        }
        let mut behind = None;
        for tandem in self.tandems().iter() {
            let left = timeout.saturating_sub(began.elapsed());
            if let Err(why) = tandem.catch_up(left).await {
                behind = Some(format!("database {}: {why}", tandem.name()));
                break;
            }
        }
        Ok(WaitAnswer {
            caught_up: behind.is_none(),
            waited_ms: began.elapsed().as_secs_f64() * 1000.0,
            behind,
        })
    }

    async fn explain(&self, sql: &str) -> ExplainAnswer {
        // The databases' catalogs differ in what they know of functions; the first one's stands
        // for all where a statement is explained without saying where it runs.
        let catalog = match self.tandems().first() {
            Some(tandem) => Shadows::read_catalog(tandem, self.control_now()).await,
            None => None,
        };
        let context = ExplainContext {
            phase: self.control_now().phase,
            shadow_percent: self.config.load().reads.shadow_percent,
            catalog: catalog.as_ref().map(|catalog| &catalog.functions as _),
        };
        let explanation = explain(sql.as_bytes(), &context);
        ExplainAnswer {
            text: explanation.to_string(),
            explanation: serde_json::to_value(&explanation).unwrap_or_default(),
        }
    }
}

impl World {
    pub(super) async fn databases(&self) -> Vec<DatabaseStatus> {
        let mut databases = Vec::new();
        for tandem in self.tandems().iter() {
            let mut status = tandem.status();
            status.shadow_reads = self.shadows.of_database(tandem.name());
            status.acknowledge = self.both_sides.status(tandem.name());
            databases.push(status);
        }
        databases
    }
}
