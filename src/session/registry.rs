//! Every client session, as the switchover, the admin pages and cancel requests see it.
//!
//! Sessions run on their own threads and are told things through flags and a waker; they answer
//! through one-shot channels. What makes a hold exact: a session publishes that it is active
//! and *then* looks for a hold, whoever holds sets the hold and *then* looks at the sessions, both
//! sequentially consistent. So one of the two always sees the other.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use dashmap::DashMap;
use serde::Serialize;
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::Instant;

use super::reading::ReadAsked;
use crate::config::Target;
use crate::control::Side;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct SessionId(pub u64);

/// Where a session stands, for others to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Connecting to the primary.
    Opening,
    /// Arrived during a hold; connects to the primary after it.
    Waiting,
    Idle,
    /// A statement or an unsynced pipeline is running.
    Active,
    /// Inside BEGIN … COMMIT.
    InTransaction,
    /// Finishes a read, or ends a prepared transaction, where it began; a flip does not wait for it.
    Reading,
    Ended,
}

impl State {
    const ALL: [Self; 7] = [
        Self::Opening,
        Self::Waiting,
        Self::Idle,
        Self::Active,
        Self::InTransaction,
        Self::Reading,
        Self::Ended,
    ];

    fn of(value: u8) -> Self {
        Self::ALL.get(usize::from(value)).copied().unwrap_or(Self::Active)
    }

    /// Whether it has a server connection to move, and a flip waits until it can.
    const fn is_open(self) -> bool {
        match self {
            Self::Idle | Self::Active | Self::InTransaction => true,
            Self::Opening | Self::Waiting | Self::Reading | Self::Ended => false,
        }
    }

    /// Whether a hold has to wait for it.
    const fn quiet(self) -> bool {
        match self {
            Self::Waiting | Self::Idle | Self::Reading | Self::Ended => true,
            Self::Opening | Self::Active | Self::InTransaction => false,
        }
    }
}

/// What a session looks at on every turn.
pub(super) mod order {
    /// End with 57P01 as soon as no transaction is open.
    pub(crate) const END_WHEN_IDLE: u32 = 1;
    /// End with 57P01 now.
    pub(crate) const END_NOW: u32 = 2;
    /// Open a connection to the other side.
    pub(crate) const PREPARE: u32 = 4;
    /// See to it that the session can move to the other side, as soon as no transaction is open.
    pub(crate) const READY: u32 = 8;
    /// Close the connection to the side that is not the session's, as soon as no transaction is open.
    pub(crate) const SETTLE: u32 = 16;
    /// The connection to the other side is there, or has failed.
    pub(crate) const STANDBY: u32 = 32;
    /// Move to where the primary is, as soon as no transaction is open.
    pub(crate) const FOLLOW: u32 = 64;
    /// Find out whether it could be carried over.
    pub(crate) const LOOK: u32 = 128;
    /// Copy the session's state to its connection to the other side, as soon as no transaction is
    /// open.
    pub(crate) const COPY: u32 = 256;
    /// Say whether what runs is a read that can be finished where it is.
    pub(crate) const READ: u32 = 512;

    /// What waits for the end of a transaction.
    pub(crate) const WHEN_IDLE: u32 = END_WHEN_IDLE | READY | SETTLE | FOLLOW | COPY;
}

/// Where a session's statements run now.
#[derive(Debug, Clone)]
pub(super) struct BackendKey {
    pub target: Target,
    pub pid: i32,
    pub key: Box<[u8]>,
}

/// The answer of a session that was asked to prepare.
pub(super) struct PreparedOne {
    /// Why the connection could not be opened.
    pub failed: Option<String>,
    /// Why the session could not be carried over as it stands.
    pub uncarriable: Option<String>,
}

