//! Every kind of difference under its own name; rules, ignores, COPY and EXECUTE.

use std::time::Duration;

use bytes::Bytes;
use pgtandem::config::{ColumnRule, How, Ignore, Reads, Which};
use pgtandem::shadow::Call;
use time::macros::date;

use super::{Pair, Shadows};

const SCHEMA: &str = "
    create table m (id int primary key, f float8, n numeric, at timestamptz, doc json, name text);
    insert into m select i, i / 10.0, i / 4.0, '2026-01-01 00:00:00.123456Z'::timestamptz + i * interval '1 s',
        json_build_object('a', i, 'b', 'x'), 'name ' || i from generate_series(1, 50) i;
    create view one_column as select id as a from m;
    create view few as select id from m;
    create function loud() returns int stable language plpgsql as 'begin raise notice ''one''; return 1; end'";

#[tokio::test]
async fn each_difference_has_its_kind() {
    let pair = Pair::start().await;
    pair.both(SCHEMA).await;
    let notices = Reads {
        compare_notices: true,
        ..Reads::default()
    };
    let mut shadows = Shadows::start(&pair, &pair.log_path(), notices).await;
    shadows.check("select loud()", "matched").await;
    let on_new = async |sql: &str| pair.secondary.batch_execute(sql).await.unwrap();

    on_new("alter view one_column rename a to b").await;
    shadows
        .check("select * from one_column", "mismatched: column_name")
        .await;
    on_new("drop view few; create view few as select id, name from m; grant select on few to app").await;
    shadows.check("select * from few", "mismatched: columns").await;
    on_new("create or replace function loud() returns int stable language plpgsql as 'begin raise notice ''two''; return 1; end'").await;
    shadows.check("select loud()", "mismatched: notices").await;

    on_new("update m set f = 0.30000000000000004 where id = 3").await;
    shadows.check("select id, f from m", "mismatched: precision").await;
    on_new("update m set n = 0.750 where id = 3").await;
    shadows.check("select id, n from m", "mismatched: precision").await;
    on_new("update m set at = date_trunc('milliseconds', at) where id = 3").await;
    shadows
        .check("select id, at from m order by id", "mismatched: precision")
        .await;
    on_new("update m set f = 0.31 where id = 3").await;
    shadows.check("select id, f from m", "mismatched: value").await;
    // By their key these are two rows, not one with another value.
    on_new("update m set id = 1003 where id = 3").await;
    shadows.check("select id, name from m", "mismatched: rows").await;
    on_new("delete from m where id = 1003").await;
    shadows.check("select id, name from m", "mismatched: missing_row").await;

    // Sorted by another collation, which Debian's server has and the other one need not.
    pair.primary
        .batch_execute(
            "create table sorted (name text collate \"und-x-icu\"); insert into sorted values ('B'), ('a'), ('C')",
        )
        .await
        .unwrap();
    on_new("create table sorted (name text collate \"C\"); insert into sorted values ('B'), ('a'), ('C')").await;
    shadows.catalog_read().await;
    shadows
        .check("select name from sorted order by name", "mismatched: collation")
        .await;
    shadows.check("select name from sorted", "matched").await;
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
