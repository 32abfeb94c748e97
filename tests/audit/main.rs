//! What an auditor relies on: the chained log and the report made of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod browser;
mod chain;
mod report;
#[path = "../rig/mod.rs"]
mod rig;
