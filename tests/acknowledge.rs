//! `writes.acknowledge: both`: a commit is answered when the secondary has it, too.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod rig;

use futures_util::{SinkExt, future};
use pgtandem::control::{Phase, Side};
use rig::storm::{SCHEMA, Storm};
use rig::{APP, Rig};
use tokio_postgres::Client;

const BOTH: &str = "writes: { acknowledge: both, both_timeout: 60s }";

async fn serving(extra: &str) -> Rig {
    let mut rig = Rig::new();
    rig.extra = extra.into();
    rig.serve(Phase::DualWrite).await;
    rig.client()
        .await
        .batch_execute(
            "CREATE TABLE t (id bigint PRIMARY KEY, shape text NOT NULL);
             CREATE FUNCTION put(bigint) RETURNS bigint LANGUAGE sql AS
                 $$ INSERT INTO t VALUES ($1, 'function') RETURNING id $$;
             CREATE VIEW w AS SELECT id, shape FROM t",
        )
        .await
        .unwrap();
    rig.wait_caught_up().await;
    rig
}

/// The shapes a commit comes in; each writes the row `id` and returns when it is acknowledged.
const SHAPES: [&str; 9] = [
    "simple",
    "several statements",
    "explicit, simple",
    "explicit, extended",
    "extended",
    "pipelined",
    "copy",
    "function",
    "transaction in a query",
];

async fn write(client: &mut Client, shape: &str, id: i64) {
    let insert = format!("INSERT INTO t VALUES ({id}, 'x')");
    match shape {
        "simple" => client.batch_execute(&insert).await.unwrap(),
        "several statements" => client
            .batch_execute(&format!(
                "SELECT 1; {insert}; SELECT 2; UPDATE w SET shape = 'y' WHERE id = {id}"
            ))
            .await
            .unwrap(),
        "explicit, simple" => {
            client.batch_execute("BEGIN").await.unwrap();
            client
                .batch_execute("SAVEPOINT s; SELECT 1; ROLLBACK TO s")
                .await
                .unwrap();
            client.batch_execute(&insert).await.unwrap();
            client.batch_execute("COMMIT").await.unwrap();
        }
        "explicit, extended" => {
            let transaction = client.transaction().await.unwrap();
            transaction
                .execute("INSERT INTO t VALUES ($1, 'x')", &[&id])
                .await
                .unwrap();
            transaction.commit().await.unwrap();
        }
        "extended" => {
            client.execute("INSERT INTO t VALUES ($1, 'x')", &[&id]).await.unwrap();
        }
        "pipelined" => {
            let statement = client.prepare("INSERT INTO t VALUES ($1, 'x')").await.unwrap();
            let others = [-id * 3, -id * 3 - 1];
            future::try_join_all([id, others[0], others[1]].iter().map(|id| {
                let (client, statement) = (&*client, &statement);
                async move { client.execute(statement, &[id]).await }
            }))
            .await
            .unwrap();
        }
        "copy" => {
            let mut sink = Box::pin(client.copy_in("COPY t FROM STDIN").await.unwrap());
            sink.send(bytes::Bytes::from(format!("{id}\tx\n"))).await.unwrap();
            sink.as_mut().finish().await.unwrap();
        }
        "function" => {
            let row = client.query_one("SELECT put($1)", &[&id]).await.unwrap();
            assert_eq!(row.get::<_, i64>(0), id);
        }
        "transaction in a query" => client
            .batch_execute(&format!("BEGIN; {insert}; COMMIT; SELECT 1"))
            .await
            .unwrap(),
        other => panic!("no such shape: {other}"),
    }
}