#[derive(Default)]
pub(super) struct Asked {
    pub prepare: Option<(Side, oneshot::Sender<PreparedOne>)>,
    pub ready: Option<(Side, oneshot::Sender<Result<(), String>>)>,
    pub look: Option<oneshot::Sender<()>>,
    pub read: Option<ReadAsked>,
    pub end_because: Option<String>,
}

/// What was last found that keeps a session where it is.
#[derive(Default)]
pub(super) struct Looked {
    /// How many transactions it had begun then: what has done nothing since is not asked again.
    pub at: Option<u64>,
    pub uncarriable: Option<String>,
}

/// What a session shares with the registry.
pub(super) struct Shared {
    pub id: SessionId,
    pub user: String,
    pub database: String,
    pub application: Mutex<String>,
    pub peer: SocketAddr,
    pub started: Instant,
    state: AtomicU8,
    /// Its state lies on a connection to the other side.
    ready: AtomicBool,
    /// It waits for the end of a hold.
    in_line: AtomicBool,
    /// It may begin one transaction in spite of a hold.
    admitted: AtomicBool,
    orders: AtomicU32,
    asked: Mutex<Asked>,
    waker: Mutex<Option<Waker>>,
    backend: Mutex<Option<BackendKey>>,
    looked: Mutex<Looked>,
    /// Requests to cancel that were sent on.
    cancels: AtomicU32,
}

/// A panic elsewhere leaves nothing half-written behind these locks.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn state(&self) -> State {
        State::of(self.state.load(Ordering::SeqCst))
    }

    pub(super) fn publish(&self, state: State) {
        self.state.store(state as u8, Ordering::SeqCst);
    }

    pub(super) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::SeqCst);
    }

    /// Whether it can move as it stands, under a hold. A session that begins a transaction publishes
    /// that it is active, takes its admission if it needs one, and then is ready no more: in the
    /// reverse order it is looked at here.
    fn is_ready(&self) -> bool {
        !self.admitted.load(Ordering::SeqCst) && self.state() == State::Idle && self.ready.load(Ordering::SeqCst)
    }

    /// Whether it may begin a transaction in spite of a hold; once.
    pub(super) fn take_admission(&self) -> bool {
        self.admitted.swap(false, Ordering::SeqCst)
    }

    /// Whether a hold has to wait for it. Who has been admitted publishes that it is active before
    /// it takes the admission back, so that it is seen by one or the other.
    pub(super) fn is_busy(&self) -> bool {
        let admitted = self.admitted.load(Ordering::SeqCst);
        let state = self.state();
        !state.quiet() || admitted && state != State::Ended
    }

    pub(super) fn orders(&self) -> u32 {
        self.orders.load(Ordering::Acquire)
    }

    pub(super) fn clear(&self, order: u32) {
        self.orders.fetch_and(!order, Ordering::AcqRel);
    }

    pub(super) fn order(&self, order: u32) {
        self.orders.fetch_or(order, Ordering::AcqRel);
        self.wake();
    }

    pub(super) fn wake(&self) {
        if let Some(waker) = &*lock(&self.waker) {
            waker.wake_by_ref();
        }
    }

    pub(super) fn set_waker(&self, waker: &Waker) {
        *lock(&self.waker) = Some(waker.clone());
    }

    pub(super) fn asked(&self) -> MutexGuard<'_, Asked> {
        lock(&self.asked)
    }

    pub(super) fn set_backend(&self, backend: BackendKey) {
        *lock(&self.backend) = Some(backend);
    }

    pub(super) fn cancels(&self) -> u32 {
        self.cancels.load(Ordering::SeqCst)
    }

    pub(super) fn backend(&self) -> Option<BackendKey> {
        lock(&self.backend).clone()
    }

    pub(super) fn looked(&self) -> MutexGuard<'_, Looked> {
        lock(&self.looked)
    }
}

