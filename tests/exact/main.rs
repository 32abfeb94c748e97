//! Everything an application does on an ordinary Postgres, through the proxy, on real servers:
//! after every case both databases are identical, rows and definitions.
//!
//! `PGTANDEM_CASES=text` runs only the cases whose name holds the text.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../rig/mod.rs"]
mod rig;

mod bench;
mod ddl;
mod dml;
mod schema;
mod sequences;
mod unseen;
mod values;

use bench::{run, run_as};
use pgtandem::servers::Binaries;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ddl_from_15_to_18() {
    run(Binaries::new_side().unwrap(), ddl::CASES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ddl_from_15_to_15() {
    run(Binaries::legacy().unwrap(), ddl::CASES).await;
}

/// As a superuser the proxy has event triggers besides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ddl_as_a_superuser() {
    run_as(Binaries::new_side().unwrap(), ddl::CASES, "SUPERUSER").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dml_from_15_to_18() {
    run(Binaries::new_side().unwrap(), dml::CASES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dml_from_15_to_15() {
    run(Binaries::legacy().unwrap(), dml::CASES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_builds_have_in_common() {
    run(Binaries::legacy().unwrap(), dml::SAME_BUILD).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequences_and_the_clients_view_from_15_to_18() {
    run(Binaries::new_side().unwrap(), sequences::CASES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequences_and_the_clients_view_from_15_to_15() {
    run(Binaries::legacy().unwrap(), sequences::CASES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_of_every_type_from_15_to_18() {
    values::storm(Binaries::new_side().unwrap(), false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_of_every_type_from_15_to_15() {
    values::storm(Binaries::legacy().unwrap(), true).await;
}
