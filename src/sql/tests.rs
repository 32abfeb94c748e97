//! One table a question: what class, which DDL, what facts, comparable or not.

use super::*;

/// A class in one word, with what decides about it.
fn describe(class: &Class) -> String {
    match class {
        Class::Ddl(ddl) => {
            let kind = match ddl.kind {
                DdlKind::Transactional => "transactional".to_owned(),
                DdlKind::Outside => "outside".to_owned(),
                DdlKind::Temporary => "temporary".to_owned(),
                DdlKind::NotMirrored(reason) => format!("not mirrored: {reason:?}"),
            };
            let rows = if ddl.computes_rows { ", rows" } else { "" };
            let name = ddl.name.as_ref().map_or(String::new(), |name| format!(" {name}"));
            format!("{}{name}: {kind}{rows}", ddl.tag)
        }
        Class::Read(_) => "read".to_owned(),
        other => format!("{other:?}"),
    }
}

#[track_caller]
fn check(sql: &str, expected: &str) {
    assert_eq!(
        describe(&classify(sql.as_bytes(), LexSettings::default())),
        expected,
        "{sql}"
    );
}

#[test]
fn reads() {
    for sql in [
        "select 1",
        "SELECT * FROM t WHERE a = $1",
        "(select 1)",
        "((select 1) union all (select 2)) order by 1",
        "values (1), (2)",
        "table t",
        "with x as (select 1) select * from x",
        "with recursive x as (select 1 union all select n + 1 from x) select * from x limit 3",
        "select a as into from t",
        "select t.into from t",
        "select * from only t",
        "select * from a, only b join only c on true",
        "select 'a;b', E'\\'', $$ ; $$, U&'\\0041' uescape '!', b'01', x'ff'",
        "select 1::numeric(10, 2), date '2020-01-01', interval '1 day', '{}'::jsonb -> 'a' ->> 'b'",
        "select extract(year from d), substring(a from 1 for 2), position('a' in b), trim(both 'x' from c) from t",
        "select a[1:2], array[1, 2], row(1, 2), (r).f from t",
        "select count(*) filter (where a > 0) over (partition by b order by c) from t",
        "select * from t fetch first 3 rows only",
        "select nextval('s')",
        "select * from generate_series(1, 3) with ordinality as g(a, b)",
        "select * from t tablesample system (1)",
        "select distinct on (a) a, b from t order by a, b",
        "select * from t where a ~* 'x' and b @> '{}' and c && '{1}'",
        "select * from a left join lateral (select * from b where b.x = a.x) s on true",
        "select \"a\"\"b\" from \"T\"",
        "select case when a then 1 else 2 end from t",
        "select current_timestamp, current_user, localtime(0)",
        "select a at time zone 'utc', a is not distinct from b, a between 1 and 2 from t",
    ] {
        check(sql, "read");
    }
}

#[test]
fn writes_and_what_is_not_understood() {
    for sql in [
        "insert into t values (1)",
        "with x as (select 1) insert into t select * from x",
        "with x as (insert into t values (1) returning *) select * from x",
        "with x as (delete from t returning *) select * from x",
        "select * from (with x as (update t set a = 1 returning *) select * from x) y",
        "update t set a = 1",
        "delete from t",
        "merge into t using s on true when matched then delete",
        "call p()",
        "do $$ begin create table x(); end $$",
        "explain analyze insert into t values (1)",
        "explain (analyze, buffers) delete from t",
        "explain (analyze off, analyze on) delete from t",
        "explain analyze verbose with x as (delete from t returning *) select * from x",
        "explain analyze execute p",
    ] {
        check(sql, "Write");
    }
    for sql in [
        "select",
        "selec 1",
        "select * from t where",
        "with x as (select 1",
        "select 'abc",
        "select 1)",
        "1",
        "'a'",
        "select * from t where a === = b (",
    ] {
        assert!(
            !matches!(classify(sql.as_bytes(), LexSettings::default()), Class::Write),
            "{sql}"
        );
        check(sql, "Unknown");
    }
}

