//! Writers that come to the secondary past pgtandem.

use pgtandem::control::{Phase, Side};
use tokio_postgres::error::SqlState;

use crate::another::{Another, mirroring};
use crate::rig::{APP, Rig};

async fn pair_with(strays: &str) -> (Rig, Another) {
    let mut rig = Rig::new();
    rig.extra = format!("stray_writers: {strays}\nswitchover: {{ gates: {{ no_strays_for: 1h }} }}");
    rig.serve(Phase::DualWrite).await;
    let other = Another::beside(&rig, Phase::DualWrite).await;
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1), (2, 2)";
    rig.client().await.batch_execute(schema).await.unwrap();
    rig.wait_caught_up().await;
    (rig, other)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_with_a_word_where_to_go() {
    let (rig, _other) = pair_with("refuse").await;
    let stray = rig.direct(Side::New, APP).await;
    for sql in [
        "INSERT INTO t VALUES (3, 3)",
        "UPDATE t SET v = 0",
        "DELETE FROM t",
        "TRUNCATE t",
        "MERGE INTO t USING (SELECT 1) s ON t.id = 1 WHEN MATCHED THEN DELETE",
    ] {
        let refused = stray.batch_execute(sql).await.unwrap_err();
        let error = refused.as_db_error().unwrap();
        assert_eq!(error.code(), &SqlState::READ_ONLY_SQL_TRANSACTION, "{sql}");
        assert!(
            error.message().contains("writes go to the primary (legacy)"),
            "{error:?}"
        );
        assert!(error.hint().unwrap().contains("Connect through pgtandem"), "{error:?}");
    }
    stray.query("SELECT * FROM t", &[]).await.unwrap();
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    let status = rig.status().await.unwrap();
    assert_eq!(mirroring(&status).stray_writes, 0);
    assert_eq!(rig.command(&["status"]).status.code(), Some(0));
    rig.check(&["switchover", "--to", "new", "--dry-run"], 0, "none recorded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reported_by_every_proxy() {
    let (rig, other) = pair_with("report").await;
    let stray = rig.direct(Side::New, APP).await;
    stray
        .batch_execute("INSERT INTO t VALUES (3, 3), (4, 4); UPDATE t SET v = 0 WHERE id = 3")
        .await
        .unwrap();
    stray.batch_execute("BEGIN; DELETE FROM t; ROLLBACK").await.unwrap();
    rig.until(|status| mirroring(status).stray_writes == 3).await;
    other.until(&rig, |status| mirroring(status).stray_writes == 3).await;
    let told = rig.command(&["status"]);
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    assert_eq!(told.status.code(), Some(1));
    assert!(
        text.contains("3 writes reached the secondary without pgtandem"),
        "{text}"
    );
    let recorded = "SELECT string_agg(concat_ws(' ', role, relation, operation, writes), ', ' ORDER BY operation) FROM pgtandem.stray";
    assert_eq!(
        rig.value(Side::New, recorded).await,
        "app public.t INSERT 2, app public.t UPDATE 1"
    );
    let gate = rig.check(&["switchover", "--to", "new", "--dry-run"], 1, "none within 60 min");
    assert!(gate.contains("app () on public.t"), "{gate}");
    // The applier's own writes are none, and rounds go on.
    rig.client()
        .await
        .batch_execute("UPDATE t SET v = 7 WHERE id = 1")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    assert_eq!(rig.value(Side::New, "SELECT v FROM t WHERE id = 1").await, "7");
    assert_eq!(mirroring(&rig.status().await.unwrap()).stray_writes, 3);

    // Somebody looked at them: on record with name and reason, and neither a problem nor a closed
    // gate any more.
    rig.check(&["strays"], 1, "new: app, 2 INSERT on public.t");
    rig.check(&["strays", "ack"], 2, "--reason");
    rig.check(
        &["strays", "ack", "--reason", " ", "--by", "ann"],
        2,
        "needs a name and a reason",
    );
    rig.check(
        &["strays", "ack", "--reason", "a batch job, ticket 9", "--by", "ann"],
        0,
        "by ann",
    );
    rig.check(&["strays"], 0, "no stray writers");
    rig.check(&["strays", "ack", "--reason", "again"], 0, "no stray writers");
    rig.until(|status| mirroring(status).stray_writes == 0).await;
    assert_eq!(rig.command(&["status"]).status.code(), Some(0));
    rig.check(&["switchover", "--to", "new", "--dry-run"], 0, "none recorded");
    let acknowledged =
        "SELECT concat_ws(' ', actor, reason, sum(writes)) FROM pgtandem.stray_acknowledged GROUP BY actor, reason";
    assert_eq!(rig.value(Side::New, acknowledged).await, "ann a batch job, ticket 9 3");
    let log = std::fs::read_to_string(rig.directory.path().join("mismatches.jsonl")).unwrap();
    assert!(log.contains("strays_acknowledged") && log.contains("ticket 9"), "{log}");
    // What comes later is open again.
    stray.batch_execute("UPDATE t SET v = 1 WHERE id = 4").await.unwrap();
    rig.until(|status| mirroring(status).stray_writes == 1).await;
    rig.check(&["strays"], 1, "1 UPDATE on public.t");
    rig.check(&["switchover", "--to", "new", "--dry-run"], 1, "none within 60 min");
}
