"""asyncpg: binary protocol throughout, portals with a row limit, its own pipelining and COPY."""

import asyncio
import datetime as dt
import decimal
import hashlib
import io
import ipaddress
import ssl
import uuid

import asyncpg

import common
from common import DBNAME, HOST, PASSWORD, PORT, USER, behaviour, canonical


async def connect(**options):
    settings = {"host": HOST, "port": PORT, "user": USER, "password": PASSWORD, "database": DBNAME, "ssl": False}
    settings.update(options)
    return await asyncpg.connect(**settings)


class connected:
    """`async with connected() as c`"""

    def __init__(self, **options):
        self.options = options

    async def __aenter__(self):
        self.connection = await connect(**self.options)
        return self.connection

    async def __aexit__(self, *_):
        await self.connection.close()


def diagnosis(error):
    if isinstance(error, asyncpg.PostgresError | asyncpg.PostgresLogMessage):
        return {"class": type(error).__name__, **error.as_dict()}
    return {"class": type(error).__name__, "text": str(error)}


def without_source(diagnosis):
    """Whoever refuses a connection need not do so in the same line of C."""
    return {name: value for name, value in diagnosis.items() if not name.startswith("server_source")}


async def fails(awaitable):
    try:
        return {"did not fail": await awaitable}
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, asyncio.TimeoutError) as error:
        return diagnosis(error)


def rows(records):
    return [list(record.items()) for record in records]


@behaviour
async def startup_and_settings():
    async with connected(server_settings={"application_name": "asyncpg shop", "work_mem": "5MB", "jit": "off"}) as c:
        settings = {name: getattr(c.get_settings(), name, None) for name in (
            "server_version", "client_encoding", "TimeZone", "application_name", "DateStyle", "is_superuser",
            "standard_conforming_strings", "integer_datetimes", "IntervalStyle", "session_authorization")}  # fmt: skip
        own = await c.fetchval("SELECT pg_backend_pid()") == c.get_server_pid()
        return settings, own, list(c.get_server_version()), await c.fetchval("SHOW work_mem")


@behaviour
async def refused_connections():
    return [
        without_source(await fails(connect(**options)))
        for options in (
            {"password": "wrong"},
            {"user": "no_such_role"},
            {"database": "no_such_database"},
            {"server_settings": {"no_such_setting": "1"}},
        )
    ]


@behaviour
async def types_in_binary():
    values = [
        ("bool", True), ("int2", -3), ("int4", 2**31 - 1), ("int8", -(2**63)), ("float4", 1.5), ("float8", float("inf")),
        ("numeric", decimal.Decimal("-123456789.000000000000001")), ("text", "żółć \U0001f418"), ("bytea", b"\0\xff"),
        ("date", dt.date(1, 1, 1)), ("time", dt.time(1, 2, 3, 4)), ("timestamp", dt.datetime(2024, 2, 29, 1)),
        ("timestamptz", dt.datetime(2024, 2, 29, tzinfo=dt.timezone.utc)), ("interval", dt.timedelta(days=400, microseconds=7)),
        ("uuid", uuid.UUID(int=7)), ("inet", ipaddress.ip_address("::1")), ("cidr", ipaddress.ip_network("10.0.0.0/8")),
        ("json", '{"a": 1}'), ("jsonb", '{"a": [1]}'), ("int4[]", [1, None, 3]), ("text[]", [["a", "b"], ["c", None]]),
        ("int4range", asyncpg.Range(1, 5)), ("int4multirange", [asyncpg.Range(1, 2), asyncpg.Range(5, 9)]),
        ("point", asyncpg.Point(1, 2)), ("box", asyncpg.Box((3, 4), (1, 2))), ("bit(5)", asyncpg.BitString("10101")),
        ("oid", 4294967295), ("xid", 7), ("char", "x"), ("varchar(3)", "abc"), ("name", "n"), ("tid", (1, 2)),
        ("money", "1.50"), ("tsvector", "'a':1"), ("macaddr", "08:00:2b:01:02:03"), ("xml", "<a/>"),
    ]  # fmt: skip
    answers = []
    async with connected() as c:
        for name, value in values:
            answers.append([name, await fails(c.fetchval(f"SELECT $1::{name}", value))])
    return answers