/// A session as it is shown.
#[derive(Debug, Clone, Serialize)]
pub struct SessionInfo {
    pub id: SessionId,
    pub user: String,
    pub database: String,
    pub application: String,
    pub peer: SocketAddr,
    pub state: State,
    /// The server process that runs its statements.
    pub pid: i32,
    pub side: Option<Side>,
    pub age_seconds: u64,
    /// Why it could not be carried over, as [`Registry::look`] last found.
    pub uncarriable: Option<String>,
}

/// A session that did not come to rest within a hold's deadline.
#[derive(Debug, Clone, Serialize)]
pub struct Straggler {
    pub id: SessionId,
    pub user: String,
    pub application: String,
    pub pid: i32,
    pub state: State,
}

/// What [`Registry::prepare`] achieved.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Prepared {
    pub opened: usize,
    /// Sessions whose connection to the other side could not be opened: with any of these a flip
    /// must not proceed.
    pub failed: Vec<Uncarried>,
    /// Sessions that could not be carried over as they stand now (temporary tables, …).
    pub uncarriable: Vec<Uncarried>,
}

/// A session that stays where it is, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Uncarried {
    pub id: SessionId,
    pub user: String,
    pub application: String,
    pub reason: String,
}

/// As many sessions open their connection to the other side at once, so that a thousand do not
/// fall upon a server in one instant.
const OPENING_AT_ONCE: usize = 16;
/// One is enough to call a switchover off; with as many it is not a session's own trouble.
const FAILED_MAX: usize = 3;
/// A connection that took longer to open was held up by something that resting does not help.
const REST_MAX: Duration = Duration::from_millis(20);
/// Idle sessions that move in one go: each is a few system calls.
const FOLLOWING_AT_ONCE: usize = 16;
const BETWEEN_PORTIONS: Duration = Duration::from_millis(5);
/// Between two connections that are closed: for a server that is as much work as opening them.
const BETWEEN_CLOSINGS: Duration = Duration::from_millis(20);

struct Inner {
    sessions: DashMap<SessionId, Arc<Shared>>,
    /// What a client holds to cancel with: the process id and key of its first backend.
    cancel_keys: DashMap<(i32, Box<[u8]>), Arc<Shared>>,
    next_id: AtomicU64,
    holds: AtomicUsize,
    /// A session came to rest during a hold.
    quiet: Notify,
    /// The last hold was released.
    released: Notify,
    /// Sessions whose transaction a hold keeps from beginning, in the order they came.
    line: Mutex<VecDeque<Arc<Shared>>>,
    draining: AtomicBool,
    opening: Arc<Semaphore>,
}

/// Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

impl Default for Registry {
    fn default() -> Self {
        Self(Arc::new(Inner {
            sessions: DashMap::new(),
            cancel_keys: DashMap::new(),
            next_id: AtomicU64::new(1),
            holds: AtomicUsize::new(0),
            quiet: Notify::new(),
            released: Notify::new(),
            line: Mutex::default(),
            draining: AtomicBool::new(false),
            opening: Arc::new(Semaphore::new(OPENING_AT_ONCE)),
        }))
    }
}

/// No session begins a transaction while one of these lives.
#[must_use = "dropping a hold releases it"]
pub struct Hold(Registry);

impl Drop for Hold {
    fn drop(&mut self) {
        if self.0.0.holds.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.0.released.notify_waiters();
            let line = std::mem::take(&mut *lock(&self.0.0.line));
            for session in line {
                session.in_line.store(false, Ordering::SeqCst);
                session.wake();
            }
        }
    }
}

impl Registry {
    pub fn sessions(&self) -> Vec<SessionInfo> {
        let mut infos = Vec::with_capacity(self.0.sessions.len());
        self.each(|session| {
            let backend = session.backend();
            infos.push(SessionInfo {
                id: session.id,
                user: session.user.clone(),
                database: session.database.clone(),
                application: lock(&session.application).clone(),
                peer: session.peer,
                state: session.state(),
                pid: backend.as_ref().map_or(0, |backend| backend.pid),
                side: backend.map(|backend| backend.target.side),
                age_seconds: session.started.elapsed().as_secs(),
                uncarriable: session.looked().uncarriable.clone(),
            });
        });
        infos
    }