#[test]
fn transaction_control() {
    use TransactionControl as T;
    let check = |sql, control| check(sql, &format!("{:?}", Class::Transaction(control)));
    check("begin", T::Begin { read_only: false });
    check(
        "BEGIN WORK ISOLATION LEVEL SERIALIZABLE, READ ONLY",
        T::Begin { read_only: true },
    );
    check("begin read only, read write", T::Begin { read_only: false });
    check("start transaction read only deferrable", T::Begin { read_only: true });
    check("commit", T::Commit { chain: false });
    check("COMMIT WORK AND CHAIN", T::Commit { chain: true });
    check("end transaction and no chain", T::Commit { chain: false });
    check("rollback", T::Rollback { chain: false });
    check("abort and chain", T::Rollback { chain: true });
    check("rollback to a", T::RollbackTo);
    check("rollback work to savepoint a", T::RollbackTo);
    check("savepoint a", T::Savepoint);
    check("release savepoint a", T::Release);
    check("release a", T::Release);
    check("prepare transaction 'x'", T::PrepareTransaction);
    check("commit prepared 'x'", T::CommitPrepared);
    check("rollback prepared 'x'", T::RollbackPrepared);
}

#[test]
fn session_statements() {
    check(
        "set work_mem = '1MB'",
        "Set(Set { what: Setting(\"work_mem\"), local: false })",
    );
    check("set local x.y to 1", "Set(Set { what: Setting(\"x.y\"), local: true })");
    check(
        "SET SESSION \"Work_Mem\" TO 1",
        "Set(Set { what: Setting(\"work_mem\"), local: false })",
    );
    check(
        "set time zone 'utc'",
        "Set(Set { what: Setting(\"timezone\"), local: false })",
    );
    check(
        "set names 'utf8'",
        "Set(Set { what: Setting(\"client_encoding\"), local: false })",
    );
    check(
        "set schema 'a'",
        "Set(Set { what: Setting(\"search_path\"), local: false })",
    );
    check("set role a", "Set(Set { what: Role, local: false })");
    check("set local role a", "Set(Set { what: Role, local: true })");
    for sql in [
        "set session authorization a",
        "set session session authorization a",
        "set session authorization default",
    ] {
        check(sql, "Set(Set { what: SessionAuthorization, local: false })");
    }
    check(
        "set local session authorization a",
        "Set(Set { what: SessionAuthorization, local: true })",
    );
    check(
        "set transaction read only",
        "Set(Set { what: Transaction { read_write: false }, local: true })",
    );
    check(
        "set session characteristics as transaction read only",
        "Set(Set { what: SessionCharacteristics, local: false })",
    );
    check(
        "set constraints all deferred",
        "Set(Set { what: Constraints, local: true })",
    );
    check("reset all", "Reset(All)");
    check("reset role", "Reset(Role)");
    check("reset session authorization", "Reset(SessionAuthorization)");
    check("reset a.b", "Reset(Setting(\"a.b\"))");
    check("reset time zone", "Reset(Setting(\"timezone\"))");
    check("discard all", "Discard(All)");
    check("discard temporary", "Discard(Temp)");
    check("deallocate prepare p", "Deallocate(Some(\"p\"))");
    check("deallocate all", "Deallocate(None)");
    check("close all", "Close(None)");
    check("close c", "Close(Some(\"c\"))");
    check("listen a", "Listen(\"a\")");
    check("unlisten *", "Unlisten(None)");
    check("unlisten a", "Unlisten(Some(\"a\"))");
    check("notify a, 'b'", "Notify");
    check("show all", "Show");
    check("vacuum (analyze) t", "Vacuum");
    check("analyze t", "Analyze");
    check("lock table t", "Lock");
    check("select * from t for update", "Lock");
    check("select * from (select * from t for share skip locked) x", "Lock");
    check("checkpoint", "Other");
    check("load 'x'", "Other");
    check("truncate t cascade", "Truncate");
    check("explain select 1", "Explain { analyze: false }");
    check("explain delete from t", "Explain { analyze: false }");
    check("explain (costs off) delete from t", "Explain { analyze: false }");
    check("explain (analyze false) delete from t", "Explain { analyze: false }");
    check("explain (select 1)", "Explain { analyze: false }");
    check("explain analyze select 1", "Explain { analyze: true }");
    check("explain (analyze) select 1", "Explain { analyze: true }");
    check("", "Empty");
    check("-- nothing", "Empty");
}

#[test]
fn prepared_statements() {
    let class = |text: &str| classify(text.as_bytes(), LexSettings::default());
    for (text, name, statement) in [
        ("prepare p as select 1", "p", "select 1"),
        ("PREPARE p (int, numeric(3, 1)) AS select $1", "p", "select $1"),
        ("prepare transaction as select 1", "transaction", "select 1"),
        ("prepare transaction (int) as select 1", "transaction", "select 1"),
    ] {
        let Class::Prepare(found) = class(text) else {
            panic!("{text}")
        };
        assert_eq!(
            (found.name.as_str(), &*found.statement),
            (name, statement.as_bytes()),
            "{text}"
        );
    }
    for (text, name, functions) in [
        ("execute p", "p", Some(0)),
        ("execute \"P\" (1, 'a')", "P", Some(0)),
        ("execute p (lower('A'), random())", "p", Some(2)),
        ("execute p (1,)", "p", None),
    ] {
        let Class::Execute(found) = class(text) else {
            panic!("{text}")
        };
        let used = found.arguments.map(|arguments| arguments.functions.len());
        assert_eq!((found.name.as_str(), used), (name, functions), "{text}");
    }
}

