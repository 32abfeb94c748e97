//! Schema migrations during the dual phases: real projects of real tools, run through the proxy
//! while an application writes. After each step both sides have the same definitions and rows.
//!
//! `alembic/` is the project of a shop, whose migrations hold what people do to live databases:
//! columns in three steps, renames by copies, split tables, concurrent indexes, enum labels.
//! `django/` is one of Django's.
//!
//! `scripts/install-drivers` installs the tools; without it these tests fail and say so.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../rig/mod.rs"]
mod rig;

mod alembic;
mod application;
mod django;
mod loads;
mod shop;
mod tool;