@behaviour
async def types_of_ones_own():
    """Types that the driver must look up in the catalog first."""
    async with connected() as c:
        await c.execute(
            """DROP SCHEMA IF EXISTS asyncpg_types CASCADE; CREATE SCHEMA asyncpg_types; SET search_path = asyncpg_types;
               CREATE TYPE mood AS ENUM ('sad', 'merry'); CREATE DOMAIN positive AS int CHECK (VALUE > 0);
               CREATE TYPE pair AS (a int, b mood); CREATE TYPE span AS RANGE (subtype = float8);
               CREATE TABLE kept (id int PRIMARY KEY, m mood, p pair, ps pair[], d positive, s span)"""
        )
        await c.execute(
            "INSERT INTO kept VALUES ($1, $2, $3, $4, $5, $6)",
            1, "sad", (1, "merry"), [(2, "sad"), None], 5, asyncpg.Range(1.5, 2.5),
        )  # fmt: skip
        row = await c.fetchrow("SELECT * FROM kept")
        await c.set_type_codec("mood", schema="asyncpg_types", encoder=str.lower, decoder=str.upper)
        shouted = await c.fetchval("SELECT m FROM kept")
        failed = await fails(c.execute("INSERT INTO kept (id, d) VALUES (2, $1)", -1))
        await c.execute("DROP SCHEMA asyncpg_types CASCADE")
        return list(row.items()), shouted, failed


@behaviour
async def prepared_statements():
    async with connected() as c:
        await c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY, name text)")
        statement = await c.prepare("INSERT INTO t VALUES ($1, $2) RETURNING *")
        described = [p.name for p in statement.get_parameters()], [(a.name, a.type.name) for a in statement.get_attributes()]
        inserted = [rows(await statement.fetch(n, f"n{n}")) for n in range(5)]
        failed = await fails(statement.fetch(1, "again"))
        explained = await (await c.prepare("SELECT 1")).explain()
        # The result's columns change under a statement of the driver's cache.
        before = rows(await c.fetch("SELECT * FROM t WHERE id = 1"))
        await c.execute("ALTER TABLE t ADD COLUMN extra int DEFAULT 9")
        after = rows(await c.fetch("SELECT * FROM t WHERE id = 1"))
        async with c.transaction():
            await c.fetch("SELECT * FROM t WHERE id = 2")
        await c.execute("ALTER TABLE t DROP COLUMN extra")
        async with c.transaction():
            in_transaction = await fails(c.fetch("SELECT * FROM t WHERE id = 2"))
        malformed = await fails(c.prepare("SELEC $1"))
        return described, inserted, failed, canonical(str(explained)), before, after, in_transaction, malformed


@behaviour
async def without_statement_cache():
    """Unnamed statements only, as behind poolers."""
    async with connected(statement_cache_size=0) as c:
        return [rows(await c.fetch("SELECT $1::int + $2::int AS sum", n, n)) for n in range(5)]


@behaviour
async def portals_with_a_row_limit():
    async with connected() as c:
        async with c.transaction():
            fetched = [row[0] async for row in c.cursor("SELECT generate_series(1, $1)", 205, prefetch=50)]
            cursor = await c.cursor("SELECT n FROM generate_series(1, 20) n")
            stepped = [await cursor.fetchrow(), await cursor.forward(5), await cursor.fetch(3), await cursor.fetch(100)]
            stepped.append(await cursor.fetch(1))
            # Two portals open at once, and another statement between.
            one = await c.cursor("SELECT n FROM generate_series(1, 5) n")
            two = await c.cursor("SELECT -n FROM generate_series(1, 5) n")
            mixed = [await one.fetch(2), await two.fetch(2), await c.fetchval("SELECT 'between'"), await one.fetch(9), await two.fetch(9)]
            mixed = [rows(part) if isinstance(part, list) else part for part in mixed]
        async with c.transaction():
            dividing = await c.cursor("SELECT 10 / (4 - n) FROM generate_series(1, 9) n", prefetch=None)
            failed = [rows(await dividing.fetch(2)), await fails(dividing.fetch(5))]
        return fetched == list(range(1, 206)), [rows(s) if isinstance(s, list) else canonical(repr(s)) for s in stepped], mixed, failed


