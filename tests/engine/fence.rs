//! The fence, the epoch, stray writers, and the other direction.

use std::time::Duration;

use pgtandem::apply::{self, ApplierState, begin_direction};
use pgtandem::config::StrayWriters;
use pgtandem::control::{Epoch, Side};
use pgtandem::journal::{self, FenceError, SideRole, SideState, fence, read_state};
use tokio_postgres::error::SqlState;

use crate::bed::{Bed, until};

const SCHEMA: &str = "CREATE TABLE t (id serial PRIMARY KEY, v int); CREATE TABLE keyless (v text)";

#[tokio::test]
async fn a_stray_writer_is_refused() {
    let (bed, applier) = Bed::mirrored("stray_refused", SCHEMA).await;
    let client = bed.app(Side::New).await;
    for statement in ["INSERT INTO t (v) VALUES (1)", "TRUNCATE t"] {
        let error = client.batch_execute(statement).await.unwrap_err();
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code(), &SqlState::READ_ONLY_SQL_TRANSACTION);
        assert!(error.message().contains("(new) is the secondary"), "{error}");
        assert!(error.hint().unwrap().contains("Connect through pgtandem"), "{error:?}");
    }
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t (v) VALUES (1)")
        .await
        .unwrap();
    // The refused INSERT took a number of the secondary's own sequence; it is copied back.
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn a_stray_writer_is_reported() {
    let bed = Bed::new("stray_reported", SCHEMA).await;
    bed.install().await;
    let mut config = bed.config();
    config.stray_writers = StrayWriters::Report;
    let applier = apply::spawn(config);
    applier.catch_up().await.unwrap();
    bed.app(Side::New)
        .await
        .batch_execute("INSERT INTO t VALUES (-5, 1), (-6, 1)")
        .await
        .unwrap();
    let status = until(&applier, |status| status.strays > 0).await;
    assert_eq!(status.strays, 2);
}

#[tokio::test]
async fn waits_for_writers_in_flight_and_turns() {
    let (bed, applier) = Bed::mirrored("fence_turns", SCHEMA).await;
    let mut writer = bed.app(Side::Legacy).await;
    let transaction = writer.transaction().await.unwrap();
    transaction.batch_execute("INSERT INTO t (v) VALUES (1)").await.unwrap();
    let mut control = bed.proxy(Side::Legacy).await;
    match fence(&mut control, Duration::from_millis(300)).await {
        Err(FenceError::Timeout { writers, .. }) => assert!(writers.contains("app"), "{writers}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a writer was in flight"),
    }
    // Everything is as before: others write, and so does the one in flight.
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t (v) VALUES (2)")
        .await
        .unwrap();
    transaction.batch_execute("INSERT INTO t (v) VALUES (3)").await.unwrap();
    transaction.commit().await.unwrap();

    let mut watcher = bed.proxy(Side::Legacy).await;
    let raised = fence(&mut control, Duration::from_secs(5)).await.unwrap();
    let late = bed.app(Side::Legacy).await;
    let late = tokio::spawn(async move { late.batch_execute("INSERT INTO t (v) VALUES (4)").await });
    // The last round runs under the fence, with a writer waiting behind it.
    applier.catch_up().await.unwrap();
    let state = SideState {
        epoch: Epoch(2),
        role: SideRole::from(StrayWriters::Refuse),
    };
    raised.turn(state).await.unwrap();
    let error = late.await.unwrap().unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION));
    assert_eq!(read_state(&watcher).await.unwrap(), Some(state));
    // The applier of the old direction notices.
    until(&applier, |status| matches!(status.state, ApplierState::Failing { .. })).await;
    // The refused writer may have drawn a number before its row was refused, on the side whose
    // sequences now follow the other's.
    let mut differences = bed.differences().await;
    differences.retain(|difference| !difference.name.ends_with("_seq"));
    assert_eq!(differences, []);
    journal::set_role(&mut watcher, SideRole::Fenced).await.unwrap();
    let error = bed
        .app(Side::Legacy)
        .await
        .batch_execute("DELETE FROM t")
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION));
}

#[tokio::test]
async fn there_and_back() {
    let (bed, mut applier) = Bed::mirrored("directions", SCHEMA).await;
    let mut primary = Side::Legacy;
    let writes = "INSERT INTO t (v) SELECT generate_series(1, 20); UPDATE t SET v = v + 1 WHERE id % 3 = 0; DELETE FROM t WHERE id % 7 = 0;
                  INSERT INTO keyless VALUES ('a'), ('a'); DELETE FROM keyless WHERE ctid = (SELECT min(ctid) FROM keyless)";
    for turn in 2..6 {
        bed.app(primary).await.batch_execute(writes).await.unwrap();
        let (mut old, mut new) = (bed.proxy(primary).await, bed.proxy(primary.other()).await);
        let raised = fence(&mut old, Duration::from_secs(5)).await.unwrap();
        applier.catch_up().await.unwrap();
        applier.stop().await;
        let epoch = Epoch(turn);
        let mut writer = bed.proxy(primary).await;
        begin_direction(&new, &mut writer, primary.other(), epoch)
            .await
            .unwrap();
        raised
            .turn(SideState {
                epoch,
                role: SideRole::from(StrayWriters::Refuse),
            })
            .await
            .unwrap();
        let raised = fence(&mut new, Duration::from_secs(5)).await.unwrap();
        raised
            .turn(SideState {
                epoch,
                role: SideRole::Primary,
            })
            .await
            .unwrap();
        primary = primary.other();
        applier = apply::spawn(bed.config_towards(primary.other(), epoch));
        bed.assert_same(&applier).await;
        assert!(bed.app(primary.other()).await.batch_execute(writes).await.is_err());
        bed.app(primary).await.batch_execute(writes).await.unwrap();
        bed.assert_same(&applier).await;
    }
}

