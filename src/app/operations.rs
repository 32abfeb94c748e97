//! What the admin server asks, answered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::flips::Ordered;
use super::shadows::Shadows;
use super::world::World;
use crate::admin::Operations;
use crate::admin::api::{
    AcknowledgeRequest, AcknowledgeStraysRequest, AcknowledgedStrays, BackfillAnswer, BackfillCancelRequest,
    BackfillRequest, DatabaseStatus, DiscardRequest, ExplainAnswer, HealAnswer, HealRequest, History, QuarantineAnswer,
    QuarantineEntry, QuarantineList, Recorded, ReloadAnswer, RetryRequest, Sessions, ShadowsAnswer, Status, StrayEntry,
    StrayList, SwitchoverAnswer, SwitchoverRequest, VerifyRequest, WaitAnswer,
};
use crate::apply::{Entry, HealOrder, Order};
use crate::chain;
use crate::control::{Control, Phase, Side};
use crate::journal::Stray;
use crate::reconcile::report::Event;
use crate::reconcile::{Chosen, Options};
use crate::shadow::rehearsal::read_reach;
use crate::shadow::{Plans, events};
use crate::sql::{CanaryShare, ExplainContext, explain};
use crate::switchover::{Kind, Tandem, in_the_way};

/// An order is carried out at the end of a round; that may take as long as a backlog does.
const ORDER_MAX: Duration = Duration::from_secs(60);