@behaviour
async def transactions():
    async with connected() as c:
        await c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY)")
        seen = []
        for isolation in ("serializable", "repeatable_read", "read_committed"):
            async with c.transaction(isolation=isolation, readonly=isolation == "serializable", deferrable=isolation == "serializable"):
                seen.append([await c.fetchval("SHOW transaction_isolation"), c.is_in_transaction()])
        try:
            async with c.transaction():
                await c.execute("INSERT INTO t VALUES (1)")
                async with c.transaction():
                    await c.execute("INSERT INTO t VALUES (2)")
                seen.append(await fails(nested(c)))
                await c.execute("INSERT INTO t VALUES (1)")
        except asyncpg.UniqueViolationError as error:
            seen.append(diagnosis(error))
        async with c.transaction():
            await c.execute("INSERT INTO t VALUES (3)")
            seen.append(await fails(nested(c)))
        return seen, rows(await c.fetch("TABLE t")), c.is_in_transaction()


async def nested(c):
    async with c.transaction():
        await c.execute("INSERT INTO t VALUES (4)")
        await c.execute("SELECT 1/0")


@behaviour
async def many_executions_in_flight():
    """executemany sends Bind and Execute for every row before it reads an answer."""
    async with connected() as c:
        await c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY, v text)")
        await c.executemany("INSERT INTO t VALUES ($1, $2)", [(n, "v" * (n % 50)) for n in range(3000)])
        failed = await fails(c.executemany("INSERT INTO t VALUES ($1, $2)", [(n, "") for n in range(3000, 2990, -1)]))
        returned = rows(await c.fetchmany("INSERT INTO t VALUES ($1, $2) RETURNING id", [(n, "") for n in range(4000, 4005)]))
        return failed, returned, rows(await c.fetch("SELECT count(*), sum(length(v)) FROM t"))


@behaviour
async def copy_both_ways():
    async with connected() as c:
        await c.execute("CREATE TEMP TABLE t (id int, name text)")
        answers = [await c.copy_records_to_table("t", records=[(n, f"n{n}") for n in range(1000)])]
        answers.append(await c.copy_to_table("t", source=io.BytesIO(b"7,seven\n8,eight\n"), format="csv"))
        answers.append(await fails(c.copy_to_table("t", source=io.BytesIO(b"x,seven\n"), format="csv")))
        answers.append(await fails(c.copy_to_table("absent", source=io.BytesIO(b"x\n"))))
        for options in ({}, {"format": "csv", "header": True}, {"format": "binary"}):
            out = io.BytesIO()
            status = await c.copy_from_query("SELECT * FROM t WHERE id < $1 ORDER BY id, name", 500, output=out, **options)
            answers.append([status, len(out.getvalue()), hashlib.sha256(out.getvalue()).hexdigest()])
        out = io.BytesIO()
        answers.append([await c.copy_from_table("t", output=out), len(out.getvalue())])

        async def breaks_off():
            yield b"1\tone\n"
            raise ValueError("the client changes its mind")

        try:
            await c.copy_to_table("t", source=breaks_off())
        except ValueError as error:
            answers.append(str(error))
        answers.append(await c.fetchval("SELECT count(*) FROM t"))
        return answers


@behaviour
async def listen_and_notify():
    async with connected() as c, connected() as other:
        heard = []
        all_heard = asyncio.Event()
        pids = {c.get_server_pid(): "own", other.get_server_pid(): "other"}

        def listener(_, pid, channel, payload):
            heard.append([pids.get(pid), channel, payload])
            if len(heard) == 3:
                all_heard.set()

        await c.add_listener("here", listener)
        await c.execute("NOTIFY here, 'own'")
        await other.execute("SELECT pg_notify('here', 'a'), pg_notify('here', 'a'), pg_notify('here', 'b')")
        await asyncio.wait_for(all_heard.wait(), 60)
        await c.remove_listener("here", listener)
        await other.execute("NOTIFY here, 'unheard'")
        return heard, await c.fetchval("SELECT count(*) FROM pg_listening_channels()")


@behaviour
async def notices():
    async with connected() as c:
        heard = []
        c.add_log_listener(lambda _, message: heard.append(diagnosis(message)))
        await c.execute("DO $$ BEGIN RAISE NOTICE 'noted %', 7 USING HINT = 'h'; RAISE WARNING 'warned'; END $$")
        await c.fetch("SELECT 1")
        await asyncio.sleep(0)
        return heard