#[test]
fn cursors() {
    let class = |text: &str| classify(text.as_bytes(), LexSettings::default());
    for (text, hold, binary) in [
        ("declare c scroll cursor with hold for select 1", true, false),
        ("declare c cursor without hold for select 1", false, false),
        ("declare c binary insensitive cursor for select 1", false, true),
    ] {
        let Class::Declare(found) = class(text) else {
            panic!("{text}")
        };
        assert_eq!(
            (found.hold, found.binary, &*found.query),
            (hold, binary, &b"select 1"[..]),
            "{text}"
        );
    }
    for (text, onward) in [
        ("fetch c", Some(FetchRows::Count(1))),
        ("fetch from c", Some(FetchRows::Count(1))),
        ("fetch next from c", Some(FetchRows::Count(1))),
        ("fetch next in c", Some(FetchRows::Count(1))),
        ("fetch next c", Some(FetchRows::Count(1))),
        ("fetch 10 c", Some(FetchRows::Count(10))),
        ("fetch forward 3 from c", Some(FetchRows::Count(3))),
        ("fetch forward c", Some(FetchRows::Count(1))),
        ("fetch all in c", Some(FetchRows::All)),
        ("fetch forward all from c", Some(FetchRows::All)),
        ("fetch 0 from c", None),
        ("fetch -1 from c", None),
        ("fetch prior from c", None),
        ("fetch backward all from c", None),
        ("fetch absolute 3 from c", None),
        ("fetch last from c", None),
        ("move 3 from c", None),
        ("move c", None),
    ] {
        let Class::Fetch(found) = class(text) else {
            panic!("{text}")
        };
        assert_eq!((found.cursor.as_str(), found.onward), ("c", onward), "{text}");
    }
    assert!(matches!(class("fetch next"), Class::Fetch(fetch) if fetch.cursor == "next" && fetch.onward.is_some()));
}

#[test]
fn copy() {
    let check = |text: &str, expected: &str| {
        let found = match classify(text.as_bytes(), LexSettings::default()) {
            Class::CopyTo(copy) => {
                let tables = copy.read.as_ref().map(|read| read.relations.len());
                assert_eq!(tables.is_none(), copy.may_write, "{text}");
                format!("to {} {}", copy.stdout, copy.may_write)
            }
            other => format!("{other:?}"),
        };
        assert_eq!(found, expected, "{text}");
    };
    let to = |stdout, may_write| format!("to {stdout} {may_write}");
    check("copy t to stdout", &to(true, false));
    check("copy s.t (a, b) to stdout with (format csv)", &to(true, false));
    check("copy t to '/x'", &to(false, false));
    check("copy (select 1) to stdout", &to(true, false));
    check("copy (table t) to program 'x'", &to(false, false));
    check("copy (insert into t values (1) returning *) to stdout", &to(true, true));
    check("copy t from stdin", "CopyFrom(CopyFrom { stdin: true })");
    check("COPY BINARY t FROM '/x'", "CopyFrom(CopyFrom { stdin: false })");
    check("copy \"from\" from program 'x'", "CopyFrom(CopyFrom { stdin: false })");
}

