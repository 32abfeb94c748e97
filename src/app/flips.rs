//! This process's part in switchovers: leading one when told to, taking part in every one, and
//! telling of them from their records.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;

use super::world::World;
use crate::admin::api::{Flip, History, Proxy, UnderWay};
use crate::config::Switchover;
use crate::control::{Control, Phase, Side};
use crate::session::Registry;
use crate::switchover::machine::{Kind, Step};
use crate::switchover::records::{self, FlipRow, SILENCE_MAX};
use crate::switchover::{CannotBegin, Host, Order, Survey, Tandem, lead, seat, take_over, told};
use crate::upstream::control::{connect, error_chain};

/// Whose word a change of phase is.
#[derive(Debug, Clone)]
pub(super) struct Ordered {
    pub(super) by: String,
    /// The reason for which closed gates are passed.
    pub(super) force: Option<String>,
}

impl Ordered {
    /// By whoever wrote proxy.yaml.
    pub(super) fn in_config() -> Self {
        Self {
            by: "proxy.yaml".into(),
            force: None,
        }
    }
}

impl Host for World {
    fn control(&self) -> Control {
        self.control_now()
    }

    fn registry(&self) -> &Registry {
        &self.sessions.registry
    }

    fn tandems(&self) -> Arc<Vec<Arc<Tandem>>> {
        self.tandems()
    }

    fn policy(&self) -> Switchover {
        self.config.load().switchover
    }

    fn wish(&self) -> Phase {
        self.config.load().phase
    }

    fn try_exclude(&self) -> Option<OwnedMutexGuard<()>> {
        self.transition.clone().try_lock_owned().ok()
    }

    async fn completed(&self) {
        let Some(_changing) = self.try_exclude() else { return };
        for tandem in self.tandems().iter() {
            tandem.stop_applier().await;
        }
        let phase = Phase::Complete;
        tracing::info!(
            changed = self.publish(Control {
                phase,
                ..self.control_now()
            }),
            "another proxy has completed the migration"
        );
        if self.wish() != phase {
            self.facts().problem =
                Some("another proxy has completed the migration; write phase: complete in proxy.yaml".into());
        }
    }

    async fn adopt(&self, control: Control) {
        for tandem in self.tandems().iter() {
            tandem.stop_applier().await;
            tandem.start_applier(control);
        }
        self.publish(control);
        self.facts().problem = self.wish_differs(control);
    }
}

impl World {
    /// What an operator is told where proxy.yaml no longer says what is served.
    pub(super) fn wish_differs(&self, control: Control) -> Option<String> {
        let wish = self.config.load().phase;
        (wish.primary() != control.primary).then(|| {
            format!(
                "{} is the primary by a switchover, proxy.yaml still says {wish}; change it to {}, or the next reload leads back",
                control.primary, control.phase
            )
        })
    }

    /// Leads a switchover or a rehearsal. The caller holds `transition`.
    pub(super) async fn flip(
        self: &Arc<Self>,
        kind: Kind,
        from: Control,
        to: Control,
        ordered: Ordered,
    ) -> Result<Vec<String>, String> {
        let Ordered { by, force: forced } = ordered;
        tracing::info!(to = %to.primary, epoch = %to.epoch, kind = kind.as_str(), by, forced, "switchover begins");
        let tandems = self.tandems();
        let led = lead(Order {
            kind,
            tandems: &tandems,
            from,
            to,
            by,
            forced,
            policy: self.config.load().switchover,
            me: &self.participant.me,
        })
        .await;
        let told = self.history_of(&tandems).await;
        let flip = told
            .into_iter()
            .next()
            .filter(|flip| led.as_ref().map_or(flip.to == to.primary, |id| flip.id == *id));
        self.facts().last_flip.clone_from(&flip);
        if let Some(flip) = &flip {
            self.shadows.note_switchover(flip);
        }
        let id = led.map_err(|abandoned| {
            tracing::error!(%abandoned, "switchover abandoned; everything goes on as before");
            format!("switchover abandoned, everything goes on as before: {abandoned}")
        })?;
        if kind == Kind::Flip && self.control_now().epoch < to.epoch {
            return Err(format!(
                "switchover {id} is done, and this proxy has not followed it yet"
            ));
        }
        let (held, carried) = flip.map_or((0.0, 0), |flip| (flip.held_ms, flip.sessions_carried));
        Ok(vec![match kind {
            Kind::Flip => format!(
                "{} is primary now (epoch {}); {carried} sessions carried over, transactions held for {held:.0} ms",
                to.primary, to.epoch
            ),
            Kind::Rehearsal => format!("rehearsed: transactions were held for {held:.0} ms"),
        }])
    }

