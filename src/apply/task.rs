//! The applier's task and its handle.
//!
//! The task's inputs are few: time, somebody waiting for a cut, somebody asking to hold one,
//! and the order to stop. It connects again after every error; what it was doing is then found
//! on the secondary.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::errands::{self, Errand};
use super::follower::{Follower, Sight, count_strays};
use super::heal::{HealOrder, Healed};
use super::lease::{self, Lease, this_proxy};
use super::memory::Memory;
use super::mend::{Mend, Mended};
use super::quarantine::{Order, Outcome};
use super::seeding::CatalogWatch;
use super::session::Session;
use super::status::{ApplierState, ApplierStatus, Lag, MIRRORING_STOPPED, WatermarkStatus};
use super::{ApplierConfig, ApplyError, doing, guard};
use crate::catalog::quote::literal;
use crate::journal::read::lsn;
use crate::journal::{self, rotation};

/// How long a cut may be held: the secondary stands still meanwhile.
const HOLD_MAX: Duration = Duration::from_secs(5);

/// Requests to hold a cut that wait their turn; one more waits in its sender.
const CUT_REQUESTS_MAX: usize = 4;

/// Catalogs, rotation and strays are looked at this often, as is another applier's progress.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A server that is down is tried more often than one that says no.
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// How often a waiting proxy asks for the lease.
const LEASE_INTERVAL: Duration = Duration::from_millis(250);

/// The end of a round: there the secondary equals the primary as of the round's snapshot.
#[derive(Debug, Clone)]
pub struct Cut {
    pub round: u64,
    /// The primary's snapshot, as `pg_snapshot` writes it.
    pub snapshot: String,
    /// The end of the primary's log when the snapshot was taken.
    pub position: u64,
    pub applied_at: Instant,
}

/// The applier has been stopped, or (for a held cut) does not hold the lease.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the applier has stopped or another proxy holds its lease")]
pub struct Stopped;

/// A cut at which the applier stands still, for at most a few seconds, until this is dropped.
pub struct HeldCut {
    pub cut: Cut,
    /// For SET TRANSACTION SNAPSHOT on the primary, while this is held.
    pub primary_snapshot: String,
    release: oneshot::Sender<()>,
}

impl HeldCut {
    /// False once the applier has gone on because this was held too long. Whoever compared
    /// something under it asks at the end.
    pub fn still_held(&self) -> bool {
        !self.release.is_closed()
    }
}

/// The sequences of the two sides are being compared.
pub struct ComparedSequences(Arc<Shared>);