/// Each takes a connection to both servers.
const WORKERS_MAX: usize = 16;

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
            self.gates_of(&databases)
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
            switchover: self.under_way(),
            proxies: self.proxies(),
            last_flip,
            mismatch_log: Some(self.shadows.log().status()),
        }
    }

    async fn reload(self: Arc<Self>, yes: bool) -> Result<ReloadAnswer, String> {
        self.reload_config(yes).await
    }

    async fn switchover(self: Arc<Self>, request: SwitchoverRequest) -> Result<SwitchoverAnswer, String> {
        let _changing = self.transition.lock().await;
        let now = self.control_now();
        let to = match request.to {
            Some(to) => to,
            None if request.rehearse => now.secondary(),
            None => return Err("say which side shall be primary".into()),
        };
        if !request.dry_run {
            self.catch_up_before_flip().await;
        }
        let gates = self.gates().await;
        let kind = if request.rehearse { Kind::Rehearsal } else { Kind::Flip };
        if request.dry_run || (request.force.is_none() && in_the_way(&gates, kind).is_some()) {
            return Ok(SwitchoverAnswer {
                gates,
                flip: None,
                done: false,
            });
        }
        if now.primary == to {
            return Err(format!("{to} is primary already"));
        }
        let wish = match to {
            Side::New => Phase::Switchover,
            Side::Legacy => Phase::DualRead,
        };
        let ordered = Ordered {
            by: request.by.unwrap_or_default(),
            force: request.force,
        };
        if request.rehearse {
            if !now.phase.mirrors() {
                return Err(format!(
                    "phase {} mirrors nothing: there is nothing to rehearse",
                    now.phase
                ));
            }
            let target = Control {
                phase: wish,
                primary: to,
                epoch: now.epoch.next(),
            };
            self.flip(Kind::Rehearsal, now, target, ordered).await?;
        } else {
            let outcome = self.make_so(wish, ordered).await;
            self.facts().problem = match &outcome {
                Ok(_) => self.wish_differs(self.control_now()),
                Err(why) => Some(why.clone()),
            };
            outcome?;
        }
        let flip = self.facts().last_flip.clone();
        Ok(SwitchoverAnswer {
            gates,
            flip,
            done: true,
        })
    }

    async fn complete(self: Arc<Self>) -> Result<ReloadAnswer, String> {
        let _changing = self.transition.lock().await;
        let changed = self.make_so(Phase::Complete, Ordered::in_config()).await?;
        if self.config.load().phase != Phase::Complete {
            self.facts().problem =
                Some("the migration is complete; proxy.yaml still says otherwise: write phase: complete".into());
        }
        Ok(ReloadAnswer {
            phase: self.control_now().phase,
            changed,
        })
    }

    async fn history(&self) -> Result<History, String> {
        self.recorded_flips().await
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

    async fn quarantine(&self) -> Result<QuarantineList, String> {
        let control = self.control_now();
        let mut entries = Vec::new();
        if control.phase.mirrors() {
            for tandem in self.tandems().iter() {
                let held = tandem.quarantine(control.primary).await;
                let held = held.map_err(|why| format!("database {}: {why}", tandem.name()))?;
                entries.extend(held.into_iter().map(|entry| self.shown(tandem.name(), entry)));
            }
        }
        Ok(QuarantineList { entries })
    }

    async fn retry_held(&self, request: RetryRequest) -> Result<QuarantineAnswer, String> {
        let tandems = self.chosen(request.database.as_deref(), request.id.is_some())?;
        let order = Order::Retry {
            id: request.id,
            actor: request.actor,
        };
        let mut answer = QuarantineAnswer {
            databases: BTreeMap::new(),
            done: true,
        };
        for tandem in tandems {
            let outcome = tandem.order(order.clone(), ORDER_MAX).await;
            let outcome = outcome.map_err(|why| format!("database {}: {why}", tandem.name()))?;
            let found = request.id.is_none_or(|id| outcome.done.contains(&id));
            answer.done &= found && outcome.refused.is_empty() && outcome.left.is_empty();
            answer.databases.insert(tandem.name().to_owned(), outcome);
        }
        Ok(answer)
    }

    async fn discard_held(&self, request: DiscardRequest) -> Result<QuarantineAnswer, String> {
        if request.reason.trim().is_empty() {
            return Err("a reason must be given; it is recorded".into());
        }
        let order = Order::Discard {
            id: request.id,
            actor: request.actor,
            reason: request.reason,
        };
        let tandems = self.chosen(request.database.as_deref(), true)?;
        let mut answer = QuarantineAnswer {
            databases: BTreeMap::new(),
            done: true,
        };
        for tandem in tandems {
            let outcome = tandem.order(order.clone(), ORDER_MAX).await;
            let outcome = outcome.map_err(|why| format!("database {}: {why}", tandem.name()))?;
            answer.done &= outcome.done.contains(&request.id);
            answer.databases.insert(tandem.name().to_owned(), outcome);
        }
        Ok(answer)
    }

    async fn heal(&self, request: HealRequest) -> Result<HealAnswer, String> {
        let order = HealOrder {
            only: request.tables,
            dry_run: request.dry_run,
            actor: request.actor,
        };
        let tandems = self.chosen(request.database.as_deref(), !order.only.is_empty())?;
        let mut answer = HealAnswer {
            databases: BTreeMap::new(),
            done: true,
        };
        for tandem in tandems {
            let healed = tandem.heal(order.clone(), ORDER_MAX).await;
            let healed = healed.map_err(|why| format!("database {}: {why}", tandem.name()))?;
            answer.done &= healed.left.is_empty() && healed.to_seed.is_empty();
            answer.databases.insert(tandem.name().to_owned(), healed);
        }
        Ok(answer)
    }

    async fn strays(&self) -> Result<StrayList, String> {
        let mut list = StrayList::default();
        for tandem in self.tandems().iter() {
            let strays = tandem.strays().await;
            let strays = strays.map_err(|why| format!("database {}: {why}", tandem.name()))?;
            list.strays.extend(stray_entries(tandem.name(), strays));
        }
        Ok(list)
    }

    async fn acknowledge_strays(&self, request: AcknowledgeStraysRequest) -> Result<AcknowledgedStrays, String> {
        let AcknowledgeStraysRequest { database, by, reason } = request;
        if by.trim().is_empty() || reason.trim().is_empty() {
            return Err("an acknowledgement needs a name and a reason".into());
        }
        let mut answer = AcknowledgedStrays {
            acknowledged: Vec::new(),
            head: None,
            log_error: None,
        };
        for tandem in self.chosen(database.as_deref(), false)? {
            let strays = tandem.acknowledge_strays(&by, &reason).await;
            let strays = strays.map_err(|why| format!("database {}: {why}", tandem.name()))?;
            answer.acknowledged.extend(stray_entries(tandem.name(), strays));
        }
        if answer.acknowledged.is_empty() {
            return Ok(answer);
        }
        let told = serde_json::json!({ "by": by, "reason": reason, "strays": answer.acknowledged });
        let body = chain::body(&told).map_err(|error| error.to_string())?;
        match self.shadows.log().record(events::STRAYS_ACKNOWLEDGED, body).await {
            Ok(head) => answer.head = Some(head),
            Err(why) => answer.log_error = Some(why),
        }
        Ok(answer)
    }

    async fn acknowledge(&self, request: AcknowledgeRequest) -> Result<Recorded, String> {
        let keys = chain::body(&request.acknowledgement()?).map_err(|error| error.to_string())?;
        let head = self.shadows.log().record(events::ACKNOWLEDGED, keys).await?;
        Ok(Recorded { head })
    }

    async fn record_statistics(&self) -> Result<Recorded, String> {
        self.shadows.record_slower().await?;
        let head = self.record_reads().await?;
        Ok(Recorded { head })
    }

    fn backfill(&self) -> BackfillAnswer {
        let tandems = self.tandems();
        let databases = tandems
            .iter()
            .filter_map(|tandem| Some((tandem.name().to_owned(), tandem.backfill().status()?)));
        BackfillAnswer {
            databases: databases.collect(),
        }
    }

    async fn start_backfill(&self, request: BackfillRequest) -> Result<BackfillAnswer, String> {
        let control = self.control_now();
        if !control.phase.mirrors() {
            return Err(format!(
                "phase {} mirrors nothing: rows written meanwhile would be missing; begin with dual_write",
                control.phase
            ));
        }
        let mut answer = BackfillAnswer::default();
        for tandem in self.chosen(request.database.as_deref(), !request.order.tables.is_empty())? {
            self.has_cuts(&tandem)?;
            let status = tandem.start_backfill(control, &request.order).await;
            let status = status.map_err(|why| format!("database {}: {why}", tandem.name()))?;
            answer.databases.insert(tandem.name().to_owned(), status);
        }
        Ok(answer)
    }

    fn reconcile(self: Arc<Self>, request: VerifyRequest, mend: bool) -> Result<mpsc::Receiver<Event>, String> {
        let control = self.control_now();
        if !control.phase.mirrors() {
            return Err(format!("phase {} mirrors nothing, so there are no cuts", control.phase));
        }
        let tandems = self.chosen(request.database.as_deref(), !request.tables.is_empty())?;
        tandems.iter().try_for_each(|tandem| self.has_cuts(tandem))?;
        let chosen = match request.tables.is_empty() {
            true => Chosen::All,
            false => Chosen::Named(request.tables),
        };
        let usual = Options::of(chosen);
        let options = Options {
            workers: request.workers.unwrap_or(usual.workers).clamp(1, WORKERS_MAX),
            rate: request.rate.filter(|rate| *rate > 0),
            plain: request.plain,
            ..usual
        };
        let actor = mend.then(|| request.actor.unwrap_or_default());
        let (events, heard) = mpsc::channel(64);
        tokio::spawn(async move {
            for tandem in tandems {
                let done = tandem.reconcile(control, &options, actor.clone(), &events).await;
                if let Err(error) = done {
                    let database = tandem.name().to_owned();
                    // Nobody may listen any more.
                    events.send(Event::Failed { database, error }).await.ok();
                    return;
                }
            }
        });
        Ok(heard)
    }

    async fn cancel_backfill(&self, request: BackfillCancelRequest) -> Result<BackfillAnswer, String> {
        let mut any = false;
        for tandem in self.chosen(request.database.as_deref(), false)? {
            any |= tandem.backfill().cancel().await;
        }
        if any {
            Ok(self.backfill())
        } else {
            Err("no backfill is running".into())
        }
    }

    fn shadows(&self) -> ShadowsAnswer {
        ShadowsAnswer {
            rehearsals: self.rehearsals.report(self.config.load().reads.slower_ratio),
            ..self.shadows.report()
        }
    }

    async fn plans(&self, fingerprint: &str) -> Result<Plans, String> {
        self.shadows.plans(fingerprint).await
    }

    async fn explain(&self, sql: &str) -> ExplainAnswer {
        // The databases' catalogs differ in what they know of functions; the first one's stands
        // for all where a statement is explained without saying where it runs.
        let catalog = match self.tandems().first() {
            Some(tandem) => Shadows::read_catalog(tandem, self.control_now()).await,
            None => None,
        };
        let reach = match self.tandems().first() {
            Some(tandem) => read_reach(tandem.targets(), self.control_now().secondary()).await.ok(),
            None => None,
        };
        let context = ExplainContext {
            phase: self.control_now().phase,
            shadow_percent: self.config.load().reads.shadow_percent,
            canary: self.canary_share(),
            rehearse_percent: self.config.load().rehearse.percent,
            reach: reach.as_ref(),
            catalog: catalog.as_ref().map(|catalog| &catalog.functions as _),
        };
        let explanation = explain(sql.as_bytes(), &context);
        ExplainAnswer {
            text: explanation.to_string(),
            explanation: serde_json::to_value(&explanation).unwrap_or_default(),
        }
    }
}