@behaviour
async def cancel():
    async with connected() as c, connected() as other:

        async def until_it_sleeps():
            query = "SELECT state = 'active' AND query LIKE '%pg_sleep%' FROM pg_stat_activity WHERE pid = $1"
            while not await other.fetchval(query, c.get_server_pid()):
                await asyncio.sleep(0.005)

        # A task's end makes the driver send a CancelRequest; the session goes on.
        task = asyncio.create_task(c.execute("SELECT pg_sleep(60)"))
        await until_it_sleeps()
        task.cancel()
        cancelled = (await asyncio.gather(task, return_exceptions=True))[0]
        answers = [type(cancelled).__name__, await c.fetchval("SELECT 1")]
        answers.append((await fails(c.fetchval("SELECT pg_sleep(60)", timeout=0.05)))["class"])
        answers.append(await c.fetchval("SELECT 2"))
        task = asyncio.create_task(c.execute("SELECT pg_sleep(60)"))
        await until_it_sleeps()
        await other.fetchval("SELECT pg_cancel_backend($1)", c.get_server_pid())
        answers.append(await fails(task))
        return answers


@behaviour
async def errors_and_many_statements():
    async with connected() as c:
        return [
            await fails(c.execute("SELECT 1; SELECT 1/0; SELECT 2")),
            await fails(c.execute("CREATE TEMP TABLE t (a int UNIQUE); INSERT INTO t VALUES (1); INSERT INTO t VALUES (1)")),
            await fails(c.fetch("SELECT * FROM t")),
            await fails(c.fetch("SELECT 1; SELECT 2")),
            await fails(c.fetch("")),
            await fails(c.fetch("SELECT $1::int", None)),
            await fails(c.execute("SELECT absent")),
            await fails(c.execute("INSERT INTO pg_class DEFAULT VALUES")),
        ]


@behaviour
async def reset_and_settings_changes():
    async with connected() as c:
        await c.execute("SET work_mem = '7MB'; SET TimeZone = 'Asia/Tokyo'")
        await c.fetchval("SELECT pg_advisory_lock(7)")
        changed = [await c.fetchval("SHOW work_mem"), c.get_settings().TimeZone, await c.fetchval("SELECT now()::text LIKE '%+09'")]
        await c.reset()
        return changed, await c.fetchval("SHOW work_mem") != "7MB", c.get_settings().TimeZone != "Asia/Tokyo"


@behaviour
async def ended_by_the_server():
    async with connected() as c, connected() as other:
        await other.fetchval("SELECT pg_terminate_backend($1, 10000)", c.get_server_pid())
        while not c.is_closed():
            await asyncio.sleep(0.005)
        return (await fails(c.fetchval("SELECT 1")))["class"]


@behaviour
async def large_values():
    async with connected() as c:
        big = bytes(range(256)) * (8 * 1024 * 4)
        return [
            await c.fetchval("SELECT md5($1::bytea)", big) == hashlib.md5(big).hexdigest(),
            await c.fetchval("SELECT $1::bytea", big) == big,
            len(await c.fetch("SELECT repeat('x', 2000) FROM generate_series(1, 20000)")),
        ]


@behaviour
async def a_pool_of_connections():
    pool = await asyncpg.create_pool(
        host=HOST, port=PORT, user=USER, password=PASSWORD, database=DBNAME, ssl=False, min_size=1, max_size=8
    )
    async with pool:

        async def one(n):
            async with pool.acquire() as c, c.transaction():
                return await c.fetchval("SELECT $1::int * 2 FROM pg_sleep(0.001)", n)

        return await asyncio.gather(*(one(n) for n in range(200)))


@behaviour
async def tls_connections():
    context = ssl.create_default_context(cafile=common.TLS_ROOT)
    answers = []
    for host in ("localhost", "127.0.0.1"):
        for wanted in (context, "require", "prefer", "allow", "disable"):
            try:
                async with connected(host=host, ssl=wanted) as c:
                    transport = c._transport.get_extra_info("ssl_object")
                    answers.append([bool(transport), await c.fetchval("SELECT 1")])
            except (OSError, ssl.SSLError, asyncpg.PostgresError) as error:
                answers.append(diagnosis(error))
    return answers


async def main():
    for function in common.selected():
        try:
            common.record(function.__name__, await function())
        except Exception as error:  # noqa: BLE001: whatever it is, the test shows it
            common.record_unexpected(function.__name__, error)


asyncio.run(main())
