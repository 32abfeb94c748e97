//! The engine on real servers: what is written on the primary, in whatever way, is on the
//! secondary after a round, and stays so through failures and flips.

#![allow(clippy::unwrap_used, reason = "helpers of tests are outside #[test] functions")]

mod backfill;
mod backlog;
mod bed;
mod capture;
mod catalog;
mod copies;
mod ddl;
mod dml;
mod encodings;
mod errands;
mod failures;
mod fence;
mod keys;
mod quarantine;
mod rehearse;
mod split;
mod storm;
mod transform;
mod verify;
