//! Where clients come in.
//!
//! One acceptor for each address hands sockets round robin to worker threads. Each worker is a
//! runtime of its own thread, and a session lives on one worker from its first byte to its last:
//! no session shares a lock, a queue or a cache line with another on its way. The app starts it
//! and drains it; nothing in here knows what a session says.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::session::{self, Context};
use crate::wire::error::{SqlError, sqlstate};

/// Why the proxy cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("listen on {address}: {error}")]
    Bind { address: SocketAddr, error: io::Error },
    #[error("start a worker thread: {0}")]
    Worker(io::Error),
}

/// Sockets accepted and not yet taken up by a worker. A worker takes them up at once; a full
/// queue makes the acceptor wait, and then the kernel's backlog fills.
const HANDED_OVER_MAX: usize = 256;
const BACKLOG: u32 = 1024;
/// Connections that have not proved who they are, at least; else as many as there may be sessions.
/// Each costs a few kilobytes until the handshake's deadline.
const HALF_OPEN_MIN: usize = 128;
/// How long sessions have for their goodbyes after a drain's deadline.
const GOODBYES: Duration = Duration::from_secs(3);

type Arrival = (std::net::TcpStream, SocketAddr, OwnedSemaphorePermit);

/// The listening proxy. Dropped without [`Listener::drain`], it stops accepting; sessions go on
/// until their clients leave.
pub struct Listener {
    context: Arc<Context>,
    addresses: Vec<SocketAddr>,
    acceptors: Vec<AbortOnDropHandle<()>>,
    workers: Vec<JoinHandle<()>>,
}

impl Listener {
    /// Listens on every address and starts the workers. To be called on a tokio runtime, which
    /// then runs the acceptors.
    ///
    /// # Errors
    /// An address cannot be listened on, or a thread cannot be started.
    pub fn start(context: Arc<Context>, listen: &[SocketAddr]) -> Result<Self, ListenError> {
        let limits = context.settings.load().limits.clone();
        let count = match limits.worker_threads {
            0 => default_workers(),
            count => count,
        };
        let mut sockets = Vec::new();
        for &address in listen {
            let bound = bind(address).map_err(|error| ListenError::Bind { address, error })?;
            sockets.push(bound);
        }
        let (mut queues, mut workers) = (Vec::new(), Vec::new());
        for number in 0..count {
            let (queue, arrivals) = mpsc::channel(HANDED_OVER_MAX);
            let context = context.clone();
            let worker = std::thread::Builder::new()
                .name(format!("sessions-{number}"))
                .spawn(move || work(&context, arrivals))
                .map_err(ListenError::Worker)?;
            queues.push(queue);
            workers.push(worker);
        }
        let half_open = Arc::new(Semaphore::new(limits.max_connections.max(HALF_OPEN_MIN)));
        let (mut addresses, mut acceptors) = (Vec::new(), Vec::new());
        for socket in sockets {
            addresses.extend(socket.local_addr());
            let (context, queues, half_open) = (context.clone(), queues.clone(), half_open.clone());
            let acceptor = tokio::spawn(accept(context, socket, queues, half_open));
            acceptors.push(AbortOnDropHandle::new(acceptor));
        }
        Ok(Self {
            context,
            addresses,
            acceptors,
            workers,
        })
    }

    /// Where it listens; a port given as 0 is the real one here.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    pub const fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Lets nobody in any more, ends idle sessions, lets open transactions finish until the
    /// deadline, then ends what is left. Returns how many transactions were cut off.
    pub async fn drain(self, deadline: Instant) -> usize {
        self.context.shutdown.cancel();
        drop(self.acceptors);
        let registry = &self.context.registry;
        registry.drain();
        let cut_off = registry.ended(deadline).await;
        registry.end_all();
        registry.ended(Instant::now() + GOODBYES).await;
        let joined = tokio::task::spawn_blocking(move || {
            for worker in self.workers {
                // A worker that panicked has said so on its own.
                worker.join().ok();
            }
        });
        // A session in a login that hangs ends with its own timeout; the process need not wait.
        tokio::time::timeout(GOODBYES, joined).await.ok();
        cut_off
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn accept(
    context: Arc<Context>,
    socket: TcpListener,
    queues: Vec<mpsc::Sender<Arrival>>,
    half_open: Arc<Semaphore>,
) {
    for queue in queues.iter().cycle() {
        let (tcp, peer, permit) = loop {
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                () = context.shutdown.cancelled() => return,
            };
            match accepted {
                Ok((tcp, peer)) => match half_open.clone().try_acquire_owned() {
                    Ok(permit) => break (tcp, peer, permit),
                    Err(_) => turn_away(&tcp, peer),
                },
                Err(error) => {
                    // Out of file descriptors: waiting is all that helps.
                    tracing::warn!(%error, "accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        let Ok(tcp) = tcp.into_std() else { continue };
        if queue.send((tcp, peer, permit)).await.is_err() {
            return;
        }
    }
}

/// Too many connections are in the middle of their handshakes. As Postgres when it cannot fork:
/// an error before anything was read, if the socket takes it.
fn turn_away(tcp: &TcpStream, peer: SocketAddr) {
    tracing::warn!(%peer, "too many connections in their handshakes");
    let error = SqlError::fatal(sqlstate::TOO_MANY_CONNECTIONS, "sorry, too many clients already");
    tcp.try_write(&error.to_frame()).ok();
}

/// Half of the processors, at least one. A worker that serves more sessions finds more of them ready
/// at each wake-up; beside servers on the same machine, a worker for every processor measured a
/// fifth more at the 99th percentile and a tenth more CPU time for each transaction.
fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get().div_ceil(2))
}

/// A worker thread's life.
fn work(context: &Arc<Context>, mut arrivals: mpsc::Receiver<Arrival>) {
    // A `LocalSet` on an ordinary runtime would be a second scheduler inside the first, paid for at
    // every wake-up.
    let runtime = match Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "start a worker's runtime");
            return;
        }
    };
    let sessions = TaskTracker::new();
    runtime.block_on(async {
        while let Some((tcp, peer, permit)) = arrivals.recv().await {
            match TcpStream::from_std(tcp) {
                Ok(tcp) => {
                    sessions.spawn_local(session::serve(context.clone(), tcp, peer, permit));
                }
                Err(error) => tracing::warn!(%peer, %error, "take over a connection"),
            }
        }
        // Nobody new will come; those who are here stay until they end.
        sessions.close();
        sessions.wait().await;
    });
}