#[test]
fn ddl_in_transactions() {
    for (sql, tag) in [
        (
            "create table t (a int generated always as (1) stored)",
            "CREATE TABLE t",
        ),
        (
            "/* x */ CREATE /* y */ UNLOGGED TABLE IF NOT EXISTS \"S\".t ()",
            "CREATE TABLE S.t",
        ),
        ("create table p partition of t for values in (1)", "CREATE TABLE p"),
        ("create or replace view v as select 1", "CREATE VIEW v"),
        ("create recursive view v (a) as select 1", "CREATE VIEW v"),
        ("create unique index on t (a)", "CREATE INDEX"),
        ("create index i on t (a)", "CREATE INDEX i"),
        (
            "create or replace function s.f() returns int as $$ select 1 $$ language sql",
            "CREATE FUNCTION s.f",
        ),
        (
            "create constraint trigger x after insert on t execute function f()",
            "CREATE TRIGGER x",
        ),
        (
            "create event trigger e on ddl_command_end execute function f()",
            "CREATE EVENT TRIGGER e",
        ),
        ("create rule r as on insert to t do nothing", "CREATE RULE r"),
        ("create extension if not exists pgcrypto", "CREATE EXTENSION pgcrypto"),
        ("create foreign table f (a int) server s", "CREATE FOREIGN TABLE f"),
        ("create foreign data wrapper w", "CREATE FOREIGN DATA WRAPPER w"),
        ("create user mapping for u server s", "CREATE USER MAPPING"),
        ("create user u password 'x'", "CREATE USER u"),
        ("create role r", "CREATE ROLE r"),
        (
            "create text search configuration c (parser = p)",
            "CREATE TEXT SEARCH CONFIGURATION c",
        ),
        (
            "create operator class o for type int using btree as storage int",
            "CREATE OPERATOR CLASS o",
        ),
        ("create operator === (function = f)", "CREATE OPERATOR"),
        ("create trusted procedural language l", "CREATE LANGUAGE l"),
        ("create schema s create table t (a int)", "CREATE SCHEMA s"),
        ("create publication p for all tables", "CREATE PUBLICATION p"),
        ("create domain d as int", "CREATE DOMAIN d"),
        ("create type e as enum ('a')", "CREATE TYPE e"),
        ("alter type e add value 'b'", "ALTER TYPE e"),
        (
            "alter table only s.t add column a int default random()",
            "ALTER TABLE s.t",
        ),
        ("alter table t detach partition p", "ALTER TABLE t"),
        ("alter table t detach partition p finalize", "ALTER TABLE t"),
        ("alter table t add a int, set tablespace x", "ALTER TABLE t"),
        ("alter table t set schema s", "ALTER TABLE t"),
        ("alter table t set tablespace x, add a int", "ALTER TABLE t"),
        (
            "alter default privileges grant select on tables to a",
            "ALTER DEFAULT PRIVILEGES",
        ),
        ("alter database d set work_mem = 1", "ALTER DATABASE d"),
        ("alter role r set search_path = x", "ALTER ROLE r"),
        ("drop table if exists a, b cascade", "DROP TABLE a"),
        ("drop index i", "DROP INDEX i"),
        ("drop owned by r", "DROP OWNED"),
        ("drop materialized view m", "DROP MATERIALIZED VIEW m"),
        ("reassign owned by a to b", "REASSIGN OWNED"),
        ("comment on table t is 'x'", "COMMENT"),
        ("grant select (a, b) on t to r", "GRANT"),
        ("grant a to b", "GRANT"),
        ("revoke all on all tables in schema s from r", "REVOKE"),
        ("security label for p on table t is 'x'", "SECURITY LABEL"),
        ("import foreign schema s from server x into y", "IMPORT FOREIGN SCHEMA"),
    ] {
        check(sql, &format!("{tag}: transactional"));
    }
    for (sql, tag) in [
        ("create table t as select 1", "CREATE TABLE AS t"),
        (
            "create table t (a, b) with (fillfactor = 10) as (values (1, 2)) with no data",
            "CREATE TABLE AS t",
        ),
        ("create table if not exists t as execute p", "CREATE TABLE AS t"),
        ("create materialized view m as select 1", "CREATE MATERIALIZED VIEW m"),
        (
            "refresh materialized view concurrently s.m",
            "REFRESH MATERIALIZED VIEW s.m",
        ),
        ("select * into t from a", "SELECT INTO t"),
        ("select 1 into unlogged table t", "SELECT INTO t"),
        ("with x as (select 1) select * into t from x", "SELECT INTO t"),
        ("(select 1 into t) union select 2", "SELECT INTO t"),
        ("explain analyze create table t as select 1", "CREATE TABLE AS t"),
    ] {
        check(sql, &format!("{tag}: transactional, rows"));
    }
}

