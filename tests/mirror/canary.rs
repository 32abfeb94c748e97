//! Canary reads through the built proxy: what the secondary answers, that a session reads its own
//! writes, and that a client is not hurt by a secondary that fails.
//!
//! Which side answered is told by a difference that was planted in the table `place`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgtandem::admin::api::{CanaryStatus, ShadowsAnswer};
use pgtandem::control::{Phase, Side};
use pgtandem::servers::SUPERUSER;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::{Client, SimpleQueryMessage};

use super::SEED;
use super::rig::{APP, DATABASE, OWN_ROLE, Rig};

/// A canary whose planted mismatches, and the times of a busy machine, do not end it.
const CANARY: &str = "shadow_percent: 0, canary_wait: 20s, canary_max_lag: 1h, \
    canary_budget: {mismatches: 100, errors: 100, latency_ratio: 1000000}";
const PLACE: &str = "select side from place where id = 1";

async fn rig(reads: &str) -> Rig {
    let mut rig = Rig::new();
    rig.extra = format!("reads: {{{reads}}}\n");
    rig.serve(Phase::DualRead).await;
    let client = rig.client().await;
    client
        .batch_execute(
            "create table place (id int primary key, side text);
             insert into place select i, 'legacy' from generate_series(1, 5) i;
             create table item (id int primary key, n int);
             create table day (d date); insert into day values ('2026-11-21')",
        )
        .await
        .unwrap();
    rig.wait_caught_up().await;
    rig.direct(Side::New, OWN_ROLE)
        .await
        .batch_execute("update place set side = 'new'")
        .await
        .unwrap();
    rig
}

/// All reads go to the secondary, and the proxy knows the tables.
async fn all() -> Rig {
    let rig = rig(&format!("canary_percent: 100, {CANARY}")).await;
    until_on(&rig).await;
    let client = rig.client().await;
    until_answered_by(&client, "new").await;
    rig
}

async fn until_on(rig: &Rig) {
    rig.until(|status| status.databases[0].canary.as_ref().is_some_and(|canary| canary.on))
        .await;
}

async fn canary(rig: &Rig) -> CanaryStatus {
    rig.status().await.unwrap().databases[0].canary.clone().unwrap()
}

async fn value(client: &Client, sql: &str) -> String {
    for message in client.simple_query(sql).await.unwrap() {
        if let SimpleQueryMessage::Row(row) = message {
            return row.get(0).unwrap_or_default().to_owned();
        }
    }
    panic!("no row: {sql}");
}