    pub fn len(&self) -> usize {
        self.0.sessions.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.sessions.is_empty()
    }

    /// From now on no session begins a transaction; open ones go on.
    pub fn hold(&self) -> Hold {
        if !self.held() {
            // Of an earlier hold, which ended before they were used.
            self.each(|session| session.admitted.store(false, Ordering::SeqCst));
        }
        self.0.holds.fetch_add(1, Ordering::SeqCst);
        Hold(self.clone())
    }

    /// Waits until no transaction is open.
    ///
    /// # Errors
    /// The sessions that still have one at the deadline.
    pub async fn drained(&self, _hold: &Hold, deadline: Instant) -> Result<(), Vec<Straggler>> {
        loop {
            let quiet = self.0.quiet.notified();
            tokio::pin!(quiet);
            quiet.as_mut().enable();
            let busy = self.busy();
            if busy.is_empty() {
                return Ok(());
            }
            if tokio::time::timeout_at(deadline, quiet).await.is_err() {
                let busy = self.busy();
                return if busy.is_empty() { Ok(()) } else { Err(busy) };
            }
        }
    }

    fn busy(&self) -> Vec<Straggler> {
        let mut busy = Vec::new();
        self.each(|session| {
            if session.is_busy() {
                busy.push(Straggler {
                    id: session.id,
                    user: session.user.clone(),
                    application: lock(&session.application).clone(),
                    pid: session.backend().map_or(0, |backend| backend.pid),
                    state: session.state(),
                });
            }
        });
        busy
    }

    /// Has every session find out what would keep it where it is, unless it has done nothing since
    /// it last did, or is busy now; [`Self::sessions`] tells.
    pub async fn look(&self, patience: Duration) {
        let mut answers = Vec::new();
        self.each(|session| {
            if session.state() == State::Idle {
                let (answer, answered) = oneshot::channel();
                session.asked().look = Some(answer);
                session.order(order::LOOK);
                answers.push(answered);
            }
        });
        // A client that does not read its answers keeps only its own session from this.
        let all = futures_util::future::join_all(answers);
        tokio::time::timeout(patience, all).await.ok();
    }

    /// Opens a connection to `to` for every session, as its user, and where the session is idle
    /// brings it to the session's state. Sessions go on meanwhile, and so that they hardly feel it,
    /// it is done one after the other, with rests: a thousand connections opened at once would keep
    /// a server from everything else for seconds.
    pub async fn prepare(&self, to: Side) -> Prepared {
        let mut prepared = Prepared::default();
        for session in self.all() {
            if !session.state().is_open() {
                continue;
            }
            let began = Instant::now();
            let (answer, answered) = oneshot::channel();
            session.asked().prepare = Some((to, answer));
            // What the last switchover left to be done is overtaken, but for being where it led.
            session.clear(order::SETTLE);
            session.order(order::FOLLOW | order::PREPARE);
            // A session that ended meanwhile has dropped its sender.
            let Ok(one) = answered.await else { continue };
            let uncarried = |reason| uncarried(&session, reason);
            match one.failed {
                Some(reason) => prepared.failed.push(uncarried(reason)),
                None => prepared.opened += 1,
            }
            prepared.uncarriable.extend(one.uncarriable.map(uncarried));
            if prepared.failed.len() >= FAILED_MAX {
                break;
            }
            tokio::time::sleep(began.elapsed().min(REST_MAX)).await;
        }
        prepared
    }