#[test]
fn ddl_that_goes_another_way() {
    for (sql, tag) in [
        ("create index concurrently i on t (a)", "CREATE INDEX i"),
        (
            "create unique index concurrently if not exists i on t (a)",
            "CREATE INDEX i",
        ),
        ("drop index concurrently if exists s.i", "DROP INDEX s.i"),
        ("create database d", "CREATE DATABASE d"),
        ("drop database if exists d with (force)", "DROP DATABASE d"),
        ("alter table t detach partition p concurrently", "ALTER TABLE t"),
    ] {
        check(sql, &format!("{tag}: outside"));
    }
    check("create temp table t (a int)", "CREATE TABLE t: temporary");
    check(
        "create local temporary table t as select 1",
        "CREATE TABLE AS t: temporary, rows",
    );
    check("create table pg_temp.t (a int)", "CREATE TABLE pg_temp.t: temporary");
    check("create or replace temp view v as select 1", "CREATE VIEW v: temporary");
    check("create temp sequence s", "CREATE SEQUENCE s: temporary");
    check("select 1 into temp t", "SELECT INTO t: temporary, rows");
    check("drop table pg_temp.t", "DROP TABLE pg_temp.t: temporary");
    for (sql, expected) in [
        ("reindex table concurrently t", "REINDEX: not mirrored: Maintenance"),
        ("cluster", "CLUSTER: not mirrored: Maintenance"),
        (
            "alter system set work_mem = 1",
            "ALTER SYSTEM: not mirrored: ServerConfiguration",
        ),
        (
            "create tablespace x location '/x'",
            "CREATE TABLESPACE x: not mirrored: Tablespace",
        ),
        ("drop tablespace x", "DROP TABLESPACE x: not mirrored: Tablespace"),
        (
            "alter table t set tablespace x",
            "ALTER TABLE t: not mirrored: Tablespace",
        ),
        (
            "alter database d set tablespace x",
            "ALTER DATABASE d: not mirrored: Tablespace",
        ),
        (
            "alter index all in tablespace x set tablespace y",
            "ALTER INDEX: not mirrored: Tablespace",
        ),
        (
            "create subscription s connection '' publication p",
            "CREATE SUBSCRIPTION s: not mirrored: Subscription",
        ),
        (
            "alter subscription s disable",
            "ALTER SUBSCRIPTION: not mirrored: Subscription",
        ),
        (
            "grant select on large object 1 to a",
            "GRANT: not mirrored: LargeObject",
        ),
        ("comment on large object 1 is 'x'", "COMMENT: not mirrored: LargeObject"),
    ] {
        check(sql, expected);
    }
}

fn facts(sql: &str) -> ReadFacts {
    match classify(sql.as_bytes(), LexSettings::default()) {
        Class::Read(facts) => (*facts).clone(),
        other => panic!("{sql} is {other:?}"),
    }
}

#[test]
fn facts_of_reads() {
    let names = |sql: &str| {
        let facts = facts(sql);
        let relations: Vec<String> = facts
            .relations
            .iter()
            .map(|relation| format!("{}{}", relation.name, if relation.perhaps_cte { "?" } else { "" }))
            .collect();
        let functions: Vec<String> = facts
            .functions
            .iter()
            .map(|function| function.name.to_string())
            .collect();
        format!("{} | {}", relations.join(" "), functions.join(" "))
    };
    assert_eq!(names("select f(a) from S.t, \"S\".u"), "s.t S.u | f");
    assert_eq!(
        names("with x as (select * from x) select g(h(1)) from x join y using (a)"),
        "x? y | g h"
    );
    assert_eq!(names("select * from f(1) join lateral s.g(2) on true"), " | f s.g");
    assert_eq!(names("table T"), "t | ");
    assert_eq!(
        names("select 1 from db.s.t where a in (select k(1) from u) order by o(1) limit l(1)"),
        "s.t u | k o l"
    );
    assert_eq!(
        names("select sum(x) over (order by w(1)) from t window z as (order by v(1))"),
        "t | sum w v"
    );

    for (sql, ordered, limited) in [
        ("select 1", false, false),
        ("select a from t order by a", true, false),
        ("(select a from t order by a)", true, false),
        ("select a from (select a from t order by a limit 1) x", false, false),
        ("select a from t union select 1 order by 1 limit 3", true, true),
        ("select a from t offset 2", false, true),
        ("select a from t order by a fetch first 3 rows with ties", true, true),
    ] {
        let facts = facts(sql);
        assert_eq!((facts.ordered, facts.limited), (ordered, limited), "{sql}");
    }

    for (sql, expected) in [
        ("select a from t", None),
        (
            "select a, b from t order by b desc, 1",
            Some(vec![OrderKey::Name("b".into()), OrderKey::Position(1)]),
        ),
        ("(select a from t order by t.a)", Some(vec![OrderKey::Name("a".into())])),
        ("select a from t order by lower(a)", None),
    ] {
        assert_eq!(facts(sql).order_keys, expected, "{sql}");
    }

    for (sql, expected) in [
        ("select a from t limit 1", Some(Unstable::LimitWithoutOrder)),
        ("select a from t order by a limit 1", None),
        ("select array_agg(a) from t", Some(Unstable::OrderDependentFunction)),
        ("select array_agg(a order by a) from t", None),
        ("select string_agg(a, ',') from (select a from t order by a) x", None),
        (
            "select row_number() over () from t",
            Some(Unstable::OrderDependentFunction),
        ),
        ("select row_number() over (order by a) from t", None),
        (
            "select distinct on (a) * from t",
            Some(Unstable::DistinctOnWithoutOrder),
        ),
        ("select * from t tablesample system (1)", Some(Unstable::Sample)),
    ] {
        assert_eq!(facts(sql).unstable, expected, "{sql}");
    }
}

