//! pgtandem mirrors every committed write between two Postgres databases and flips the primary.
//! A sentence per module, each using only what stands above it.

/// proxy.yaml, as written and as used.
pub mod config;
/// The words every layer shares: side, phase, epoch, control.
pub mod control;
/// Throwaway Postgres servers, for the demo and the tests.
pub mod servers;
/// Changing the phase, and the flip of the primary.
pub mod switchover;
/// Logs and metrics of the process.
pub mod telemetry;
/// Connections to the two servers.
pub mod upstream;