    /// Sees to it that every session can move to `to` with its settings, role, prepared statements
    /// and LISTEN; each as soon as it has no transaction open. Returns those that cannot. Sessions
    /// have been told when this returns its future.
    pub fn make_ready(&self, _hold: &Hold, to: Side) -> impl Future<Output = Vec<Uncarried>> + use<> {
        let mut answers = Vec::new();
        self.each(|session| {
            if !session.state().is_open() || session.is_ready() {
                return;
            }
            let (answer, answered) = oneshot::channel();
            session.asked().ready = Some((to, answer));
            session.order(order::READY);
            answers.push((session.clone(), answered));
        });
        async move {
            let mut stay = Vec::new();
            for (session, answered) in answers {
                if let Ok(Err(reason)) = answered.await {
                    stay.push(uncarried(&session, reason));
                }
            }
            stay
        }
    }

    /// After a switchover, or one that was given up: idle sessions go where the primary is (the
    /// others have, with their next transaction), and the connections that are not needed any more
    /// are closed. In small portions: clients that have waited go first.
    pub async fn settle(&self) {
        let sessions = self.all();
        for portion in sessions.chunks(FOLLOWING_AT_ONCE) {
            portion.iter().for_each(|session| session.order(order::FOLLOW));
            tokio::time::sleep(BETWEEN_PORTIONS).await;
        }
        for session in sessions {
            session.order(order::SETTLE);
            tokio::time::sleep(BETWEEN_CLOSINGS).await;
        }
    }

    /// Ends the named sessions with FATAL 57P01 and `reason`.
    pub fn end(&self, sessions: &[SessionId], reason: &str) {
        for id in sessions {
            if let Some(session) = self.0.sessions.get(id) {
                session.asked().end_because = Some(reason.to_owned());
                session.order(order::END_NOW);
            }
        }
    }

    /// Ends every session as soon as it has no transaction open, and lets no new one in.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::SeqCst);
        self.each(|session| session.order(order::END_WHEN_IDLE));
    }

    /// Ends every session now.
    pub fn end_all(&self) {
        self.each(|session| session.order(order::END_NOW));
    }

    /// Waits until every session has ended (some may still be saying goodbye to a client); returns
    /// how many have not at the deadline.
    pub async fn ended(&self, deadline: Instant) -> usize {
        let left = || {
            let mut left = 0;
            self.each(|session| left += usize::from(session.state() != State::Ended));
            left
        };
        loop {
            let changed = self.0.quiet.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if left() == 0 || tokio::time::timeout_at(deadline, changed).await.is_err() {
                return left();
            }
        }
    }

    /// The backend that runs the statements of the client that holds this key.
    pub(super) fn cancel_target(&self, pid: i32, key: &[u8]) -> Option<BackendKey> {
        let session = self.0.cancel_keys.get(&(pid, Box::from(key)))?.clone();
        session.cancels.fetch_add(1, Ordering::SeqCst);
        session.backend()
    }

    pub(super) fn held(&self) -> bool {
        self.0.holds.load(Ordering::SeqCst) > 0
    }

    pub(super) fn draining(&self) -> bool {
        self.0.draining.load(Ordering::SeqCst)
    }

    /// A session came to rest, or found itself held.
    pub(super) fn came_to_rest(&self) {
        self.0.quiet.notify_waiters();
    }

    /// A hold keeps this session's transaction from beginning; it is woken when the hold ends.
    pub(super) fn wait_in_line(&self, session: &Arc<Shared>) {
        if !session.in_line.swap(true, Ordering::SeqCst) {
            lock(&self.0.line).push_back(session.clone());
        }
        if !self.held() {
            // It ended in between, and may have looked at the line before.
            session.wake();
        }
    }

    /// Lets up to `count` of those that wait begin, in the order they came; returns how many.
    pub(super) fn admit(&self, _hold: &Hold, count: usize) -> usize {
        let admitted: Vec<_> = {
            let mut line = lock(&self.0.line);
            let count = count.min(line.len());
            line.drain(..count).collect()
        };
        for session in &admitted {
            session.admitted.store(true, Ordering::SeqCst);
            session.in_line.store(false, Ordering::SeqCst);
            session.wake();
        }
        admitted.len()
    }

    /// How many sessions a hold has to wait for.
    pub(super) fn under_way(&self) -> usize {
        self.0.sessions.iter().filter(|session| session.is_busy()).count()
    }

    /// Ends when a session comes to rest during a hold.
    pub(super) fn rest_of_one(&self) -> Notified<'_> {
        self.0.quiet.notified()
    }

    /// Waits until there is no hold.
    pub(super) async fn until_released(&self) {
        loop {
            let released = self.0.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            if !self.held() {
                return;
            }
            released.await;
        }
    }

    pub(super) fn opening(&self) -> Arc<Semaphore> {
        self.0.opening.clone()
    }

    /// Enters a session; it leaves when the returned value is dropped.
    pub(super) fn enter(&self, user: &str, database: &str, application: &str, peer: SocketAddr) -> Registered {
        let shared = Arc::new(Shared {
            id: SessionId(self.0.next_id.fetch_add(1, Ordering::Relaxed)),
            user: user.to_owned(),
            database: database.to_owned(),
            application: Mutex::new(application.to_owned()),
            peer,
            started: Instant::now(),
            state: AtomicU8::new(State::Opening as u8),
            ready: AtomicBool::new(false),
            in_line: AtomicBool::new(false),
            admitted: AtomicBool::new(false),
            orders: AtomicU32::new(0),
            asked: Mutex::new(Asked::default()),
            waker: Mutex::new(None),
            backend: Mutex::new(None),
            looked: Mutex::default(),
            cancels: AtomicU32::new(0),
        });
        self.0.sessions.insert(shared.id, shared.clone());
        Registered {
            registry: self.clone(),
            shared,
            cancel_key: None,
        }
    }

    /// Every session, in the order of their arrival.
    fn all(&self) -> Vec<Arc<Shared>> {
        let mut sessions: Vec<Arc<Shared>> = self.0.sessions.iter().map(|entry| entry.value().clone()).collect();
        sessions.sort_by_key(|session| session.id);
        sessions
    }

    pub(super) fn each(&self, act: impl FnMut(&Arc<Shared>)) {
        self.all().iter().for_each(act);
    }
}

