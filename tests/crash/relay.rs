//! A TCP relay that stands between a proxy and a server and treats its connections as networks
//! do: cuts, resets, delays and forgets them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// What becomes of connections, by their number.
#[derive(Clone, Copy, Default)]
struct Rules {
    /// Those below are closed; by a reset, if asked.
    closed_below: u64,
    reset: bool,
    /// New ones are closed at once.
    refusing: bool,
    /// Those below stay open, and nothing passes.
    silent_below: u64,
    delay: Duration,
}

pub(crate) struct Relay {
    pub(crate) port: u16,
    rules: watch::Sender<Rules>,
    accepted: Arc<AtomicU64>,
    _listening: AbortOnDropHandle<()>,
}

impl Relay {
    pub(crate) async fn towards(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (rules, watched) = watch::channel(Rules::default());
        let accepted = Arc::new(AtomicU64::new(0));
        Self {
            port: listener.local_addr().unwrap().port(),
            rules,
            accepted: accepted.clone(),
            _listening: AbortOnDropHandle::new(tokio::spawn(listen(listener, port, watched, accepted))),
        }
    }

    fn so_far(&self) -> u64 {
        self.accepted.load(Relaxed)
    }

    /// Closes every connection and accepts no others.
    pub(crate) fn cut(&self) {
        let so_far = self.so_far();
        self.rules.send_modify(|rules| {
            rules.closed_below = so_far;
            rules.reset = false;
            rules.refusing = true;
        });
    }

    /// Resets every connection; new ones pass.
    pub(crate) fn reset(&self) {
        let so_far = self.so_far();
        self.rules.send_modify(|rules| {
            rules.closed_below = so_far;
            rules.reset = true;
        });
    }

    /// Nothing passes any more on the connections there are, and nobody is told; new ones pass.
    pub(crate) fn forget(&self) {
        let so_far = self.so_far();
        self.rules.send_modify(|rules| rules.silent_below = so_far);
    }

    /// Nothing passes, on new connections neither.
    pub(crate) fn swallow(&self) {
        self.rules.send_modify(|rules| rules.silent_below = u64::MAX);
    }

    pub(crate) fn delay(&self, delay: Duration) {
        self.rules.send_modify(|rules| rules.delay = delay);
    }

    /// From here on all passes; what was forgotten stays so.
    pub(crate) fn calm(&self) {
        let so_far = self.so_far();
        self.rules.send_modify(|rules| {
            rules.refusing = false;
            rules.delay = Duration::ZERO;
            rules.silent_below = rules.silent_below.min(so_far);
        });
    }
}

async fn listen(listener: TcpListener, port: u16, rules: watch::Receiver<Rules>, accepted: Arc<AtomicU64>) {
    loop {
        let (client, _) = listener.accept().await.unwrap();
        let number = accepted.fetch_add(1, Relaxed);
        if !rules.borrow().refusing {
            tokio::spawn(pass(client, port, number, rules.clone()));
        }
    }
}

async fn pass(client: TcpStream, port: u16, number: u64, rules: watch::Receiver<Rules>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else {
        return;
    };
    client.set_nodelay(true).ok();
    server.set_nodelay(true).ok();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // One end that closes closes the other, as a server does.
    tokio::select! {
        _ = carry(from_client, to_server, number, rules.clone()) => {}
        _ = carry(from_server, to_client, number, rules) => {}
    }
}

/// Ends when either end does, or when it is told to close.
async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    number: u64,
    mut rules: watch::Receiver<Rules>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = tokio::select! {
            count = from.read(&mut buffer) => count?,
            closed = rules.wait_for(|rules| number < rules.closed_below) => {
                if closed.is_ok_and(|rules| rules.reset) {
                    for socket in [SockRef::from(from.as_ref()), SockRef::from(to.as_ref())] {
                        socket.set_linger(Some(Duration::ZERO))?;
                    }
                }
                return Ok(());
            }
        };
        // A forgotten connection passes on no goodbye either.
        rules
            .wait_for(|rules| number >= rules.silent_below || number < rules.closed_below)
            .await
            .map_err(io::Error::other)?;
        if count == 0 {
            return Ok(());
        }
        let delay = rules.borrow().delay;
        if delay > Duration::ZERO {
            tokio::time::sleep(delay).await;
        }
        to.write_all(&buffer[..count]).await?;
    }
}
