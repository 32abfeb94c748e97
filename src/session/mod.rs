//! A client's session, from its first byte to its end.
//!
//! ```text
//! socket ─ handshake (TLS, startup packet) ─ auth ─ Authenticated ─ open (login at the primary)
//!            │ cancel request: delivered       │ 28P01               │ 3D000, 53300, 08006
//!            └ malformed: 08P01                                      └─ relay until either end goes
//! ```
//!
//! The listener's worker threads call [`serve`], one task for each client; a session never leaves
//! its thread. Each arrow is a type: only an `Authenticated` client can be opened. The switchover
//! and the admin pages see sessions through the [`Registry`] alone.

mod acknowledge;
mod asking;
mod attention;
mod auth;
mod batch;
mod canary;
mod carry;
mod context;
mod cursors;
mod downward;
mod eligible;
mod footprint;
mod handshake;
pub mod hooks;
mod known;
mod observe;
mod open;
mod orders;
mod outbox;
mod reading;
mod registry;
mod rehearse;
mod relay;
mod reported;
mod sniff;
mod standby;
mod state;
mod taper;
mod tls;
mod turn;
mod two_phase;
mod upward;
mod verifiers;

use std::net::SocketAddr;
use std::sync::Arc;

pub use context::{Context, Settings, Users};
pub use reading::Running;
pub use registry::{Hold, Prepared, Registry, SessionId, SessionInfo, State, Straggler, Uncarried, count_by_state};
pub use taper::Tapered;
pub use tls::ClientTlsError;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;

use crate::upstream::Stream;
use crate::upstream::stream::tune;
use crate::wire::error::SqlError;

/// Runs one client's connection to its end. `half_open` bounds the connections that have not
/// proved who they are; it is given back as soon as this one has.
pub async fn serve(context: Arc<Context>, tcp: TcpStream, peer: SocketAddr, half_open: OwnedSemaphorePermit) {
    if let Err(error) = tune(&tcp) {
        tracing::debug!(%peer, %error, "set socket options");
    }
    // The handshake's future is large and short-lived: boxed, so that a session does not keep
    // its room.
    let opening = Box::pin(begin(context, tcp, peer, half_open)).await;
    if let Some(mut session) = opening {
        session.run().await;
    }
}

async fn begin(
    context: Arc<Context>,
    tcp: TcpStream,
    peer: SocketAddr,
    half_open: OwnedSemaphorePermit,
) -> Option<Box<relay::Session>> {
    let limit = context.settings.load().limits.handshake_timeout;
    let mut identify = Box::pin(async {
        let greeted = handshake::greet(&context, tcp).await?;
        auth::authenticate(&context, greeted).await.map(Some)
    });
    let authenticated = tokio::select! {
        identified = tokio::time::timeout(limit, &mut identify) => match identified {
            Ok(Ok(authenticated)) => authenticated?,
            Ok(Err(Refused::Quietly)) => return None,
            Ok(Err(Refused::With(stream, error))) => {
                tracing::info!(%peer, error = %error, "client refused");
                say_goodbye(stream, &error.to_frame()).await;
                return None;
            }
            // As Postgres' authentication_timeout: closed without a word.
            Err(_) => {
                tracing::info!(%peer, "handshake took longer than {} ms", limit.as_millis());
                return None;
            }
        },
        () = context.shutdown.cancelled() => return None,
    };
    drop(identify);
    drop(half_open);
    open::open(context, authenticated, peer).await
}

/// How a handshake ends without a session.
enum Refused {
    /// The client is gone, was served by a cancel, or would not understand an answer.
    Quietly,
    With(Box<Stream>, SqlError),
}

/// The last words to a client: sent if it takes them within a moment, and the connection closed
/// so that they are not lost to a reset.
async fn say_goodbye(mut stream: Box<Stream>, frame: &[u8]) {
    let limit = std::time::Duration::from_secs(2);
    let goodbye = async {
        stream.write_all(frame).await?;
        stream.shutdown().await?;
        // What the client still sends is read away: closing before it is read would reset the
        // connection, and the client might never see the words. A bounded amount of it.
        let mut ignored = Vec::new();
        while ignored.len() < 1 << 16 && stream.read_some(&mut ignored).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    // Whoever does not take the answer in time goes without it.
    tokio::time::timeout(limit, goodbye).await.ok();
}