impl Drop for ComparedSequences {
    fn drop(&mut self) {
        self.0.sequences_compared.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What the handle, the task and the guard share.
#[derive(Default)]
pub(super) struct Shared {
    /// Tickets given out to those who wait for a cut.
    wanted: AtomicU64,
    /// The same for those who want the sequences as well.
    wanted_sequences: AtomicU64,
    /// What is recorded of the tables was changed by somebody else.
    tables_changed: AtomicBool,
    /// Other proxies may have left errands on the secondary.
    errands_left: AtomicBool,
    /// How many compare the sequences just now.
    sequences_compared: AtomicU64,
    wake: Notify,
    stop: CancellationToken,
    /// The guard had no answer from the primary: connections to it are not worth waiting for.
    pub(super) primary_silent: Notify,
    memory: Arc<Memory>,
}

impl Shared {
    async fn hear_of_errands(&self, lease: &Lease) -> Infallible {
        loop {
            lease.hear_of_errand().await;
            self.errands_left.store(true, Ordering::SeqCst);
            self.wake.notify_one();
        }
    }
}

/// An operator's order, and where its outcome goes.
struct Ordered {
    order: Order,
    answer: oneshot::Sender<Result<Outcome, String>>,
}

/// An order to bring definitions in line.
struct HealOrdered {
    order: HealOrder,
    answer: oneshot::Sender<Result<Healed, String>>,
}

/// Rows to be mended, and where the outcome goes.
struct Mending {
    mend: Mend,
    answer: oneshot::Sender<Result<Mended, String>>,
}

/// Up to which ticket rounds have been applied.
#[derive(Debug, Clone, Default)]
struct Done {
    ticket: u64,
    /// Of those who want the sequences as well.
    sequences: u64,
    cut: Option<Cut>,
}

/// A running applier. Dropping it ends its task; what was not committed is not applied.
pub struct Applier {
    shared: Arc<Shared>,
    status: watch::Receiver<ApplierStatus>,
    done: watch::Receiver<Done>,
    cuts: mpsc::Sender<oneshot::Sender<HeldCut>>,
    orders: mpsc::Sender<Ordered>,
    heals: mpsc::Sender<HealOrdered>,
    mendings: mpsc::Sender<Mending>,
    _task: AbortOnDropHandle<()>,
}

/// Starts an applier. It never fails: its status says how it fares.
pub fn spawn(config: ApplierConfig) -> Applier {
    let shared = Arc::new(Shared::default());
    let (status_sender, status) = watch::channel(ApplierStatus::new(config.primary.side, config.epoch));
    let (done_sender, done) = watch::channel(Done::default());
    let (cuts, cut_requests) = mpsc::channel(CUT_REQUESTS_MAX);
    let (orders, order_requests) = mpsc::channel(1);
    let (heals, heal_requests) = mpsc::channel(1);
    let (mendings, mending_requests) = mpsc::channel(1);
    let task = Task {
        config: Arc::new(config),
        shared: shared.clone(),
        status: Arc::new(status_sender),
        done: done_sender,
        cut_requests,
        order_requests,
        heal_requests,
        mending_requests,
        next_order: None,
    };
    Applier {
        shared,
        status,
        done,
        cuts,
        orders,
        heals,
        mendings,
        _task: AbortOnDropHandle::new(tokio::spawn(task.run())),
    }
}

impl Applier {
    pub fn status(&self) -> watch::Receiver<ApplierStatus> {
        self.status.clone()
    }

    /// Waits until a round that began after this call has been applied (or found empty), and
    /// the sequences have been copied after that. No deadline: while the secondary is away, it
    /// waits; so it does while a client's open DDL has locked a sequence. While another proxy holds
    /// the lease, the answer comes from the watermark that one leaves; the sequences are then at
    /// most half a second older.
    pub async fn catch_up(&self) -> Result<Cut, Stopped> {
        let sequences = self.shared.wanted_sequences.fetch_add(1, Ordering::SeqCst) + 1;
        self.reached(sequences).await
    }

    /// The same without the sequences, for those who ask often.
    pub async fn round_after_now(&self) -> Result<Cut, Stopped> {
        self.reached(0).await
    }

    async fn reached(&self, sequences: u64) -> Result<Cut, Stopped> {
        let ticket = self.shared.wanted.fetch_add(1, Ordering::SeqCst) + 1;
        self.shared.wake.notify_one();
        let mut done = self.done.clone();
        let reached = done
            .wait_for(|done| done.ticket >= ticket && done.sequences >= sequences)
            .await
            .map_err(|_| Stopped)?;
        reached.cut.clone().ok_or(Stopped)
    }

    /// The records in `pgtandem.seeding`, or of what is held, were changed: they are read again
    /// before the next round.
    pub fn tables_changed(&self) {
        self.shared.tables_changed.store(true, Ordering::SeqCst);
        self.shared.wake.notify_one();
    }

    /// The last round that is known to be applied; 0 for none.
    pub fn applied_round(&self) -> u64 {
        self.done.borrow().cut.as_ref().map_or(0, |cut| cut.round)
    }

    /// While it lives, nobody shall draw from the secondary's sequences.
    pub fn compare_sequences(&self) -> ComparedSequences {
        self.shared.sequences_compared.fetch_add(1, Ordering::SeqCst);
        ComparedSequences(self.shared.clone())
    }

    /// Whether the sequences are being compared.
    pub fn sequences_are_compared(&self) -> bool {
        self.shared.sequences_compared.load(Ordering::SeqCst) > 0
    }

    /// Stops at the end of a round that begins after this call, and holds there.
    pub async fn cut(&self) -> Result<HeldCut, Stopped> {
        let (answer, held) = oneshot::channel();
        self.cuts.send(answer).await.map_err(|_| Stopped)?;
        self.shared.wake.notify_one();
        held.await.map_err(|_| Stopped)
    }

    /// Has an operator's order about the quarantine carried out at the end of a round, by whichever
    /// proxy applies. A retry also makes a halted applier go on.
    ///
    /// # Errors
    /// Why it could not be carried out; then nothing of it was, or what was is in the quarantine's
    /// history.
    pub async fn order(&self, order: Order) -> Result<Outcome, String> {
        let (answer, outcome) = oneshot::channel();
        let sent = self.orders.send(Ordered { order, answer }).await;
        sent.map_err(|_| Stopped.to_string())?;
        self.shared.wake.notify_one();
        outcome.await.map_err(|_| Stopped.to_string())?
    }

    /// Has the secondary's definitions brought in line with the primary's, at the end of a round, by
    /// whichever proxy applies.
    ///
    /// # Errors
    /// Why not; then nothing was changed.
    pub async fn heal(&self, order: HealOrder) -> Result<Healed, String> {
        let (answer, outcome) = oneshot::channel();
        let sent = self.heals.send(HealOrdered { order, answer }).await;
        sent.map_err(|_| Stopped.to_string())?;
        self.shared.wake.notify_one();
        outcome.await.map_err(|_| Stopped.to_string())?
    }

    /// Mends rows of the secondary at the end of a round that begins after this call.
    ///
    /// # Errors
    /// Why nothing was mended.
    pub async fn mend(&self, mend: Mend) -> Result<Mended, String> {
        let (answer, outcome) = oneshot::channel();
        let sent = self.mendings.send(Mending { mend, answer }).await;
        sent.map_err(|_| Stopped.to_string())?;
        self.shared.wake.notify_one();
        outcome.await.map_err(|_| Stopped.to_string())?
    }

    /// Makes a halted applier go on; the others are not concerned.
    pub fn go_on(&self) {
        if matches!(self.status.borrow().state, ApplierState::Halted { .. }) {
            self.shared.memory.say_go_on();
            self.shared.wake.notify_one();
        }
    }

    /// Ends the task, wherever it is: a round that is not committed has not happened.
    pub async fn stop(&self) {
        self.shared.stop.cancel();
        let mut status = self.status.clone();
        // An error means that the task, which holds the sender, is gone.
        status
            .wait_for(|status| status.state == ApplierState::Stopped)
            .await
            .ok();
    }
}

struct Task {
    config: Arc<ApplierConfig>,
    shared: Arc<Shared>,
    status: Arc<watch::Sender<ApplierStatus>>,
    done: watch::Sender<Done>,
    cut_requests: mpsc::Receiver<oneshot::Sender<HeldCut>>,
    order_requests: mpsc::Receiver<Ordered>,
    heal_requests: mpsc::Receiver<HealOrdered>,
    mending_requests: mpsc::Receiver<Mending>,
    /// Taken while halted, to be carried out once that has ended.
    next_order: Option<Ordered>,
}

impl Task {
    async fn run(mut self) {
        let stop = self.shared.stop.clone();
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = guard::keep(self.config.clone(), self.shared.clone(), self.status.clone()) => {}
            () = self.run_until_stopped() => {}
        }
        self.status.send_modify(|status| {
            status.applier = None;
            status.state = ApplierState::Stopped;
        });
    }

    async fn run_until_stopped(&mut self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let rounds_before = self.status.borrow().round;
            let Err(error) = self.serve().await;
            if self.status.borrow().round != rounds_before {
                backoff = BACKOFF_MIN;
            }
            let text = error.to_string();
            let connecting = error.is_connection();
            let halted = matches!(error, ApplyError::Halted(_));
            let awaited = error.is_missing_database() && self.config.awaited.is();
            let state = if connecting {
                ApplierState::Connecting {
                    error: Some(text.clone()).filter(|_| !awaited),
                }
            } else if halted {
                ApplierState::Halted { error: text.clone() }
            } else {
                ApplierState::Failing { error: text.clone() }
            };
            if awaited {
                tracing::debug!(error = text, "waiting for the round that creates the database");
            } else if matches!(error, ApplyError::Flipped(_)) {
                tracing::info!(why = text, "the applier of this direction ends");
            } else if self.status.borrow().state != state {
                tracing::warn!(error = text, "the applier is interrupted; the journal keeps what comes");
            }
            self.status.send_modify(|status| {
                status.applier = None;
                status.state = state;
            });
            self.take_orders(halted, &text);
            tokio::select! {
                () = sleep(backoff) => {}
                () = self.shared.wake.notified() => sleep(BACKOFF_MIN).await,
            }
            backoff = (backoff * 2).min(if connecting { RECONNECT_MAX } else { BACKOFF_MAX });
        }
    }

