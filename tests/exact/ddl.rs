//! Whatever changes a schema.

use crate::bench::Step::{CaughtUp, Dba, Fails, Is, Pipeline, Prepare, Q, Run, Session, X, XFails};
use crate::bench::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case(
        "create table, simple and extended",
        &[
            Q("create table a (id int primary key, v text not null default 'x' check (v <> ''))"),
            X("create table b (id serial primary key, a int references a on delete cascade, unique (a, id))"),
            Q("insert into a values (1), (2); insert into b (a) values (1), (2)"),
        ],
    ),
    case(
        "if exists and if not exists",
        &[
            Q("create table if not exists a (id int primary key)"),
            Q("create table if not exists a (other text)"),
            Q("insert into a values (1)"),
            X("create index if not exists i on a (id)"),
            X("create index if not exists i on a (id)"),
            Q("alter table if exists nothing add column x int"),
            Q("alter table a add column if not exists w int default 5"),
            Q("alter table a add column if not exists w text"),
            Q("alter table a drop column if exists nothing"),
            Q("drop table if exists nothing; drop index if exists nothing"),
            Q("create schema if not exists public; create sequence if not exists s; create sequence if not exists s"),
            Q(
                "create materialized view if not exists m as select 1 as one; create materialized view if not exists m as select 2 as two",
            ),
            Q("create table if not exists a as select 7 as x"),
            Q("create table if not exists fresh as select g, random() as r from generate_series(1, 5) g"),
            Q("update a set w = 6"),
        ],
    ),
    // The primary's partition stays half detached; the other side has never heard of it.
    case(
        "a concurrent detach that was cut short, and completed",
        &[
            Q(
                "create table a (id int not null) partition by list (id); create table a_1 (id int not null check (id = 1)); alter table a attach partition a_1 for values in (1)",
            ),
            Q("insert into a values (1)"),
            Session(1),
            Q("begin; select * from a"),
            Session(0),
            Q("set statement_timeout = '300ms'"),
            Fails("57014", "alter table a detach partition a_1 concurrently"),
            Q("reset statement_timeout"),
            Session(1),
            Q("commit"),
            Session(0),
            Q("insert into a_1 values (1)"),
            Q("alter table a detach partition a_1 finalize"),
            Q("insert into a_1 values (1)"),
        ],
    ),
    case(
        "rolled back, in part and in whole",
        &[
            Q("create table a (id int primary key); insert into a values (1)"),
            Q("begin; alter table a add column x int; create table gone (id int); drop table a; rollback"),
            Q("begin"),
            Q("savepoint s"),
            X("alter table a add column y int default 1"),
            Q("rollback to s"),
            X("alter table a add column z int default 2"),
            Q("insert into a values (2, 3)"),
            Q("commit"),
            Q("begin"),
            Q("create table half (id int)"),
            Fails("42P07", "create table half (id int)"),
            Q("rollback"),
            Fails("22012", "create table third (id int); select 1 / 0"),
            XFails("42P07", "create table a (id int)"),
            Q("create table half (id int); insert into half values (1)"),
        ],
    ),
    case(
        "begin, DDL, DML, commit in one query",
        &[
            Q(
                "begin; create table a (id int primary key, v int); insert into a select g, g from generate_series(1, 10) g; alter table a add column w int default 7; update a set v = w where id < 5; create index on a (w); delete from a where id = 9; commit; insert into a values (100, 1, 2)",
            ),
            Q(
                "create table b (id int); insert into b values (1); alter table b add column v text; insert into b values (2, 'two'); drop table a",
            ),
            Q("begin; truncate b; alter table b alter v set default 'd'; insert into b (id) values (3); commit"),
        ],
    ),
    case(
        "pipelines",
        &[Pipeline(&[
            "create table a (id int primary key)",
            "insert into a values (1)",
            "alter table a add column v int default 3",
            "insert into a values (2, 4)",
            "create index on a (v)",
            "begin; drop table a; rollback",
            "update a set v = v + 1",
        ])],
    ),
    case(
        "concurrent index builds, one of them failing",
        &[
            Q("create table a (id int primary key, v int); insert into a select g, g % 3 from generate_series(1, 9) g"),
            Q("create index concurrently a_v on a (v)"),
            X("create index concurrently if not exists a_v on a (v)"),
            Fails("23505", "create unique index concurrently a_u on a (v)"),
            Q("insert into a values (10, 10)"),
            CaughtUp,
            // An unfinished index is an index to whoever drops it.
            Q("drop index a_u"),
            X("create unique index concurrently a_u on a (id, v)"),
            Q("reindex index concurrently a_u; "),
            Q("reindex table a"),
            Q("drop index concurrently a_v"),
            Fails("23505", "create unique index concurrently a_done on a (v)"),
            Fails(
                "23505",
                "create unique index concurrently \"A late\" on a ((v + 0)) where v < 100",
            ),
            Fails("23505", "create unique index concurrently a_third on a (v)"),
            Q("insert into a values (11, 110); update a set v = id * 10"),
            Q("reindex index concurrently a_done"),
            X("/* by its name */ reindex index \"A late\""),
            Q("begin; insert into a values (12, 120)"),
            Q("reindex table a"),
            Q("insert into a values (13, 130)"),
            Q("commit"),
            Fails("23505", "insert into a values (99, 130)"),
            Q("drop index a_done, \"A late\", a_third; update a set v = id % 3"),
            Fails("23505", "create unique index concurrently a_w on a (v)"),
            Q("drop index concurrently a_w"),
            Fails("23505", "create unique index concurrently a_x on a (v)"),
            Q("update a set v = id"),
            Q("drop index concurrently if exists a_x"),
            Fails("25001", "begin; create index concurrently a_y on a (v)"),
            Q("rollback"),
        ],
    ),
    case(
        "enum values",
        &[
            Q("create type mood as enum ('sad', 'ok'); create table a (id int primary key, m mood, ms mood[])"),
            Q("insert into a values (1, 'sad', '{sad,ok}')"),
            Q("alter type mood add value 'happy'"),
            Q("insert into a values (2, 'happy', '{happy}')"),
            X("alter type mood add value if not exists 'meh' before 'ok'"),
            X("alter type mood add value if not exists 'meh'"),
            Q("insert into a values (3, 'meh', '{meh}')"),
            Q("alter type mood rename value 'ok' to 'fine'"),
            Q("update a set m = 'fine' where id = 1; delete from a where id = 2"),
            Q("begin; alter type mood add value 'late'; commit"),
            Q(
                "begin; create type fresh as enum ('a'); alter type fresh add value 'b'; create table f (x fresh); insert into f values ('a'); commit",
            ),
            Q("alter type mood rename to feeling; insert into a values (9, 'late')"),
        ],
    ),
    case(
        "tables from queries",
        &[
            Q(
                "create table src (id int primary key, v text); insert into src select g, 'v' || g from generate_series(1, 50) g",
            ),
            Q("create table a as select *, random() as r, clock_timestamp() as t, now() as n from src"),
            X("create table b as select id from src with no data"),
            Q("select id, gen_random_uuid() as u into c from src where id < 10"),
            X("select id into d from src"),
            Q("create table e (x, y) as values (1, random()), (2, random())"),
            Q("prepare q as select id, random() as r from src; create table f as execute q"),
            Q("create unlogged table g as select random() as r"),
            Q("create table h as table src; create table i (like src including all); insert into i select * from src"),
            Q("create table j as with x as (select random() as r) select * from x"),
            Q("insert into a select * from a; delete from c; insert into g select r from g"),
            X("explain (analyze) create table k as select random() as r"),
        ],
    ),
    case(
        "materialized views",
        &[
            Q("create table a (id int primary key, v int); insert into a select g, g from generate_series(1, 20) g"),
            Q("create materialized view m as select id, v from a; create unique index on m (id)"),
            Q("create materialized view late as select count(*) from a with no data"),
            Q("update a set v = v * 2; refresh materialized view m"),
            X("refresh materialized view concurrently m"),
            Q(
                "begin; delete from a where id > 10; refresh materialized view m; refresh materialized view late; commit",
            ),
            Q("alter materialized view late rename to later; refresh materialized view later with no data"),
        ],
    ),
    case(
        "a materialized view of what the moment gives",
        &[
            Q(
                "create materialized view m as select g as id, random() as r, clock_timestamp() as t from generate_series(1, 5) g",
            ),
            Q("refresh materialized view m"),
        ],
    ),
    case(
        "columns with volatile and stable defaults",
        &[
            Q("create table a (id int primary key); insert into a select generate_series(1, 30)"),
            Q("alter table a add column r float8 default random()"),
            Q("alter table a add column u uuid default gen_random_uuid()"),
            Q("alter table a add column n timestamptz default now()"),
            X("alter table a add column c timestamptz default clock_timestamp()"),
            Q("alter table a add column s serial"),
            Q("alter table a add column i int generated always as identity"),
            Q("alter table a add column g int generated always as (id * 2) stored"),
            Q("insert into a (id) values (31); update a set r = 0 where id < 3"),
            Q(
                "begin; alter table a add column x float8 default random(); update a set x = x + 1 where id = 4; alter table a add column y int default 7; commit",
            ),
        ],
    ),
    case(
        "column types, with and without a rewrite",
        &[
            Q(
                "create table a (id int primary key, v int, t text, at timestamp, n numeric(10, 2)); insert into a select g, g, g::text, '2020-01-01'::timestamp + g * interval '1 day', g / 3.0 from generate_series(1, 20) g",
            ),
            Q("alter table a alter v type bigint"),
            Q("alter table a alter v type text using 'v' || v"),
            Q("alter table a alter t type varchar(50)"),
            Q("set timezone = 'Asia/Tokyo'; alter table a alter at type timestamptz; reset timezone"),
            X("alter table a alter n type numeric(12, 3) using n * 1.5 + random()::numeric"),
            Q("alter table a alter n type int, alter v type varchar(10), add column w int default 1"),
            Q("insert into a values (21, 'x', 'y', now(), 5); update a set v = 'z' where id < 4"),
        ],
    ),
    case(
        "renames and schema moves",
        &[
            Q("create table a (id serial primary key, v int); insert into a (v) select generate_series(1, 5)"),
            Q("alter table a rename to b; insert into b (v) values (6)"),
            Q("alter table b rename column v to \"V w\"; insert into b (\"V w\") values (7)"),
            Q("alter table b rename constraint a_pkey to b_pk; alter index b_pk rename to b_pk2"),
            Q("alter sequence a_id_seq rename to b_seq; insert into b (\"V w\") values (8)"),
            Q("create schema moved_to; alter table b set schema moved_to; insert into moved_to.b (\"V w\") values (9)"),
            Q("alter schema moved_to rename to moved_on; update moved_on.b set \"V w\" = 0 where id = 1"),
            Q(
                "begin; alter table moved_on.b rename to c; create table moved_on.b (id int primary key, x text); insert into moved_on.b values (1, 'other'); insert into moved_on.c (\"V w\") values (10); commit",
            ),
            Q("drop schema moved_on cascade"),
        ],
    ),
    case(
        "two tables swap their names",
        &[
            Q(
                "create table a (id int primary key); create table b (id int primary key); insert into a values (1); insert into b values (2)",
            ),
            Q(
                "begin; alter table a rename to tmp; alter table b rename to a; alter table tmp rename to b; insert into a values (3); insert into b values (4); commit",
            ),
            Q(
                "begin; alter table a rename id to x; alter table a add id int; alter table a drop x; insert into a values (5); commit",
            ),
        ],
    ),
    case(
        "partitions",
        &[
            Q("create table p (id int, k int, primary key (id, k)) partition by range (k)"),
            Q(
                "create table p1 partition of p for values from (0) to (10); create table p2 (id int not null, k int not null); insert into p2 values (1, 15)",
            ),
            Q("alter table p attach partition p2 for values from (10) to (20)"),
            Q("insert into p select g, g from generate_series(0, 19) g; update p set k = k + 5 where k < 10"),
            Q("alter table p detach partition p1; insert into p1 values (1000, 1)"),
            Q("alter table p attach partition p1 for values from (0) to (10)"),
            Q("alter table p detach partition p2 concurrently"),
            Q("insert into p2 values (77, 17)"),
            Q("create table p3 partition of p default; insert into p values (9, 99)"),
            X("create table p4 partition of p for values from (200) to (300) partition by list (id)"),
            Q(
                "create table p4a partition of p4 for values in (1, 2); insert into p values (1, 250); create index on p (k)",
            ),
            Q("alter table p add column w int default 4; update p set w = 5 where k = 250"),
            Q("drop table p1; truncate p3"),
        ],
    ),
    case(
        "indexes of partitions, attached one by one",
        &[
            Q(
                "create table \"P p\" (id int, k int) partition by list (k); create table p1 partition of \"P p\" for values in (1); create table p2 partition of \"P p\" for values in (2)",
            ),
            Q("create index \"I i\" on only \"P p\" (id); create index i1 on p1 (id)"),
            Q("alter index \"I i\" attach partition i1; create index i2 on p2 (id)"),
            X("alter index \"I i\" attach partition i2"),
            Q("alter index \"I i\" rename to attach; alter index attach rename to i"),
            Q("insert into \"P p\" values (1, 1), (2, 2)"),
        ],
    ),
    case(
        "concurrent detach by the extended protocol, quoted",
        &[
            Q(
                "create table \"P p\" (id int) partition by list (id); create table \"P 1\" partition of \"P p\" for values in (1); insert into \"P p\" values (1)",
            ),
            X("alter table \"P p\" detach partition \"P 1\" concurrently"),
            Q("insert into \"P 1\" values (1)"),
        ],
    ),
    case(
        "drop cascade",
        &[
            Q(
                "create table a (id int primary key, v int); create table b (id int primary key, a int references a); create view va as select * from a; create view vb as select * from va; insert into a values (1, 1); insert into b values (1, 1)",
            ),
            Q(
                "create function fa(x a) returns int language sql as 'select 1'; create sequence s owned by a.v; create type t as (x int); create table ct (c t)",
            ),
            Q("alter table a drop column v cascade"),
            Q("drop table a cascade; insert into b values (2, 2)"),
            Q("drop type t cascade; drop table b, ct"),
        ],
    ),
    case(
        "owned sequences and identity",
        &[
            Q(
                "create table a (id int generated by default as identity (start 10 increment 5), v serial, w int); insert into a (w) select generate_series(1, 5)",
            ),
            Q(
                "create sequence s increment 3 minvalue -5 maxvalue 50 start 7 cycle; alter sequence s owned by a.w; alter table a alter w set default nextval('s')",
            ),
            Q(
                "insert into a default values; alter table a alter id set increment 2 restart 500; insert into a default values",
            ),
            Q(
                "alter table a alter id drop identity; alter table a alter id add generated always as identity (start 1000)",
            ),
            Q("insert into a default values; insert into a (id) overriding system value values (1)"),
            Q("alter sequence s owned by none; drop table a; select nextval('s')"),
            Q(
                "create sequence free as smallint; select nextval('free'), nextval('free'); alter sequence free rename to freed; drop sequence s",
            ),
        ],
    ),
    case(
        "grants and default privileges",
        &[
            Q(
                "create table a (id int, secret text); create view v as select id from a; create sequence s; create function f() returns int language sql as 'select 1'; create procedure pr() language sql as 'select 1'",
            ),
            Q(
                "grant select (id), update (id) on a to reader; grant select on v to reader with grant option; grant usage on sequence s to writer",
            ),
            X("grant insert, delete on a to writer"),
            Q(
                "revoke execute on function f() from public; grant execute on function f to reader; grant all on procedure pr() to writer",
            ),
            Q("alter default privileges grant select on tables to reader; create table b (id int)"),
            Q("revoke delete on a from writer; alter default privileges revoke select on tables from reader"),
            Q(
                "create schema granted authorization app; grant usage, create on schema granted to writer; drop schema granted",
            ),
            Q("grant all on a to bare; revoke all on a from bare cascade; insert into a values (1, 'x')"),
            Q("do $$ begin perform 1; end $$"),
        ],
    ),
    case(
        "comments",
        &[
            Q(
                "create table a (id int primary key, v int); comment on table a is 'it''s; a \\ \"table\" $$x$$'; comment on column a.v is E'two\\nlines'",
            ),
            Q(
                "create index i on a (v); comment on index i is 'index'; comment on constraint a_pkey on a is 'key'; create view w as select 1 as x; comment on view w is 'view'; comment on view w is null",
            ),
            X("comment on schema public is 'changed'"),
            Q(
                "create function f(int) returns int language sql as 'select $1'; comment on function f(int) is 'function'; create type e as enum (); comment on type e is 'type'",
            ),
            Q("comment on schema public is null"),
        ],
    ),
    case(
        "functions and triggers of the application",
        &[
            Q(
                "create table a (id serial primary key, v int); create table log (id serial primary key, what text, at timestamptz default clock_timestamp())",
            ),
            Q(
                "create function bump() returns trigger language plpgsql as $$ begin new.v := coalesce(new.v, 0) + 1; return new; end $$; create trigger bump before insert on a for each row execute function bump()",
            ),
            X(
                "create function note() returns trigger language plpgsql as $body$ begin insert into log (what) values (tg_op); return null; end $body$",
            ),
            Q("create trigger note after insert or update or delete on a for each statement execute function note()"),
            Q("insert into a (v) values (1), (2); update a set v = 5; delete from a where id = 1"),
            Q(
                "create or replace function bump() returns trigger language plpgsql as $$ begin new.v := -1; return new; end $$; insert into a (v) values (9)",
            ),
            Q(
                "alter table a disable trigger bump; insert into a (v) values (10); alter table a enable always trigger note; update a set v = 1; alter table a enable trigger bump",
            ),
            Q(
                "alter function note() rename to noted; alter function noted() set work_mem = '1MB'; drop trigger note on a; drop function noted()",
            ),
            Q(
                "create function poly(anyelement, x int default 3, variadic y text[] default '{}') returns table (a int, b text) language sql immutable parallel safe as 'select 1, ''x'''; create procedure p(inout x int) language plpgsql as $$ begin x := x + 1; end $$",
            ),
            Q(
                "create function std(x int) returns int language sql begin atomic select x + 1; end; create aggregate total(int) (sfunc = int4pl, stype = int, initcond = '0')",
            ),
            Q("create operator === (leftarg = int, rightarg = int, function = int4eq)"),
        ],
    ),
    case(
        "views, rules, policies, statistics, domains, collations, text search",
        &[
            Q(
                "create table a (id int primary key, v int, owner name default current_user); insert into a select g, g from generate_series(1, 10) g",
            ),
            Q(
                "create view v with (security_barrier) as select id, v from a where v > 3 with check option; alter view v alter column v set default 9; insert into v (id) values (50)",
            ),
            Q(
                "create or replace view v as select id, v, owner from a; create recursive view r (n) as values (1) union all select n + 1 from r where n < 3",
            ),
            Q(
                "create rule ra as on delete to a where old.id = 1 do instead nothing; delete from a where id < 3; alter rule ra on a rename to rb; create rule also as on insert to v do instead insert into a values (new.id, new.v)",
            ),
            Q(
                "alter table a enable row level security; create policy own on a using (owner = current_user) with check (v > 0); alter policy own on a to app, reader; alter table a force row level security; alter table a no force row level security",
            ),
            Q("create statistics st (dependencies) on id, v from a; alter statistics st rename to st2"),
            Q(
                "create domain positive as int default 1 constraint pos check (value > 0) not null; create table d (p positive); insert into d values (5); alter domain positive drop constraint pos; alter domain positive add constraint big check (value > 2) not valid; alter domain positive drop not null; insert into d values (null)",
            ),
            Q(
                "create collation c1 (locale = 'C'); create table co (t text collate c1); insert into co values ('x'); create text search configuration ts (copy = simple); create type rng as range (subtype = float8); create table rt (r rng); insert into rt values ('[1.5,2)')",
            ),
            Q("create publication pub for table a; drop publication pub"),
        ],
    ),
    case(
        "constraints come, are validated and go",
        &[
            Q("create table a (id int, v int); insert into a values (1, 1), (2, 2)"),
            Q(
                "alter table a add primary key (id); alter table a add constraint pos check (v > 0) not valid; alter table a validate constraint pos",
            ),
            Q("create table b (id int references a deferrable initially deferred); insert into b values (1)"),
            Fails(
                "42830",
                "alter table b add constraint again foreign key (id) references a (v)",
            ),
            Q("create unique index au on a (v)"),
            Q("alter table a add constraint av unique using index au"),
            Q("alter table a add exclude using gist (int4range(v, v + 1) with &&)"),
            Q(
                "alter table a alter v set not null; alter table a alter v drop not null; alter table a drop constraint pos, alter v set default 8, alter v set statistics 50, alter v set storage plain",
            ),
            Q(
                "alter table a replica identity full; alter table a set (fillfactor = 70); alter table a cluster on a_pkey; cluster a; alter table a set without cluster; alter table a reset (fillfactor)",
            ),
            Q("alter table b alter constraint b_id_fkey not deferrable; alter table a drop constraint a_pkey cascade"),
            Q("alter table a set unlogged; insert into a values (9, 9); alter table a set logged"),
        ],
    ),
    case(
        "statements prepared before and run after DDL",
        &[
            Q("create table a (id int primary key, v int); insert into a values (1, 1)"),
            Prepare("insert", "insert into a (id, v) select max(id) + 1, 5 from a"),
            Prepare("update", "update a set v = v + 1"),
            Prepare("create", "create table late (id int)"),
            Prepare("drop", "drop table late"),
            Prepare("alter", "alter table a add column w int default 3"),
            Run("insert"),
            Run("alter"),
            Run("insert"),
            Run("update"),
            Run("create"),
            Q("insert into late values (1)"),
            Run("drop"),
            Run("create"),
            Run("update"),
            Q("prepare p as insert into a (id) values (1000); execute p"),
            Q("begin"),
            Run("drop"),
            Q("rollback"),
        ],
    ),
    case(
        "search_path and role before it",
        &[
            Q("create schema elsewhere; grant all on schema elsewhere to writer, reader"),
            Q("set search_path = elsewhere; create table a (id int)"),
            X("create table b (id int)"),
            Q("insert into a values (1)"),
            Q(
                "begin; set local search_path = public; create table in_public (id int); insert into in_public values (3); commit; create table c (id int)",
            ),
            Q("set role writer; create table w (id int); insert into w values (1)"),
            X("create table w2 (id int)"),
            Q("alter table w add v int default 2; reset role"),
            Q("begin; set local role reader; create table r (id int); commit; create table mine (id int)"),
            Q("drop table public.in_public; drop schema elsewhere cascade"),
        ],
    ),
    case(
        "settings that DDL depends on",
        &[
            Q(
                "set datestyle = 'german'; create table a (d date default '01.02.2020', t timestamp default '03.04.2021 10:00'); insert into a default values; reset datestyle",
            ),
            Q(
                "set intervalstyle = 'iso_8601'; set timezone = 'America/New_York'; create table b (z timestamptz default '2020-01-01 00:00', i interval default 'P1DT2H'); insert into b default values; reset timezone",
            ),
            Q(
                "set standard_conforming_strings = off; create table c (t text default 'a\\nb'); insert into c default values; reset standard_conforming_strings",
            ),
            Q(
                "set check_function_bodies = off; create function f() returns int language sql as 'select * from no_such_table'; reset check_function_bodies",
            ),
            Q("set default_with_oids = off; create table d (x int)"),
            Q(
                "set default_table_access_method = heap; set default_toast_compression = pglz; create table e (t text); set transform_null_equals = on; create view n as select 1 where 1 = null; reset transform_null_equals",
            ),
            Q(
                "set quote_all_identifiers = on; create view q as select id from (select 1 as id) x; reset quote_all_identifiers; set bytea_output = escape; create table y (b bytea default '\\x01ff'); insert into y default values; set extra_float_digits = 0; create view fl as select 0.1::float8 + 0.2 as f; reset all",
            ),
        ],
    ),
    case(
        "with another encoding",
        &[
            Q("set client_encoding = 'LATIN1'"),
            X("set client_encoding = 'UTF8'"),
            Q(
                "create table \"größe\" (\"naïve\" text default 'é'); insert into \"größe\" default values; comment on table \"größe\" is 'œ 漢字'",
            ),
        ],
    ),
    case(
        "every kind of object dropped and made again in one round",
        &[
            Q("create table a (id int primary key); insert into a values (1)"),
            Q(
                "begin; drop table a; create table a (id int primary key, v text); insert into a values (1, 'x'); commit",
            ),
            Q("drop table a; create table a (id bigint); insert into a values (5)"),
            Q(
                "create type t as (x int, y text); create table c (t t); insert into c values ((1, 'x')); alter type t add attribute z int cascade; insert into c values ((2, 'y', 3)); alter type t rename attribute z to zz; alter type t drop attribute y; insert into c values ((4, 5))",
            ),
            Q("create table of_t of t; insert into of_t values (1, 2)"),
        ],
    ),
    case(
        "inheritance changed afterwards",
        &[
            Q(
                "create table parent (id int, a text); create table child (id int, a text, b text); insert into child values (1, 'x', 'y')",
            ),
            Q("alter table child inherit parent; insert into parent values (2, 'p'); update parent set a = a || '!'"),
            Q(
                "alter table parent add column c int default 3; alter table child no inherit parent; update child set c = 9",
            ),
            Q(
                "create table third (d int default 4) inherits (parent, child); insert into third (id) values (7); update third set a = 'z'",
            ),
        ],
    ),
    case(
        "temporary objects stay on the primary",
        &[
            Q(
                "create temp table t (id int); insert into t values (1); create temp sequence s; create temporary view v as select * from t; alter table t add column x int; create index on t (x); drop table t cascade",
            ),
            Q(
                "create temp table m (id int); create table m2 (id int); insert into m2 values (1); drop table m, m2; create temp table m (id int); comment on column m.id is 'x'; create policy po on m using (true); create view over as select * from m; drop view over",
            ),
            Q(
                "create table liked as table m with no data; insert into liked values (3); create table lm2 (like liked, x text check (x like 'm'))",
            ),
            X("create table if not exists m (id int)"),
            Q(
                "begin; create temp table n (x int); drop table n; create table n (x int, y int); insert into n values (1, 2); commit",
            ),
            Q(
                "create temp table if not exists u as select 1 as x; alter table pg_temp.u add y int; comment on table u is 'x'; grant select on u to reader; truncate u; select * into temp w from u",
            ),
            Q(
                "create table a (id int); insert into a values (1); create temp table a (id int, only_here int); insert into a values (2, 3); alter table a add column z int; insert into pg_temp.a values (4); drop table a; insert into a values (5)",
            ),
            Q(
                "create function pg_temp.f() returns int language sql as 'select 1'; select pg_temp.f(); drop function pg_temp.f()",
            ),
        ],
    ),
    case(
        "one statement for temporary and other relations at once",
        &[
            Q(
                "create temp table m (id int, only_here int); create temp sequence s; create table a (id int, v int); create table b (id int); create sequence t; create view v as select * from a",
            ),
            Q("grant select on m, a to reader"),
            X("grant insert, update (id) on a, pg_temp.m, b to writer with grant option"),
            Q("grant usage on sequence s, t to reader; grant select on v, m to reader, bare"),
            Q(
                "begin; alter table a add column w int default 3; insert into a values (1); grant all on m, a to bare; commit",
            ),
            Q("begin; grant all on m, b to bare; rollback"),
            Q("revoke select on a, m from reader; revoke all on m, b, v from writer"),
            Q("create temp table a (id int); grant delete on a, b to reader"),
            Q("drop table m, b; insert into pg_temp.a values (1)"),
        ],
    ),
    case(
        "tables and functions made from temporary tables",
        &[
            Q(
                "create temp table m (id serial primary key, i int generated by default as identity, v text default 'x' check (v <> ''), g int generated always as (i * 2) stored, unique (v, i)); comment on column m.v is 'a comment'; create index on m (g)",
            ),
            Q("create table plain (like m); insert into plain (id, i, v) values (1, 2, 'x')"),
            Q("create table referred (id int primary key); insert into referred values (7)"),
            X("create table liked (like m including all, x int default 7 references referred, y serial)"),
            Q("alter table liked alter id drop default; insert into liked (id, i) values (1, 5)"),
            X("insert into liked (id, v) values (2, 'y'), (3, 'z')"),
            X("create table if not exists liked (like m)"),
            Q(
                "begin; create table parts (like m including defaults excluding generated, k int) partition by list (k); create table part partition of parts for values in (1, 2); alter table parts alter id drop default; insert into parts (id, i, k) values (1, 1, 1); commit; insert into parts (id, i, k) values (2, 1, 2)",
            ),
            Q("begin; create table gone (like m including all); rollback"),
            Q(
                "begin; create unlogged table u (like \"m\"); insert into u (id, i) values (1, 1); alter table u add column late int default 4; commit",
            ),
            Q(
                "create function typed(x m.id%type, y text) returns m.v%type language sql as 'select y'; create function of_rows(x m) returns int language sql as 'select x.i'; create function gives() returns setof m language sql as 'select * from m'; select of_rows(m) from m; create procedure pr(x int) language sql as 'select 1'",
            ),
            Q(
                "create view over as select * from m; create or replace function typed(x int, y text) returns text language sql as 'select ''other'''",
            ),
            // What needs the temporary table goes with it, and never was on the secondary.
            Q("drop table m cascade"),
        ],
    ),
    case(
        "two sessions change different tables at once",
        &[
            Q("create table a (id int primary key); create table b (id int primary key)"),
            Q("begin"),
            Q("alter table a add v int default 1"),
            Q("insert into a values (1)"),
            Session(1),
            Q("alter table b add w int default 2"),
            Q("insert into b values (1)"),
            CaughtUp,
            Session(0),
            Q("insert into a values (2)"),
            Q("commit"),
            Session(1),
            Q("insert into a values (3); insert into b values (4)"),
        ],
    ),
    case(
        "row security and grants do not keep rows back",
        &[
            Q(
                "create table a (id int primary key, o name default current_user); grant select, insert, update, delete on a to writer; alter table a enable row level security; alter table a force row level security; create policy p on a using (o = current_user)",
            ),
            Q(
                "insert into a values (1); set role writer; insert into a values (2); update a set id = id + 10; reset role; insert into a values (3)",
            ),
            Q("alter table a add column r float8 default random(); truncate a; insert into a (id) values (9)"),
        ],
    ),
    case(
        "a DBA's grant on both sides",
        &[
            Q("create table a (id int)"),
            CaughtUp,
            Dba("grant select on a to bare"),
            Q("insert into a values (1)"),
            Is("select count(*) from a", "1"),
        ],
    ),
    case(
        "reassign and drop owned, owners changed",
        &[
            Q(
                "grant create, usage on schema public to writer, reader; set role writer; create table public.owned (id int); reset role; grant select on public.owned to reader",
            ),
            Q("create table a (id int); alter table a owner to writer; insert into public.owned values (1)"),
            Q("reassign owned by writer to app; insert into a values (1); drop owned by reader"),
            Q("drop table public.owned; revoke all on schema public from writer, reader"),
        ],
    ),
];
