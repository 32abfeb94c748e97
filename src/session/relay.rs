//! The life of an open session: one task that polls both sockets.
//!
//! ```text
//! client ──read──▶ client_frames ──write──▶ server      (upward)
//! client ◀──write── server_frames ◀──read── server      (downward)
//! ```
//!
//! Both directions read into one scratch buffer of the thread and write straight out of it. A
//! session keeps bytes of its own only while a socket does not take them, or while a frame that
//! must be understood is incomplete. Nothing is read from one side while the other has not taken
//! what came before; what comes back is read meanwhile, so that pipelines cannot lock up.

use std::cell::RefCell;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::acknowledge::Acknowledging;
use super::attention::Attention;
use super::canary::Canary;
use super::context::Context;
use super::known::Statements;
use super::observe::{Observation, Shadowing};
use super::open::refuse_own_role;
use super::orders::Opening;
use super::outbox::{Gather, Outbox};
use super::registry::{Asked, PreparedOne, Registered, State, order};
use super::rehearse::Rehearsing;
use super::reported::Reported;
use super::sniff::Access;
use super::standby::Standby;
use super::upward::Frame;
use crate::control::{Control, Side};
use crate::routing::Pair;
use crate::sql::LexSettings;
use crate::upstream::cancel::cancel;
use crate::upstream::{Login, Stream};
use crate::wire::backend::Status;
use crate::wire::error::{SqlError, sqlstate};
use crate::wire::frame::{FrameError, Framer};
use crate::wire::frontend;
use crate::wire::tracker::Tracker;

/// Read at once; also what a slow peer makes a session keep at most, in each direction.
const CHUNK: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into());
}

/// One way through a session.
#[derive(Debug, Default)]
pub(super) struct Direction {
    pub framer: Framer,
    /// Read and not yet understood: part of a frame, or frames that have to wait.
    pub pending: Vec<u8>,
    pub outbox: Outbox,
    /// What is pending waits for something else than more bytes, or has not been looked at.
    pub blocked: bool,
}

impl Direction {
    /// A direction whose first bytes have been read already.
    pub(super) fn beginning_with(bytes: Vec<u8>) -> Self {
        Self {
            blocked: !bytes.is_empty(),
            pending: bytes,
            ..Self::default()
        }
    }
}

/// How a session ends.
#[derive(Debug)]
pub(super) enum End {
    ClientGone,
    /// The server closed the connection, or its socket failed.
    ServerGone(String),
    /// The client sent what is not a message.
    Violation(FrameError),
    /// FATAL 57P01 with this text.
    Ordered(String),
    /// This error.
    Refused(SqlError),
}

/// Why the relay pauses.
enum Pause {
    Orders,
    /// Of the canary's.
    Turn,
    End(End),
}

pub(super) struct Session {
    pub context: Arc<Context>,
    pub registered: Registered,
    pub pair: Arc<Pair>,
    pub login: Arc<Login>,
    pub updates: watch::Receiver<Control>,
    /// Of the transaction that is open, or of the last one.
    pub control: Control,
    pub side: Side,
    pub client: Stream,
    pub server: Stream,
    pub up: Direction,
    pub down: Direction,
    pub tracker: Tracker,
    /// Published as active: a transaction may be open.
    pub active: bool,
    /// Transactions begun.
    pub transactions: u64,
    pub statements: Statements,
    /// The client's view of the server's parameters.
    pub reported: Reported,
    pub lex: LexSettings,
    /// Set while replies must be looked at one by one.
    pub attention: Option<Box<Attention>>,
    /// Set while a commit's answer will have to wait for a round.
    pub acknowledging: Option<Box<Acknowledging>>,
    pub shadowing: Shadowing,
    /// What the open transaction writes, where that is rehearsed.
    pub rehearsing: Option<Box<Rehearsing>>,
    /// The round that was known to be applied when it began.
    pub begun_at_round: Option<u64>,
    /// It changes a schema.
    pub changes_schema: bool,
    /// What it has said that it may do.
    pub access: Option<Access>,
    /// It is finished where it began, whatever becomes of the primary: a read, or the end of a
    /// prepared transaction.
    pub reading: bool,
    pub client_done: bool,
    pub terminated: bool,
    /// The server has said why it goes.
    pub server_fatal: bool,
    pub server_deaf: bool,
    pub shut: bool,
    pub waker: Option<Waker>,
    pub standby: Option<Box<Standby>>,
    /// The question of a switchover stands prepared on the server connection.
    pub footprinted: bool,
    /// The other side's connection is being opened.
    pub opening: Option<Opening>,
    pub preparing: Option<oneshot::Sender<PreparedOne>>,
    /// While the secondary may answer reads of this session.
    pub canary: Option<Box<Canary>>,
}

