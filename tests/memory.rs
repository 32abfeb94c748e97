//! What a large transaction costs in memory, through the built binary.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod rig;

use pgtandem::control::{Phase, Side};
use rig::Rig;

/// The bound of every transaction's passage, whatever its size.
const RESIDENT_MAX_KB: u64 = 256 * 1024;

/// The most that the process ever held, in kB (proc(5)).
async fn resident_peak(rig: &Rig) -> u64 {
    let pid = rig.status().await.unwrap().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wide_rows_and_many_rows_pass_within_the_bound() {
    let rig = Rig::serving(Phase::DualWrite).await;
    let client = rig.client().await;
    client
        .batch_execute("CREATE TABLE wide (id int PRIMARY KEY, v text); CREATE TABLE many (id int PRIMARY KEY, v text)")
        .await
        .unwrap();
    // Few rows of a megabyte each, in all more than the bound; and many small ones.
    for statement in [
        "INSERT INTO wide SELECT x, repeat(x::text || ' ', 1 << 18) FROM generate_series(1000, 1279) x",
        "UPDATE wide SET v = v || 'x' WHERE id < 1030",
        "INSERT INTO many SELECT x, md5(x::text) FROM generate_series(1, 30000) x",
    ] {
        client.batch_execute(statement).await.unwrap();
        rig.wait_caught_up().await;
        let peak = resident_peak(&rig).await;
        assert!(peak < RESIDENT_MAX_KB, "{peak} kB after {statement}");
    }
    for sql in [
        "SELECT count(*), sum(length(v)), md5(string_agg(md5(v), '' ORDER BY id)) FROM wide",
        "SELECT count(*), md5(string_agg(v, '' ORDER BY id)) FROM many",
    ] {
        let row = format!("SELECT q FROM ({sql}) q");
        assert_eq!(rig.value(Side::Legacy, &row).await, rig.value(Side::New, &row).await);
    }
}