    /// Mends what somebody asked for, while the round's snapshot is open on the primary.
    async fn mend(&self, session: &mut Session, mending: Option<Mending>, began: Instant) -> Result<(), ApplyError> {
        let Some(Mending { mend, answer }) = mending else {
            return Ok(());
        };
        let mended = session.mend(&mend).await;
        if mended.is_ok() {
            session.end_read().await?;
        }
        self.publish(session, began);
        match mended {
            Ok(outcome) => answer.send(outcome).ok(),
            Err(error) => {
                answer.send(Err(error.to_string())).ok();
                return Err(error);
            }
        };
        Ok(())
    }

    /// Orders that come while no round can be applied. A retry ends a halt; nothing else can be
    /// carried out now.
    fn take_orders(&mut self, halted: bool, why: &str) {
        for ordered in drain(&mut self.heal_requests) {
            ordered.answer.send(Err(format!("not now: {why}"))).ok();
        }
        for ordered in drain(&mut self.order_requests) {
            if halted && matches!(ordered.order, Order::Retry { .. }) && self.next_order.is_none() {
                self.shared.memory.say_go_on();
                self.shared.wake.notify_one();
                self.next_order = Some(ordered);
            } else {
                ordered.answer.send(Err(format!("not now: {why}"))).ok();
            }
        }
        for mending in drain(&mut self.mending_requests) {
            mending.answer.send(Err(format!("not now: {why}"))).ok();
        }
        if !halted && let Some(ordered) = self.next_order.take() {
            ordered.answer.send(Err(format!("not now: {why}"))).ok();
        }
    }

