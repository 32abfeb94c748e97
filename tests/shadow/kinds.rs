//! Every kind of difference under its own name; rules, ignores, COPY and EXECUTE.

use std::time::Duration;

use bytes::Bytes;
use pgtandem::config::{ColumnRule, How, Ignore, Reads, Which};
use pgtandem::shadow::{Call, Filter, Kind, SlowerWatch, read_log};
use time::macros::date;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{Pair, Shadows};

const SCHEMA: &str = "
    create table m (id int primary key, f float8, n numeric, at timestamptz, doc json, name text);
    insert into m select i, i / 10.0, i / 4.0, '2026-01-01 00:00:00.123456Z'::timestamptz + i * interval '1 s',
        json_build_object('a', i, 'b', 'x'), 'name ' || i from generate_series(1, 50) i;
    create view one_column as select id as a from m;
    create view few as select id from m;
    create function loud() returns int stable language plpgsql as 'begin raise notice ''one''; return 1; end'";

/// What is done on new alone, and the reads that must show it.
struct Plant {
    on_new: &'static str,
    reads: &'static [&'static str],
}

/// A difference of each kind, on tables and views of its own. Without a wildcard: a new kind does
/// not build until it has one.
fn plant(kind: Kind) -> Plant {
    let (on_new, reads): (_, &[_]) = match kind {
        Kind::Error => (
            "create or replace view failing as select 1 / (id - 1) as a from m",
            &["select a from failing"],
        ),
        Kind::Columns => (
            "drop view few; create view few as select id, name from m; grant select on few to app",
            &["select * from few"],
        ),
        Kind::ColumnName => (
            "alter view one_column rename a to b",
            &["select * from one_column", "select * from one_column order by 1"],
        ),
        Kind::Type => (
            "drop view typed; create view typed as select id::bigint as a from m; grant select on typed to app",
            &["select a from typed"],
        ),
        // The relay before new says so.
        Kind::Tag => ("", &["select 'tagged' from m where id = 1"]),
        Kind::Notices => (
            "create or replace function loud() returns int stable language plpgsql as 'begin raise notice ''two''; return 1; end'",
            &["select loud()"],
        ),
        Kind::MissingRow => (
            "delete from missing where id = 2",
            &["select id from missing", "copy missing to stdout"],
        ),
        Kind::ExtraRow => ("insert into extra values (4)", &["select * from extra order by id"]),
        Kind::Value => (
            "update valued set name = 'other' where id = 2",
            &[
                "select id, name from valued",
                "select name from valued where id = 2 order by id limit 1",
                "copy valued to stdout",
            ],
        ),
        Kind::Precision => (
            "update precise set f = 0.30000000000000004, n = 0.750, at = date_trunc('milliseconds', at) where id = 3",
            &[
                "select id, f from precise",
                "select id, n from precise",
                "select id, at from precise order by id",
            ],
        ),
        // By their key these are two rows, not one with another value.
        Kind::Rows => (
            "update renamed set id = 1003 where id = 3",
            &["select id, name from renamed"],
        ),
        Kind::Order => ("", &["select name, mood from person order by mood"]),
        // By another collation, which Debian's server has and the other one need not.
        Kind::Collation => (
            "create table sorted (name text collate \"C\"); insert into sorted values ('B'), ('a'), ('C')",
            &["select name from sorted order by name"],
        ),
        // `what_is_slower_on_new_is_told_with_both_plans`: no wrong answer, so no read shows it.
        Kind::Slower => ("", &[]),
        // Of rehearsed writes: tests/mirror/rehearsals.rs.
        Kind::WriteError | Kind::WriteTag | Kind::WriteColumns => ("", &[]),
    };
    Plant { on_new, reads }
}

#[tokio::test]
async fn planted_differences_of_every_kind_are_found_each_under_its_own() {
    let mut pair = Pair::start().await;
    pair.both(SCHEMA).await;
    pair.both(
        "create view failing as select 1 / id as a from m;
         create view typed as select id as a from m;
         create table missing as select id from m; create table extra as select id from m where id < 4;
         create table valued as select id, name from m; create table renamed (id int primary key, name text);
         insert into renamed select id, name from m; create table precise as select id, f, n, at from m;
         create table person (name text)",
    )
    .await;
    for (side, labels) in [(&pair.primary, "'sad', 'glad'"), (&pair.secondary, "'glad', 'sad'")] {
        let sql = format!(
            "create type mood as enum ({labels}); alter table person add mood mood;
             insert into person values ('a', 'sad'), ('b', 'glad')"
        );
        side.batch_execute(&sql).await.unwrap();
    }
    pair.primary
        .batch_execute(
            "create table sorted (name text collate \"und-x-icu\"); insert into sorted values ('B'), ('a'), ('C')",
        )
        .await
        .unwrap();
    pair.targets.new.port = relay_that_tells_another_tag(pair.targets.new.port).await;
    let notices = Reads {
        compare_notices: true,
        ..Reads::default()
    };
    let mut shadows = Shadows::start(&pair, &pair.log_path(), notices).await;
    shadows.check("select loud()", "matched").await;
    shadows.check("select a from failing", "matched").await;
    shadows.check("select id, f, n, at from precise", "matched").await;

    for kind in Kind::ALL {
        let Plant { on_new, reads } = plant(kind);
        if !on_new.is_empty() {
            pair.secondary.batch_execute(on_new).await.unwrap();
            shadows.catalog_read().await;
        }
        for read in reads {
            let lines = shadows.check(read, &format!("mismatched: {}", kind.as_str())).await;
            assert_eq!(lines.len(), 1, "{read}");
        }
    }
    // Nothing else was touched.
    shadows.check("select name from sorted", "matched").await;
    shadows
        .check("select name, mood from person order by name", "matched")
        .await;
    shadows.check("select * from m", "matched").await;
    // More digits than precision has are another value.
    pair.secondary
        .batch_execute("update precise set f = 0.31 where id = 3")
        .await
        .unwrap();
    shadows.check("select id, f from precise", "mismatched: value").await;
}