fn catalog() -> FunctionVolatility {
    let mut catalog = FunctionVolatility::default();
    for (schema, name, volatility) in [
        ("pg_catalog", "lower", "i"),
        ("pg_catalog", "count", "i"),
        ("pg_catalog", "random", "v"),
        ("pg_catalog", "nextval", "v"),
        ("pg_catalog", "age", "i"),
        ("pg_catalog", "version", "s"),
        ("pg_catalog", "pg_typeof", "s"),
        ("pg_catalog", "pg_backend_pid", "s"),
        ("app", "twice", "i"),
        ("other", "twice", "v"),
    ] {
        catalog.add_function(schema.into(), name.into(), volatility);
    }
    catalog.add_relation("public".into(), "t".into(), None);
    catalog.add_relation("public".into(), "v".into(), Some(" SELECT t.a FROM t;"));
    catalog.add_relation(
        "public".into(),
        "recent".into(),
        Some(" SELECT a FROM v WHERE b > now();"),
    );
    catalog.add_relation("public".into(), "over_recent".into(), Some("SELECT a FROM recent"));
    catalog.add_relation("public".into(), "locking".into(), Some("SELECT a FROM t FOR UPDATE"));
    catalog.add_relation("public".into(), "strange".into(), Some("select * from t where"));
    catalog
}

#[test]
fn which_reads_are_comparable() {
    let catalog = catalog();
    let check = |sql: &str, expected: Result<(), NotComparable>| {
        assert_eq!(shadowable(&facts(sql), &catalog), expected, "{sql}");
    };
    for sql in [
        "select 1",
        "select lower(a), count(*), coalesce(a, b), greatest(1, 2), extract(year from a) from t",
        "select a from public.v where age(a, b) > interval '1 day'",
        "with x as (select * from t) select * from x",
        "select pg_typeof(a) from t",
        "select app.twice(1)",
        "select a as current_date, t.user from t",
    ] {
        check(sql, Ok(()));
    }
    use NotComparable as N;
    for (sql, reason) in [
        ("select random()", N::VolatileFunction),
        ("select nextval('s')", N::VolatileFunction),
        (
            "select a from t where exists (select 1 from t where b = random())",
            N::VolatileFunction,
        ),
        ("select twice(1)", N::VolatileFunction),
        ("select unheard_of(1)", N::UnknownFunction),
        ("select * from unheard_of", N::UnknownRelation),
        ("select * from strange", N::UnknownRelation),
        ("select now()", N::Clock),
        ("select * from t where a > current_date - 1", N::Clock),
        ("select 'now'::timestamptz", N::Clock),
        ("select * from t where a > E'TODAY '", N::Clock),
        ("select age(a) from t", N::Clock),
        ("select * from over_recent", N::Clock),
        ("select current_user", N::Session),
        ("select user", N::Session),
        ("select current_setting('x')", N::Session),
        ("select version()", N::ServerSpecific),
        ("select pg_backend_pid()", N::ServerSpecific),
        ("select * from pg_class", N::ServerSpecific),
        ("select * from information_schema.tables", N::ServerSpecific),
        ("select ctid from t", N::ServerSpecific),
        ("select t.xmin from t", N::ServerSpecific),
        ("select * from pg_temp.t", N::TemporaryTable),
        ("select * from locking", N::Locking),
        ("select U&\"a\" from t", N::Encoding),
    ] {
        check(sql, Err(reason));
    }
}

#[test]
fn every_reason_has_a_name_of_its_own() {
    let names: std::collections::BTreeSet<_> = NotComparable::ALL.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(names.len(), NotComparable::ALL.len());
    for reason in NotComparable::ALL {
        assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
    }
}