    /// Orders that come while another proxy applies: that one carries them out.
    fn pass_orders_on(&mut self) {
        let (config, stop) = (&self.config, &self.shared.stop);
        let held = self.next_order.take();
        for Ordered { order, answer } in held.into_iter().chain(drain(&mut self.order_requests)) {
            errands::send(config, stop, Errand::Quarantine(order), answer);
        }
        for HealOrdered { order, answer } in drain(&mut self.heal_requests) {
            errands::send(config, stop, Errand::Heal(order), answer);
        }
        for mending in drain(&mut self.mending_requests) {
            mending
                .answer
                .send(Err("another proxy applies; ask that one".into()))
                .ok();
        }
    }

    /// Carries out one of the errands that other proxies left, if there is any.
    async fn run_errand(
        &mut self,
        lease: &Lease,
        session: &mut Session,
        watch: &mut CatalogWatch,
        began: Instant,
    ) -> Result<(), ApplyError> {
        if !self.shared.errands_left.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let Some((id, errand)) = errands::take(lease.connection(), self.config.epoch).await? else {
            return Ok(());
        };
        // There may be more of them, for after the next round.
        self.shared.errands_left.store(true, Ordering::SeqCst);
        self.shared.wake.notify_one();
        let (answer, error) = match errand {
            Errand::Quarantine(order) => errands::answer_of(self.obey(session, &order, began).await.map(Ok)),
            Errand::Heal(order) => errands::answer_of(self.heal_now(session, watch, &order).await),
        };
        errands::answer(lease.connection(), id, &answer).await?;
        error.map_or(Ok(()), Err)
    }