/// The trigger's own words must not be taken for a table's columns.
#[tokio::test]
async fn a_stray_writer_of_a_table_with_odd_columns_is_refused() {
    let bed = Bed::new(
        "stray_odd",
        "CREATE TABLE odd (id int PRIMARY KEY, state text, pgtandem_new text, old int, new int, tg_op text, rel oid)",
    )
    .await;
    bed.install().await;
    let applier = apply::spawn(bed.config());
    applier.catch_up().await.unwrap();
    let error = bed
        .app(Side::New)
        .await
        .batch_execute("INSERT INTO odd (id) VALUES (1)")
        .await
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "25006");
    bed.app(Side::Legacy)
        .await
        .batch_execute(
            "INSERT INTO odd VALUES (1, 'a', 'b', 1, 2, 'c', 3); UPDATE odd SET state = 'd'; INSERT INTO odd (id) VALUES (2); DELETE FROM odd WHERE id = 2",
        )
        .await
        .unwrap();
    bed.assert_same(&applier).await;
}

/// What a flip has read before it holds anybody is used under the fence only while it is still so.
#[tokio::test]
async fn what_a_trial_has_read_is_not_used_once_it_is_no_longer_true() {
    let (bed, applier) = Bed::mirrored("as_tried", SCHEMA).await;
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t (v) VALUES (1), (2)")
        .await
        .unwrap();
    applier.catch_up().await.unwrap();
    applier.stop().await;
    let (new, mut old) = (bed.proxy(Side::New).await, bed.proxy(Side::Legacy).await);
    let epoch = Epoch(2);
    let recorded = async |old: &tokio_postgres::Client| -> Vec<String> {
        let sql = "SELECT to_jsonb(s)::text FROM pgtandem.seeding s UNION ALL SELECT to_jsonb(w) ->> 'epoch' FROM pgtandem.watermark w ORDER BY 1";
        old.query(sql, &[])
            .await
            .unwrap()
            .iter()
            .map(|row| row.get(0))
            .collect()
    };
    for disturbance in [
        "CREATE TABLE public.late (id int)",
        "ALTER TABLE public.t ADD COLUMN more int",
        "DROP TABLE public.late",
        "ALTER TABLE public.t DISABLE TRIGGER zzz_pgtandem_row",
        "CREATE SEQUENCE public.more",
        "UPDATE pgtandem.seeding SET note = 'looked at'",
    ] {
        let tried = apply::try_direction(&new, &mut old, Side::New, epoch).await.unwrap();
        new.batch_execute(disturbance).await.unwrap();
        let begun = apply::begin_as_tried(&new, &mut old, Side::New, epoch, &tried).await;
        assert!(!begun.unwrap(), "{disturbance}");
        assert_eq!(recorded(&old).await, Vec::<String>::new(), "{disturbance}");
    }
    let tried = apply::try_direction(&new, &mut old, Side::New, epoch).await.unwrap();
    assert!(
        apply::begin_as_tried(&new, &mut old, Side::New, epoch, &tried)
            .await
            .unwrap()
    );
    let as_tried = recorded(&old).await;
    begin_direction(&new, &mut old, Side::New, epoch).await.unwrap();
    assert_eq!(as_tried, recorded(&old).await);
    assert_eq!(as_tried.len(), 3, "two tables and the watermark: {as_tried:?}");
}

#[tokio::test]
async fn prepared_sequences_are_copied_until_one_is_gone() {
    let (bed, applier) = Bed::mirrored("prepared_sequences", "CREATE SEQUENCE a; CREATE SEQUENCE b").await;
    applier.stop().await;
    let (old, new) = (bed.proxy(Side::Legacy).await, bed.proxy(Side::New).await);
    let prepared = apply::PreparedSequences::prepare(&old, &new).await.unwrap();
    assert_eq!(prepared.copy(&old, &new).await.unwrap(), 0);
    old.batch_execute("SELECT nextval('public.a'), nextval('public.a'), setval('public.b', 7, false)")
        .await
        .unwrap();
    assert_eq!(prepared.copy(&old, &new).await.unwrap(), 2);
    let values = "SELECT (SELECT (last_value, is_called)::text FROM public.a) || (SELECT (last_value, is_called)::text FROM public.b)";
    let row = new.query_one(values, &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "(2,t)(7,f)");
    old.batch_execute("DROP SEQUENCE public.b").await.unwrap();
    assert!(prepared.copy(&old, &new).await.is_err());
    assert_eq!(apply::copy_sequences(&old, &new).await.unwrap(), 0);
}