#[test]
fn texts_with_several_statements() {
    let script = analyze(b"begin; create table t (a int); insert into t values (1);; commit -- done");
    let classes: Vec<_> = script
        .statements
        .iter()
        .map(|statement| statement.class.name())
        .collect();
    assert_eq!(classes, ["transaction", "ddl", "write", "transaction"]);
    assert!(script.has_ddl() && script.single().is_none() && !script.unterminated);
    assert!(analyze(b" ; ").statements.is_empty());
    assert!(analyze(b"select 'x").unterminated);
    let text = b"select 'caf\xe9', a from t;";
    let script = analyze(text);
    assert_eq!(script.statements[0].of(text), b"select 'caf\xe9', a from t");
    assert!(single_read(&script).is_ok_and(|facts| !facts.undecoded_names));
    let in_sjis = LexSettings {
        encoding: Encoding::Sjis,
        ..LexSettings::default()
    };
    assert_eq!(
        analyze_as(b"select E'\x95\\'; drop table t", in_sjis).statements.len(),
        2
    );
}

#[test]
fn hostile_texts_cost_little() {
    // On a stack as small as a worker thread's.
    std::thread::Builder::new()
        .stack_size(2 * 1024 * 1024)
        .spawn(|| {
            for sql in [
                format!("select {}1", "(".repeat(10_000)),
                format!("select {}1{}", "(".repeat(30), ")".repeat(30)),
                format!("select * from {}t{}", "(".repeat(30), ")".repeat(30)),
                format!("select * from {}select 1{}", "(".repeat(30), ")".repeat(30)),
                format!("select {}1{}", "f(".repeat(30), ")".repeat(30)),
                format!("select {}1{}", "case when ".repeat(30), " then 1 end".repeat(30)),
                format!("select {}1", "not ".repeat(5_000)),
                format!("select {}1", "- ".repeat(5_000)),
                format!("select 1{}", " + 1".repeat(1_490)),
                format!("select 1{}", " + 1".repeat(100_000)),
                format!("select 1{}", " union select 1".repeat(1_490)),
                format!("select 1{}", " or 1".repeat(1_490)),
                format!("select 1{}", "::int".repeat(740)),
                format!("select 1 from t where a in (1{})", ", 1".repeat(20_000)),
                format!("select '{}'", "x".repeat(4_000_000)),
                format!("select {}", "[".repeat(2_000)),
                format!("select {}1{}", "array[".repeat(100), "]".repeat(100)),
                format!("with {} select 1", "a as (with ".repeat(30)),
                "select 1".to_owned() + &" from (select 1".repeat(35),
                format!("select {}'1'", "interval ".repeat(100)),
                "explain ".repeat(1_000),
                format!("{}select 1", "explain analyze ".repeat(1_000)),
                format!("copy {}select 1{} to stdout", "(".repeat(35), ")".repeat(35)),
            ] {
                analyze(sql.as_bytes());
                fingerprint(sql.as_bytes());
            }
        })
        .unwrap()
        .join()
        .unwrap();
}

#[test]
fn explanations() {
    let catalog = catalog();
    let share = CanaryShare {
        percent: 5.0,
        rules: 1,
        off_because: None,
    };
    let explain_in = |phase, sql: &str| {
        let context = ExplainContext {
            phase,
            shadow_percent: 10.0,
            canary: share.clone(),
            rehearse_percent: 0.0,
            reach: None,
            catalog: Some(&catalog),
        };
        explain(sql.as_bytes(), &context)
    };
    let in_dual_read = |sql: &str| {
        let explanation = explain_in(crate::control::Phase::DualRead, sql);
        let one = &explanation.statements[0];
        format!(
            "{} {:?} shadowed={} {:?}: {}",
            one.class, one.tables, one.shadowed, one.mirrored, one.why
        )
    };
    for (sql, expected) in [
        (
            "select a from t order by a",
            "read [\"t\"] shadowed=true Nothing: 10% of such reads, rows compared in order",
        ),
        (
            "select now()",
            "read [] shadowed=false Nothing: it depends on the clock",
        ),
        (
            "insert into t values (1)",
            "write [] shadowed=false Rows: it may write: capture triggers record what it changes",
        ),
        (
            "drop table s.t",
            "ddl [\"s.t\"] shadowed=false Statement: it is a schema change: a barrier in the round, run under the client's own role",
        ),
        (
            "create temp table x ()",
            "ddl [\"x\"] shadowed=false Stays: temporary objects stay on the primary",
        ),
        (
            "vacuum",
            "vacuum [] shadowed=false Stays: it cares for one server's own files and changes neither rows nor schema",
        ),
    ] {
        assert_eq!(in_dual_read(sql), expected, "{sql}");
    }
    for (sql, answers, says) in [
        ("select a from t", true, "5% of such reads beside 1 rules"),
        ("select now()", true, "only within a transaction that only reads"),
        ("begin read only", true, "5% of such transactions"),
        ("begin", false, "unless it says READ ONLY"),
        (
            "set transaction isolation level serializable, read only",
            true,
            "within a transaction",
        ),
        ("set transaction read write", false, "may write"),
        ("set local transaction_read_only = off", false, "may write"),
        ("declare c cursor for select a from t", true, "within a transaction"),
        (
            "declare c cursor with hold for select a from t",
            false,
            "outlives the transaction",
        ),
        ("copy t to stdout", true, "of such reads"),
        ("select a from t for update", false, "lock"),
        ("select random()", false, "volatile"),
        ("insert into t values (1)", false, "only reads"),
        ("select a from t; select a from t", false, "several"),
    ] {
        let explanation = explain_in(crate::control::Phase::DualRead, sql);
        let canary = &explanation.statements[0].canary;
        assert!(
            canary.answers == answers && canary.why.contains(says),
            "{sql}: {canary:?}"
        );
    }
    let initial = explain_in(crate::control::Phase::Initial, "select a from t; drop table t");
    assert!(
        initial
            .statements
            .iter()
            .all(|one| !one.shadowed && one.mirrored == Mirrored::Nothing)
    );
    assert!(initial.to_string().contains("mirrored  nothing to mirror"));
}