    /// Carries out what an operator ordered, between two rounds.
    async fn carry_out(&mut self, session: &mut Session, began: Instant) -> Result<(), ApplyError> {
        let ordered = self.next_order.take().or_else(|| self.order_requests.try_recv().ok());
        let Some(Ordered { order, answer }) = ordered else {
            return Ok(());
        };
        match self.obey(session, &order, began).await {
            Ok(outcome) => {
                answer.send(Ok(outcome)).ok();
                Ok(())
            }
            Err(error) => {
                answer.send(Err(error.to_string())).ok();
                Err(error)
            }
        }
    }

    async fn obey(&self, session: &mut Session, order: &Order, began: Instant) -> Result<Outcome, ApplyError> {
        let outcome = session.carry_out(order).await?;
        self.publish(session, began);
        Ok(outcome)
    }

    /// Brings definitions in line where an operator asked for it.
    async fn heal(&mut self, session: &mut Session, watch: &mut CatalogWatch) -> Result<(), ApplyError> {
        let Ok(HealOrdered { order, answer }) = self.heal_requests.try_recv() else {
            return Ok(());
        };
        // Whoever asked has given up.
        if answer.is_closed() {
            return Ok(());
        }
        match self.heal_now(session, watch, &order).await {
            Ok(outcome) => {
                answer.send(outcome).ok();
                Ok(())
            }
            Err(error) => {
                answer.send(Err(error.to_string())).ok();
                Err(error)
            }
        }
    }

    async fn heal_now(
        &self,
        session: &mut Session,
        watch: &mut CatalogWatch,
        order: &HealOrder,
    ) -> Result<Result<Healed, String>, ApplyError> {
        let outcome = session.heal(order, watch).await?;
        if !order.dry_run {
            self.look_around(session, watch).await?;
        }
        Ok(outcome)
    }

    /// Waits for the lease, then applies, until something fails or no longer answers.
    async fn serve(&mut self) -> Result<Infallible, ApplyError> {
        let lease = self.take_lease().await?;
        self.status.send_modify(|status| {
            status.applier = Some(this_proxy());
            if status.state == ApplierState::Waiting {
                status.state = ApplierState::Connecting { error: None };
            }
        });
        let shared = self.shared.clone();
        tokio::select! {
            failed = self.apply_rounds(&lease) => failed,
            lost = lease.keep() => lost,
            () = shared.primary_silent.notified() => Err(ApplyError::Silent("primary")),
            never = shared.hear_of_errands(&lease) => match never {},
        }
    }

    /// Returns when this proxy is the one that applies. While another is, whoever waits here
    /// for a cut is answered from the watermark that the other one leaves.
    async fn take_lease(&mut self) -> Result<Lease, ApplyError> {
        let lease = Lease::connect(&self.config).await?;
        if answered(lease.try_take()).await? {
            return Ok(lease);
        }
        let mut follower = Follower::connect(&self.config, &lease).await?;
        let mut next_report = Instant::now();
        while !answered(lease.try_take()).await? {
            while self.cut_requests.try_recv().is_ok() {
                // Dropping the request answers it: a cut can be held only by the lease's holder.
            }
            self.pass_orders_on();
            let ticket = self.shared.wanted.load(Ordering::SeqCst);
            let wanted = ticket > self.done.borrow().ticket;
            let mut found = false;
            if wanted || Instant::now() >= next_report {
                let asking = wanted.then_some(ticket);
                let sight = answered(follower.look(&self.config, asking)).await?;
                found = self.answer(&sight);
                if Instant::now() >= next_report {
                    let report = answered(follower.report(&sight)).await?;
                    self.status.send_modify(|status| {
                        status.state = ApplierState::Waiting;
                        status.take_over(&sight, report);
                    });
                    next_report = Instant::now() + WATCH_INTERVAL;
                }
            }
            let pause = if wanted && !found {
                self.config.poll_min
            } else {
                LEASE_INTERVAL
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = self.shared.wake.notified() => {}
            }
        }
        drop(follower);
        Ok(lease)
    }