    /// A flip that is half-way when this proxy starts is waited for, or ended where nobody leads it.
    pub(super) async fn settle_flips(&self, tandems: &[Arc<Tandem>]) -> Result<(), CannotBegin> {
        let Some(seat) = seat(tandems) else { return Ok(()) };
        for side in [Side::Legacy, Side::New] {
            // One that cannot be reached is asked again where its answer is needed.
            let Ok(client) = connect(seat.targets().target(side), "recovery").await else {
                continue;
            };
            let look = records::look(&client)
                .await
                .map_err(|error| CannotBegin::NotYet(error_chain(&error)))?;
            let unfinished = |flip: &FlipRow| flip.from == side && (flip.step.is_open() || flip.step == Step::Decided);
            let Some(flip) = look.flip.filter(unfinished) else {
                continue;
            };
            if !flip.orphaned {
                return Err(CannotBegin::NotYet(format!(
                    "a switchover is under way, led by {}; its outcome is waited for",
                    flip.coordinator
                )));
            }
            let why = format!("its coordinator, {}, was lost", flip.coordinator);
            let step = take_over(tandems, &flip, &self.participant.me.name, &why)
                .await
                .map_err(CannotBegin::NotYet)?;
            tracing::warn!(flip = flip.id, %step, why, "ended a switchover that was left half-way");
        }
        Ok(())
    }

    /// Every proxy on the pair, as last seen.
    pub(super) fn proxies(&self) -> Vec<Proxy> {
        if !self.control_now().phase.mirrors() {
            return Vec::new();
        }
        let sight = self.participant.sight();
        sight
            .proxies
            .into_iter()
            .filter(|proxy| proxy.silent < Duration::from_secs(60))
            .map(|proxy| Proxy {
                name: proxy.name,
                address: proxy.address,
                version: proxy.version,
                phase: proxy.phase,
                epoch: proxy.epoch,
                silent_seconds: proxy.silent.as_secs_f64(),
                clock_offset_ms: proxy.clock_offset_ms,
                sessions: proxy.sessions.sessions(),
                in_the_way: proxy.sessions.in_the_way,
            })
            .collect()
    }

    /// What every proxy tells of its sessions, and whether it still answers; this one's as of now.
    pub(super) fn sessions_of_proxies(&self) -> Vec<(String, bool, Survey)> {
        let me = &self.participant.me;
        let sight = self.participant.sight();
        let others = sight.proxies.into_iter().filter(|proxy| proxy.id != me.id);
        let mut told: Vec<_> = others
            .map(|proxy| (proxy.name, proxy.silent <= SILENCE_MAX, proxy.sessions))
            .collect();
        told.push((me.name.clone(), true, self.participant.surveyed()));
        told
    }

    /// The flip that is under way, as last seen.
    pub(super) fn under_way(&self) -> Option<UnderWay> {
        let sight = self.participant.sight();
        let flip = sight.flip.filter(|flip| {
            (flip.step.is_open() || flip.step == Step::Decided) && flip.to.epoch > self.control_now().epoch
        })?;
        let word = match flip.step {
            Step::Preparing => Some("prepared"),
            Step::Holding => Some("held"),
            _ => None,
        };
        let missing = sight.proxies.iter().filter(|proxy| {
            let answered = proxy.flip.as_ref() == Some(&flip.id) && proxy.answer.as_deref() == word;
            word.is_some() && !answered && proxy.silent <= SILENCE_MAX
        });
        Some(UnderWay {
            kind: flip.kind,
            to: flip.to.primary,
            step: flip.step,
            coordinator: flip.coordinator.clone(),
            waiting_for: missing.map(|proxy| proxy.name.clone()).collect(),
            id: flip.id,
        })
    }

    pub(super) async fn recorded_flips(&self) -> Result<History, String> {
        Ok(History {
            flips: self.history_of(&self.tandems()).await,
        })
    }

    async fn history_of(&self, tandems: &[Arc<Tandem>]) -> Vec<Flip> {
        let Some(seat) = seat(tandems) else {
            return Vec::new();
        };
        let on = async |side| told::on(seat.targets().target(side)).await.unwrap_or_default();
        let (legacy, new) = tokio::join!(on(Side::Legacy), on(Side::New));
        told::flips(legacy.into_iter().chain(new))
    }
}