/// A stack overflow would take the whole proxy down: sqlparser's own guard did not prevent it in
/// `x in (table(…))` nested 40 times.
#[test]
fn deeply_nested_shapes_of_every_kind() {
    const SHAPES: &[&str] = &[
        "(@)",
        "f(@)",
        "(select @)",
        "(select * from @)",
        "(select 1 from (@) a)",
        "(@ join t on true)",
        "array[@]",
        "a[@]",
        "cast(@ as int)",
        "exists (select @)",
        "not (@)",
        "a in (@)",
        "a in (select @)",
        "(a, @)",
        "case when @ then 1 end",
        "interval @",
        "a between (@) and 1",
        "extract(year from @)",
        "(with x as (select @) select 1)",
        "lateral (select @)",
        "sum(1) over (order by @)",
        "coalesce((select @), 1)",
        "(values (@))",
        "substring(@ from 1)",
        "(@)::int",
        "x -> (@)",
        "table(@)",
        "if(@, 1, 2)",
        "{@}",
    ];
    for (at, outer) in SHAPES.iter().enumerate() {
        for inner in [
            outer,
            &SHAPES[(at * 7 + 3) % SHAPES.len()],
            &SHAPES[(at * 11 + 5) % SHAPES.len()],
        ] {
            let mut nested = "1".to_owned();
            for _ in 0..19 {
                nested = outer.replace('@', &inner.replace('@', &nested));
            }
            for head in ["select ", "select * from ", "select 1 from t where "] {
                analyze(format!("{head}{nested}").as_bytes());
            }
        }
    }
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_analysed(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            analyze(&text);
            fingerprint(&text);
            custom_setting_names(&text);
        }

        #[test]
        fn sql_like_texts_are_analysed(words in proptest::collection::vec(
            prop::sample::select(vec![
                "select", "from", "with", "as", "(", ")", ",", "'a'", "t", "insert", "into", "create", "table",
                "view", "temp", "order by", "limit", "1", "$1", ";", "explain", "analyze", "copy", "to", "stdout",
                "set", "local", "=", "alter", "drop", "index", "concurrently", "union", "values", "for update",
                "begin", "atomic", "end", "case", "$$", "--", "\n", "/*", "*/", "e'", "\\", "on", "using",
            ]),
            0..40,
        )) {
            let text = words.join(" ");
            let script = analyze(text.as_bytes());
            for statement in &script.statements {
                prop_assert!(!statement.of(text.as_bytes()).is_empty());
            }
            let fingerprint = fingerprint(text.as_bytes());
            let shouted = super::fingerprint(text.to_uppercase().as_bytes());
            prop_assert_eq!(fingerprint.id, shouted.id, "case is of no consequence outside quoted names: {}", text);
        }
    }
}

#[test]
fn how_a_partition_is_detached() {
    for (text, expected) in [
        (
            "alter table s.p detach partition s.\"Q 1\" finalize;",
            Some(("Q 1", true, "finalize")),
        ),
        (
            "ALTER TABLE IF EXISTS ONLY p DETACH PARTITION q /* x */ CONCURRENTLY",
            Some(("q", false, "CONCURRENTLY")),
        ),
        ("alter table p detach partition q", None),
        ("alter table p attach partition q default", None),
        ("alter index p attach partition q", None),
    ] {
        let detach = detach(text.as_bytes());
        let found = detach
            .as_ref()
            .map(|detach| (&*detach.partition.name, detach.finalizes, &text[detach.word.clone()]));
        assert_eq!(found, expected, "{text}");
    }
}