fn stray_entries(database: &str, strays: Vec<(Side, Stray)>) -> impl Iterator<Item = StrayEntry> {
    strays.into_iter().map(move |(side, stray)| StrayEntry {
        database: database.to_owned(),
        side,
        stray,
    })
}

impl World {
    pub(super) async fn databases(&self) -> Vec<DatabaseStatus> {
        let mut databases = Vec::new();
        for tandem in self.tandems().iter() {
            let mut status = tandem.status();
            status.shadow_reads = self.shadows.of_database(tandem.name());
            status.rehearsed_writes = self.rehearsals.of_database(tandem.name());
            status.acknowledge = self.both_sides.status(tandem.name());
            status.canary = self.canaries.status(tandem.name());
            databases.push(status);
        }
        databases
    }
}

impl World {
    /// An entry with its values as the mismatch log would write them.
    fn shown(&self, database: &str, mut entry: Entry) -> QuarantineEntry {
        let values = self.shadows.values();
        entry.keys = std::mem::take(&mut entry.keys)
            .into_iter()
            .filter_map(|(table, key)| Some((table, values.text(&key)?)))
            .collect();
        entry.detail = entry.detail.filter(|_| values.shows_values());
        QuarantineEntry {
            database: database.to_owned(),
            entry,
        }
    }

