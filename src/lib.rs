//! pgtandem mirrors every committed write between two Postgres databases and flips the primary.
//! A sentence per module, each using only what stands above it.

/// proxy.yaml, as written and as used.
pub mod config;
/// The words every layer shares: side, phase, epoch, control.
pub mod control;
/// Where clients come in: sockets, worker threads, draining.
pub mod listener;
/// Which pair of databases a name means, which of the two answers. Pure.
pub mod routing;
/// Throwaway Postgres servers, for the demo and the tests.
pub mod servers;
/// A client's session: handshake, authentication, relay, carrying over.
pub mod session;
/// What statements are, decided from their text alone.
pub mod sql;
/// Connections to the two servers.
pub mod upstream;
/// The bytes of the protocol, without I/O.
pub mod wire;
