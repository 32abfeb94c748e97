//! This process's part in switchovers: leading one when told to, taking part in every one, and
//! telling of them from their records.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::OwnedMutexGuard;

use super::world::World;
use crate::admin::api::{Flip, FlipStep, History, InTheWay, Proxy, UnderWay};
use crate::config::Switchover;
use crate::control::{Control, Phase, Side};
use crate::session::Registry;
use crate::switchover::machine::{Kind, Step};
use crate::switchover::records::{self, FlipRow, SILENCE_MAX, Told};
use crate::switchover::{CannotBegin, Host, Order, Survey, Tandem, lead, seat, take_over};
use crate::upstream::control::{connect, error_chain};

/// Flips that are told of.
const HISTORY_MAX: i64 = 200;
/// A side that takes longer to tell is left out.
const ASK_MAX: Duration = Duration::from_secs(5);

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
        forced: Option<String>,
    ) -> Result<Vec<String>, String> {
        tracing::info!(to = %to.primary, epoch = %to.epoch, kind = kind.as_str(), forced, "switchover begins");
        let tandems = self.tandems();
        let led = lead(Order {
            kind,
            tandems: &tandems,
            from,
            to,
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

    /// What either side has recorded: of one flip, the side that knows more of it.
    async fn history_of(&self, tandems: &[Arc<Tandem>]) -> Vec<Flip> {
        let Some(seat) = seat(tandems) else {
            return Vec::new();
        };
        let on = async |side| {
            let asked = tokio::time::timeout(ASK_MAX, async {
                let client = connect(seat.targets().target(side), "history")
                    .await
                    .map_err(|error| error.to_string())?;
                records::history(&client, HISTORY_MAX).await
            });
            asked
                .await
                .unwrap_or_else(|_| Err("no answer".into()))
                .unwrap_or_default()
        };
        let (legacy, new) = tokio::join!(on(Side::Legacy), on(Side::New));
        let mut told: Vec<Told> = Vec::new();
        for one in legacy.into_iter().chain(new) {
            match told.iter_mut().find(|known| known.0.row.id == one.0.row.id) {
                Some(known) if known.1.len() < one.1.len() => *known = one,
                Some(_) => {}
                None => told.push(one),
            }
        }
        told.sort_by(|a, b| b.0.began.cmp(&a.0.began));
        told.into_iter().map(shown).collect()
    }
}

fn shown((flip, steps): Told) -> Flip {
    let mut shown = Flip {
        id: flip.row.id,
        kind: flip.row.kind,
        to: flip.row.to.primary,
        epoch: flip.row.to.epoch,
        coordinator: flip.row.coordinator,
        at: flip.began,
        ended: flip.ended,
        outcome: match flip.outcome {
            Some(outcome) if outcome == "done" || outcome == "rehearsed" => outcome,
            Some(why) => format!("abandoned: {why}"),
            None => "under way".into(),
        },
        forced: flip.row.forced,
        steps: Vec::new(),
        held_ms: 0.0,
        sessions_carried: 0,
        sessions_ended: 0,
        in_the_way: Vec::new(),
        fenced_out: Vec::new(),
    };
    let (mut in_the_way, mut fenced_out) = (BTreeSet::new(), BTreeSet::new());
    for step in &steps {
        gather(&step.measured, &mut shown, &mut in_the_way, &mut fenced_out);
        if let Some(released) = step.measured.get("released") {
            gather(released, &mut shown, &mut in_the_way, &mut fenced_out);
        }
    }
    shown.in_the_way = in_the_way.into_iter().collect();
    shown.fenced_out = fenced_out.into_iter().collect();
    shown.steps = steps
        .into_iter()
        .map(|step| FlipStep {
            name: step.step,
            at: step.at,
            who: step.who,
            ms: step.took_ms.unwrap_or_default(),
            held: step.step.holds(),
            measured: step.measured,
        })
        .collect();
    shown
}

/// What each proxy has said, summed up.
fn gather(measured: &Value, shown: &mut Flip, in_the_way: &mut BTreeSet<InTheWay>, fenced_out: &mut BTreeSet<String>) {
    for name in measured
        .get("fenced_out")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        fenced_out.extend(name.as_str().map(str::to_owned));
    }
    for (proxy, said) in measured.as_object().into_iter().flatten() {
        if let Some(held) = said.get("held_ms").and_then(Value::as_f64) {
            shown.held_ms = shown.held_ms.max(held);
        }
        let of_hold = said.get("drain_ms").is_some();
        if let (true, Some(sessions)) = (of_hold, said.get("sessions").and_then(Value::as_u64)) {
            shown.sessions_carried += usize::try_from(sessions).unwrap_or_default();
        }
        let list = |key: &str| said.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
        shown.sessions_ended += list("ended").len();
        for session in list("in_the_way").iter().chain(&list("ended")).chain(&list("failed")) {
            let text = |key: &str| session.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            in_the_way.insert(InTheWay {
                proxy: proxy.clone(),
                user: text("user"),
                application: text("application"),
                reason: text("reason"),
            });
        }
    }
}
