//! pgtandem mirrors every committed write between two Postgres databases and flips the primary.
//! A sentence per module, each using only what stands above it.

/// Rounds: what the journal holds, brought to the secondary.
pub mod apply;
/// What the databases say of themselves: tables, snapshots, privileges, equality.
pub mod catalog;
/// proxy.yaml, as written and as used.
pub mod config;
/// The words every layer shares: side, phase, epoch, control.
pub mod control;
/// Capture, the journal, the fence.
pub mod journal;
/// Throwaway Postgres servers, for the demo and the tests.
pub mod servers;
/// Connections to the two servers.
pub mod upstream;