    /// Of the first database, as what [`Self::explain`] looks up.
    fn canary_share(&self) -> CanaryShare {
        let tandems = self.tandems();
        let status = tandems.first().and_then(|tandem| self.canaries.status(tandem.name()));
        match status {
            Some(status) => CanaryShare {
                percent: status.percent,
                rules: status.rules,
                off_because: status.off_because.filter(|_| !status.on),
            },
            None => CanaryShare {
                percent: 0.0,
                rules: 0,
                off_because: Some("reads.canary_percent is 0".into()),
            },
        }
    }

    /// Existing rows are read at cuts, and their progress is told by the proxy that has those: another
    /// one says which that is.
    fn has_cuts(&self, tandem: &Tandem) -> Result<(), String> {
        let Some(other) = tandem.applied_by_another() else {
            return Ok(());
        };
        let known = self.participant.sight().proxies;
        let address = known.into_iter().find(|proxy| proxy.name == other);
        let address = address.map_or_else(String::new, |proxy| format!(", which listens on {}", proxy.address));
        Err(format!(
            "database {}: {other} applies, and only that proxy has cuts: ask it{address}",
            tandem.name()
        ))
    }

    /// The databases that an order is for; an entry's number means something in one of them only.
    fn chosen(&self, database: Option<&str>, one: bool) -> Result<Vec<Arc<Tandem>>, String> {
        let tandems = self.tandems();
        match database {
            Some(name) => {
                let found = tandems.iter().find(|tandem| tandem.name() == name).cloned();
                found
                    .map(|tandem| vec![tandem])
                    .ok_or_else(|| format!("no database is called {name}"))
            }
            None if one && tandems.len() > 1 => Err("there are several databases; say which (--database)".into()),
            None => Ok(tandems.to_vec()),
        }
    }
}
