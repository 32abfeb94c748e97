//! Whatever changes rows.

use crate::bench::Step::{CaughtUp, Copy, Fails, Pipeline, Q, Session, X, XFails};
use crate::bench::{Case, case};

/// COPY's binary form: header, `(7, 'seven')`, trailer.
const BINARY: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0\0\x02\0\0\0\x04\0\0\0\x07\0\0\0\x05seven\xff\xff";

pub(crate) const CASES: &[Case] = &[
    case(
        "copy in text, csv and binary, and failing in the middle",
        &[
            Q("create table a (id int primary key, v text)"),
            Copy("copy a from stdin", b"1\tone\n2\t\\N\n", None),
            Copy(
                "copy a from stdin with (format csv, header, null 'nil')",
                b"id,v\n3,\"a,b\"\n4,nil\n",
                None,
            ),
            Copy("copy a from stdin with (format binary)", BINARY, None),
            Copy("copy a from stdin", b"8\teight\n1\tagain\n", Some("23505")),
            Copy("copy a from stdin", b"9\tnine\nx\tno number\n", Some("22P02")),
            Q("begin"),
            Copy("copy a (id) from stdin", b"10\n11\n", None),
            Q("savepoint s"),
            Copy("copy a from stdin", b"1\tx\n", Some("23505")),
            Q("rollback to s"),
            Q("commit"),
            Q(
                "create table p (id int, k int) partition by list (k); create table p1 partition of p for values in (1); create table p2 partition of p for values in (2)",
            ),
            Copy("copy p from stdin", b"1\t1\n2\t2\n", None),
            Q("begin; create table fresh (id int)"),
            Copy("copy fresh from stdin with (freeze)", b"1\n2\n", None),
            Q("commit"),
        ],
    ),
    case(
        "merge",
        &[
            Q(
                "create table a (id int primary key, v int); create table s (id int, v int); insert into a select g, g from generate_series(1, 10) g; insert into s select g, g * 2 from generate_series(5, 15) g",
            ),
            Q(
                "merge into a using s on a.id = s.id when matched and s.v > 16 then delete when matched then update set v = s.v when not matched then insert values (s.id, s.v)",
            ),
            X(
                "merge into a using s on a.id = s.id when matched then do nothing when not matched then insert values (s.id, 0)",
            ),
            Q(
                "create table p (id int, k int) partition by list (k); create table p1 partition of p for values in (1); create table p2 partition of p for values in (2); insert into p values (1, 1), (2, 1)",
            ),
            Q(
                "merge into p using (values (1), (3)) s(id) on p.id = s.id when matched then update set k = 2 when not matched then insert values (s.id, 2)",
            ),
        ],
    ),
    case(
        "data-modifying CTEs",
        &[
            Q(
                "create table a (id int primary key, v int); create table b (id int, v int, at timestamptz default clock_timestamp())",
            ),
            Q(
                "with x as (insert into a select g, g from generate_series(1, 10) g returning *) insert into b select * from x",
            ),
            X(
                "with d as (delete from a where id < 4 returning *), u as (update a set v = v + 100 where id > 8 returning *) insert into b select * from d union all select * from u",
            ),
            Q(
                "with moved as (delete from b where v < 3 returning id, v) insert into a select distinct on (id) id + 1000, v from moved returning (select count(*) from moved)",
            ),
            Q(
                "insert into a values (1, 1), (9, 0) on conflict (id) do update set v = excluded.v * 7; insert into a values (1, 5) on conflict do nothing",
            ),
        ],
    ),
    case(
        "writable views, rules and instead-of triggers",
        &[
            Q(
                "create table a (id int primary key, v int, hidden text default 'h'); create view va as select id, v from a where id < 100 with local check option; create table log (id int, op text)",
            ),
            Q("insert into va values (1, 1), (2, 2); update va set v = 10 where id = 1; delete from va where id = 2"),
            Fails("44000", "insert into va values (100, 1)"),
            Q(
                "create rule r1 as on update to a do also insert into log values (new.id, 'update'); create rule r2 as on insert to a where new.id = 50 do instead nothing",
            ),
            Q("insert into a values (50, 1), (51, 1); update a set v = v + 1"),
            Q(
                "create view j as select a.id, log.op from a join log on log.id = a.id; create function ji() returns trigger language plpgsql as $$ begin insert into a values (new.id, 0); insert into log values (new.id, new.op); return new; end $$; create trigger ji instead of insert on j for each row execute function ji()",
            ),
            X("insert into j values (70, 'through a join')"),
        ],
    ),
    case(
        "rows move between partitions",
        &[
            Q(
                "create table p (id int, k text, v int, primary key (id, k)) partition by list (k); create table pa partition of p for values in ('a'); create table pb partition of p for values in ('b') partition by range (id); create table pb1 partition of pb for values from (0) to (100); create table pd partition of p default",
            ),
            Q(
                "insert into p select g, case g % 3 when 0 then 'a' when 1 then 'b' else 'z' end, 0 from generate_series(1, 60) g",
            ),
            Q("update p set k = 'a' where k = 'b'"),
            X("update p set k = 'z', id = id + 1000 where id % 2 = 0"),
            Q(
                "begin; update p set k = 'b' where id < 30; update p set k = 'a' where id < 20; delete from p where id < 10; rollback",
            ),
            Q(
                "begin; update p set k = 'b' where id < 30; savepoint s; update p set k = 'a'; rollback to s; commit; update pb1 set v = 1",
            ),
            Q(
                "create table ref (id int, k text, foreign key (id, k) references p on delete cascade on update cascade); insert into ref select id, k from p where id < 20; delete from p where id < 5; truncate p cascade",
            ),
        ],
    ),
    case(
        "inheritance",
        &[
            Q(
                "create table parent (id int primary key, a text); create table child (b text) inherits (parent); create table grand (c text) inherits (child)",
            ),
            Q(
                "insert into parent values (1, 'p'); insert into child values (1, 'same id', 'b'); insert into grand values (1, 'same id', 'b', 'c'); update parent set a = a || '!'; delete from only parent; update only child set b = 'x'",
            ),
            X("delete from parent where id = 1"),
            Q("insert into grand values (5); truncate only parent; truncate parent"),
        ],
    ),
    case(
        "tables without a key, with duplicates",
        &[
            Q(
                "create table a (v int, t text); insert into a select g % 3, 'x' from generate_series(1, 30) g; insert into a values (null, null), (null, null)",
            ),
            Q(
                "delete from a where ctid in (select ctid from a where v = 1 limit 3); update a set t = 'y' where ctid in (select ctid from a where v = 2 limit 2); delete from a where ctid = (select min(ctid) from a where v is null)",
            ),
            Q(
                "create table j (a json, c point, d jsonb); insert into j select '{\"a\": 1}', '(1,2)', '{}' from generate_series(1, 4); delete from j where ctid = (select min(ctid) from j); update j set c = '(3,4)' where ctid = (select min(ctid) from j)",
            ),
            Q(
                "create table f (x float8); insert into f values ('nan'), ('nan'), (0), ('-0'), ('inf'); delete from f where ctid = (select min(ctid) from f); update f set x = '-0' where x = 0",
            ),
            Q(
                "create table n (x numeric); insert into n values (1.0), (1.00), (1); delete from n where ctid = (select min(ctid) from n where x::text = '1.00'); create table none (); insert into none default values; insert into none default values; delete from none where ctid = (select min(ctid) from none)",
            ),
        ],
    ),
    case(
        "keys that are not what they seem",
        &[
            Q(
                "create table a (id text collate \"C\" primary key, v int); insert into a values ('a', 1), ('A', 2), ('', 3); update a set id = upper(id) || 'x' where v <> 2",
            ),
            Q(
                "create table n (x numeric primary key, v int); insert into n values (1.0, 1); update n set x = 1.00; update n set v = 2; delete from n where x = 1; insert into n values (1, 3)",
            ),
            Q(
                "create table f (x float8 primary key); insert into f values ('-0'); update f set x = 0; insert into f values ('nan'); delete from f where x = 'nan'",
            ),
            Q(
                "create table u (x int unique nulls not distinct, y int); insert into u values (null, 1); update u set y = 2; create table m (x int unique, y int); insert into m values (null, 1), (null, 1), (1, 1); update m set y = 3 where x is null; delete from m where ctid = (select min(ctid) from m where x is null)",
            ),
            Q(
                "create unique index part on m (y) where x > 0; create unique index expr on m ((x + 1000)); update m set x = 7 where x = 1",
            ),
        ],
    ),
    case(
        "deferrable and exclusion constraints, unique swaps",
        &[
            Q(
                "create extension if not exists plpgsql; create table a (id int primary key deferrable initially deferred, v int unique); insert into a select g, g from generate_series(1, 5) g",
            ),
            Q("update a set id = 6 - id"),
            Q(
                "begin; update a set v = -1 where id = 5; update a set v = 1 where id = 4; update a set v = 2 where id = 5; commit",
            ),
            Q("begin; insert into a values (1, 100); delete from a where id = 1 and v <> 100; commit"),
            Q(
                "create table e (id int primary key, r int4range, exclude using gist (r with &&)); insert into e values (1, '[1,5)'), (2, '[5,9)'); begin; update e set r = '[100,101)' where id = 1; update e set r = '[1,5)' where id = 2; update e set r = '[5,9)' where id = 1; commit",
            ),
            Q(
                "create table s (id int primary key, code text unique); insert into s values (1, 'a'), (2, 'b'), (3, 'c'); update s set code = case id when 1 then 'tmp' else code end; update s set code = 'a' where id = 2; update s set code = 'b' where id = 3; update s set code = 'c' where id = 1",
            ),
            Q(
                "create table fk (id int primary key, up int references fk deferrable initially deferred); begin; insert into fk values (2, 1); insert into fk values (1, 2); commit; begin; set constraints all deferred; delete from fk where id = 1; update fk set up = null; commit",
            ),
            Fails("23503", "begin; insert into fk values (9, 99); commit"),
        ],
    ),
    case(
        "prepared transactions",
        &[
            Q("create table a (id int primary key)"),
            Q("begin; insert into a values (1); prepare transaction 'exact one'"),
            Q("insert into a values (2)"),
            CaughtUp,
            Q("commit prepared 'exact one'"),
            X("begin"),
            X("insert into a values (3)"),
            X("prepare transaction 'exact two'"),
            CaughtUp,
            Session(1),
            X("rollback prepared 'exact two'"),
            Q("begin; create table late (id int); insert into late values (1); prepare transaction 'exact three'"),
            CaughtUp,
            Q("commit prepared 'exact three'"),
            Q("insert into late values (2)"),
        ],
    ),
    case(
        "procedures with inner commits, and DO",
        &[
            Q("create table a (id int primary key, v int)"),
            Q(
                "create procedure p(n int) language plpgsql as $$ begin for i in 1..n loop insert into a values (i, i); if i % 2 = 0 then commit; else rollback; end if; end loop; insert into a values (1000, 0); end $$",
            ),
            Q("call p(9)"),
            X("delete from a where id = 1000"),
            X("call p(0)"),
            Q(
                "do $$ begin insert into a values (500, 1); commit; insert into a values (501, 1); rollback; begin insert into a values (500, 1); exception when unique_violation then insert into a values (502, 2); end; end $$",
            ),
            Q(
                "create function f(int) returns setof int language sql as 'update a set v = v + $1 returning v'; select sum(x) from f(3) x; select f(1) from generate_series(1, 3)",
            ),
        ],
    ),
    case(
        "cursors and explain",
        &[
            Q("create table a (id int primary key, v int); insert into a select g, g from generate_series(1, 10) g"),
            Q(
                "begin; declare c cursor with hold for select * from a; fetch 3 from c; update a set v = 0 where id = 3; commit",
            ),
            Q("fetch all from c; close c"),
            Q(
                "begin; declare u cursor for select * from a for update; fetch 2 from u; update a set v = 77 where current of u; delete from a where current of u; commit",
            ),
            Q("explain analyze update a set v = v + 1"),
            X("explain (analyze, format json) insert into a values (100, 1)"),
            Q(
                "explain update a set v = 5; explain (analyze) with x as (delete from a where id = 5 returning *) select * from x",
            ),
            Q("select * from a for update; select * from a order by id limit 1 for update skip locked"),
        ],
    ),
    case(
        "a role with the barest privileges",
        &[
            Q(
                "create table a (id serial primary key, v int); grant insert (v) on a to bare; grant usage on sequence a_id_seq to bare; create table r (id int primary key, v int); insert into r values (1, 1); grant update (v), select (id) on r to bare; create table d (id int); insert into d values (1); grant delete on d to bare; create table t (id int); insert into t values (1); grant truncate on t to bare",
            ),
            Q(
                "set role bare; insert into a (v) values (5); update r set v = 2 where id = 1; delete from d; truncate t; reset role",
            ),
            Q("set session authorization default; set role bare"),
            X("insert into a (v) values (6)"),
            XFails("42501", "select * from a"),
            XFails("42501", "select * from pgtandem.change_0"),
            Q("reset role"),
        ],
    ),
    case(
        "application triggers that sort before and after ours",
        &[
            Q(
                "create table a (id int primary key, v int, t text); create table log (id serial, op text, old int, new int, at timestamptz default clock_timestamp())",
            ),
            Q(
                "create function note() returns trigger language plpgsql as $$ begin insert into log (op, old, new) values (tg_name || ' ' || tg_op || ' ' || tg_when, case when tg_op <> 'INSERT' then old.v end, case when tg_op <> 'DELETE' then new.v end); if tg_when = 'AFTER' then return null; end if; return coalesce(new, old); end $$",
            ),
            Q(
                "create trigger aaa_before before insert or update or delete on a for each row execute function note(); create trigger aaa_after after insert or update or delete on a for each row execute function note(); create trigger \"zzzzz\" after insert or update or delete on a for each row execute function note(); create constraint trigger zz_deferred after insert or update on a deferrable initially deferred for each row execute function note()",
            ),
            Q(
                "create function skip() returns trigger language plpgsql as $$ begin if new.v = 13 then return null; end if; new.t := 'seen'; return new; end $$; create trigger bbb before insert or update on a for each row execute function skip()",
            ),
            Q(
                "insert into a values (1, 1), (2, 13), (3, 3); update a set v = 13 where id = 1; update a set v = 4; delete from a where id = 3",
            ),
            Q(
                "create function others() returns trigger language plpgsql as $$ begin if pg_trigger_depth() < 3 then update a set v = v + 100 where id <> new.id; update a set v = new.v + 1 where id = new.id; end if; return null; end $$; create trigger aaa_others after update on a for each row when (new.v < 1000) execute function others(); create trigger zzzz_others after insert on a for each row execute function others()",
            ),
            Q("insert into a values (10, 10), (11, 11), (12, 12)"),
            X("update a set v = 1"),
            Q(
                "begin; update a set v = 2; savepoint s; update a set v = 3; rollback to s; delete from a where id = 11; commit",
            ),
            Q(
                "create function del() returns trigger language plpgsql as $$ begin delete from a where id = old.id + 1; return null; end $$; create trigger aaa_del after delete on a for each row execute function del(); delete from a where id in (10, 11)",
            ),
            Q(
                "create function stmt() returns trigger language plpgsql as $$ begin insert into log (op, new) select tg_op, v from fresh; return null; end $$; create trigger s_ins after insert on a referencing new table as fresh for each statement execute function stmt(); insert into a select g, g from generate_series(100, 110) g",
            ),
            Q(
                "create function tr() returns trigger language plpgsql as $$ begin insert into log (op) values ('truncate'); return null; end $$; create trigger tr before truncate on a for each statement execute function tr(); truncate a",
            ),
        ],
    ),
    case(
        "triggers that change other rows of the same statement",
        &[
            Q(
                "create table tree (id int primary key, up int, n int default 0); create function up() returns trigger language plpgsql as $$ begin update tree set n = n + 1 where id = new.up; return null; end $$; create trigger aaa after insert on tree for each row execute function up()",
            ),
            Q("insert into tree select g, g / 2 from generate_series(1, 40) g"),
            X("insert into tree values (50, 3), (51, 50), (52, 51)"),
            Q(
                "create function bump() returns trigger language plpgsql as $$ begin update tree set n = n + 10 where id = new.id + 1 and n < 100; return new; end $$; create trigger bbb before update on tree for each row when (pg_trigger_depth() = 0) execute function bump()",
            ),
            Q(
                "create function tags() returns trigger language plpgsql as $$ begin return new; end $$; update tree set n = n + 1 where id = 50",
            ),
        ],
    ),
    case(
        "foreign keys with every action",
        &[
            Q(
                "create table a (id int primary key); create table c (id int primary key, a int default 0 references a on delete cascade on update cascade); create table n (id int primary key, a int references a on delete set null on update set null); create table d (id int primary key, a int default 0 references a on delete set default); create table self (id int primary key, up int references self on delete cascade)",
            ),
            Q(
                "insert into a select generate_series(0, 9); insert into c select g, g from generate_series(0, 9) g; insert into n select g, g from generate_series(0, 9) g; insert into d select g, g from generate_series(0, 9) g; insert into self values (1, null), (2, 1), (3, 2)",
            ),
            Q("delete from d where id = 5; delete from a where id = 5"),
            X("update c set a = 1 where id < 3"),
            Q(
                "delete from d where id > 5; delete from a where id = 7; delete from self where id = 1; update a set id = id + 100 where id = 9",
            ),
            Fails("23503", "insert into c values (77, 77)"),
        ],
    ),
    case(
        "truncate in every place",
        &[
            Q(
                "create table a (id serial primary key, v int); create table b (id serial primary key, a int references a); insert into a (v) select generate_series(1, 9); insert into b (a) select id from a",
            ),
            Q("truncate a, b"),
            Q(
                "insert into a (v) values (1); insert into b (a) select id from a; begin; insert into a (v) values (2); truncate a restart identity cascade; insert into a (v) values (3); commit",
            ),
            Q(
                "begin; truncate a cascade; rollback; begin; savepoint s; truncate a cascade; rollback to s; insert into a (v) values (6); commit",
            ),
            X("truncate b restart identity"),
            Q(
                "insert into a (v) select generate_series(1, 500); truncate a cascade; insert into a (v) values (9); truncate a cascade; truncate a cascade",
            ),
        ],
    ),
    case(
        "row security",
        &[
            Q(
                "create table a (id int primary key, o text); alter table a enable row level security; grant all on a to writer; create policy r on a for select to writer using (o = 'w'); create policy i on a for insert to writer with check (o = 'w'); create policy u on a for update to writer using (true) with check (o <> 'x')",
            ),
            Q(
                "insert into a values (1, 'app'), (2, 'w'); set role writer; insert into a values (3, 'w'); update a set o = 'v' where id = 3 and false; delete from a; reset role; delete from a where id = 1",
            ),
            Q("set role writer"),
            XFails("42501", "insert into a values (9, 'other')"),
            Q("reset role"),
        ],
    ),
    case(
        "many sessions at once, in one pipeline each",
        &[
            Q("create table a (id serial primary key, v int)"),
            Pipeline(&[
                "insert into a (v) values (1)",
                "begin; insert into a (v) values (2); rollback",
                "update a set v = v + 1",
                "insert into a (v) select 5 from a",
                "delete from a where id = 1",
            ]),
            Session(1),
            Pipeline(&["insert into a (v) values (10)", "update a set v = v * 2"]),
            Session(2),
            Q("begin isolation level serializable"),
            Q("update a set v = 0"),
            Session(1),
            X("insert into a (v) values (99)"),
            Session(2),
            Q("commit"),
        ],
    ),
    case(
        "values of generated, identity and default columns",
        &[
            Q(
                "create table a (id int generated always as identity primary key, v int, g int generated always as (v * 2) stored, r float8 default random(), t timestamptz default clock_timestamp(), u uuid default gen_random_uuid())",
            ),
            Q(
                "insert into a (v) select generate_series(1, 20); update a set v = v + 1, r = default; insert into a (id, v) overriding system value values (500, 1); insert into a (v) overriding user value values (2); update a set id = default where id = 500",
            ),
            Q(
                "create table only_generated (a int generated always as (1) stored); insert into only_generated default values; insert into only_generated default values; delete from only_generated where ctid = (select min(ctid) from only_generated)",
            ),
        ],
    ),
    case(
        "subtransactions, deep",
        &[
            Q(
                "create table a (id int primary key, v int); do $$ begin for i in 1..200 loop begin insert into a values (i, i); if i % 3 = 0 then raise exception 'no'; end if; exception when others then insert into a values (i + 1000, 0); end; end loop; end $$",
            ),
            Q(
                "begin; savepoint a; insert into a values (5000, 1); savepoint b; update a set v = 9; release b; rollback to a; savepoint c; delete from a where id < 10; release c; commit",
            ),
        ],
    ),
    case(
        "wide rows, large values, odd names",
        &[
            Q(
                "create table \"Weird \"\"Table\" (\"a b\" int primary key, \"SELECT\" text, \"é\" bytea, \"a'b\" jsonb, \"new\" int, \"old\" int, tg_op text, state int, slot int)",
            ),
            Q(
                "insert into \"Weird \"\"Table\" select g, repeat('x', 100000) || g, decode(repeat('ff00', 5000), 'hex'), '{\"k\": [1, 2, {\"x\": null}]}', g, g, 'op', 1, 2 from generate_series(1, 5) g; update \"Weird \"\"Table\" set \"SELECT\" = \"SELECT\" || '\\,\"'')(', \"new\" = 7; delete from \"Weird \"\"Table\" where \"a b\" = 3",
            ),
            Q(
                "do $$ declare c text := (select string_agg(format('c%s int default %s', g, g), ', ') from generate_series(1, 600) g); begin execute 'create temp table pre (x int)'; end $$",
            ),
        ],
    ),
];