    /// Tells whoever waits for a cut that another applier has reached one; whether it has.
    fn answer(&self, sight: &Sight) -> bool {
        let (Some(watermark), Some(ticket)) = (&sight.watermark, sight.reached) else {
            return false;
        };
        self.done.send_replace(Done {
            ticket,
            sequences: self.shared.wanted_sequences.load(Ordering::SeqCst),
            cut: Some(Cut {
                round: watermark.round,
                snapshot: watermark.snapshot.to_string(),
                position: watermark.position,
                applied_at: Instant::now(),
            }),
        });
        true
    }

    async fn apply_rounds(&mut self, lease: &Lease) -> Result<Infallible, ApplyError> {
        let mut session = Session::connect(self.config.clone(), lease, self.shared.memory.clone()).await?;
        journal::refuse_or_report(&mut session.secondary, self.config.stray_writers).await?;
        errands::answer_lost(lease.connection(), self.config.epoch).await?;
        self.shared.errands_left.store(true, Ordering::SeqCst);
        let mut watch = CatalogWatch::default();
        let mut next_watch = Instant::now();
        let mut pause = self.config.poll_min;
        let mut first = true;
        loop {
            let ticket = self.shared.wanted.load(Ordering::SeqCst);
            let sequences_wanted = self.shared.wanted_sequences.load(Ordering::SeqCst);
            let sequences_done = self.done.borrow().sequences;
            let request = self.cut_requests.try_recv().ok().filter(|request| !request.is_closed());
            let mending = match &request {
                None => self.mending_requests.try_recv().ok(),
                Some(_) => None,
            };
            let began = Instant::now();
            if first {
                // Tables must be known before their first changes are.
                session.finish_interrupted().await?;
                session.keep_in_step(&mut watch).await?;
                first = false;
            }
            if self.shared.tables_changed.swap(false, Ordering::SeqCst) {
                session.reload_tables().await?;
                session.load_held(None).await?;
            }
            let (outcome, exported) = session.round(request.is_some() || mending.is_some()).await?;
            let copied = session.copy_sequences(sequences_wanted > sequences_done).await?;
            let cut = Cut {
                round: session.round,
                snapshot: session.since.to_string(),
                position: session.position,
                applied_at: Instant::now(),
            };
            if std::mem::take(&mut session.gap) {
                // What the journal still had has been applied: from here on there is no gap.
                session.store_watermark().await?;
            }
            let worked = began.elapsed();
            self.publish(&session, began);
            self.done.send_replace(Done {
                ticket,
                sequences: if copied { sequences_wanted } else { sequences_done },
                cut: Some(cut.clone()),
            });
            self.mend(&mut session, mending, began).await?;
            if request.is_none() {
                self.carry_out(&mut session, began).await?;
                self.heal(&mut session, &mut watch).await?;
                self.run_errand(lease, &mut session, &mut watch, began).await?;
            }
            if let (Some(request), Some(primary_snapshot)) = (request, exported) {
                let (release, released) = oneshot::channel();
                let held = HeldCut {
                    cut,
                    primary_snapshot,
                    release,
                };
                if request.send(held).is_ok() {
                    timeout(HOLD_MAX, released).await.ok();
                }
                session.end_read().await?;
            }
            if outcome.changes > 0 {
                session
                    .lookout
                    .keep_up(&session.aside, &mut session.reader.horizons)
                    .await?;
            }
            // After whoever waits was answered: a look may take as long as a lock it asks for.
            if began >= next_watch {
                let looking = Instant::now();
                self.look_around(&mut session, &mut watch).await?;
                next_watch = Instant::now() + WATCH_INTERVAL.max(looking.elapsed() * 20);
            }
            pause = if outcome.changes > 0 {
                // Under load the servers are the clients' for the larger part of the time, and the
                // more a round holds, the more of it cancels out.
                (worked * self.config.rest)
                    .min(self.config.poll_max / 2)
                    .max(self.config.poll_min)
            } else {
                (pause * 3 / 2).min(self.config.poll_max)
            };
            if self.shared.wanted.load(Ordering::SeqCst) > ticket
                || !self.cut_requests.is_empty()
                || !self.mending_requests.is_empty()
            {
                // Somebody waits: rounds follow each other without a pause.
                continue;
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = self.shared.wake.notified() => pause = self.config.poll_min,
            }
        }
    }