/// The proxy reads the catalogs a moment after the tables were made.
async fn until_answered_by(client: &Client, side: &str) {
    for _ in 0..1200 {
        if value(client, PLACE).await == side {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{side} never answered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_secondary_answers_reads_of_every_form_as_the_session_stands() {
    let rig = all().await;
    let client = rig.client().await;
    until_answered_by(&client, "new").await;
    for (sql, says) in [
        ("SELECT side FROM place", "canary    yes: 100% of such reads"),
        (
            "SELECT now()",
            "canary    yes: it depends on the clock: only within a transaction",
        ),
        ("INSERT INTO place VALUES (9, '')", "canary    no: only reads"),
    ] {
        rig.check(&["explain", sql], 0, says);
    }
    let by_id = client.prepare("select side from place where id = $1").await.unwrap();
    for id in 1..4 {
        let row = client.query_one(&by_id, &[&id]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), "new");
    }
    // Settings, the role and the path are followed, whenever they are changed.
    for (set, expected) in [
        ("set datestyle = 'German'", "21.11.2026 new"),
        ("select set_config('datestyle', 'SQL', false)", "21/11/2026 new"),
        ("begin; set datestyle = 'German'; rollback", "21/11/2026 new"),
        ("reset datestyle", "2026-11-21 new"),
    ] {
        client.batch_execute(set).await.unwrap();
        let found = value(&client, "select d::text || ' ' || side from day, place where id = 1").await;
        assert_eq!(found, expected, "{set}");
    }
    client
        .batch_execute("create schema other; create table other.place (id int, side text); insert into other.place values (1, 'other')")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    client.batch_execute("set search_path = other").await.unwrap();
    assert_eq!(value(&client, PLACE).await, "other");
    client.batch_execute("reset search_path").await.unwrap();
    assert_eq!(value(&client, PLACE).await, "new");
    // A statement that was closed and made anew under its name.
    client
        .batch_execute("prepare p as select 1; deallocate p")
        .await
        .unwrap();
    let row = client.query_one(&by_id, &[&5]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "new");
    // Sent in one go, a write between reads is the primary's, and the read behind it sees it.
    let count = client.prepare("select count(*) from item").await.unwrap();
    let insert = client.prepare("insert into item values ($1, 0)").await.unwrap();
    for id in 100..110 {
        let values: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&id];
        let (before, written, after) = tokio::join!(
            client.query_one(&count, &[]),
            client.execute(&insert, &values),
            client.query_one(&count, &[])
        );
        let rows = |row: Result<tokio_postgres::Row, _>| row.unwrap().get::<_, i64>(0);
        assert_eq!(
            (rows(before), written.unwrap(), rows(after)),
            (i64::from(id) - 100, 1, i64::from(id) - 99)
        );
    }
    // Notifications are the primary's.
    client.batch_execute("listen here").await.unwrap();
    assert_eq!(
        value(
            &client,
            "select side from place, pg_catalog.generate_series(1, 1) where id = 1"
        )
        .await,
        "new"
    );
    client.batch_execute("unlisten *").await.unwrap();
    // What the secondary cannot know, or must not do, stays with the primary.
    client
        .batch_execute("create temp table place (id int, side text); insert into place values (1, 'temp')")
        .await
        .unwrap();
    assert_eq!(value(&client, PLACE).await, "temp");
    client.batch_execute("drop table pg_temp.place").await.unwrap();
    let mut locking = rig.client().await;
    until_answered_by(&locking, "new").await;
    assert_eq!(
        value(&locking, "select side from place where id = 1 for update").await,
        "legacy"
    );
    let open = locking.transaction().await.unwrap();
    let row = open.query_one(PLACE, &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "legacy", "a transaction that may write");
    open.commit().await.unwrap();

    // Rows of types that have another OID there are not what the client was told of.
    client
        .batch_execute("create type mood as enum ('glad'); create table moods (m mood, side text); insert into moods values ('glad', 'x')")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    let before = canary(&rig).await.counts.fallbacks.types;
    for _ in 0..100 {
        assert_eq!(value(&client, "select m from moods").await, "glad");
        if canary(&rig).await.counts.fallbacks.types > before {
            break;
        }
        // The catalogs are read a moment after.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(
        canary(&rig).await.counts.fallbacks.types,
        before + 1,
        "asked there once"
    );
    assert_eq!(value(&client, "select m from moods").await, "glad");
    let row = client.query_one("select m::text, m from moods", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "glad");

    let counts = canary(&rig).await.counts;
    assert!(counts.served > 10, "{counts:?}");
    assert_eq!((counts.errors, counts.broken, counts.stranded), (0, 0, 0));
    // They are compared, and what differs is a mismatch that says so.
    let log = loop {
        let log = std::fs::read_to_string(rig.directory.path().join("mismatches.jsonl")).unwrap_or_default();
        if log.contains("\"event\":\"mismatch\"") {
            break log;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let line = log
        .lines()
        .find(|line| line.contains("\"event\":\"mismatch\""))
        .unwrap();
    assert!(line.contains("\"canary\":true"), "{line}");
    let shadows: ShadowsAnswer = rig.admin().get("/api/v1/shadows").await.unwrap();
    let fingerprints = &shadows.databases[DATABASE].fingerprints;
    assert!(fingerprints.iter().any(|one| one.canary.served > 3), "{fingerprints:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_transaction_stays_on_one_side() {
    let rig = all().await;
    let mut client = rig.client().await;
    until_answered_by(&client, "new").await;
    let outside = client.prepare("select side from place where id = $1").await.unwrap();
    let transaction = client.build_transaction().read_only(true).start().await.unwrap();
    let inside = transaction
        .prepare("select side from place where id > $1 order by id")
        .await
        .unwrap();
    transaction
        .batch_execute("set local datestyle = 'German'")
        .await
        .unwrap();
    for _ in 0..2 {
        let row = transaction.query_one(&outside, &[&2]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), "new");
        let portal = transaction.bind(&inside, &[&1]).await.unwrap();
        assert_eq!(transaction.query_portal(&portal, 2).await.unwrap().len(), 2);
        assert_eq!(transaction.query_portal(&portal, 2).await.unwrap().len(), 2);
    }
    for sql in [
        "declare c cursor for select side from place",
        "savepoint s",
        "select now()",
        "rollback to s",
    ] {
        transaction.batch_execute(sql).await.unwrap();
    }
    let rows = transaction.query("fetch all from c", &[]).await.unwrap();
    assert!(rows.iter().all(|row| row.get::<_, &str>(0) == "new"));
    transaction.commit().await.unwrap();
    // Statements that were parsed there are the session's.
    let writing = client.transaction().await.unwrap();
    let rows = writing.query(&inside, &[&4]).await.unwrap();
    assert_eq!(rows[0].get::<_, &str>(0), "legacy");
    writing.commit().await.unwrap();
    assert_eq!(value(&client, "select d::text from day").await, "2026-11-21");

    // Where the first statement is not for the secondary, the whole transaction is the primary's.
    client.batch_execute("start transaction read only").await.unwrap();
    client.batch_execute("set local work_mem = '5MB'").await.unwrap();
    client.batch_execute("select pg_advisory_xact_lock(1)").await.unwrap();
    assert_eq!(value(&client, "show work_mem").await, "5MB");
    assert_eq!(value(&client, PLACE).await, "legacy");
    client.batch_execute("commit").await.unwrap();

    // Later it is an error that asks for another try, which the primary serves.
    client.batch_execute("begin read only").await.unwrap();
    assert_eq!(value(&client, PLACE).await, "new");
    let refused = client
        .batch_execute("select pg_advisory_xact_lock(1)")
        .await
        .unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "40001");
    let failed = client.batch_execute(PLACE).await.unwrap_err();
    assert_eq!(failed.code().unwrap().code(), "25P02");
    client.batch_execute("rollback").await.unwrap();
    client.batch_execute("begin read only").await.unwrap();
    assert_eq!(value(&client, PLACE).await, "legacy");
    client
        .batch_execute("select pg_advisory_xact_lock(1); commit")
        .await
        .unwrap();

    // Said by the session's settings; and taken back.
    let other = rig.client().await;
    until_answered_by(&other, "new").await;
    other
        .batch_execute("set default_transaction_read_only = on")
        .await
        .unwrap();
    other.batch_execute("begin").await.unwrap();
    assert_eq!(value(&other, PLACE).await, "new");
    other.batch_execute("commit").await.unwrap();
    other.batch_execute("begin read write").await.unwrap();
    assert_eq!(value(&other, PLACE).await, "legacy");
    other.batch_execute("insert into item values (77, 7)").await.unwrap();
    other.batch_execute("commit").await.unwrap();
    let counts = canary(&rig).await.counts;
    assert_eq!((counts.stranded, counts.broken), (1, 0), "{counts:?}");
    assert!(counts.transactions >= 3, "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_share_goes_by_keys_and_rules() {
    let rig = rig(&format!(
        "canary_percent: 50, canary_rules: [{{table: day, percent: 0}}, {{application_name: pilot, percent: 100}}], {CANARY}"
    ))
    .await;
    until_on(&rig).await;
    let pilot = super::rig::connect(&format!("{}?application_name=pilot", rig.url()))
        .await
        .unwrap();
    until_answered_by(&pilot, "new").await;
    assert_eq!(
        value(&pilot, "select side from place, day where id = 1").await,
        "legacy"
    );
    let client = rig.client().await;
    let mut new = 0;
    for key in 0..200 {
        let sql = format!("select side from place where id = 1 and {key} >= 0");
        let first = value(&client, &sql).await;
        assert_eq!(first, value(&client, &sql).await, "the same read, the same side: {key}");
        new += u32::from(first == "new");
    }
    assert!((60..140).contains(&new), "{new} of 200");
}

/// Rounds wait until this is dropped.
async fn hold_rounds(rig: &Rig) -> Client {
    let holder = rig.direct(Side::New, SUPERUSER).await;
    holder
        .batch_execute("begin; lock table pgtandem.watermark in share mode")
        .await
        .unwrap();
    holder
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_reads_its_own_writes() {
    let rig = rig(&format!("canary_percent: 100, {}", CANARY.replace("20s", "300ms"))).await;
    until_on(&rig).await;
    let mut client = rig.client().await;
    let other = rig.client().await;
    until_answered_by(&client, "new").await;
    until_answered_by(&other, "new").await;
    let held = hold_rounds(&rig).await;
    client.batch_execute("insert into item values (1, 1)").await.unwrap();
    // Not there yet: the primary answers, and only the first read waits for long.
    for _ in 0..3 {
        assert_eq!(value(&client, "select count(*) from item").await, "1");
    }
    let counts = canary(&rig).await.counts;
    assert_eq!(counts.fallbacks.wait, 3, "{counts:?}");
    // Who has not written reads the secondary as it is.
    assert_eq!(value(&other, "select count(*) from item").await, "0");
    let transaction = client.build_transaction().read_only(true).start().await.unwrap();
    let row = transaction
        .query_one("select n from item where id = 1", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, i32>(0), 1);
    transaction.commit().await.unwrap();
    held.batch_execute("commit").await.unwrap();
    until_answered_by(&client, "new").await;
    assert_eq!(value(&client, "select count(*) from item").await, "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_not_hurt_by_a_secondary_that_fails() {
    let mut rig = all().await;
    let client = rig.client().await;
    until_answered_by(&client, "new").await;
    // An error that the primary does not give.
    rig.direct(Side::New, SUPERUSER)
        .await
        .batch_execute("alter table item rename to gone; create function bad(int) returns int stable language sql as 'select $1 / 0'")
        .await
        .unwrap();
    assert_eq!(value(&client, "select count(*) from item").await, "0");
    let prepared = client.prepare("select count(*) from item where id > $1").await.unwrap();
    assert_eq!(client.query_one(&prepared, &[&0]).await.unwrap().get::<_, i64>(0), 0);
    let counts = canary(&rig).await.counts;
    assert_eq!((counts.errors, counts.both_failed), (2, 0), "{counts:?}");
    // One that both give is the primary's.
    let both = client
        .batch_execute("select 1 / (n - n) from place, generate_series(1, 2) n")
        .await;
    assert_eq!(both.unwrap_err().code().unwrap().code(), "22012");
    assert_eq!(canary(&rig).await.counts.both_failed, 1);
    // In a transaction, before anything was given away.
    client.batch_execute("begin read only").await.unwrap();
    assert_eq!(value(&client, "select count(*) from item").await, "0");
    assert_eq!(value(&client, PLACE).await, "legacy");
    client.batch_execute("commit").await.unwrap();
    rig.direct(Side::New, SUPERUSER)
        .await
        .batch_execute("alter table gone rename to item; drop function bad(int)")
        .await
        .unwrap();

    // The connection is gone, before the first row.
    until_answered_by(&client, "new").await;
    let killer = rig.direct(Side::New, SUPERUSER).await;
    let kill = format!(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = '{APP}' and pid <> pg_backend_pid()"
    );
    let lost_before = canary(&rig).await.counts;
    let slow = "select max(side) from place where (select count(*) from generate_series(1, 20000000)) > 0 and id = 1";
    let (answer, ()) = tokio::join!(value(&client, slow), async {
        // Until it runs there.
        loop {
            let running = format!(
                "select count(*)::int from pg_stat_activity where usename = '{APP}' and state = 'active' and query like '%20000000%'"
            );
            if killer.query_one(&running, &[]).await.unwrap().get::<_, i32>(0) > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        killer.batch_execute(&kill).await.unwrap();
    });
    assert_eq!(answer, "legacy");
    let counts = canary(&rig).await.counts;
    assert_eq!(counts.fallbacks.broken, lost_before.fallbacks.broken + 1, "{counts:?}");
    // And where it is gone before the read, it is opened anew, or the primary answers.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    until_answered_by(&client, "new").await;
    killer.batch_execute(&kill).await.unwrap();
    assert_ne!(value(&client, PLACE).await, "");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    until_answered_by(&client, "new").await;
    // A transaction that has read there fails in earnest, and the session goes on.
    client.batch_execute("begin read only").await.unwrap();
    assert_eq!(value(&client, PLACE).await, "new");
    killer.batch_execute(&kill).await.unwrap();
    assert_eq!(
        client.batch_execute(PLACE).await.unwrap_err().code().unwrap().code(),
        "40001"
    );
    assert_eq!(
        client
            .batch_execute("select 1")
            .await
            .unwrap_err()
            .code()
            .unwrap()
            .code(),
        "25P02"
    );
    client.batch_execute("rollback").await.unwrap();
    assert_eq!(value(&client, PLACE).await, "legacy");
    // No secondary at all.
    rig.new.stop("immediate").unwrap();
    for _ in 0..3 {
        assert_eq!(value(&client, PLACE).await, "legacy");
    }
    rig.until(|status| status.databases[0].canary.as_ref().is_some_and(|canary| !canary.on))
        .await;
    rig.new.start_again().unwrap();
    until_on(&rig).await;
    until_answered_by(&client, "new").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_reaches_the_side_that_answers() {
    let rig = all().await;
    let client = rig.client().await;
    until_answered_by(&client, "new").await;
    let slow = "select max(side) from place where (select count(*) from generate_series(1, 2000000000)) > 0";
    let watcher = rig.direct(Side::New, SUPERUSER).await;
    let (answer, ()) = tokio::join!(client.simple_query(slow), async {
        loop {
            let running = "select count(*)::int from pg_stat_activity where state = 'active' and query like '%2000000000%' and pid <> pg_backend_pid()";
            if watcher.query_one(running, &[]).await.unwrap().get::<_, i32>(0) > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        client.cancel_token().cancel_query(tokio_postgres::NoTls).await.unwrap();
    });
    assert_eq!(answer.unwrap_err().code().unwrap().code(), "57014");
    assert_eq!(value(&client, PLACE).await, "new");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_budget_turns_it_off_and_a_reload_on_again() {
    let rig = rig(
        "shadow_percent: 0, canary_percent: 100, canary_wait: 20s, canary_max_lag: 1h, \
         canary_budget: {min_reads: 10, mismatches: 5, errors: 100, latency_ratio: 1000000}",
    )
    .await;
    until_on(&rig).await;
    let client = rig.client().await;
    for id in 0..2000 {
        let sql = format!("select side from place where id = 1 or id = {}", 100 + id);
        client.simple_query(&sql).await.unwrap();
        if canary(&rig).await.turned_off_by_budget {
            break;
        }
    }
    let off = canary(&rig).await;
    assert!(off.turned_off_by_budget && !off.on, "{off:?}");
    assert!(off.off_because.as_ref().unwrap().contains("mismatches"), "{off:?}");
    assert_eq!(off.turned_off.len(), 1);
    assert_eq!(value(&client, PLACE).await, "legacy");
    rig.check(&["status"], 1, "turned itself off");
    assert!(rig.log().contains("canary reads turned themselves off"));
    let log = std::fs::read_to_string(rig.directory.path().join("mismatches.jsonl")).unwrap();
    assert!(log.contains("\"what\":\"turned_off\""), "{log}");
    let report = rig.command(&["report", "--json"]).stdout;
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    let told = &report["databases"][0]["canary"];
    assert_eq!(told["turned_off"], 1, "{told}");
    assert!(told["counts"]["served"].as_u64().unwrap() >= 10, "{told}");
    rig.set_phase(Phase::DualRead).await.unwrap();
    assert!(!canary(&rig).await.turned_off_by_budget);
    until_answered_by(&client, "new").await;
}

/// Writes a number and reads it again, over and over, in many ways; returns how often.
async fn own_writes(mut client: Client, seed: u64, worker: i32, stop: Arc<AtomicBool>) -> u32 {
    let mut random = StdRng::seed_from_u64(seed);
    let read = client.prepare("select n from item where id = $1").await.unwrap();
    client
        .execute("insert into item values ($1, 0)", &[&worker])
        .await
        .unwrap();
    let mut turns = 0;
    while !stop.load(Ordering::Relaxed) {
        turns += 1;
        let wanted = i32::try_from(turns).unwrap();
        match random.random_range(0..4) {
            0 => {
                let transaction = client.transaction().await.unwrap();
                transaction
                    .execute("update item set n = $2 where id = $1", &[&worker, &wanted])
                    .await
                    .unwrap();
                transaction.commit().await.unwrap();
            }
            1 => {
                client
                    .execute("update item set n = $2 where id = $1", &[&worker, &wanted])
                    .await
                    .unwrap();
            }
            2 => {
                let sql =
                    format!("with w as (update item set n = {wanted} where id = {worker} returning n) select n from w");
                client.batch_execute(&sql).await.unwrap();
            }
            _ => {
                client
                    .batch_execute(&format!("select put({worker}, {wanted})"))
                    .await
                    .unwrap();
            }
        }
        for _ in 0..random.random_range(1..4) {
            let found: i32 = match random.random_range(0..3) {
                0 => client.query_one(&read, &[&worker]).await.unwrap().get(0),
                1 => value(&client, &format!("select n from item where id = {worker}"))
                    .await
                    .parse()
                    .unwrap(),
                _ => {
                    let transaction = client.build_transaction().read_only(true).start().await.unwrap();
                    let found = transaction.query_one(&read, &[&worker]).await.unwrap().get(0);
                    transaction.commit().await.unwrap();
                    found
                }
            };
            assert_eq!(found, wanted, "worker {worker}, seed {seed}");
        }
    }
    turns
}

const PUT: &str = "create function put(int, int) returns int volatile language sql as \
    'update item set n = $2 where id = $1 returning n'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_in_which_every_session_reads_its_own_writes_also_over_flips() {
    let rig = rig(&format!("canary_percent: 100, {}", CANARY.replace("20s", "500ms"))).await;
    rig.client().await.batch_execute(PUT).await.unwrap();
    until_on(&rig).await;
    until_answered_by(&rig.client().await, "new").await;
    // What was planted would be a divergence after the flip.
    rig.direct(Side::New, OWN_ROLE)
        .await
        .batch_execute("update place set side = 'legacy'")
        .await
        .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = tokio::task::JoinSet::new();
    for worker in 0..6 {
        workers.spawn(own_writes(
            rig.client().await,
            SEED + u64::try_from(worker).unwrap(),
            worker,
            stop.clone(),
        ));
    }
    for phase in [Phase::Switchover, Phase::DualRead] {
        let before = canary(&rig).await.counts.served;
        rig.until(|status| {
            let canary = status.databases[0].canary.as_ref();
            canary.is_some_and(|canary| canary.counts.served > before + 100)
        })
        .await;
        if let Err(error) = rig.set_phase(phase).await {
            panic!("{error}\n{}", rig.log());
        }
    }
    let before = canary(&rig).await.counts.served;
    rig.until(|status| {
        let canary = status.databases[0].canary.as_ref();
        canary.is_some_and(|canary| canary.counts.served > before + 100)
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    let turns = workers.join_all().await;
    assert!(turns.iter().all(|turns| *turns > 5), "{turns:?}");
    let counts = canary(&rig).await.counts;
    assert_eq!(
        (counts.errors, counts.broken, counts.mismatched),
        (0, 0, 0),
        "{counts:?}"
    );
    rig.wait_caught_up().await;
    rig.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_flip_a_share_goes_back_to_the_old_side() {
    let rig = rig(&format!("canary_percent: 0, {CANARY}")).await;
    let client = rig.client().await;
    assert_eq!(value(&client, PLACE).await, "legacy");
    let prepared = client.prepare("select side from place where id = $1").await.unwrap();
    rig.set_phase(Phase::Switchover).await.unwrap();
    assert_eq!(value(&client, PLACE).await, "new");
    let extra = rig.extra.replace("canary_percent: 0", "canary_percent: 100");
    let path = rig.config_path();
    let text = std::fs::read_to_string(&path).unwrap().replace(&rig.extra, &extra);
    std::fs::write(&path, text).unwrap();
    let _: pgtandem::admin::api::ReloadAnswer = rig.admin().post("/api/v1/reload", &()).await.unwrap();
    until_on(&rig).await;
    until_answered_by(&client, "legacy").await;
    assert_eq!(
        client.query_one(&prepared, &[&1]).await.unwrap().get::<_, &str>(0),
        "legacy"
    );
    client.batch_execute("insert into item values (5, 5)").await.unwrap();
    assert_eq!(value(&client, "select n from item where id = 5").await, "5");
}