impl Session {
    pub(super) async fn run(&mut self) {
        let end = loop {
            match poll_fn(|cx| self.poll(cx)).await {
                Pause::Orders => {
                    // Rare and large: boxed, so that a session's task stays small.
                    if let Err(end) = Box::pin(self.obey()).await {
                        break end;
                    }
                }
                Pause::Turn => {
                    if let Err(end) = Box::pin(self.take_turn()).await {
                        break end;
                    }
                }
                Pause::End(end @ End::ServerGone(_)) => match Box::pin(self.survives()).await {
                    Ok(true) => {}
                    Ok(false) => break end,
                    Err(end) => break end,
                },
                Pause::End(end) => break end,
            }
        };
        Box::pin(self.finish(end)).await;
    }

    fn poll(&mut self, cx: &mut TaskContext<'_>) -> Poll<Pause> {
        if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
            self.registered.shared.set_waker(cx.waker());
        }
        SCRATCH.with_borrow_mut(|scratch| {
            loop {
                let orders = self.registered.shared.orders();
                if orders != 0 && self.must_obey(orders) {
                    return Poll::Ready(Pause::Orders);
                }
                let progress = self
                    .pump_down(cx, scratch)
                    .and_then(|down| Ok(down | self.pump_up(cx, scratch)?));
                match progress {
                    Ok(_) if self.canary.as_ref().is_some_and(|canary| canary.turn.is_some()) => {
                        return Poll::Ready(Pause::Turn);
                    }
                    Ok(true) => {}
                    Ok(false) => return Poll::Pending,
                    Err(end) => return Poll::Ready(Pause::End(end)),
                }
            }
        })
    }

    fn must_obey(&self, orders: u32) -> bool {
        orders & !order::WHEN_IDLE != 0 || !self.active
    }

    /// Server to client. Returns whether anything moved.
    fn pump_down(&mut self, cx: &mut TaskContext<'_>, scratch: &mut [u8]) -> Result<bool, End> {
        match self.down.outbox.poll_send(&mut self.client, cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_)) => return Err(End::ClientGone),
            Poll::Pending => return Ok(false),
        }
        if self.poll_applied(cx).is_pending() {
            return Ok(false);
        }
        let read = if std::mem::take(&mut self.down.blocked) {
            0
        } else {
            match self.server.poll_read(cx, scratch) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(0)) => return Err(End::ServerGone("the server closed the connection".into())),
                Poll::Ready(Ok(read)) => read,
                Poll::Ready(Err(error)) => return Err(End::ServerGone(error.to_string())),
            }
        };
        let mut pending = std::mem::take(&mut self.down.pending);
        let chunk = if pending.is_empty() {
            &scratch[..read]
        } else {
            pending.extend_from_slice(&scratch[..read]);
            &pending[..]
        };
        let mut gather = Gather::new(chunk, std::mem::take(&mut self.down.outbox));
        let consumed = self.server_frames(&mut gather);
        let (run, outbox) = gather.finish();
        self.down.outbox = outbox;
        let sent = self.down.outbox.poll_send_run(run, &mut self.client, cx);
        self.down.pending = rest_of(chunk, consumed?);
        if self.canary.is_some() {
            self.canary_settled();
        }
        match sent {
            Poll::Ready(Err(_)) => Err(End::ClientGone),
            Poll::Ready(Ok(())) | Poll::Pending => Ok(true),
        }
    }

    /// Client to server. Returns whether anything moved.
    fn pump_up(&mut self, cx: &mut TaskContext<'_>, scratch: &mut [u8]) -> Result<bool, End> {
        if self.server_deaf {
            // Its last words are still to be read; what the client says reaches nobody.
            return Ok(false);
        }
        match self.up.outbox.poll_send(&mut self.server, cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_)) => {
                self.server_is_deaf();
                return Ok(true);
            }
            Poll::Pending => return Ok(false),
        }
        let was_blocked = self.up.blocked;
        let read = if was_blocked {
            0
        } else if self.client_done {
            return self.shut_server(cx);
        } else if self.tracker.full() {
            return Ok(false);
        } else {
            match self.client.poll_read(cx, scratch) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(0)) => {
                    // The server is told once it has everything; it answers what it was asked
                    // before, as it would a client that has only closed one direction.
                    self.client_done = true;
                    return Ok(true);
                }
                Poll::Ready(Ok(read)) => read,
                Poll::Ready(Err(_)) => return Err(End::ClientGone),
            }
        };
        let mut pending = std::mem::take(&mut self.up.pending);
        let chunk = if pending.is_empty() {
            &scratch[..read]
        } else {
            pending.extend_from_slice(&scratch[..read]);
            &pending[..]
        };
        let mut gather = Gather::new(chunk, std::mem::take(&mut self.up.outbox));
        let consumed = self.client_frames(&mut gather);
        let (run, outbox) = gather.finish();
        self.up.outbox = outbox;
        let sent = self.up.outbox.poll_send_run(run, &mut self.server, cx);
        let consumed = consumed?;
        if consumed > 0 || pending.is_empty() {
            self.up.pending = rest_of(chunk, consumed);
        } else {
            // Nothing could be used: what was kept is kept, without a copy.
            self.up.pending = pending;
        }
        if let Poll::Ready(Err(_)) = sent {
            self.server_is_deaf();
        }
        self.settle();
        // Where nothing blocks any more, the client has not been asked for more yet.
        Ok(consumed > 0 || read > 0 || was_blocked && !self.up.blocked)
    }

    fn server_is_deaf(&mut self) {
        self.server_deaf = true;
        self.up.outbox.clear();
        if !self.on_secondary() {
            self.up.pending = Vec::new();
        }
    }

    /// The client will say nothing more.
    fn shut_server(&mut self, cx: &mut TaskContext<'_>) -> Result<bool, End> {
        if self.shut {
            return Ok(false);
        }
        match self.server.poll_shutdown(cx) {
            Poll::Pending => Ok(false),
            Poll::Ready(_) => {
                self.shut = true;
                Ok(true)
            }
        }
    }

    /// A transaction is about to begin, with this frame where it lies here whole. False: it has to
    /// wait.
    pub(super) fn begin(&mut self, first: Option<Frame<'_>>) -> Result<bool, End> {
        let registry = &self.registered.registry;
        // First said, then looked: see the registry.
        self.registered.shared.publish(State::Active);
        if registry.held() && !self.registered.shared.take_admission() {
            if first.is_some_and(|frame| self.ends_prepared(frame)) {
                self.pass_through_hold();
                return Ok(true);
            }
            self.registered.shared.publish(State::Idle);
            registry.came_to_rest();
            registry.wait_in_line(&self.registered.shared);
            return Ok(false);
        }
        if !self.follow()? {
            // Its state has to be copied first, which takes time.
            self.registered.shared.publish(State::Idle);
            self.registered.shared.order(order::FOLLOW);
            return Ok(false);
        }
        if self.standby.is_some() {
            // From here on its copy there is an old one.
            self.registered.shared.set_ready(false);
        }
        self.active = true;
        self.transactions += 1;
        Ok(true)
    }

    /// Takes note of a change of the phase, and goes where the primary is. False: it cannot as it
    /// stands.
    pub(super) fn follow(&mut self) -> Result<bool, End> {
        if self.updates.has_changed().unwrap_or(false) {
            self.control = *self.updates.borrow_and_update();
            if let Some(error) = refuse_own_role(&self.pair, self.control, &self.login.user) {
                return Err(End::Refused(error));
            }
        }
        Ok(self.control.primary == self.side || self.move_to_primary())
    }

    /// Publishes that the session is idle, if it is.
    pub(super) fn settle(&mut self) {
        if !self.active || !self.tracker.idle() || !self.up.framer.at_boundary() {
            return;
        }
        if self.canary.as_ref().is_some_and(|canary| canary.busy()) {
            return;
        }
        if let Some(attention) = &self.attention {
            if attention.busy() {
                return;
            }
            if let Some(attention) = self.attention.take() {
                attention.suspended.into_values().for_each(Observation::complete);
            }
        }
        self.statements.transaction_over();
        self.note_end();
        if self.context.hooks.shadow.is_some() {
            self.shadowing.transaction_over();
        }
        self.active = false;
        self.access = None;
        self.reading = false;
        self.registered.shared.publish(State::Idle);
        if self.registered.registry.held() {
            self.registered.registry.came_to_rest();
        }
    }

    /// A ReadyForQuery has passed.
    pub(super) fn ready(&mut self) {
        self.rehearsal_ready();
        if self.tracker.status() == Status::Idle {
            self.access = None;
        }
        self.settle();
        if self.active && !self.reading && self.tracker.at_rest() && self.tracker.status() != Status::Idle {
            self.registered.shared.publish(State::InTransaction);
        }
    }

    /// Tells the client why, as far as there is anything to tell, and the server that it is over.
    async fn finish(&mut self, end: End) {
        self.registered.shared.publish(State::Ended);
        self.registered.registry.came_to_rest();
        // Whoever waits for an answer of this session waits no longer.
        *self.registered.shared.asked() = Asked::default();
        let target = self.pair.config.target(self.side);
        let ordered = matches!(end, End::Ordered(_));
        let error = match end {
            End::ClientGone => None,
            End::ServerGone(_) if self.server_fatal || self.terminated || self.client_done => None,
            End::ServerGone(cause) => {
                tracing::warn!(
                    session = self.registered.shared.id.0,
                    server = target.describe(),
                    cause,
                    "server gone"
                );
                Some(SqlError::fatal(
                    sqlstate::CONNECTION_FAILURE,
                    format!("connection to {} lost: {cause}", target.describe()),
                ))
            }
            End::Violation(error) => Some(SqlError::fatal(sqlstate::PROTOCOL_VIOLATION, error.to_string())),
            End::Refused(error) => Some(error),
            End::Ordered(reason) => Some(SqlError::fatal(sqlstate::ADMIN_SHUTDOWN, reason)),
        };
        let mut last_words = self.down.outbox.unsent().to_vec();
        // In the middle of a frame the client could not read it.
        if let Some(error) = error
            && self.down.framer.at_boundary()
        {
            last_words.extend_from_slice(&error.to_frame());
        }
        let cut_off = ordered && self.active;
        let goodbye_server = async {
            if cut_off && let Some(backend) = self.registered.shared.backend() {
                // What is running would go on until the server next looks at its socket.
                cancel(&backend.target, backend.pid, &backend.key).await.ok();
            }
            self.server.write_all(frontend::TERMINATE).await.ok();
            self.server.shutdown().await.ok();
            if let Some(lane) = self.canary.take().and_then(|canary| canary.lane) {
                lane.close().await;
            }
        };
        let goodbye_client = async {
            self.client.write_all(&last_words).await?;
            self.client.shutdown().await?;
            let mut ignored = Vec::new();
            // As at the handshake's end: unread bytes would turn the close into a reset.
            while !self.client_done && ignored.len() < 1 << 16 && self.client.read_some(&mut ignored).await? > 0 {}
            Ok::<(), std::io::Error>(())
        };
        let goodbye = async { tokio::join!(goodbye_server, goodbye_client) };
        // A client that does not take its last words goes without them.
        tokio::time::timeout(GOODBYE_TIMEOUT, goodbye).await.ok();
    }
}

const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);

fn rest_of(chunk: &[u8], consumed: usize) -> Vec<u8> {
    chunk[consumed..].to_vec()
}