fn uncarried(session: &Shared, reason: String) -> Uncarried {
    Uncarried {
        id: session.id,
        user: session.user.clone(),
        application: lock(&session.application).clone(),
        reason,
    }
}

/// A session's place in the registry.
pub(super) struct Registered {
    pub registry: Registry,
    pub shared: Arc<Shared>,
    cancel_key: Option<(i32, Box<[u8]>)>,
}

impl Registered {
    /// What the client was given to cancel with.
    pub(super) fn set_cancel_key(&mut self, pid: i32, key: &[u8]) {
        let key = (pid, Box::from(key));
        self.registry.0.cancel_keys.insert(key.clone(), self.shared.clone());
        self.cancel_key = Some(key);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.publish(State::Ended);
        if let Some(key) = &self.cancel_key {
            // Another session may hold the same key by now, if a server was restarted.
            let ours = |_: &(i32, Box<[u8]>), session: &Arc<Shared>| Arc::ptr_eq(session, &self.shared);
            self.registry.0.cancel_keys.remove_if(key, ours);
        }
        self.registry.0.sessions.remove(&self.shared.id);
        *self.shared.asked() = Asked::default();
        self.registry.came_to_rest();
    }
}

/// Sessions by state, for the metrics.
pub fn count_by_state(sessions: &[SessionInfo]) -> HashMap<&'static str, usize> {
    let mut counts = HashMap::new();
    for session in sessions {
        let name = match session.state {
            State::Opening => "opening",
            State::Waiting => "waiting",
            State::Idle => "idle",
            State::Active => "active",
            State::InTransaction => "in_transaction",
            State::Reading => "reading",
            State::Ended => "ended",
        };
        *counts.entry(name).or_insert(0) += 1;
    }
    counts
}
