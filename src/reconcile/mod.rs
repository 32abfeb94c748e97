//! Existing rows. So far: tables that were not empty when their capture began are compared at a
//! cut, and those that are equal count as synced from there on.
//!
//! Called by the app for each applier that it starts. Nothing here changes a row of a table.

pub mod backfill;
pub mod key;
mod verify;

pub use verify::{VerifyError, verify_unseeded};