/// What the newer server's build cannot (XML, ICU, extensions): from 15 to 15 only.
pub(crate) const SAME_BUILD: &[Case] = &[
    case(
        "xml",
        &[Q(
            "create table j (x xml, d text default 'x'); insert into j (x) select '<a/>' from generate_series(1, 4); delete from j where ctid = (select min(ctid) from j); set xmloption = document; insert into j values ('<b>c</b>')",
        )],
    ),
    case(
        "a collation under which different texts are equal",
        &[
            Q("create collation ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"),
            Q(
                "create table c (x text collate ci primary key); insert into c values ('Abc'); update c set x = 'aBC'; update c set x = 'ABC'",
            ),
            Q(
                "create table n (x text collate ci); insert into n values ('a'), ('A'), ('a'); delete from n where ctid = (select min(ctid) from n where x collate \"C\" = 'A')",
            ),
        ],
    ),
    case(
        "extensions",
        &[
            Q(
                "create extension hstore; create extension if not exists hstore; create extension citext with schema public; create extension btree_gist",
            ),
            Q(
                "create table a (id citext primary key, h hstore, e int, exclude using gist (e with =)); insert into a values ('Key', 'a=>1, b=>null', 1), ('other', '', 2)",
            ),
            X("update a set h = h || 'c=>3', id = 'KEY' where id = 'key'"),
            Q("comment on extension hstore is 'changed'; update a set h = null"),
            Q(
                "drop extension hstore cascade; insert into a values ('third', 3); drop table a; drop extension citext, btree_gist",
            ),
        ],
    ),
    case(
        "tables that an extension's function reads",
        &[Q(
            "create extension pg_trgm with schema public; create table a (t text); create index on a using gin (t gin_trgm_ops); insert into a values ('some words'); drop table a; drop extension pg_trgm",
        )],
    ),
];