async fn is_there(secondary: &Client, id: i64) -> bool {
    let row = secondary
        .query_one("SELECT EXISTS (SELECT FROM t WHERE id = $1)", &[&id])
        .await
        .unwrap();
    row.get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_on_the_secondary_right_after_the_answer_sees_the_write() {
    let rig = serving(BOTH).await;
    let workers = (0..4).map(|worker| {
        let rig = &rig;
        async move {
            let mut client = rig.client().await;
            let secondary = rig.direct(Side::New, APP).await;
            for turn in 0..10 {
                for (number, shape) in SHAPES.iter().enumerate() {
                    let id = 1 + worker * 1_000_000 + turn * 1000 + i64::try_from(number).unwrap() * 10;
                    write(&mut client, shape, id).await;
                    assert!(is_there(&secondary, id).await, "{shape}, {id}");
                }
                // What failed or was rolled back waits for nothing, and leaves the session usable.
                let first = 1 + worker * 1_000_000 + turn * 1000;
                let twice = format!("INSERT INTO t VALUES ({first}, 'x')");
                let twice = client.batch_execute(&twice);
                assert_eq!(twice.await.unwrap_err().code().unwrap().code(), "23505");
                client
                    .batch_execute("BEGIN; INSERT INTO t VALUES (0, 'x'); ROLLBACK")
                    .await
                    .unwrap();
            }
        }
    });
    future::join_all(workers).await;
    rig.wait_caught_up().await;
    rig.assert_equal().await;
}

/// The test above can fail: where the primary acknowledges, the secondary lags.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_primary_acknowledges_the_secondary_is_behind() {
    let rig = serving("writes: { acknowledge: primary }").await;
    let mut client = rig.client().await;
    let secondary = rig.direct(Side::New, APP).await;
    let mut missing = 0;
    for id in 1..=50 {
        write(&mut client, "simple", id).await;
        missing += u32::from(!is_there(&secondary, id).await);
    }
    assert!(missing > 0);
    rig.wait_caught_up().await;
    rig.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_secondary_is_an_error_or_an_alarm() {
    let mut rig = serving(BOTH).await;
    let mut client = rig.client().await;
    let primary = rig.direct(Side::Legacy, APP).await;
    rig.new.stop("immediate").unwrap();
    rig.extra = "writes: { acknowledge: both, both_timeout: 300ms, when_late: error }".into();
    rig.set_phase(Phase::DualWrite).await.unwrap();

    for (id, statements) in [
        (1, &["INSERT INTO t VALUES (1, 'x')"][..]),
        (2, &["BEGIN", "INSERT INTO t VALUES (2, 'x')", "COMMIT"]),
    ] {
        let (last, before) = statements.split_last().unwrap();
        for statement in before {
            client.batch_execute(statement).await.unwrap();
        }
        let error = client.batch_execute(last).await.unwrap_err();
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code().code(), "58000");
        assert!(error.message().contains("committed on the primary"), "{error}");
        assert!(is_there(&primary, id).await);
    }
    let error = client
        .execute("INSERT INTO t VALUES ($1, 'x')", &[&3_i64])
        .await
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "58000");
    // Reads wait for nobody, as soon as the primary's catalog is known.
    while client.query("SELECT count(*) FROM pg_class", &[]).await.is_err() {}
    client.query("SELECT count(*) FROM pg_class", &[]).await.unwrap();

    rig.extra = "writes: { acknowledge: both, both_timeout: 300ms, when_late: degrade }".into();
    rig.set_phase(Phase::DualWrite).await.unwrap();
    write(&mut client, "explicit, extended", 4).await;
    let status = rig.status().await.unwrap();
    let both = status.databases[0].acknowledge.as_ref().unwrap();
    assert!(both.degraded_seconds.is_some(), "{both:?}");
    assert!(both.refused >= 3 && both.answered_early >= 1, "{both:?}");
    assert_eq!(rig.command(&["status"]).status.code(), Some(1));

    rig.new.start_again().unwrap();
    rig.until(|status| {
        let both = status.databases[0].acknowledge.as_ref().unwrap();
        both.degraded_seconds.is_none()
    })
    .await;
    let secondary = rig.direct(Side::New, APP).await;
    for id in 1..=4 {
        assert!(is_there(&secondary, id).await, "{id}");
    }
    rig.extra = BOTH.into();
    rig.set_phase(Phase::DualWrite).await.unwrap();
    write(&mut client, "simple", 5).await;
    assert!(is_there(&secondary, 5).await);
}

/// The applier is replaced in the middle, and every commit waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_primary_flips_while_commits_wait_for_both_sides() {
    let mut rig = Rig::new();
    rig.extra = "writes: { acknowledge: both, both_timeout: 60s, when_late: error }".into();
    rig.serve(Phase::DualRead).await;
    rig.client().await.batch_execute(SCHEMA).await.unwrap();
    let storm = Storm::begin(&rig.url(), 20_261_121, 8, false).await;
    for phase in [Phase::Switchover, Phase::DualRead] {
        storm.rage(300).await;
        if let Err(error) = rig.set_phase(phase).await {
            panic!("{error}\n{:#?}\n{}", rig.status().await, rig.log());
        }
    }
    storm.rage(300).await;
    let ledger = storm.end().await;
    assert_eq!(ledger.failures, Vec::<String>::new());
    // Not waited for: what was acknowledged is there.
    for side in [Side::Legacy, Side::New] {
        ledger.assert_kept(&rig.direct(side, APP).await).await;
    }
    rig.wait_caught_up().await;
    rig.assert_equal().await;
}
