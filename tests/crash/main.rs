//! What fails while a storm rages, and what must hold afterwards: no acknowledged commit lost on
//! either side, no row that was never committed, none twice, no row different. And whatever
//! happens to the secondary, clients notice nothing.
//!
//! `PGTANDEM_CRASH_ROUNDS=10` repeats every fault so often, `PGTANDEM_CRASH_SEED=7` moves their
//! moments, `PGTANDEM_CRASH_STOP_SECONDS=30` stops the secondary for so long.
//! `PGTANDEM_FLIP_FAULTS=1` strikes at every step of flips back, too, not only at two of them.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../rig/mod.rs"]
mod rig;

mod another;
mod backlog;
mod databases;
mod fault;
mod flips;
mod gates;
mod holes;
mod journal;
mod primary;
mod processes;
mod proxies;
mod reads;
mod relay;
mod secondary;
mod stage;
mod strays;
mod together;
mod two_phase;
