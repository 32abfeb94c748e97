//! Shadow reads through the built proxy: which reads are compared, why others are not, and that
//! writes and a late applier make no mismatch.

use futures_util::StreamExt;
use pgtandem::admin::api::ShadowsAnswer;
use pgtandem::control::{Phase, Side};
use pgtandem::shadow::ShadowReport;
use tokio_postgres::Client;

use super::SEED;
use super::places::{Place, produced_in};
use super::rig::{APP, DATABASE, Rig};

/// A rig in dual_read that shadows all reads.
async fn rig() -> Rig {
    let mut rig = Rig::new();
    rig.extra = "reads: {shadow_percent: 100, shadow_queue: 20000}\n".into();
    rig.serve(Phase::DualRead).await;
    rig
}

/// What is known of the reads once none is waiting.
async fn settled(rig: &Rig, client: &Client) -> ShadowReport {
    // A read is counted right after its answer, and before the session's next one.
    client.simple_query("").await.unwrap();
    loop {
        let answer: ShadowsAnswer = rig.admin().get("/api/v1/shadows").await.unwrap();
        let report = answer.databases[DATABASE].clone();
        if report.totals.waiting == 0 {
            return report;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Waits until the proxy has read the catalogs since the tables were made.
async fn known(rig: &Rig, client: &Client) {
    loop {
        client.simple_query("select count(*) from item").await.unwrap();
        if settled(rig, client).await.totals.counts.matched > 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

const SCHEMA: &str = "
    create table item (id int primary key, name text);
    insert into item select i, 'item ' || i from generate_series(1, 100) i;
    create table log (at timestamptz);
    create sequence s;
    create function audit() returns int volatile language sql as 'insert into log values (now()); select 1';
    create function coin(int, int) returns boolean volatile language sql as 'select random() < 2';
    create operator <~> (leftarg = int, rightarg = int, function = coin)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_of_every_form_are_compared() {
    let rig = rig().await;
    let mut client = rig.client().await;
    client.batch_execute(SCHEMA).await.unwrap();
    rig.wait_caught_up().await;
    known(&rig, &client).await;

    // Prepared statements with parameters, in a transaction that reads only and in one that does
    // not write yet.
    let by_id = client.prepare("select name from item where id = $1").await.unwrap();
    for id in [1, 2, 1000] {
        client.query(&by_id, &[&id]).await.unwrap();
    }
    let read_only = client.build_transaction().read_only(true).start().await.unwrap();
    read_only
        .query("select id from item where id < $1", &[&5])
        .await
        .unwrap();
    read_only.commit().await.unwrap();
    let transaction = client.transaction().await.unwrap();
    transaction
        .query("select id, name from item where id > $1", &[&90])
        .await
        .unwrap();
    // A portal, fetched in parts and not to its end.
    let every = transaction.prepare("select id from item order by id").await.unwrap();
    let portal = transaction.bind(&every, &[]).await.unwrap();
    assert_eq!(transaction.query_portal(&portal, 10).await.unwrap().len(), 10);
    assert_eq!(transaction.query_portal(&portal, 10).await.unwrap().len(), 10);
    transaction.commit().await.unwrap();
    let transaction = client.transaction().await.unwrap();
    let unordered = transaction.prepare("select name, id from item").await.unwrap();
    let portal = transaction.bind(&unordered, &[]).await.unwrap();
    while !transaction.query_portal(&portal, 30).await.unwrap().is_empty() {}
    transaction.commit().await.unwrap();

    for sql in [
        // Cursors: a part, all of it in parts, by name.
        "begin",
        "declare c cursor for select id from item where id > 10 order by id",
        "fetch 5 from c",
        "fetch next from c",
        "commit",
        "begin",
        "declare c cursor for select name from item where id > 20",
        "fetch forward 50 from c",
        "fetch all in c",
        "close c",
        "commit",
        "prepare p (int) as select name, id from item where id = $1",
        "execute p (5)",
        "execute p (6 + 1)",
        "deallocate p",
        "with w as (select 1 as one) select one, id from w, item",
        "(select max(id) from item) union (select 0)",
    ] {
        client.simple_query(sql).await.unwrap();
    }
    for sql in [
        "copy item to stdout",
        "copy (select id from item where id > 50) to stdout (format csv)",
    ] {
        copied(&client, sql).await;
    }
    let report = settled(&rig, &client).await;
    assert_eq!(report.totals.counts.mismatched, 0, "{report:#?}");
    for (text, executions) in [
        ("select name from item where id = ?", 3),
        ("select id from item where id < ?", 1),
        ("select id, name from item where id > ?", 1),
        ("select id from item order by id", 1),
        ("select name, id from item", 1),
        ("select id from item where id > ? order by id", 1),
        ("select name from item where id > ?", 1),
        ("select name, id from item where id = ?", 2),
        ("copy item to stdout", 1),
        ("copy(select id from item where id > ?) to stdout(format csv)", 1),
        ("with w as(select ? as one) select one, id from w, item", 1),
        ("(select max(id) from item) union(select ?)", 1),
    ] {
        let found = report.fingerprints.iter().find(|one| one.text == text);
        let counts = &found.unwrap_or_else(|| panic!("{text}: {report:#?}")).counts;
        assert_eq!(
            (counts.executions, counts.compared),
            (executions, executions),
            "{text}: {counts:?}"
        );
        let latency = found.unwrap().latency.as_ref().unwrap();
        assert_eq!(latency.legacy.total.count, executions, "{text}");
        assert_eq!(latency.new.total.count, executions, "{text}");
    }
    // Both sides' plans of a statement with parameters, without values.
    let by_id = report
        .fingerprints
        .iter()
        .find(|one| one.text == "select name from item where id = ?");
    let said = rig.check(
        &["mismatches", "--explain", "--fingerprint", &by_id.unwrap().fingerprint],
        0,
        "",
    );
    assert_eq!(said.matches("(cost=").count(), 2, "{said}");
    assert!(!said.contains("Cond"), "{said}");
    // What differs in the part that was fetched is found, and only there.
    rig.direct(Side::New, super::rig::OWN_ROLE)
        .await
        .batch_execute("update item set id = 1000 where id = 13")
        .await
        .unwrap();
    for (fetch, mismatched) in [("fetch 2 from c", 0), ("fetch 5 from c", 1)] {
        for sql in [
            "begin",
            "declare c cursor for select id from item where id > 10 order by id",
            fetch,
            "commit",
        ] {
            client.simple_query(sql).await.unwrap();
        }
        assert_eq!(
            settled(&rig, &client).await.totals.counts.mismatched,
            mismatched,
            "{fetch}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_reason_against_a_comparison_is_counted() {
    let rig = rig().await;
    let client = rig.client().await;
    client.batch_execute(SCHEMA).await.unwrap();
    rig.wait_caught_up().await;
    known(&rig, &client).await;
    let mut produced = std::collections::BTreeSet::new();
    for (statements, reason) in [
        (&["select 1; select 2"][..], "several_statements"),
        (
            &["select name from item where id between symmetric 1 and 2"],
            "not_understood",
        ),
        (&["select audit()"], "volatile_function"),
        (&["select id from item where id <~> 3"], "volatile_function"),
        (&["select now()"], "clock"),
        (&["select current_user"], "session"),
        (&["select count(*) from pg_class"], "server_specific"),
        (&["select id from item for update"], "locking"),
        (&["select last_value from s"], "not_mirrored"),
        (
            &[
                "create temp table item (id int)",
                "select id from item where id = 7",
                "drop table pg_temp.item",
            ],
            "temporary_table",
        ),
        (
            &[
                "discard temp",
                "begin",
                "insert into item values (1001)",
                "select id from item where id = 8",
                "rollback",
            ],
            "earlier_write",
        ),
        (
            &[
                "begin",
                "select audit()",
                "select id from item where id = 9",
                "rollback",
            ],
            "earlier_write",
        ),
        (
            &[
                "begin",
                "set timezone = 'UTC'",
                "select id from item where id = 10",
                "rollback",
                "reset all",
            ],
            "unknown_settings",
        ),
        (
            &[
                "begin",
                "declare c scroll cursor for select id, 1 from item",
                "fetch last from c",
                "commit",
            ],
            "cursor_movement",
        ),
        (
            &[
                "begin",
                "declare c binary cursor for select id, 2 from item",
                "fetch 1 from c",
                "commit",
            ],
            "cursor_movement",
        ),
        (
            &["do $$ begin execute 'prepare q as select 1'; end $$", "execute q"],
            "unknown_statement",
        ),
        (&["select no_such_function(1)"], "unknown_function"),
        (&["select 1 from no_such_table"], "unknown_relation"),
        (&["copy item to '/no/such/directory/file'"], "copy_to_server"),
    ] {
        let before = settled(&rig, &client).await.totals.counts;
        for sql in statements {
            // Some are errors, which are answers like others.
            client.simple_query(sql).await.ok();
        }
        let after = settled(&rig, &client).await.totals.counts;
        let count = |counts: &pgtandem::shadow::ReadCounts| counts.not_comparable.get(reason).copied().unwrap_or(0);
        assert!(count(&after) > count(&before), "{statements:?} {reason}: {after:?}");
        produced.insert(reason);
    }
    // No read is counted as anything.
    let before = settled(&rig, &client).await.totals.counts;
    for sql in [
        "insert into item values (2000)",
        "set work_mem = '5MB'",
        "begin",
        "commit",
    ] {
        client.simple_query(sql).await.unwrap();
    }
    assert_eq!(settled(&rig, &client).await.totals.counts, before);

    // A session that ends in the middle of an answer; a read behind another one's answer.
    let skipped = async |reason: &str| {
        let counts = settled(&rig, &client).await.totals.counts;
        counts.skipped.get(reason).copied().unwrap_or(0)
    };
    assert_eq!((skipped("cut_off").await, skipped("pipelined").await), (0, 0));
    cut_off(&rig).await;
    while skipped("cut_off").await == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    tokio::join!(
        async {
            client
                .simple_query("select count(*) from generate_series(1, 500000) a")
                .await
                .unwrap()
        },
        async { client.simple_query("select id from item where id = 11").await.unwrap() },
    );
    assert_eq!(skipped("pipelined").await, 1);
    produced.extend(["cut_off", "pipelined"]);
    let wanted: std::collections::BTreeSet<_> = produced_in(Place::Proxy).into_iter().collect();
    assert_eq!(produced, wanted);

    // All of it is in the coverage, with its reason.
    let report = settled(&rig, &client).await;
    let coverage = &report.coverage;
    assert!(
        coverage.fingerprints > coverage.fingerprints_compared && coverage.executions > coverage.executions_compared
    );
    let never = coverage.never_compared.iter().find(|one| one.text == "select now()");
    assert_eq!(never.map(|one| one.reason.as_str()), Some("clock"));
}

/// A client that goes away while its answer is on the way.
async fn cut_off(rig: &Rig) {
    let (client, connection) = tokio_postgres::connect(&rig.url(), tokio_postgres::NoTls)
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    let rows = client
        .query_raw(
            "select repeat('x', 1000) from generate_series(1, 1000000) a",
            Vec::<i32>::new(),
        )
        .await
        .unwrap();
    let mut rows = std::pin::pin!(rows);
    rows.next().await.unwrap().unwrap();
    connection.abort();
}

/// Reads a COPY to its end.
async fn copied(client: &Client, sql: &str) {
    let stream = client.copy_out(sql).await.unwrap();
    let mut stream = std::pin::pin!(stream);
    while let Some(data) = stream.next().await {
        data.unwrap();
    }
}

/// The applier waits for locks on the secondary, for as long again and again.
async fn with_lag(rig: &Rig, milliseconds: u64) -> tokio::task::JoinHandle<()> {
    let client = rig.direct(Side::New, super::rig::OWN_ROLE).await;
    tokio::spawn(async move {
        if milliseconds == 0 {
            return;
        }
        loop {
            client
                .batch_execute("begin; lock table account, entry in share mode")
                .await
                .unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(milliseconds)).await;
            client.batch_execute("commit").await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
}

/// A generator of the same numbers each time (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: i32) -> i32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        i32::try_from((mixed ^ (mixed >> 31)) % u64::from(bound.unsigned_abs())).unwrap()
    }
}

/// Rows of the storm's tables: most reads meet none that is being written.
const ACCOUNTS: i32 = 20_000;

/// Reads in the suite, with each lag; `PGTANDEM_STORM_READS` asks for more. What a service that reads
/// once a second asks in an hour.
fn storm_reads() -> u64 {
    let asked = std::env::var("PGTANDEM_STORM_READS");
    asked.map_or(3600, |reads| reads.parse().expect("PGTANDEM_STORM_READS is a number"))
}

/// Writes and reads at random; every read is one that can be compared.
async fn rage(mut client: Client, seed: u64, turns: u64) {
    let mut numbers = Numbers(seed);
    let by_id = client.prepare("select * from account where id = $1").await.unwrap();
    let around = client
        .prepare("select id, balance from account where id between $1 and $1 + 20 order by balance, id limit 5")
        .await
        .unwrap();
    for _ in 0..turns {
        let (id, other) = (numbers.below(ACCOUNTS), numbers.below(ACCOUNTS));
        match numbers.below(1000) {
            0..600 => drop(client.query(&by_id, &[&id]).await.unwrap()),
            600..800 => drop(client.query(&around, &[&id]).await.unwrap()),
            800..860 => {
                let sql = format!("select * from account a join entry e on e.account = a.id where a.id = {id}");
                client.simple_query(&sql).await.unwrap();
            }
            860..900 => {
                let sql = format!("copy (select * from account where id between {id} and {id} + 5) to stdout");
                copied(&client, &sql).await;
            }
            900..930 => {
                let transaction = client.build_transaction().read_only(true).start().await.unwrap();
                let statement = transaction
                    .prepare("select id from account where id > $1 order by id")
                    .await
                    .unwrap();
                let portal = transaction.bind(&statement, &[&id]).await.unwrap();
                transaction.query_portal(&portal, 3).await.unwrap();
                transaction.commit().await.unwrap();
            }
            // These meet what is being written nearly always.
            930..935 => drop(
                client
                    .query("select sum(balance), count(*) from account", &[])
                    .await
                    .unwrap(),
            ),
            935..938 => drop(client.query("select max(id), count(*) from entry", &[]).await.unwrap()),
            938..990 => {
                let transaction = client.transaction().await.unwrap();
                // In one order, so that nobody waits for the other in a circle.
                for (id, amount) in [(id.min(other), 1), (id.max(other), -1)] {
                    let sql = "update account set balance = balance + $2 where id = $1";
                    transaction.execute(sql, &[&id, &amount]).await.unwrap();
                }
                let entry = "insert into entry (account, note) values ($1, 'moved')";
                transaction.execute(entry, &[&id]).await.unwrap();
                // Its own write: not comparable.
                transaction.query(&by_id, &[&id]).await.unwrap();
                transaction.commit().await.unwrap();
            }
            _ => drop(
                client
                    .execute("delete from entry where id % 7 = $1", &[&(id % 7)])
                    .await
                    .unwrap(),
            ),
        }
    }
}

/// As many reads as a service asks in an hour, among writes, while the applier is not late, late, and
/// very late. Equal databases: no mismatch. What only the look at a cut tells from one is counted as
/// transient: without it, each of those would have been a false alarm.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::print_stdout, reason = "a long run says how far it is")]
async fn an_hour_of_reads_and_a_late_applier_make_no_mismatch() {
    const WORKERS: u64 = 4;
    let rig = rig().await;
    let client = rig.client().await;
    client
        .batch_execute(&format!(
            "create table item (id int primary key); insert into item values (1);
             create table account (id int primary key, balance int not null);
             insert into account select i, 100 from generate_series(0, {ACCOUNTS} - 1) i;
             create table entry (id serial primary key, account int, note text);
             create index on entry (account)"
        ))
        .await
        .unwrap();
    rig.wait_caught_up().await;
    known(&rig, &client).await;
    let mut before = settled(&rig, &client).await.totals.counts;
    for (at, lag) in [0, 50, 500].into_iter().enumerate() {
        let late = with_lag(&rig, lag).await;
        let mut workers = tokio::task::JoinSet::new();
        for worker in 0..WORKERS {
            let turns = storm_reads().div_ceil(WORKERS);
            workers.spawn(rage(rig.client().await, SEED + 10 * at as u64 + worker, turns));
        }
        workers.join_all().await;
        let after = settled(&rig, &client).await.totals.counts;
        late.abort();
        let (compared, transient) = (after.compared - before.compared, after.transient - before.transient);
        println!(
            "lag {lag} ms: {compared} reads compared, {transient} of them transient, {} mismatched",
            after.mismatched
        );
        assert_eq!(after.mismatched, 0, "lag {lag} ms: {after:?}");
        assert!(
            after.dropped.is_empty() && after.failed.is_empty(),
            "lag {lag} ms: {after:?}"
        );
        assert!(compared > storm_reads() * 8 / 10, "lag {lag} ms: {after:?}");
        // The test proves nothing where nothing ever differed at first.
        assert!(lag == 0 || transient > 0, "lag {lag} ms: {after:?}");
        before = after;
    }
    // And it is not blind: the same storm over one row that differs.
    rig.wait_caught_up().await;
    rig.direct(Side::New, super::rig::OWN_ROLE)
        .await
        .batch_execute("update account set balance = balance + 1 where id = 7")
        .await
        .unwrap();
    let late = with_lag(&rig, 50).await;
    let storm = tokio::spawn(rage(rig.client().await, SEED + 99, storm_reads() / 20));
    for _ in 0..3 {
        client.query("select * from account where id = 7", &[]).await.unwrap();
    }
    client
        .query("select sum(balance), count(*) from account", &[])
        .await
        .unwrap();
    storm.await.unwrap();
    let found = settled(&rig, &client).await;
    late.abort();
    assert!(found.totals.counts.mismatched >= 4, "{:?}", found.totals.counts);
    for one in found.fingerprints.iter().filter(|one| one.counts.mismatched > 0) {
        assert!(one.text.contains("from account"), "{one:?}");
    }
    assert!(rig.direct(Side::New, APP).await.simple_query("select 1").await.is_ok());
}
