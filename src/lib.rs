//! pgtandem mirrors every committed write between two Postgres databases and flips the primary.
//! A sentence per module, each using only what stands above it.

/// The words every layer shares: side, phase, epoch, control.
pub mod control;

/// proxy.yaml, as written and as used.
pub mod config;
/// Logs and metrics of the process.
pub mod telemetry;
/// The bytes of the protocol, without I/O.
pub mod wire;

/// Connections to the two servers.
pub mod upstream;

/// What the databases say of themselves: tables, snapshots, privileges, equality.
pub mod catalog;
/// The SQL objects that capture, fence and record.
pub mod journal;
/// Which pair of databases a name means, which of the two answers. Pure.
pub mod routing;
/// What statements are, decided from their text alone.
pub mod sql;

/// How rows of one side look on the other, where the schemas differ.
pub mod transform;

/// Rounds: what the journal holds, brought to the secondary.
pub mod apply;
/// Reads repeated on the secondary, and the answers compared.
pub mod shadow;

/// Whether a pair of databases can be mirrored exactly, before anything is installed.
pub mod check;
/// Existing rows, compared at a cut; definitions brought in line.
pub mod reconcile;
/// A client's session: handshake, authentication, relay, carrying over.
pub mod session;
/// Changing the phase, and the flip of the primary.
pub mod switchover;

/// Where clients come in: sockets, worker threads, draining.
pub mod listener;

/// The HTTP server beside the proxy, its documents, and the commands' client.
pub mod admin;

/// Wires every part and lists every task.
pub mod app;

/// Throwaway Postgres servers, for the demo and the tests.
pub mod servers;

/// The whole migration on two throwaway servers.
pub mod demo;

/// The commands.
pub mod cli;
