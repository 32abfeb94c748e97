//! Existing rows brought over end to end, through the built binary and under a storm: clients
//! notice nothing, the command and the proxy are killed on the way, and both sides end identical.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod rig;

use std::process::{Command, Stdio};

use pgtandem::admin::api::{BackfillAnswer, Status};
use pgtandem::control::{Phase, Side};
use pgtandem::reconcile::backfill::BackfillStatus;
use pgtandem::servers::SUPERUSER;
use rig::storm::{SCHEMA, Storm, Weather};
use rig::{APP, Rig};

/// A database that was there before: the storm's tables, and one with rows enough to be cut into
/// ranges.
const BIG: &str = "CREATE TABLE big (id bigserial PRIMARY KEY, v text, n int);
    INSERT INTO big (v, n) SELECT md5(i::text), i FROM generate_series(1, 60000) i; ANALYZE big";

fn backfill_of(status: &Status) -> Option<&BackfillStatus> {
    status.databases.first()?.backfill.as_ref()
}

/// A rig whose new side has the tables and none of the rows.
async fn with_rows() -> Rig {
    let rig = Rig::new();
    for side in [Side::Legacy, Side::New] {
        let client = rig.direct(side, APP).await;
        client.batch_execute(SCHEMA).await.unwrap();
        client.batch_execute(BIG).await.unwrap();
    }
    let new = rig.direct(Side::New, APP).await;
    new.batch_execute("TRUNCATE big, accounts, names").await.unwrap();
    rig
}

/// As an operator does it, and then kills it; what runs in the proxy goes on.
fn begin_and_kill(rig: &Rig, arguments: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgtandem"))
        .arg("backfill")
        .args(arguments)
        .arg("--config")
        .arg(rig.config_path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Its first line says that the job has begun.
    let mut line = String::new();
    let stdout = command.stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
    assert!(line.contains("\"running\""), "{line}\n{}", rig.log());
    command.kill().unwrap();
    command.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_and_run_again_it_goes_on_where_it_was() {
    let mut rig = with_rows().await;
    rig.serve(Phase::DualWrite).await;
    let mut weather = Weather::over(&rig.url(), 11, 4);
    weather.reconnect = true;
    let storm = Storm::under(&weather).await;

    begin_and_kill(&rig, &["--max-rate", "8000", "--workers", "1"]);
    rig.until(|status| {
        backfill_of(status).is_some_and(|backfill| backfill.is_running() && backfill.counts.read > 5_000)
    })
    .await;
    rig.kill_proxy();
    rig.spawn_proxy();
    let status = rig
        .until(|status| backfill_of(status).is_some_and(|backfill| backfill.state == "interrupted"))
        .await;
    let done = backfill_of(&status).unwrap().counts.read;
    assert!(done > 5_000, "{status:#?}");
    let output = rig.command(&["status"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("a backfill was interrupted"), "{text}");

    // On with it, then a cancellation, and once more with other workers: all of it one backfill.
    begin_and_kill(&rig, &["--max-rate", "8000"]);
    rig.until(|status| backfill_of(status).is_some_and(|backfill| backfill.counts.read > done + 5_000))
        .await;
    let output = rig.command(&["backfill", "--cancel"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let output = rig.command(&["backfill", "--cancel"]);
    assert_eq!(output.status.code(), Some(1), "none runs: {output:?}");
    let output = rig.command(&["backfill", "--workers", "3", "--max-rate", "none", "--json"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}{}", rig.log());
    let last: BackfillAnswer = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let ended = &last.databases["shop"];
    assert_eq!((ended.state.as_str(), ended.workers), ("done", 3), "{ended:#?}");
    let big = ended.tables.iter().find(|table| table.name == "public.big").unwrap();
    assert_eq!(
        big.counts.read, 60_000,
        "a range was copied twice or not at all: {ended:#?}"
    );

    let ledger = storm.end().await;
    assert!(ledger.acknowledged.len() > 100);
    assert_eq!(ledger.failures, [] as [String; 0]);
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    // Nothing is left to do, and that is no failure.
    let output = rig.command(&["backfill"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_notice_nothing() {
    let mut rig = with_rows().await;
    rig.serve(Phase::DualWrite).await;
    let output = rig.command(&["backfill", "--table", "nowhere"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let storm = Storm::under(&Weather::over(&rig.url(), 12, 4)).await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgtandem"))
        .args(["backfill", "--json", "--max-rate", "30000", "--config"])
        .arg(rig.config_path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Meanwhile the proxy's role has no lock on the table that would make a writer wait.
    let looker = rig.direct(Side::Legacy, SUPERUSER).await;
    let (mut looks, mut seen_copying) = (0, false);
    let code = loop {
        let row = looker
            .query_one(
                "SELECT count(*) FILTER (WHERE l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')), count(*) > 0
                   FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                  WHERE l.relation = 'big'::regclass AND a.usename = 'pgtandem'",
                &[],
            )
            .await
            .unwrap();
        assert_eq!(row.get::<_, i64>(0), 0, "a lock that makes writers wait");
        seen_copying |= row.get::<_, bool>(1);
        looks += 1;
        if let Some(status) = command.try_wait().unwrap() {
            break status.code();
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    };
    assert_eq!(code, Some(0), "{}", rig.log());
    assert!(looks > 10 && seen_copying, "{looks} looks");
    let ledger = storm.end().await;
    assert_eq!(ledger.failures, [] as [String; 0]);
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    let status = rig.status().await.unwrap();
    let mirroring = status.databases[0].mirroring.as_ref().unwrap();
    assert_eq!((mirroring.divergences, mirroring.quarantine.transactions), (0, 0));
    assert!(
        mirroring.tables.iter().all(|table| table.seeding == "synced"),
        "{mirroring:#?}"
    );
}
