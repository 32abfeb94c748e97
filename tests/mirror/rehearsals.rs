//! Rehearsed writes through the built proxy: what only the new database refuses is found, nothing
//! of a rehearsal stays, and what cannot be rehearsed is left out by its reason.

use futures_util::SinkExt;
use pgtandem::admin::api::ShadowsAnswer;
use pgtandem::control::{Phase, Side};
use pgtandem::shadow::rehearsal::{RehearsalReport, RehearsedStatement};
use pgtandem::shadow::{Filter, Kind, Mismatch, read_log};
use tokio_postgres::Client;

use super::SEED;
use super::rig::storm::{SCHEMA as STORM_SCHEMA, Storm};
use super::rig::{APP, DATABASE, OWN_ROLE, Rig};

/// A rig that rehearses all writes.
async fn rig(phase: Phase) -> Rig {
    let mut rig = Rig::new();
    rig.extra = "writes: {rehearse_percent: 100, rehearse_queue: 20000}\nreads: {shadow_percent: 0}\n".into();
    rig.serve(phase).await;
    rig
}

/// What is known of the writes once none is waiting.
async fn settled(rig: &Rig, client: &Client) -> RehearsalReport {
    // A transaction is handed over right behind its answer, and before the session's next one.
    client.simple_query("").await.unwrap();
    loop {
        let answer: ShadowsAnswer = rig.admin().get("/api/v1/shadows").await.unwrap();
        let report = answer.rehearsals.get(DATABASE).cloned().unwrap_or_default();
        if report.totals.waiting == 0 {
            return report;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// After DDL: waits until the proxy knows what writes reach.
async fn known(rig: &Rig, client: &Client) {
    rig.wait_caught_up().await;
    loop {
        let before = settled(rig, client).await.totals.counts.matched;
        client.simple_query("update warm set n = 1 where false").await.unwrap();
        if settled(rig, client).await.totals.counts.matched > before {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

fn statement<'a>(report: &'a RehearsalReport, text: &str) -> &'a RehearsedStatement {
    let found = report.statements.iter().find(|one| one.text == text);
    found.unwrap_or_else(|| panic!("{text}: {report:#?}"))
}

/// As many as the status counts: the log is written behind the rehearsals.
async fn mismatches(rig: &Rig) -> Vec<Mismatch> {
    let counted = rig.status().await.unwrap().databases[0]
        .rehearsed_writes
        .as_ref()
        .map_or(0, |writes| writes.counts.mismatched);
    loop {
        let found = logged(rig);
        if found.len() as u64 >= counted {
            return found;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

fn logged(rig: &Rig) -> Vec<Mismatch> {
    let path = rig.directory.path().join("mismatches.jsonl");
    if !path.exists() {
        return Vec::new();
    }
    read_log(&path, &Filter::default()).unwrap().mismatches
}

const SCHEMA: &str = "
    create table warm (n int);
    create table item (id serial primary key, v int, note text);
    insert into item (v, note) select i, 'item' from generate_series(1, 20) i;
    create table part (item int references item, n numeric);
    create function told() returns trigger language plpgsql as $$
        begin perform pg_notify('told', new.v::text); new.note := coalesce(new.note, '') || '!'; return new; end $$;
    create trigger told before insert or update on item for each row execute function told();
    create function twice(int) returns int immutable language sql as 'select $1 * 2';
    create schema side;
    create table side.item (id int primary key, v text)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_of_every_form_are_rehearsed_and_nothing_stays() {
    let rig = rig(Phase::DualWrite).await;
    let mut client = rig.client().await;
    client.batch_execute(SCHEMA).await.unwrap();
    known(&rig, &client).await;
    let listener = rig.direct(Side::New, APP).await;
    listener.batch_execute("listen told").await.unwrap();

    // Prepared, with binary parameters and rows that come back; twice, from one statement.
    let insert = client
        .prepare("insert into item (v, note) values ($1, $2) returning id")
        .await
        .unwrap();
    for v in [100, 101] {
        client.query(&insert, &[&v, &"by hand"]).await.unwrap();
    }
    client
        .execute("update item set v = twice(v) where id = $1 and v < $2", &[&5, &1000])
        .await
        .unwrap();
    // A transaction with savepoints, an error, and settings of its own.
    let mut transaction = client.transaction().await.unwrap();
    transaction.batch_execute("set local search_path = side").await.unwrap();
    transaction
        .execute("insert into item values ($1, 'here')", &[&1])
        .await
        .unwrap();
    let savepoint = transaction.transaction().await.unwrap();
    savepoint
        .execute("insert into item values ($1, 'again')", &[&1])
        .await
        .unwrap_err();
    savepoint.rollback().await.unwrap();
    transaction.execute("delete from item where id = 1", &[]).await.unwrap();
    transaction.commit().await.unwrap();
    for sql in [
        "insert into part select id, 1 from item where id <= 3",
        "with gone as (delete from part where item = 1 returning *) insert into part select * from gone",
        "set search_path = side",
        "insert into item values (7, 'session')",
        "set search_path = public",
    ] {
        client.simple_query(sql).await.unwrap();
    }
    // How many rows it finds rests on those before it.
    rig.wait_caught_up().await;
    for sql in ["begin", "update item set v = 0", "rollback"] {
        client.simple_query(sql).await.unwrap();
    }
    client
        .simple_query("insert into part values (-1, 1)")
        .await
        .unwrap_err();
    let report = settled(&rig, &client).await;
    let counts = &report.totals.counts;
    assert_eq!(counts.mismatched, 0, "{report:#?}");
    for (text, executions) in [
        ("insert into item(v, note) values (...) returning id", 2),
        ("update item set v = twice(v) where id = ? and v < ?", 1),
        ("delete from item where id = ?", 1),
        ("insert into part select id, ? from item where id <= ?", 1),
        ("update item set v = ?", 1),
    ] {
        let found = report
            .statements
            .iter()
            .filter(|one| one.text == text)
            .map(|one| one.counts.executions)
            .sum::<u64>();
        assert_eq!(found, executions, "{text}: {report:#?}");
    }
    // Of those that say the same in whichever state they run, all have matched.
    for text in [
        "update item set v = twice(v) where id = ? and v < ?",
        "insert into part select id, ? from item where id <= ?",
        "update item set v = ?",
    ] {
        assert_eq!(statement(&report, text).counts.matched, 1, "{text}: {report:#?}");
        assert_eq!(statement(&report, text).new.count, 1);
    }

    // Nothing stays: rows, journal, stray records, prepared statements, notifications.
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    let own = rig.direct(Side::New, OWN_ROLE).await;
    for sql in [
        "select count(*) from pgtandem.rehearsing",
        "select count(*) from pgtandem.stray",
        "select (select count(*) from pgtandem.change_0) + (select count(*) from pgtandem.change_1) + (select count(*) from pgtandem.change_2)",
        "select count(*) from pg_prepared_xacts",
    ] {
        assert_eq!(own.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 0, "{sql}");
    }
    let status = rig.status().await.unwrap();
    let database = &status.databases[0];
    assert_eq!(database.rehearsed_writes.as_ref().unwrap().counts, *counts);
    assert_eq!(database.mirroring.as_ref().unwrap().divergences, 0);
    assert_eq!(mismatches(&rig).await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_new_refuses_is_found() {
    let rig = rig(Phase::DualRead).await;
    let client = rig.client().await;
    client.batch_execute(SCHEMA).await.unwrap();
    known(&rig, &client).await;
    let own = rig.direct(Side::New, OWN_ROLE).await;
    let app = rig.direct(Side::New, APP).await;
    app.batch_execute(
        "revoke delete on part from app; drop function twice(int);
         alter table item add constraint small check (v < 1000);
         create unique index one_each on part (item)",
    )
    .await
    .unwrap();
    // A row that drifted away.
    own.batch_execute("delete from item where id = 9").await.unwrap();

    // What is rolled back leaves the secondary as it is, so every state is the right one.
    for (sql, kind, codes) in [
        (
            "delete from part where item = 3",
            Kind::WriteError,
            [None, Some("42501")],
        ),
        (
            "update item set v = twice(v) where id = 1",
            Kind::WriteError,
            [None, Some("42883")],
        ),
        (
            "insert into item (v) values (5000)",
            Kind::WriteError,
            [None, Some("23514")],
        ),
        (
            "insert into part values (1, 1), (1, 2)",
            Kind::WriteError,
            [None, Some("23505")],
        ),
        ("update item set v = 1 where id in (8, 9)", Kind::WriteTag, [None, None]),
    ] {
        let before = mismatches(&rig).await.len();
        client.batch_execute("begin").await.unwrap();
        client.simple_query(sql).await.unwrap();
        client.batch_execute("rollback").await.unwrap();
        let report = settled(&rig, &client).await;
        let found = mismatches(&rig).await;
        assert_eq!(found.len(), before + 1, "{sql}: {report:#?}");
        let last = found.last().unwrap();
        let sides = [&last.error.primary, &last.error.secondary].map(Option::as_deref);
        assert_eq!((last.kind, sides), (kind, codes), "{sql}");
        if kind == Kind::WriteTag {
            assert_eq!((last.rows.primary, last.rows.secondary), (2, 1));
        }
    }
    // Another type behind the same name: RETURNING tells, whatever the rows are.
    app.batch_execute("alter table warm alter n type bigint").await.unwrap();
    let returning = "insert into warm values (1) returning n, n as again";
    client.simple_query(returning).await.unwrap();
    settled(&rig, &client).await;
    let found = mismatches(&rig).await;
    let last = found.last().unwrap();
    assert_eq!(
        (last.kind, &last.differing_columns),
        (Kind::WriteColumns, &vec!["n".into(), "again".into()])
    );
    // The other way round: new lets through what legacy refuses.
    rig.direct(Side::Legacy, APP)
        .await
        .batch_execute("revoke update on part from app")
        .await
        .unwrap();
    client.simple_query("update part set n = 0").await.unwrap_err();
    let report = settled(&rig, &client).await;
    let found = statement(&report, "update part set n = ?");
    assert_eq!(found.last_difference, Some(["42501".into(), "00000".into()]));
    assert_eq!(found.counts.mismatched, 1, "{report:#?}");
}

/// Deferred constraints and triggers are tried, though nothing is committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_checked_at_commit_is_tried() {
    let rig = rig(Phase::DualWrite).await;
    let client = rig.client().await;
    client
        .batch_execute(
            "create table warm (n int);
             create table parent (id int primary key);
             insert into parent values (1), (2), (4);
             create table child (id int, parent int references parent deferrable initially deferred);
             create table pair (a int, b int unique deferrable);
             insert into warm values (1)",
        )
        .await
        .unwrap();
    known(&rig, &client).await;

    // Both sides refuse it alike: at the end of a statement by itself, at COMMIT, and by order.
    let child = "insert into child values (1, 9)";
    for texts in [
        vec![child],
        vec!["begin", child, "savepoint a", "release a", "commit"],
        vec!["begin", child, "update parent set id = id where false", "commit"],
        vec!["begin", child, "set constraints all immediate", "rollback"],
        vec!["begin", "insert into pair values (1, 1), (2, 1)", "rollback"],
        vec![
            "begin",
            "set constraints all deferred",
            "insert into pair values (1, 1), (2, 1)",
            "commit",
        ],
    ] {
        let mut refused = 0;
        for text in &texts {
            refused += u32::from(client.simple_query(text).await.is_err());
        }
        assert_eq!(refused, 1, "{texts:?}");
    }
    // And what is right in the end is right on both.
    for text in [
        "begin",
        "set constraints all deferred",
        "insert into child values (2, 3)",
        "insert into parent values (3)",
        "insert into pair values (1, 1), (2, 2)",
        "update pair set b = 3 - b",
        "set constraints all immediate",
        "commit",
    ] {
        client.simple_query(text).await.unwrap();
    }
    let report = settled(&rig, &client).await;
    let counts = &report.totals.counts;
    assert_eq!((counts.mismatched, mismatches(&rig).await), (0, vec![]), "{report:#?}");
    assert!(counts.failed.is_empty(), "{report:#?}");
    let matched = statement(&report, "insert into child values (...)").counts.matched;
    assert!(matched >= 4, "{report:#?}");

    // What only new has is found.
    rig.wait_caught_up().await;
    rig.direct(Side::New, APP)
        .await
        .batch_execute(
            "alter table pair add constraint known foreign key (a) references parent deferrable initially deferred;
             create function never() returns trigger language plpgsql as $$ begin raise unique_violation; end $$;
             create constraint trigger never after update on warm deferrable initially deferred
                for each row execute function never()",
        )
        .await
        .unwrap();
    for (texts, code, write) in [
        (
            // Alike in whichever state it runs.
            vec!["update warm set n = 5"],
            "23505",
            "update warm set n = ?",
        ),
        (
            vec!["begin", "update warm set n = 6", "select 1", "commit"],
            "23505",
            "update warm set n = ?",
        ),
        // Rolled back it leaves the secondary as it is, so there its state is the right one for sure.
        (
            vec![
                "begin",
                "update pair set a = 8 where a = 1",
                "set constraints all immediate",
                "rollback",
            ],
            "23503",
            "set constraints all immediate",
        ),
    ] {
        rig.wait_caught_up().await;
        for text in &texts {
            client.simple_query(text).await.unwrap();
        }
        let report = settled(&rig, &client).await;
        let found = statement(&report, write);
        let codes = Some(["00000".into(), code.into()]);
        assert_eq!(found.last_difference, codes, "{texts:?} {report:#?}");
        let rolled_back = texts.contains(&"rollback");
        assert!(!rolled_back || found.counts.mismatched == 1, "{report:#?}");
    }
    let found = mismatches(&rig).await;
    let last = found.last().unwrap();
    assert_eq!(
        (last.kind, last.error.secondary.as_deref()),
        (Kind::WriteError, Some("23503"))
    );
    // Nothing of it stays.
    let own = rig.direct(Side::New, OWN_ROLE).await;
    let marks = own
        .query_one("select count(*) from pgtandem.rehearsing", &[])
        .await
        .unwrap();
    assert_eq!(marks.get::<_, i64>(0), 0);
    rig.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_rehearsed_is_left_out_by_its_reason() {
    let rig = rig(Phase::DualWrite).await;
    let mut client = rig.client().await;
    client.batch_execute(SCHEMA).await.unwrap();
    client
        .batch_execute(
            "create function locks() returns trigger language plpgsql as $$ begin perform pg_advisory_lock(1); perform pg_advisory_unlock(1); return new; end $$;
             create table locked (n int);
             create trigger locks before insert on locked for each row execute function locks();
             create function audit() returns int language plpgsql as $$ begin insert into warm values (1); return 1; end $$;
             create procedure p() language plpgsql as $$ begin insert into warm values (1); commit; end $$;
             create sequence s",
        )
        .await
        .unwrap();
    known(&rig, &client).await;
    for sql in [
        "insert into warm values (1); commit; insert into warm values (2)",
        "truncate warm",
        "call p()",
        "do $$ begin insert into warm values (1); end $$",
        "prepare q as insert into warm values (1)",
        "execute q",
        "create temp table scratch (n int)",
        "insert into scratch values (1)",
        "create table later ()",
    ] {
        client.simple_query(sql).await.unwrap();
    }
    known(&rig, &client).await;
    for sql in [
        "insert into locked values (1)",
        "insert into warm select setval('s', 5)",
        "insert into scratch values (1)",
    ] {
        client.simple_query(sql).await.unwrap();
    }
    let sink = client.copy_in("copy warm from stdin").await.unwrap();
    let mut sink = std::pin::pin!(sink);
    sink.send(bytes::Bytes::from_static(b"1\n")).await.unwrap();
    sink.finish().await.unwrap();
    let transaction = client.transaction().await.unwrap();
    transaction.simple_query("select audit()").await.unwrap();
    transaction.simple_query("insert into warm values (3)").await.unwrap();
    transaction.commit().await.unwrap();
    let transaction = client.transaction().await.unwrap();
    transaction
        .simple_query("select set_config('work_mem', '1MB', true)")
        .await
        .unwrap();
    transaction.simple_query("select nextval('s')").await.unwrap();
    transaction.simple_query("update warm set n = 4").await.unwrap();
    transaction.commit().await.unwrap();
    // Two transactions in one pipeline, and several statements in one text.
    let (one, two) = tokio::join!(
        client.simple_query("update warm set n = 5"),
        client.simple_query("update warm set n = 6")
    );
    one.unwrap();
    two.unwrap();
    client
        .simple_query(
            "begin; update warm set n = 8; savepoint a; update warm set n = 9 where false; release a; select 1; commit",
        )
        .await
        .unwrap();
    let transaction = client.transaction().await.unwrap();
    for _ in 0..70 {
        transaction.simple_query("update warm set n = 7").await.unwrap();
    }
    transaction.commit().await.unwrap();

    let report = settled(&rig, &client).await;
    let left_out = &report.totals.counts.left_out;
    for reason in [
        "several_statements",
        "truncate",
        "procedure",
        "sql_execute",
        "temporary_table",
        "reaches_outside",
        "ddl",
        "copy",
        "volatile_read",
        "too_long",
    ] {
        assert!(left_out.contains_key(reason), "{reason}: {report:#?}");
    }
    assert_eq!(report.totals.counts.mismatched, 0, "{report:#?}");
    let updates = statement(&report, "update warm set n = ?");
    assert_eq!(updates.counts.executions, 74, "{report:#?}");
    assert_eq!(updates.counts.left_out.values().sum::<u64>(), 70, "{report:#?}");
    assert_eq!(
        statement(&report, "update warm set n = ? where false").counts.unsettled,
        0
    );
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    drop(client);
    let explained: pgtandem::admin::api::ExplainAnswer = rig
        .admin()
        .get("/api/v1/explain?sql=insert%20into%20locked%20values%20(1)")
        .await
        .unwrap();
    assert!(explained.text.contains("rehearsed"), "{}", explained.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_applier_does_not_wait_for_a_rehearsal_and_a_flip_turns_it_round() {
    let rig = rig(Phase::DualRead).await;
    let client = rig.client().await;
    client.batch_execute("create table warm (n int)").await.unwrap();
    client
        .batch_execute(
            "create table slow (id int primary key, n int);
             insert into slow values (1, 0);
             create function dawdle() returns trigger language plpgsql as $$
                 declare until timestamptz := clock_timestamp() + interval '700ms';
                 begin while clock_timestamp() < until loop end loop; return new; end $$;
             create trigger dawdle before update on slow for each row execute function dawdle()",
        )
        .await
        .unwrap();
    known(&rig, &client).await;
    // On the secondary it holds its row's lock for as long, and the round that brings that very row
    // comes meanwhile.
    client
        .simple_query("update slow set n = n + 1 where id = 1")
        .await
        .unwrap();
    let report = settled(&rig, &client).await;
    let slow = statement(&report, "update slow set n = n + ? where id = ?");
    assert_eq!(slow.counts.failed.get("gave_way"), Some(&1), "{report:#?}");
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    assert!(!rig.log().contains("deadlock"), "{}", rig.log());

    // The other way round, the old side is the one that is tried.
    rig.set_phase(Phase::Switchover).await.unwrap();
    let app = rig.direct(Side::Legacy, APP).await;
    app.batch_execute("revoke delete on warm from app").await.unwrap();
    known(&rig, &client).await;
    client.simple_query("delete from warm").await.unwrap();
    let report = settled(&rig, &client).await;
    assert_eq!(
        statement(&report, "delete from warm").counts.mismatched,
        1,
        "{report:#?}"
    );
    let found = mismatches(&rig).await;
    let last = found.last().unwrap();
    assert_eq!((last.kind, last.primary), (Kind::WriteError, Side::New));
    assert_eq!(last.error.secondary.as_deref(), Some("42501"));
    // Told by status and by the report.
    let status = rig.command(&["status"]);
    let text = super::rig::printed(&status);
    assert!(text.contains("rehearsed") && text.contains("gave_way"), "{text}");
    let page = super::rig::printed(&rig.command(&["report", "--md"]));
    assert!(
        page.contains("### Writes") && page.contains("delete from warm"),
        "{page}"
    );
    let page = super::rig::printed(&rig.command(&["report"]));
    assert!(page.contains("<h3>Writes</h3>") && page.contains("gave way"), "{page}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_that_is_rehearsed_makes_no_mismatch() {
    let rig = rig(Phase::DualWrite).await;
    let client = rig.client().await;
    client.batch_execute("create table warm (n int)").await.unwrap();
    client.batch_execute(STORM_SCHEMA).await.unwrap();
    known(&rig, &client).await;
    let storm = Storm::begin(&rig.url(), SEED + 7, 8, false).await;
    storm.rage(1200).await;
    let ledger = storm.end().await;
    assert_eq!(ledger.failures, Vec::<String>::new());
    let report = settled(&rig, &client).await;
    rig.wait_caught_up().await;
    rig.assert_equal().await;
    for side in [Side::Legacy, Side::New] {
        ledger.assert_kept(&rig.direct(side, APP).await).await;
    }
    let counts = &report.totals.counts;
    assert_eq!(counts.mismatched, 0, "{report:#?}\n{:#?}", mismatches(&rig).await);
    assert!(counts.matched > counts.unsettled, "{counts:#?}");
    assert!(counts.matched > 100, "{counts:#?}");
    let status = rig.status().await.unwrap();
    let mirroring = status.databases[0].mirroring.as_ref().unwrap();
    assert_eq!(mirroring.divergences, 0);
    assert_eq!(mirroring.quarantine.transactions, 0, "{mirroring:#?}");
    assert!(!rig.log().contains("deadlock"), "{}", rig.log());
}