/// No server tells another tag of the same rows; a relay does, of the one read that is about it.
async fn relay_that_tells_another_tag(server: u16) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = server.into_split();
            tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
            tokio::spawn(async move {
                let mut bytes = vec![0; 1 << 16];
                while let Ok(count @ 1..) = from_server.read(&mut bytes).await {
                    // One value, six bytes, and right behind it the tag: they come in one piece.
                    let told = b"\0\x01\0\0\0\x06taggedC\0\0\0\rSELECT 1";
                    let piece = &mut bytes[..count];
                    if let Some(at) = piece.windows(told.len()).position(|window| window == told) {
                        piece[at + told.len() - 1] = b'2';
                    }
                    if to_client.write_all(piece).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

fn rule(column: &str, how: How) -> ColumnRule {
    ColumnRule {
        column: column.into(),
        which: Which {
            fingerprint: None,
            table: Some("m".into()),
        },
        how,
    }
}

#[tokio::test]
async fn rules_and_ignores_say_what_is_borne() {
    let pair = Pair::start().await;
    pair.both(SCHEMA).await;
    let ignore = |column: Option<&str>, table: &str, expires| Ignore {
        which: Which {
            fingerprint: None,
            table: Some(table.into()),
        },
        column: column.map(str::to_owned),
        owner: "ann".into(),
        reason: "known".into(),
        expires,
    };
    let reads = Reads {
        columns: vec![
            rule("f", How::FloatTolerance(0.05)),
            rule("at", How::TimestampPrecision(Duration::from_millis(1))),
            rule("doc", How::Json),
        ],
        ignores: vec![
            ignore(Some("name"), "m", date!(9999 - 12 - 31)),
            ignore(Some("n"), "m", date!(2020 - 01 - 01)),
            ignore(None, "one_column", date!(9999 - 12 - 31)),
        ],
        ..Reads::default()
    };
    let mut shadows = Shadows::start(&pair, &pair.log_path(), reads).await;
    let on_new = async |sql: &str| pair.secondary.batch_execute(sql).await.unwrap();
    on_new(
        "update m set f = f * 1.01, at = date_trunc('milliseconds', at),
         doc = json_build_object('b', 'x', 'a', id), name = 'other', n = n + 1 where id < 20;
         update m set f = f * 2 where id = 20",
    )
    .await;
    let all_but_20 = "where id <> 20";
    for (column, expected) in [
        ("f", "matched tolerated"),
        ("at", "matched tolerated"),
        ("doc", "matched tolerated"),
        ("name", "matched partly.ignored"),
        // Expired.
        ("n", "mismatched: value"),
        ("f as g", "mismatched: value"),
    ] {
        shadows
            .check(&format!("select id, {column} from m {all_but_20}"), expected)
            .await;
    }
    shadows
        .check("select id, f from m where id <> 20 order by id", "matched tolerated")
        .await;
    shadows.check("select id, f from m", "mismatched: value").await;
    on_new("alter view one_column rename a to b").await;
    let read = shadows.ask("select * from one_column", Call::Simple).await;
    assert_eq!(shadows.judge(read).await.0, ["not_comparable.ignored"]);
    let ignores = shadows.sink.report(2.0).ignores;
    let expired: Vec<_> = ignores.iter().map(|ignore| ignore.expired).collect();
    assert_eq!(expired, [false, true, false]);

    // A rule is applied to what is kept of an answer, and no further.
    pair.both("create table many (id int, doc json); insert into many select i, json_build_object('a', repeat('x', 1000)) from generate_series(1, 10000) i").await;
    on_new("update many set doc = json_build_object('a', repeat('x', 1000), 'b', 1)").await;
    shadows.catalog_read().await;
    let mut about_many = rule("doc", How::Json);
    about_many.which.table = None;
    shadows.sink.configure(&Reads {
        shadow_percent: 100.0,
        columns: vec![about_many],
        ..Reads::default()
    });
    shadows
        .check("select * from many", "not_comparable.too_many_rows")
        .await;
}

#[tokio::test]
async fn copies_and_executes_are_repeated() {
    let pair = Pair::start().await;
    pair.both(SCHEMA).await;
    let mut shadows = Shadows::start(&pair, &pair.log_path(), Reads::default()).await;
    // The same rows, otherwise on disk.
    pair.secondary
        .batch_execute("update m set name = name where id % 3 = 0")
        .await
        .unwrap();
    let copies = [
        "copy m to stdout",
        "copy m (id, name) to stdout (format csv, header)",
        "copy (select * from m where id < 10) to stdout (format binary)",
        "copy (select id from m order by id) to stdout",
    ];
    for sql in copies {
        shadows.check(sql, "matched").await;
    }
    let prepared = |execute: &str| Call::Prepared {
        name: "p".into(),
        prepare: Bytes::from_static(b"prepare p (int) as select id, name from m where id <= $1"),
        execute: Bytes::copy_from_slice(execute.as_bytes()),
    };
    for (execute, expected) in [("execute p (5)", "matched"), ("execute p (1 / 0)", "matched")] {
        let read = shadows
            .ask("select id, name from m where id <= $1", prepared(execute))
            .await;
        assert_eq!(shadows.judge(read).await.0, [expected], "{execute}");
    }
    pair.secondary
        .batch_execute("update m set name = 'other' where id = 3")
        .await
        .unwrap();
    for (sql, expected) in copies.into_iter().zip(["value", "value", "value", ""]) {
        let expected = match expected {
            "" => "matched".to_owned(),
            kind => format!("mismatched: {kind}"),
        };
        shadows.check(sql, &expected).await;
    }
    let read = shadows
        .ask("select id, name from m where id <= $1", prepared("execute p (5)"))
        .await;
    let (outcome, lines) = shadows.judge(read).await;
    assert_eq!(
        (outcome, lines[0].kind.as_str()),
        (vec!["mismatched".to_owned()], "value")
    );
}

/// A plan that is slower has a record and a kind, and no part in the match rate.
#[tokio::test]
async fn what_is_slower_on_new_is_told_with_both_plans() {
    let pair = Pair::start().await;
    pair.both(
        "create table t (id int primary key, name text);
         insert into t select i, 'name ' || i from generate_series(1, 10000) i;
         create function seen(id int) returns int stable language plpgsql as 'begin return id; end';
         create index by_name on t (name); analyze t",
    )
    .await;
    // Another plan, and slow whatever machine this is.
    pair.secondary
        .batch_execute(
            "drop index by_name; create or replace function seen(id int) returns int stable language plpgsql
                 as 'begin perform pg_sleep(0.01); return id; end'",
        )
        .await
        .unwrap();
    let mut shadows = Shadows::start(&pair, &pair.log_path(), Reads::default()).await;
    let mut watch = SlowerWatch::default();
    for _ in 0..19 {
        shadows
            .check("select seen(id) from t where name = 'name 7'", "matched")
            .await;
        shadows.check("select name from t where id = 7", "matched").await;
    }
    let tell = async |watch: &mut SlowerWatch, shadows: &Shadows| {
        let report = shadows.sink.report(2.0);
        let told = watch
            .tell(&shadows.log, &shadows.tasks.planner, "shop", &report, 2.0)
            .await;
        told.unwrap()
    };
    assert_eq!(tell(&mut watch, &shadows).await, 0, "nineteen reads tell nothing");
    shadows
        .check("select seen(id) from t where name = 'name 8'", "matched")
        .await;
    assert_eq!(tell(&mut watch, &shadows).await, 1);
    for _ in 0..20 {
        shadows
            .check("select seen(id) from t where name = 'name 9'", "matched")
            .await;
    }
    assert_eq!(tell(&mut watch, &shadows).await, 0, "it was told already");

    let only_slower = Filter {
        kind: Some(Kind::Slower),
        ..Filter::default()
    };
    let contents = read_log(&shadows.log_path, &only_slower).unwrap();
    assert_eq!((contents.mismatches.len(), contents.slower.len()), (0, 1));
    let line = &contents.slower[0];
    assert_eq!(line.statement, "select seen(id) from t where name = ?");
    assert_eq!((line.reads, line.rule.reads), (20, 20));
    assert!(line.new.p50_ms >= 10.0 && line.ratio >= 2.0, "{line:?}");
    let plans = line.plans.as_ref().unwrap();
    assert!(
        !plans.same && plans.legacy.fingerprint != plans.new.fingerprint,
        "{plans:?}"
    );
    assert!(
        plans.legacy.nodes.iter().any(|node| node.contains("by_name")),
        "{plans:?}"
    );
    assert_eq!(plans.new.nodes, ["Seq Scan on t"]);
    assert!(!std::fs::read_to_string(&shadows.log_path).unwrap().contains("name 7"));
    let counts = shadows.sink.stats().counts;
    assert_eq!((counts.mismatched, counts.matched), (0, 59));
}
