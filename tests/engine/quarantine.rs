//! What the secondary refuses: held whole with what follows it, the rest exact, taken up again or
//! dropped by order.

use pgtandem::apply::{self, Applier, ApplierConfig, ApplierState, Mend, Order, Outcome};
use pgtandem::control::Side;
use pgtandem::journal::{DDL_HOOK, DDL_HOOK_OUTSIDE};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::Client;

use crate::bed::{Bed, caught_up, until};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v int, w int UNIQUE); CREATE TABLE u (id int PRIMARY KEY, v int); CREATE TABLE k (v int)";
const REFUSE: &str = "ALTER TABLE t ADD CONSTRAINT small CHECK (v < 100)";
pub(crate) const ADMIT: &str = "ALTER TABLE t DROP CONSTRAINT small";

/// Mirrored, with a constraint that only the secondary has.
pub(crate) async fn refusing(name: &str) -> (Bed, Applier) {
    let (bed, applier) = Bed::mirrored(name, SCHEMA).await;
    bed.proxy(Side::New).await.batch_execute(REFUSE).await.unwrap();
    (bed, applier)
}

pub(crate) async fn values(client: &Client, sql: &str) -> Vec<String> {
    let sql = format!("SELECT q::text FROM ({sql}) q ORDER BY q::text COLLATE \"C\"");
    let rows = client.query(&sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

pub(crate) async fn retry(applier: &Applier, id: Option<i64>) -> Outcome {
    let actor = "tester".to_owned();
    applier.order(Order::Retry { id, actor }).await.unwrap()
}

async fn transaction(client: &Client, statements: &str) {
    client
        .batch_execute(&format!("BEGIN; {statements}; COMMIT"))
        .await
        .unwrap();
}

/// Transactions in quarantine, and of those the refused.
pub(crate) fn held(applier: &Applier) -> (u64, u64) {
    let status = applier.status().borrow().clone();
    (status.quarantine.transactions, status.quarantine.refused)
}

#[tokio::test]
async fn a_refused_transaction_is_held_whole_and_drags_along_what_follows_it() {
    let (bed, applier) = refusing("refused").await;
    let client = bed.app(Side::Legacy).await;
    transaction(&client, "INSERT INTO t VALUES (1, 200, 1); INSERT INTO u VALUES (1, 1)").await;
    client.batch_execute("INSERT INTO t VALUES (2, 5, 2)").await.unwrap();
    caught_up(&applier).await;
    // In a later round: the same key, then a key of that one, then keys of neither.
    transaction(&client, "UPDATE t SET v = 7 WHERE id = 1; INSERT INTO u VALUES (2, 2)").await;
    client.batch_execute("UPDATE u SET v = 3 WHERE id = 2").await.unwrap();
    transaction(&client, "UPDATE t SET v = 6 WHERE id = 2; INSERT INTO u VALUES (3, 3)").await;
    caught_up(&applier).await;
    assert_eq!(held(&applier), (3, 1));
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT * FROM t").await, ["(2,6,2)"]);
    assert_eq!(values(&new, "SELECT * FROM u").await, ["(3,3)"]);

    let entries = apply::list_quarantine(&new).await.unwrap();
    assert_eq!(entries.len(), 3);
    assert_eq!(entries[0].sqlstate.as_deref(), Some("23514"));
    assert!(entries[0].error.contains("small"), "{}", entries[0].error);
    assert!(!entries[0].error.contains("200"), "{}", entries[0].error);
    assert_eq!(entries[0].tables, ["public.t", "public.u"]);
    assert_eq!(entries[0].keys[0], ("public.t".to_owned(), "(1)".to_owned()));
    assert_eq!(entries[0].follows, None);
    assert_eq!(entries[1].follows, Some(entries[0].id));
    assert_eq!(entries[2].follows, Some(entries[1].id));

    // Refused again: what depends on it is left.
    let outcome = retry(&applier, None).await;
    assert_eq!(outcome.done, [] as [i64; 0]);
    assert_eq!(outcome.refused[0].0, entries[0].id);
    assert_eq!(outcome.left, [entries[1].id, entries[2].id]);

    bed.proxy(Side::New).await.batch_execute(ADMIT).await.unwrap();
    let outcome = retry(&applier, None).await;
    assert_eq!(outcome.done.len(), 3, "{outcome:?}");
    bed.assert_same(&applier).await;
    assert_eq!(held(&applier), (0, 0));
    assert_eq!(
        values(
            &new,
            "SELECT action, actor, count(*) FROM pgtandem.quarantine_history GROUP BY 1, 2"
        )
        .await,
        ["(\"refused again\",tester,1)", "(held,,3)", "(retried,tester,3)"]
    );
}

#[tokio::test]
async fn one_entry_is_retried_with_those_it_depends_on_and_no_other() {
    let (bed, applier) = refusing("retry_one").await;
    let client = bed.app(Side::Legacy).await;
    client.batch_execute("INSERT INTO t VALUES (1, 200, 1)").await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (2, 200, 2)").await.unwrap();
    caught_up(&applier).await;
    client.batch_execute("UPDATE t SET v = 1 WHERE id = 2").await.unwrap();
    caught_up(&applier).await;
    let new = bed.admin(Side::New).await;
    let entries = apply::list_quarantine(&new).await.unwrap();
    assert_eq!(entries.len(), 3);
    bed.proxy(Side::New).await.batch_execute(ADMIT).await.unwrap();
    let outcome = retry(&applier, Some(entries[2].id)).await;
    assert_eq!(outcome.done, [entries[1].id, entries[2].id]);
    assert_eq!(values(&new, "SELECT * FROM t").await, ["(2,1,2)"]);
    // What is not there is not done.
    assert_eq!(retry(&applier, Some(entries[2].id)).await, Outcome::default());
    retry(&applier, None).await;
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn an_index_that_only_the_secondary_has_takes_no_row_away() {
    let (bed, applier) = Bed::mirrored("extra_index", SCHEMA).await;
    bed.proxy(Side::New)
        .await
        .batch_execute("CREATE UNIQUE INDEX u_v ON u (v)")
        .await
        .unwrap();
    let client = bed.app(Side::Legacy).await;
    client.batch_execute("INSERT INTO u VALUES (1, 5)").await.unwrap();
    caught_up(&applier).await;
    client.batch_execute("INSERT INTO u VALUES (2, 5)").await.unwrap();
    client.batch_execute("INSERT INTO u VALUES (3, 6)").await.unwrap();
    caught_up(&applier).await;
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT * FROM u").await, ["(1,5)", "(3,6)"]);
    assert_eq!(held(&applier), (1, 1));
    assert_eq!(applier.status().borrow().diverged, 0);
    bed.proxy(Side::New)
        .await
        .batch_execute("DROP INDEX u_v")
        .await
        .unwrap();
    retry(&applier, None).await;
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn a_unique_value_of_a_held_row_is_not_taken_by_another() {
    let (bed, applier) = Bed::mirrored("unique_value", SCHEMA).await;
    let client = bed.app(Side::Legacy).await;
    client.batch_execute("INSERT INTO t VALUES (1, 1, 11)").await.unwrap();
    caught_up(&applier).await;
    bed.proxy(Side::New).await.batch_execute(REFUSE).await.unwrap();
    transaction(&client, "DELETE FROM t WHERE id = 1; INSERT INTO t VALUES (9, 900, 9)").await;
    client.batch_execute("INSERT INTO t VALUES (2, 2, 11)").await.unwrap();
    caught_up(&applier).await;
    assert_eq!(held(&applier), (2, 1));
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT * FROM t").await, ["(1,1,11)"]);
    bed.proxy(Side::New).await.batch_execute(ADMIT).await.unwrap();
    retry(&applier, None).await;
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn rows_alike_in_a_table_without_a_key() {
    let (bed, applier) = Bed::mirrored("held_keyless", SCHEMA).await;
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("INSERT INTO k VALUES (1), (1), (2)")
        .await
        .unwrap();
    caught_up(&applier).await;
    bed.proxy(Side::New).await.batch_execute(REFUSE).await.unwrap();
    transaction(
        &client,
        "INSERT INTO k VALUES (1), (3); INSERT INTO t VALUES (1, 100, 1)",
    )
    .await;
    client.batch_execute("DELETE FROM k WHERE v = 1").await.unwrap();
    client.batch_execute("UPDATE k SET v = 4 WHERE v = 2").await.unwrap();
    caught_up(&applier).await;
    assert_eq!(held(&applier), (2, 1));
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT * FROM k").await, ["(1)", "(1)", "(4)"]);
    bed.proxy(Side::New).await.batch_execute(ADMIT).await.unwrap();
    retry(&applier, None).await;
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn a_truncate_voids_what_is_held_of_its_table() {
    let (bed, applier) = refusing("voided").await;
    let client = bed.app(Side::Legacy).await;
    transaction(&client, "INSERT INTO t VALUES (1, 200, 1); INSERT INTO u VALUES (1, 1)").await;
    client.batch_execute("INSERT INTO t VALUES (2, 200, 2)").await.unwrap();
    caught_up(&applier).await;
    assert_eq!(held(&applier), (2, 2));
    client
        .batch_execute("TRUNCATE t; INSERT INTO t VALUES (1, 1, 1)")
        .await
        .unwrap();
    caught_up(&applier).await;
    // Of the first, the row of u is left.
    assert_eq!(held(&applier), (1, 1));
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT * FROM t").await, ["(1,1,1)"]);
    assert_eq!(values(&new, "SELECT * FROM u").await, [] as [String; 0]);
    retry(&applier, None).await;
    bed.assert_same(&applier).await;
    assert_eq!(held(&applier), (0, 0));
}

#[tokio::test]
async fn what_is_discarded_is_a_divergence_with_a_reason() {
    let (bed, applier) = refusing("discarded").await;
    let client = bed.app(Side::Legacy).await;
    transaction(&client, "INSERT INTO t VALUES (1, 200, 1); INSERT INTO u VALUES (1, 1)").await;
    caught_up(&applier).await;
    let new = bed.admin(Side::New).await;
    let id = apply::list_quarantine(&new).await.unwrap()[0].id;
    let discard = |id| Order::Discard {
        id,
        actor: "tester".into(),
        reason: "stale".into(),
    };
    assert_eq!(applier.order(discard(id + 1)).await.unwrap(), Outcome::default());
    assert_eq!(applier.order(discard(id)).await.unwrap().done, [id]);
    caught_up(&applier).await;
    assert_eq!(held(&applier), (0, 0));
    let status = applier.status().borrow().clone();
    assert_eq!(status.diverged, 2);
    assert_eq!(status.tables_to_seed(), 2, "{:?}", status.tables);
    assert_eq!(
        values(
            &new,
            "SELECT actor, reason FROM pgtandem.quarantine_history WHERE action = 'discarded'"
        )
        .await,
        ["(tester,stale)"]
    );
    // What comes later for its keys is applied again.
    client
        .batch_execute("UPDATE t SET v = 1 WHERE id = 1; UPDATE u SET v = 2")
        .await
        .unwrap();
    caught_up(&applier).await;
    assert_eq!(bed.differences().await, []);
}

#[tokio::test]
async fn a_type_that_refuses_the_value() {
    let (bed, applier) = Bed::mirrored(
        "enum_label",
        "CREATE TYPE mood AS ENUM ('good'); CREATE TABLE m (id int PRIMARY KEY, mood mood)",
    )
    .await;
    let client = bed.app(Side::Legacy).await;
    // Past the proxy, so that the secondary does not have it.
    client.batch_execute("ALTER TYPE mood ADD VALUE 'bad'").await.unwrap();
    client.batch_execute("INSERT INTO m VALUES (1, 'good')").await.unwrap();
    client.batch_execute("INSERT INTO m VALUES (2, 'bad')").await.unwrap();
    client.batch_execute("INSERT INTO m VALUES (3, 'good')").await.unwrap();
    caught_up(&applier).await;
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT * FROM m").await, ["(1,good)", "(3,good)"]);
    assert_eq!(
        apply::list_quarantine(&new).await.unwrap()[0].sqlstate.as_deref(),
        Some("22P02")
    );
    bed.proxy(Side::New)
        .await
        .batch_execute("ALTER TYPE mood ADD VALUE 'bad'")
        .await
        .unwrap();
    retry(&applier, None).await;
    bed.assert_same(&applier).await;
}

/// The primary may have what is no text in any encoding; a cast stands in for SQL_ASCII here.
#[tokio::test]
async fn bytes_that_are_no_text_there_are_held_and_stop_nothing() {
    let schema = "CREATE TABLE n (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v int)";
    let (bed, applier) = Bed::mirrored("no_text", schema).await;
    let legacy = bed.admin(Side::Legacy).await;
    legacy
        .batch_execute("CREATE CAST (bytea AS text) WITHOUT FUNCTION")
        .await
        .unwrap();
    for statement in [
        "INSERT INTO n VALUES (1, CAST(bytea '\\x63c3' AS text)), (2, 'é')",
        "INSERT INTO n VALUES (3, 'whole'); INSERT INTO u VALUES (1)",
    ] {
        legacy.batch_execute(statement).await.unwrap();
    }
    caught_up(&applier).await;
    assert_eq!(held(&applier), (1, 1));
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT id FROM n").await, ["(3)"]);
    assert_eq!(values(&new, "SELECT id FROM u").await, ["(1)"]);
    let entries = apply::list_quarantine(&new).await.unwrap();
    assert_eq!(entries[0].sqlstate.as_deref(), Some("22021"));
    assert_eq!(entries[0].keys[0], ("public.n".to_owned(), "(1)".to_owned()));
    let outcome = retry(&applier, None).await;
    assert_eq!(outcome.refused[0].0, entries[0].id);

    // Mended on the primary: what follows is held behind it, and the rows are brought over whole.
    legacy.batch_execute("UPDATE n SET v = 'c' WHERE id = 1").await.unwrap();
    caught_up(&applier).await;
    assert_eq!(held(&applier), (2, 1));
    let actor = "tester".to_owned();
    applier.mend(Mend::Held { actor }).await.unwrap();
    caught_up(&applier).await;
    assert_eq!(held(&applier), (0, 0));
    assert_eq!(bed.differences().await, []);
}

#[tokio::test]
async fn a_table_that_is_gone_there_is_paused_and_the_rest_goes_on() {
    let (bed, applier) = refusing("gone").await;
    let client = bed.app(Side::Legacy).await;
    // Also while something else is held.
    client.batch_execute("INSERT INTO t VALUES (1, 200, 1)").await.unwrap();
    caught_up(&applier).await;
    bed.proxy(Side::New).await.batch_execute("DROP TABLE u").await.unwrap();
    transaction(&client, "INSERT INTO u VALUES (1, 1); INSERT INTO k VALUES (1)").await;
    client.batch_execute("INSERT INTO k VALUES (2)").await.unwrap();
    caught_up(&applier).await;
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT * FROM k").await, ["(1)", "(2)"]);
    assert_eq!(held(&applier), (1, 1));
    let status = applier.status().borrow().clone();
    let paused: Vec<_> = status.tables.iter().filter(|table| table.paused.is_some()).collect();
    assert_eq!(paused.len(), 1, "{paused:?}");
    assert_eq!(paused[0].name, "u");
}

/// Runs a statement and the hook, as the proxy does for a client.
async fn ddl(client: &Client, statement: &str) {
    client.batch_execute("BEGIN").await.unwrap();
    client.batch_execute(statement).await.unwrap();
    client.execute(DDL_HOOK, &[&statement]).await.unwrap();
    client.batch_execute("COMMIT").await.unwrap();
}

#[tokio::test]
async fn refused_and_forged_ddl_stops_nothing_else() {
    let (bed, applier) = Bed::mirrored("ddl_quarantined", SCHEMA).await;
    bed.admin(Side::Legacy)
        .await
        .batch_execute("CREATE TYPE mood AS ENUM ('good'); GRANT USAGE ON TYPE mood TO app")
        .await
        .unwrap();
    let client = bed.app(Side::Legacy).await;
    ddl(&client, "ALTER TABLE t ADD COLUMN m mood").await;
    ddl(&client, "CREATE TABLE n (id int PRIMARY KEY, m mood)").await;
    client
        .batch_execute("INSERT INTO n VALUES (1, 'good'); INSERT INTO t VALUES (1, 1, 1, 'good')")
        .await
        .unwrap();
    // Forged: what was never run, and what no record is.
    client.execute(DDL_HOOK, &[&"no statement at all"]).await.unwrap();
    client
        .execute(DDL_HOOK_OUTSIDE, &[&"DROP INDEX CONCURRENTLY nowhere; DROP TABLE u"])
        .await
        .unwrap();
    bed.admin(Side::Legacy)
        .await
        .batch_execute("SELECT pgtandem.append(0, 'S', '{}', 'x')")
        .await
        .unwrap();
    bed.admin(Side::Legacy)
        .await
        .batch_execute("SELECT pgtandem.append(0, 'O', 'no json', 'x')")
        .await
        .unwrap();
    client.batch_execute("INSERT INTO u VALUES (1, 1)").await.unwrap();
    caught_up(&applier).await;
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT * FROM u").await, ["(1,1)"]);
    let entries = apply::list_quarantine(&new).await.unwrap();
    assert_eq!(entries.len(), 6, "{entries:#?}");
    assert_eq!(entries[0].statements, ["ALTER TABLE t ADD COLUMN m mood"]);
    assert_eq!(entries[0].tables, ["public.t"]);
    let status = applier.status().borrow().clone();
    let paused: Vec<&str> = status
        .tables
        .iter()
        .filter(|table| table.paused.is_some())
        .map(|table| table.name.as_str())
        .collect();
    assert_eq!(paused, ["n", "t"], "{:#?}", status.tables);

    bed.admin(Side::New)
        .await
        .batch_execute("CREATE TYPE mood AS ENUM ('good'); GRANT USAGE ON TYPE mood TO app")
        .await
        .unwrap();
    let outcome = retry(&applier, None).await;
    assert_eq!(outcome.done, [entries[0].id, entries[1].id], "{outcome:?}");
    for (id, _) in outcome.refused {
        let (actor, reason) = ("tester".into(), "forged".into());
        applier.order(Order::Discard { id, actor, reason }).await.unwrap();
    }
    // Both are there again and go on.
    until(&applier, |status| {
        status.tables.iter().all(|table| table.paused.is_none())
    })
    .await;
    client
        .batch_execute("UPDATE n SET id = 2; UPDATE t SET v = 2")
        .await
        .unwrap();
    caught_up(&applier).await;
    assert_eq!(held(&applier), (0, 0));
    assert_eq!(bed.differences().await, []);
}

#[tokio::test]
async fn ddl_on_a_table_of_which_something_is_held() {
    let (bed, applier) = refusing("ddl_over_held").await;
    let client = bed.app(Side::Legacy).await;
    transaction(&client, "INSERT INTO t VALUES (1, 200, 1); INSERT INTO u VALUES (1, 1)").await;
    caught_up(&applier).await;
    ddl(&client, "ALTER TABLE t ADD COLUMN x int DEFAULT 5").await;
    client.batch_execute("INSERT INTO t VALUES (2, 2, 2, 2)").await.unwrap();
    caught_up(&applier).await;
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT * FROM t").await, ["(2,2,2,2)"]);
    let status = applier.status().borrow().clone();
    assert_eq!(status.tables_to_seed(), 1, "{:#?}", status.tables);
    assert_eq!(held(&applier), (1, 1));
    retry(&applier, None).await;
    assert_eq!(values(&new, "SELECT * FROM u").await, ["(1,1)"]);
    // What was dropped holds nothing.
    client.batch_execute("UPDATE u SET v = 1000").await.unwrap();
    bed.proxy(Side::New)
        .await
        .batch_execute("ALTER TABLE u ADD CONSTRAINT small CHECK (v < 2000)")
        .await
        .unwrap();
    client.batch_execute("UPDATE u SET v = 3000").await.unwrap();
    caught_up(&applier).await;
    assert_eq!(held(&applier), (1, 1));
    ddl(&client, "DROP TABLE u").await;
    caught_up(&applier).await;
    assert_eq!(held(&applier), (0, 0));
}

/// A check on the secondary that raises whatever SQLSTATE table `mode` names.
const RAISING: &str = "\
CREATE TABLE mode (code text); GRANT SELECT ON mode TO PUBLIC;
CREATE FUNCTION raising(v int) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE c text := (SELECT code FROM public.mode LIMIT 1);
BEGIN
    IF c IS NOT NULL AND v >= 100 THEN RAISE EXCEPTION USING ERRCODE = c, MESSAGE = 'raised'; END IF;
    RETURN true;
END $$;
ALTER TABLE t ADD CONSTRAINT raising CHECK (raising(v))";

#[tokio::test]
async fn what_passes_by_itself_is_waited_for() {
    let (bed, applier) = Bed::mirrored("transient", SCHEMA).await;
    let new = bed.admin(Side::New).await;
    new.batch_execute(RAISING).await.unwrap();
    new.batch_execute("INSERT INTO mode VALUES ('53100')").await.unwrap();
    let client = bed.app(Side::Legacy).await;
    client.batch_execute("INSERT INTO t VALUES (1, 100, 1)").await.unwrap();
    for _ in 0..3 {
        let mut status = applier.status();
        status.mark_unchanged();
        until(
            &applier,
            |status| matches!(&status.state, ApplierState::Failing { error } if error.contains("raised")),
        )
        .await;
    }
    new.batch_execute("DELETE FROM mode").await.unwrap();
    applier.catch_up().await.unwrap();
    assert_eq!(held(&applier), (0, 0));
    assert_eq!(values(&new, "SELECT * FROM t").await, ["(1,100,1)"]);
}

#[tokio::test]
async fn what_is_unclear_is_tried_again_and_then_held() {
    let bed = Bed::new("unclear", SCHEMA).await;
    bed.install().await;
    let mut config = bed.config();
    config.writes.retry_attempts = 2;
    let applier = apply::spawn(config);
    caught_up(&applier).await;
    let new = bed.admin(Side::New).await;
    new.batch_execute(RAISING).await.unwrap();
    new.batch_execute("INSERT INTO mode VALUES ('XX000')").await.unwrap();
    let client = bed.app(Side::Legacy).await;
    client.batch_execute("INSERT INTO t VALUES (1, 100, 1)").await.unwrap();
    until(&applier, |status| matches!(status.state, ApplierState::Failing { .. })).await;
    applier.catch_up().await.unwrap();
    assert_eq!(held(&applier), (1, 1));
    new.batch_execute("DELETE FROM mode").await.unwrap();
    retry(&applier, None).await;
    assert_eq!(values(&new, "SELECT * FROM t").await, ["(1,100,1)"]);
}

#[tokio::test]
async fn beyond_the_threshold_mirroring_stops_until_an_operator_says_so() {
    let (bed, applier) = refusing("threshold").await;
    let client = bed.app(Side::Legacy).await;
    let halted = |status: &apply::ApplierStatus| matches!(status.state, ApplierState::Halted { .. });
    for id in 0..30 {
        client
            .batch_execute(&format!("INSERT INTO t VALUES ({id}, 200, {id})"))
            .await
            .unwrap();
    }
    until(&applier, halted).await;
    let new = bed.admin(Side::New).await;
    let count = "SELECT count(*) FROM pgtandem.quarantine";
    let before = values(&new, count).await;
    // It stands still, also for another proxy that comes later.
    drop(applier);
    let applier = apply::spawn(bed.config());
    let status = until(&applier, halted).await;
    assert!(
        format!("{:?}", status.state).contains("quarantine retry"),
        "{:?}",
        status.state
    );
    assert_eq!(values(&new, count).await, before);
    // Not mended: it stops again.
    applier.go_on();
    until(&applier, |status| {
        status.state == ApplierState::Running || halted(status)
    })
    .await;
    until(&applier, halted).await;
    bed.proxy(Side::New).await.batch_execute(ADMIT).await.unwrap();
    retry(&applier, None).await;
    bed.assert_same(&applier).await;
    assert_eq!(held(&applier), (0, 0));
}

#[tokio::test]
async fn missing_rows_count_towards_the_threshold() {
    let (bed, applier) = Bed::mirrored("missing_rows", SCHEMA).await;
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("INSERT INTO u SELECT x, x FROM generate_series(1, 40) x")
        .await
        .unwrap();
    caught_up(&applier).await;
    bed.proxy(Side::New).await.batch_execute("DELETE FROM u").await.unwrap();
    for id in 1..=40 {
        client
            .batch_execute(&format!("UPDATE u SET v = 0 WHERE id = {id}"))
            .await
            .unwrap();
    }
    until(&applier, |status| matches!(status.state, ApplierState::Halted { .. })).await;
    applier.go_on();
}

/// Never halts: for storms of refusals.
fn patient(bed: &Bed) -> ApplierConfig {
    let mut config = bed.config();
    config.writes.error_threshold = 100.0;
    config
}

/// Transactions of random changes, a tenth of which the secondary refuses. Each leaves a row in
/// `done`, so that it can be told which were applied.
async fn storm(client: &Client, random: &mut StdRng, from: i32, count: i32) {
    for number in from..from + count {
        let mut statements = format!("INSERT INTO done VALUES ({number});");
        for _ in 0..random.random_range(1..4) {
            let (id, v) = (random.random_range(0..60), random.random_range(0..110));
            statements.push_str(&match random.random_range(0..7) {
                0 => format!("INSERT INTO t VALUES ({id}, {v}, {id}) ON CONFLICT DO NOTHING;"),
                1 => format!("UPDATE t SET v = {v} WHERE id = {id};"),
                2 => format!("DELETE FROM t WHERE id = {id};"),
                3 => format!(
                    "UPDATE t SET id = id + 60 WHERE id = {id} AND NOT EXISTS (SELECT FROM t o WHERE o.id = t.id + 60);"
                ),
                4 => format!("INSERT INTO u VALUES ({id}, {v}) ON CONFLICT (id) DO UPDATE SET v = u.v + 1;"),
                5 => format!("INSERT INTO k VALUES ({}), ({});", id % 7, id % 5),
                _ => format!(
                    "DELETE FROM k WHERE ctid IN (SELECT ctid FROM k WHERE v = {} LIMIT 1);",
                    id % 7
                ),
            });
        }
        transaction(client, statements.trim_end_matches(';')).await;
    }
}

/// Both sides once what is held on the secondary is put on top of it there, in a transaction that
/// is rolled back: rows as multisets, image by image.
async fn assert_primary_minus_held(bed: &Bed) {
    let legacy = bed.admin(Side::Legacy).await;
    let new = bed.admin(Side::New).await;
    for table in ["t", "u", "k", "done"] {
        let here = values(
            &legacy,
            &format!("SELECT img, count(*) FROM (SELECT x::text AS img FROM {table} x) i GROUP BY 1"),
        )
        .await;
        let there = values(
            &new,
            &format!(
                "SELECT img, sum(n) FROM (
                    SELECT x::text AS img, 1 AS n FROM {table} x
                    UNION ALL
                    SELECT i.img, i.n FROM pgtandem.quarantine_change c CROSS JOIN LATERAL (VALUES (c.old, -1), (c.new, 1)) AS i(img, n)
                     WHERE c.rel = (SELECT s.rel FROM pgtandem.seeding s WHERE s.name = '{table}') AND NOT c.void AND i.img IS NOT NULL) a
                  GROUP BY 1 HAVING sum(n) <> 0"
            ),
        )
        .await;
        assert_eq!(here, there, "{table}");
    }
}

#[tokio::test]
async fn a_storm_of_refusals_leaves_the_primary_minus_what_is_held() {
    let schema = format!("{SCHEMA}; CREATE TABLE done (number int PRIMARY KEY)");
    let bed = Bed::new("refusal_storm", &schema).await;
    bed.install().await;
    let mut applier = apply::spawn(patient(&bed));
    caught_up(&applier).await;
    bed.proxy(Side::New).await.batch_execute(REFUSE).await.unwrap();
    let client = bed.app(Side::Legacy).await;
    let mut random = StdRng::seed_from_u64(20_261_121);
    for turn in 0..8 {
        storm(&client, &mut random, turn * 40, 40).await;
        if turn % 2 == 0 {
            // Wherever it is; the next one finds the quarantine on the secondary.
            drop(applier);
            storm(&client, &mut random, 1000 + turn * 40, 40).await;
            applier = apply::spawn(patient(&bed));
        }
        caught_up(&applier).await;
        assert_primary_minus_held(&bed).await;
    }
    let (all, refused) = held(&applier);
    assert!(refused > 0 && all > refused, "{all} {refused}");
    // Whole or not at all: a transaction's mark is there exactly where it is not held.
    let new = bed.admin(Side::New).await;
    let doubled = "SELECT 1 FROM done d JOIN pgtandem.quarantine_change c ON c.new = format('(%s)', d.number)
                    WHERE c.rel = (SELECT s.rel FROM pgtandem.seeding s WHERE s.name = 'done')";
    assert_eq!(values(&new, doubled).await, [] as [String; 0]);
    bed.proxy(Side::New).await.batch_execute(ADMIT).await.unwrap();
    let outcome = retry(&applier, None).await;
    assert_eq!((&outcome.refused, &outcome.left), (&vec![], &vec![]));
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn refusals_in_a_backlog_that_does_not_fit_into_memory() {
    let schema = format!("{SCHEMA}; CREATE TABLE done (number int PRIMARY KEY)");
    let bed = Bed::new("refusal_backlog", &schema).await;
    bed.install().await;
    drop({
        let applier = apply::spawn(patient(&bed));
        caught_up(&applier).await;
        applier
    });
    bed.proxy(Side::New).await.batch_execute(REFUSE).await.unwrap();
    let client = bed.app(Side::Legacy).await;
    let mut random = StdRng::seed_from_u64(7);
    client
        .batch_execute("INSERT INTO u SELECT x, x FROM generate_series(1000, 5000) x")
        .await
        .unwrap();
    storm(&client, &mut random, 0, 60).await;
    ddl(&client, "CREATE TABLE fresh (id int PRIMARY KEY)").await;
    client
        .batch_execute("INSERT INTO fresh SELECT generate_series(1, 3000); UPDATE u SET v = -v WHERE id >= 1000")
        .await
        .unwrap();
    storm(&client, &mut random, 100, 60).await;
    // Too large for memory, once accepted and once refused.
    client
        .batch_execute("INSERT INTO fresh SELECT generate_series(10001, 18000)")
        .await
        .unwrap();
    client
        .batch_execute("INSERT INTO t SELECT x, 100, x FROM generate_series(10001, 18000) x")
        .await
        .unwrap();
    client
        .batch_execute("UPDATE t SET v = 1 WHERE id = 17000")
        .await
        .unwrap();
    client.batch_execute("INSERT INTO done VALUES (-2)").await.unwrap();
    storm(&client, &mut random, 200, 20).await;
    let applier = apply::spawn(patient(&bed));
    caught_up(&applier).await;
    assert_primary_minus_held(&bed).await;
    let new = bed.admin(Side::New).await;
    assert_eq!(values(&new, "SELECT count(*) FROM fresh").await, ["(11000)"]);
    assert_eq!(values(&new, "SELECT * FROM done WHERE number < 0").await, ["(-2)"]);
    bed.proxy(Side::New).await.batch_execute(ADMIT).await.unwrap();
    let outcome = retry(&applier, None).await;
    assert_eq!((&outcome.refused, &outcome.left), (&vec![], &vec![]));
    bed.assert_same(&applier).await;
}
