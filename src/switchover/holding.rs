//! What a proxy does with its sessions in a flip: it prepares and holds them, waits until they have
//! come to rest, and lets them go, where they were or on the other side.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::machine::{Kind, Standing, Step};
use super::participant::{COPY_MAX, Host, Part, TICK};
use super::records::FlipRow;
use super::servers;
use crate::config::Stragglers;
use crate::control::{Control, Side};
use crate::session::{Hold, Running, State, Straggler, Uncarried};
use crate::upstream::control::error_chain;

/// A hold that still waits looks so often for what need not be waited for.
const LOOK_FOR_READS: Duration = Duration::from_millis(200);
/// For what was ended to be gone.
const ENDING_MAX: Duration = Duration::from_secs(2);
/// Sessions that are named in a record; the rest are counted.
const NAMED_MAX: usize = 50;

/// How waiting for open transactions ended.
enum Drain {
    Done,
    Stragglers(Vec<Straggler>),
    /// The flip was, meanwhile.
    GivenUp,
}

impl<H: Host> Part<'_, H> {
    fn is_ours(&self, flip: &FlipRow) -> bool {
        flip.coordinator == self.participant.me.name
    }

    /// Other changes of the phase wait until this is over; those that are under way go first. The
    /// coordinator has seen to that for its own proxy.
    fn exclude(&mut self, flip: &FlipRow) -> bool {
        if !self.is_ours(flip) && self.exclusive.is_none() {
            self.exclusive = self.host.try_exclude();
            if self.exclusive.is_none() {
                tracing::info!("a change of the phase is under way and goes first");
                return false;
            }
        }
        true
    }

    pub(super) async fn prepare(&mut self, flip: &FlipRow) {
        if !self.exclude(flip) {
            return;
        }
        self.standing = Standing::Prepared(flip.id.clone());
        self.settling = None;
        let began = Instant::now();
        let host = self.host;
        let prepared = tokio::select! {
            prepared = host.registry().prepare(flip.to.primary) => prepared,
            () = self.given_up(flip) => return,
        };
        let waits = self.host.policy().stragglers == Stragglers::Wait && flip.kind == Kind::Flip;
        let mut detail = json!({
            "opened": prepared.opened,
            "ms": ms(began),
            "in_the_way": in_the_way(&prepared.uncarriable),
            "failed": in_the_way(&prepared.failed),
        });
        let refusal = match (&prepared.failed[..], &prepared.uncarriable[..]) {
            ([], uncarriable) if uncarriable.is_empty() || !waits => None,
            ([], uncarriable) => Some(format!(
                "{} sessions cannot be carried over, the first: {}",
                uncarriable.len(),
                first(uncarriable)
            )),
            (failed, _) => Some(format!(
                "{} sessions have no connection to the other side, the first: {}",
                failed.len(),
                first(failed)
            )),
        };
        match refusal {
            Some(why) => {
                detail["why"] = json!(why);
                self.answer(flip, "refused", detail).await;
            }
            None => self.answer(flip, "prepared", detail).await,
        }
    }

    /// Holds, waits for open transactions, carries over; or says what was in the way.
    pub(super) async fn hold(&mut self, flip: &FlipRow) {
        if !self.exclude(flip) {
            return;
        }
        let registry = self.host.registry();
        let hold = registry.hold();
        let tapered = registry.taper(&hold).await;
        let began = Instant::now();
        // Those that have come to rest see to it while others are still waited for.
        let ready = registry.make_ready(&hold, flip.to.primary);
        self.standing = Standing::Held(flip.id.clone());
        self.hold = Some((hold, began));
        let Some(mut ended) = self.come_to_rest(flip).await else {
            return;
        };
        let drained = ms(began);
        let Some(stayed) = self.make_ready(flip, ready).await else {
            return;
        };
        let mut in_the_way = in_the_way(&stayed);
        if self.may_end(flip) {
            self.end_uncarried(&stayed, flip.to.primary);
            ended.append(&mut in_the_way);
        }
        let detail = json!({
            "approach": tapered,
            "drain_ms": drained,
            "carry_ms": ms(began) - drained,
            "sessions": self.host.registry().len(),
            "reading": self.host.registry().reading(),
            "in_the_way": in_the_way,
            "ended": ended,
        });
        self.answer(flip, "held", detail).await;
    }

    /// Waits until no transaction is open. Tells who had to be ended for it; `None` where the flip is
    /// over, because it was given up or because of them, which is said.
    async fn come_to_rest(&mut self, flip: &FlipRow) -> Option<Vec<Value>> {
        let began = Instant::now();
        let stragglers = match self.drain(flip).await {
            Drain::Done => return Some(Vec::new()),
            Drain::GivenUp => return None,
            Drain::Stragglers(stragglers) => stragglers,
        };
        if self.may_end(flip) {
            self.end_stragglers(&stragglers, flip).await;
            return Some(stragglers.iter().map(straggling).collect());
        }
        let why = format!(
            "{} sessions still had a transaction open after {:?}, the first: {}",
            stragglers.len(),
            self.host.policy().drain_timeout,
            stragglers.first().map_or_else(String::new, |session| format!(
                "{} ({}), process {}",
                session.user, session.application, session.pid
            ))
        );
        let named: Vec<_> = stragglers.iter().take(NAMED_MAX).map(straggling).collect();
        let detail = json!({ "why": why, "in_the_way": named, "drain_ms": ms(began) });
        self.answer(flip, "refused", detail).await;
        None
    }

    /// Waits until every session can move. Tells which cannot; `None` where that ends the flip, which
    /// is said.
    async fn make_ready(
        &mut self,
        flip: &FlipRow,
        under_way: impl Future<Output = Vec<Uncarried>>,
    ) -> Option<Vec<Uncarried>> {
        let stay = self.all_ready(under_way, flip.to.primary).await;
        if stay.is_empty() || flip.kind != Kind::Flip || self.may_end(flip) {
            return Some(stay);
        }
        let why = format!(
            "{} sessions cannot be carried over, the first: {}",
            stay.len(),
            first(&stay)
        );
        let detail = json!({ "why": why, "in_the_way": in_the_way(&stay) });
        self.answer(flip, "refused", detail).await;
        None
    }

    /// Waits for those that see to it already, and has the others do it: sessions that were still
    /// connecting when the hold began.
    async fn all_ready(&self, under_way: impl Future<Output = Vec<Uncarried>>, to: Side) -> Vec<Uncarried> {
        under_way.await;
        match &self.hold {
            Some((hold, _)) => self.host.registry().make_ready(hold, to).await,
            None => Vec::new(),
        }
    }

    fn may_end(&self, flip: &FlipRow) -> bool {
        self.host.policy().stragglers == Stragglers::End && flip.kind == Kind::Flip
    }

    /// Waits for open transactions, unless the flip is given up meanwhile.
    async fn drain(&mut self, flip: &FlipRow) -> Drain {
        let deadline = Instant::now() + self.host.policy().drain_timeout;
        loop {
            let Some((hold, _)) = &self.hold else {
                return Drain::GivenUp;
            };
            let until = deadline.min(Instant::now() + LOOK_FOR_READS);
            match self.host.registry().drained(hold, until).await {
                Ok(()) => return Drain::Done,
                Err(stragglers) if Instant::now() >= deadline => return Drain::Stragglers(stragglers),
                Err(_) if self.is_given_up(flip).await => return Drain::GivenUp,
                Err(_) => {
                    if let Some((hold, since)) = self.hold.take() {
                        self.let_reads_be(&hold, flip.from).await;
                        self.hold = Some((hold, since));
                    }
                }
            }
        }
    }

    /// Sessions of `side` that only read are not waited for.
    async fn let_reads_be(&mut self, hold: &Hold, side: Side) {
        let registry = self.host.registry().clone();
        let ask = async |pids: Vec<i32>| match self.running(side, &pids).await {
            Ok(running) => running,
            Err(cause) => {
                tracing::debug!(%side, cause, "not told what is running");
                HashMap::new()
            }
        };
        registry.let_reads_be(hold, side, ask).await;
    }

    async fn running(&mut self, side: Side, pids: &[i32]) -> Result<HashMap<i32, Running>, String> {
        let client = self.link(side).await?;
        let asked = timeout(COPY_MAX, servers::running(client, pids)).await;
        asked
            .map_err(|_| "no answer".to_owned())?
            .map_err(|error| error_chain(&error))
    }

    async fn is_given_up(&mut self, flip: &FlipRow) -> bool {
        let seen = self.ask(flip.from, false).await.and_then(|look| look.flip);
        seen.is_some_and(|seen| seen.id != flip.id || seen.step == Step::Aborted)
    }

    async fn given_up(&mut self, flip: &FlipRow) {
        loop {
            tokio::time::sleep(TICK).await;
            if self.is_given_up(flip).await {
                return;
            }
        }
    }

    async fn end_stragglers(&self, stragglers: &[Straggler], flip: &FlipRow) {
        let registry = self.host.registry();
        for session in stragglers {
            tracing::warn!(
                user = session.user,
                application = session.application,
                pid = session.pid,
                "ended for a switchover"
            );
        }
        let ids: Vec<_> = stragglers.iter().map(|session| session.id).collect();
        let reason = format!(
            "terminating connection: its transaction was open for longer than switchover.drain_timeout ({:?}) while the primary is switched over to {}",
            self.host.policy().drain_timeout,
            flip.to.primary
        );
        registry.end(&ids, &reason);
        if let Some((hold, _)) = &self.hold {
            registry.drained(hold, Instant::now() + ENDING_MAX).await.ok();
        }
    }

    fn end_uncarried(&self, stay: &[Uncarried], to: Side) {
        for session in stay {
            tracing::warn!(
                user = session.user,
                reason = session.reason,
                "a session cannot be carried over and is ended"
            );
            let reason = format!(
                "terminating connection: the primary is switched over to {to}, and this session cannot be carried over: {}",
                session.reason
            );
            self.host.registry().end(&[session.id], &reason);
        }
    }

    /// Everything as before: nothing was decided.
    pub(super) async fn release(&mut self) {
        let held_ms = self.hold.take().map_or(0.0, |(_, since)| ms(since));
        self.over(held_ms).await;
    }

    /// Clients belong on another side, or have for a while.
    pub(super) async fn adopt(&mut self, control: Control) {
        let (hold, since) = match self.hold.take() {
            Some(held) => held,
            None => self.hold_for(control.primary).await,
        };
        self.host.adopt(control).await;
        tracing::info!(primary = %control.primary, epoch = %control.epoch, held_ms = ms(since), "clients belong there now");
        drop(hold);
        self.over(ms(since)).await;
    }

    /// Nobody has prepared anything: whoever cannot move is ended.
    async fn hold_for(&mut self, primary: Side) -> (Hold, Instant) {
        let registry = self.host.registry();
        let (hold, since) = (registry.hold(), Instant::now());
        let ready = registry.make_ready(&hold, primary);
        let deadline = since + self.host.policy().drain_timeout;
        if registry.drained(&hold, Instant::now() + LOOK_FOR_READS).await.is_err() {
            self.let_reads_be(&hold, primary.other()).await;
        }
        if let Err(stragglers) = registry.drained(&hold, deadline).await {
            let ids: Vec<_> = stragglers.iter().map(|session| session.id).collect();
            registry.end(&ids, &format!("terminating connection: the primary is {primary} now"));
            registry.drained(&hold, Instant::now() + ENDING_MAX).await.ok();
        }
        ready.await;
        let stay = registry.make_ready(&hold, primary).await;
        self.end_uncarried(&stay, primary);
        (hold, since)
    }

    /// Connections that are not needed any more are closed, and the coordinator hears how long
    /// clients were held.
    async fn over(&mut self, held_ms: f64) {
        let registry = self.host.registry().clone();
        self.settling = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            registry.settle().await;
        })));
        self.exclusive = None;
        let standing = std::mem::replace(&mut self.standing, Standing::Serving);
        if let Standing::Prepared(id) | Standing::Held(id) = standing {
            let me = self.participant.me.clone();
            let detail = json!({ "held_ms": held_ms, "sessions": self.host.registry().len() });
            for side in [Side::Legacy, Side::New] {
                self.say(side, COPY_MAX, &me, &id, "released", &detail).await.ok();
            }
        }
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn in_the_way(sessions: &[Uncarried]) -> Vec<Value> {
    sessions
        .iter()
        .take(NAMED_MAX)
        .map(|session| json!({ "user": session.user, "application": session.application, "reason": session.reason }))
        .collect()
}

fn straggling(session: &Straggler) -> Value {
    let reason = match session.state {
        State::Opening => "it is connecting",
        State::InTransaction => "it is idle in a transaction",
        _ => "a statement is running",
    };
    json!({ "user": session.user, "application": session.application, "pid": session.pid, "reason": reason })
}

fn first(sessions: &[Uncarried]) -> String {
    sessions.first().map_or_else(String::new, |session| {
        format!("{} ({}): {}", session.user, session.application, session.reason)
    })
}
