//! Sequences follow exactly, and what the client sees of its own session is what the server alone
//! would show.

use crate::bench::Step::{CaughtUp, Fails, Is, Q, Session, X};
use crate::bench::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case(
        "setval, restart, gaps",
        &[
            Q(
                "create sequence s; select nextval('s'), nextval('s'); select setval('s', 100); select setval('s', 50, false)",
            ),
            CaughtUp,
            Q(
                "begin; select nextval('s'), nextval('s'); rollback; alter sequence s restart; alter sequence s restart with 7",
            ),
            CaughtUp,
            Q("begin; alter sequence s restart with 1000; rollback; begin; select setval('s', 9); rollback"),
            X("select nextval('s')"),
        ],
    ),
    case(
        "cycles, bounds and negative increments",
        &[
            Q(
                "create sequence down increment -2 minvalue -9 maxvalue -1 cycle; create sequence small as smallint maxvalue 3; create sequence cached cache 20",
            ),
            Q(
                "select nextval('down') from generate_series(1, 7); select nextval('small'), nextval('small'), nextval('small'); select nextval('cached')",
            ),
            CaughtUp,
            Fails("2200H", "select nextval('small')"),
            Q(
                "alter sequence small maxvalue 10; select nextval('small'); alter sequence down no cycle increment -1; alter sequence cached as int cache 1 start 5 restart; select nextval('cached')",
            ),
        ],
    ),
    case(
        "truncate restart identity",
        &[
            Q(
                "create table a (id serial primary key, i int generated always as identity (start 50)); insert into a default values; insert into a default values; truncate a restart identity; insert into a default values",
            ),
            CaughtUp,
            Q(
                "begin; truncate a restart identity; insert into a default values; rollback; insert into a default values",
            ),
        ],
    ),
    case(
        "owned and free",
        &[
            Q(
                "create table a (id int primary key default 1); create sequence s owned by a.id; alter table a alter id set default nextval('s'); insert into a default values; insert into a default values",
            ),
            CaughtUp,
            Q(
                "alter table a rename to b; alter sequence s rename to t; create sequence s; select nextval('s') from generate_series(1, 4); insert into b default values",
            ),
            Q("create unlogged table u (id serial); insert into u default values"),
        ],
    ),
    case(
        "lastval and currval",
        &[
            Q("create table a (id serial primary key, v int); create sequence s start 500"),
            X("insert into a (v) values (1)"),
            Is("select lastval()", "1"),
            Is("select currval('a_id_seq')", "1"),
            Q("select nextval('s')"),
            Q("insert into a values (99, 1)"),
            Is("select lastval()", "500"),
            Q("alter table a add column w int default 1"),
            Is("select lastval()", "500"),
            Session(1),
            Fails("55000", "select lastval()"),
            Q("insert into a values (98, 1)"),
            Fails("55000", "select lastval()"),
        ],
    ),
    case(
        "trigger depth, found rows and notices",
        &[
            Q(
                "create table a (id int primary key, depth int); create function d() returns trigger language plpgsql as $$ begin new.depth := pg_trigger_depth(); return new; end $$; create trigger d before insert or update on a for each row execute function d()",
            ),
            Q("insert into a values (1), (2)"),
            Is("select max(depth) from a", "1"),
            Is("select pg_trigger_depth()", "0"),
            Is(
                "with u as (update a set depth = 0 returning 1) select count(*) from u",
                "2",
            ),
            Q(
                "create function f() returns int language plpgsql as $$ declare n int; begin update a set depth = 5; get diagnostics n = row_count; if not found then return -1; end if; return n; end $$",
            ),
            Is("select f()", "2"),
            Is("show search_path", "c5, public"),
            Is("show datestyle", "ISO, MDY"),
            Is("select current_user", "app"),
            Is("select txid_current_if_assigned() is null", "t"),
        ],
    ),
];