    /// What need not be looked at in every round.
    async fn look_around(&self, session: &mut Session, watch: &mut CatalogWatch) -> Result<(), ApplyError> {
        session.keep_in_step(watch).await?;
        session.compare_everything(watch).await?;
        let mut size = rotation::rotate(
            &mut session.aside,
            &session.durable,
            &session.pair,
            &self.config.journal,
        )
        .await?;
        if size.waits_for_watermark && session.durable != session.since {
            session.store_watermark().await?;
            size = rotation::rotate(
                &mut session.aside,
                &session.durable,
                &session.pair,
                &self.config.journal,
            )
            .await?;
        }
        if size.stopped {
            session
                .secondary
                .batch_execute(&format!(
                    "UPDATE pgtandem.seeding SET state = 'unseeded', note = {} WHERE state <> 'unseeded'",
                    literal(MIRRORING_STOPPED)
                ))
                .await
                .map_err(doing("mark all tables for seeding"))?;
            session.reload_tables().await?;
        }
        let strays = count_strays(&session.secondary).await?;
        session.summarize_quarantine().await?;
        self.status.send_modify(|status| {
            status.strays = strays;
            status.tables = session.tables.status();
            status.not_mirrored.clone_from(&watch.not_mirrored);
            status.sql_for_dba.clone_from(&watch.sql_for_dba);
            status.different.clone_from(&watch.different);
        });
        Ok(())
    }

    fn publish(&self, session: &Session, began: Instant) {
        self.status.send_modify(|status| {
            status.state = ApplierState::Running;
            status.behind = false;
            status.round = session.round;
            let position = lsn(session.position);
            let watermark = WatermarkStatus {
                snapshot: session.since.to_string(),
                position,
                in_pieces: session.target.is_some(),
            };
            status.watermark = Some(watermark);
            status.lag = Lag::default();
            status.caught_up_at = Some(began);
            status.tables = session.tables.status();
            status.one_way.clone_from(&session.faces.one_way);
            status.diverged = status.tables.iter().map(|table| table.diverged).sum();
            status.quarantine.clone_from(&session.quarantine);
            status.sequences = session.sequences.count();
            status.sequence_errors.clone_from(&session.sequences.errors);
            status.changes_applied = session.progress.changes;
            status.transactions_applied = session.progress.transactions;
        });
    }
}

/// What waits in a queue.
fn drain<T>(queue: &mut mpsc::Receiver<T>) -> impl Iterator<Item = T> {
    std::iter::from_fn(|| queue.try_recv().ok())
}

/// What is asked of a server that answers at once or not at all.
async fn answered<T>(question: impl Future<Output = Result<T, ApplyError>>) -> Result<T, ApplyError> {
    timeout(lease::SILENCE_MAX, question)
        .await
        .map_err(|_elapsed| ApplyError::Silent("server"))?
}
