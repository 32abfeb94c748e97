"""psycopg 3, and through its `pq` module libpq itself: pipeline mode, COPY, cancel, protocol 3.2."""

import contextlib
import hashlib
import threading

import psycopg
from psycopg import pq
from psycopg.types.json import Jsonb

import common
from common import DBNAME, HOST, PASSWORD, PORT, USER, behaviour, eventually


def connect(**options):
    settings = {
        "host": HOST,
        "port": PORT,
        "user": USER,
        "password": PASSWORD,
        "dbname": DBNAME,
        "autocommit": True,
        "sslmode": "disable",
    }
    settings.update(options)
    return psycopg.connect(**settings)


def diagnosis(error):
    """Every field of a server's error or notice."""
    diag = error.diag if isinstance(error, psycopg.Error) else error
    fields = [name for name in dir(diag) if not name.startswith("_")]
    return {name: value for name in fields if (value := getattr(diag, name)) is not None and not callable(value)}


def fails(connection, statement, *args, **kwargs):
    try:
        connection.execute(statement, *args, **kwargs)
    except psycopg.Error as error:
        return {"class": type(error).__name__, **diagnosis(error)}
    return "did not fail"


def refused(**options):
    """The words of a connection that must fail: the server's own, without libpq's preamble."""
    try:
        connect(**options).close()
    except psycopg.OperationalError as error:
        return [line.split("failed: ")[-1] for line in str(error).splitlines()]
    return "was let in"


def rows(cursor):
    return {"status": cursor.statusmessage, "rows": cursor.fetchall() if cursor.description else None}


@behaviour
def parameters_at_startup():
    names = (
        "server_version server_encoding client_encoding application_name is_superuser session_authorization "
        "DateStyle IntervalStyle TimeZone integer_datetimes standard_conforming_strings search_path "
        "default_transaction_read_only in_hot_standby scram_iterations"
    ).split()
    with connect(application_name="shop front") as c:
        return {
            "reported": {name: c.info.parameter_status(name) for name in names},
            "server_version": c.info.server_version,
            "pid_is_the_servers": c.execute("SELECT pg_backend_pid()").fetchone()[0] == c.info.backend_pid,
        }


@behaviour
def startup_options():
    with connect(options="-c work_mem=3MB -c search_path=pg_catalog,public", client_encoding="LATIN1") as c:
        shown = [c.execute(f"SHOW {name}").fetchone()[0] for name in ("work_mem", "search_path", "client_encoding")]
    return shown, refused(options="-c no_such_setting=1"), refused(options="-c work_mem=lots")


@behaviour
def protocol_versions():
    answers = {}
    for low, high in (("3.0", "3.0"), ("3.0", "3.2"), ("3.0", "latest"), ("3.2", "3.2")):
        try:
            with connect(min_protocol_version=low, max_protocol_version=high) as c:
                answers[f"{low} to {high}"] = [pq_protocol(c), c.execute("SELECT 1").fetchall(), cancelled(c)["sqlstate"]]
        except psycopg.OperationalError as error:
            answers[f"{low} to {high}"] = str(error).split("failed: ")[-1]
    return answers


def pq_protocol(c):
    return getattr(c.pgconn, "full_protocol_version", c.pgconn.protocol_version)


@behaviour
def simple_query_of_many_statements():
    with connect() as c:
        cursor = c.execute("SELECT 1 AS a; SELECT 'x', 'y' WHERE false; SET work_mem = '2MB'; SHOW work_mem; SELECT")
        answers = []
        while True:
            answers.append([cursor.statusmessage, [d.name for d in cursor.description or ()], rows(cursor)])
            if not cursor.nextset():
                break
        empty = c.execute("").statusmessage, c.execute(" ; -- nothing").statusmessage
        failing = fails(c, "SELECT 1; SELECT 1/0; SELECT 2")
        c.execute("CREATE TEMP TABLE implicit (a int)")
        rolled_back = fails(c, "INSERT INTO implicit VALUES (1); SELECT 1/0")
        return answers, empty, failing, rolled_back, rows(c.execute("SELECT * FROM implicit"))


@behaviour
def extended_query_types():
    import datetime as dt
    import decimal
    import uuid

    values = [
        True, 42, -(2**62), 2.5, float("nan"), decimal.Decimal("12345678901234567890.0123456789"), "żółć 漢字 \U0001f418",
        b"\x00\x01\xfe\xff", dt.date(2024, 2, 29), dt.time(23, 59, 59, 999999), dt.datetime(2024, 2, 29, 12, 0, 0, 1),
        dt.datetime(2024, 2, 29, 12, tzinfo=dt.timezone.utc), dt.timedelta(days=-3, seconds=5),
        uuid.UUID("12345678-1234-5678-1234-567812345678"), [1, 2, None], [["a", "b"], ["c", None]],
        Jsonb({"b": [1, None], "a": "x"}), None,
    ]  # fmt: skip
    answers = []
    with connect() as c:
        for binary in (False, True):
            for value in values:
                for placeholder in ("%t", "%b"):
                    try:
                        cursor = c.execute(f"SELECT {placeholder}", (value,), binary=binary)
                        answers.append([cursor.description[0].type_code, cursor.fetchone()])
                    except psycopg.Error as error:
                        answers.append(type(error).__name__)
        answers.append(c.execute("SELECT '{1,2}'::int[], int4range(1,5), '(1,x)'::text, 'NaN'::numeric").fetchone())
    return answers


@behaviour
def prepared_statements():
    with connect(prepare_threshold=2) as c:
        c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY, name text)")
        for n in range(6):
            c.execute("INSERT INTO t VALUES (%s, %s)", (n, f"n{n}"))
        c.execute("SELECT name FROM t WHERE id = %s", (3,), prepare=True)
        listed = c.execute("SELECT statement, parameter_types::text FROM pg_prepared_statements ORDER BY 1").fetchall()
        # The plan's result type changes under a prepared statement.
        c.execute("SELECT * FROM t WHERE id = %s", (3,), prepare=True)
        c.execute("ALTER TABLE t ADD COLUMN extra int")
        changed = fails(c, "SELECT * FROM t WHERE id = %s", (3,), prepare=True)
        c.execute("DEALLOCATE ALL")
        after = c.execute("SELECT count(*) FROM pg_prepared_statements").fetchall()
        c.execute("PREPARE by_sql (int) AS SELECT $1 + 1")
        by_sql = c.execute("EXECUTE by_sql(41)").fetchall()
        return listed, changed, after, by_sql, fails(c, "EXECUTE no_such(1)")


@behaviour
def prepared_at_protocol_level():
    with connect() as c:
        p = c.pgconn
        answers = []

        def note(result):
            answers.append(
                [
                    pq.ExecStatus(result.status).name,
                    result.error_field(pq.DiagnosticField.SQLSTATE),
                    result.nparams,
                    [result.param_type(n) for n in range(result.nparams)],
                    [(result.fname(n), result.ftype(n), result.fformat(n), result.fmod(n)) for n in range(result.nfields)],
                    [[result.get_value(r, f) for f in range(result.nfields)] for r in range(result.ntuples)],
                ]
            )

        note(p.prepare(b"one", b"SELECT $1::int AS n, $2::varchar(7) AS v"))
        note(p.describe_prepared(b"one"))
        note(p.exec_prepared(b"one", [b"7", b"seven"], result_format=1))
        note(p.exec_prepared(b"one", [b"seven", None]))
        note(p.exec_prepared(b"one", [b"1"]))
        note(p.prepare(b"one", b"SELECT 1"))
        note(p.prepare(b"", b"SELECT 1"))
        note(p.prepare(b"", b"SELECT 2"))
        note(p.exec_prepared(b"", []))
        p.exec_(b"CREATE TEMP TABLE t (a int)")
        note(p.prepare(b"star", b"SELECT * FROM t"))
        p.exec_(b"ALTER TABLE t ADD COLUMN b int")
        note(p.exec_prepared(b"star", []))
        note(p.describe_prepared(b"absent"))
        note(p.describe_portal(b"absent"))
        c.execute("BEGIN")
        c.execute("DECLARE listed CURSOR FOR SELECT 1 AS a, 'x'::text AS b")
        note(p.describe_portal(b"listed"))
        c.execute("ROLLBACK")
        if hasattr(p, "close_prepared"):
            note(p.close_prepared(b"one"))
            note(p.close_prepared(b"absent"))
        return answers


@behaviour
def pipeline_mode():
    """Many statements and Syncs in flight, Flush, an error that aborts what follows up to Sync."""
    with connect() as c:
        p = c.pgconn
        c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY)")
        p.enter_pipeline_mode()
        answers = []

        def take(count):
            for _ in range(count):
                result = p.get_result()
                if result is None:
                    answers.append(None)
                else:
                    status = pq.ExecStatus(result.status).name
                    cells = [[result.get_value(r, f) for f in range(result.nfields)] for r in range(result.ntuples)]
                    answers.append([status, result.command_status, cells, result.error_field(pq.DiagnosticField.SQLSTATE)])

        def send(statement, values=()):
            p.send_query_params(statement, list(values))

        p.nonblocking = 1
        send(b"SELECT $1::int", [b"1"])
        p.send_flush_request()
        p.flush()
        take(2)
        p.send_prepare(b"ins", b"INSERT INTO t VALUES ($1) RETURNING id")
        p.send_query_prepared(b"ins", [b"1"])
        p.send_describe_prepared(b"ins")
        p.send_query_prepared(b"ins", [b"2"])
        p.pipeline_sync()
        p.send_query_prepared(b"ins", [b"3"])
        p.send_query_prepared(b"ins", [b"1"])
        p.send_query_prepared(b"ins", [b"4"])
        p.pipeline_sync()
        p.pipeline_sync()
        send(b"SELECT array_agg(id ORDER BY id) FROM t")
        send(b"BEGIN")
        send(b"INSERT INTO t VALUES (9)")
        p.pipeline_sync()
        send(b"SELECT count(*) FROM t")
        send(b"ROLLBACK")
        p.pipeline_sync()
        send(b"SELECT count(*) FROM t")
        p.pipeline_sync()
        p.flush()
        take(8 + 1 + 6 + 1 + 1 + 6 + 1 + 4 + 1 + 2 + 1)
        p.exit_pipeline_mode()
        p.nonblocking = 0
        return answers, pq.TransactionStatus(p.transaction_status).name


@behaviour
def pipeline_of_many():
    with connect() as c:
        c.execute("CREATE TEMP TABLE t (id int)")
        with c.pipeline() as pipeline:
            cursors = [c.execute("INSERT INTO t VALUES (%s) RETURNING id * 2", (n,)) for n in range(500)]
            pipeline.sync()
            wide = [c.execute("SELECT repeat('x', %s)", (40_000,)) for _ in range(40)]
            total = sum(cursor.fetchone()[0] for cursor in cursors)
            lengths = {len(cursor.fetchone()[0]) for cursor in wide}
        error = None
        try:
            with c.pipeline():
                c.execute("INSERT INTO t VALUES (-1)")
                c.execute("SELECT 1/0")
                c.execute("INSERT INTO t VALUES (-2)")
        except psycopg.Error as caught:
            error = diagnosis(caught)
        kept = c.execute("SELECT count(*), min(id) FROM t").fetchall()
        return total, sorted(lengths), error, kept


@behaviour
def server_side_cursors():
    with connect(autocommit=False) as c:
        with c.cursor("plain") as cursor:
            cursor.itersize = 7
            cursor.execute("SELECT n, repeat('y', n) FROM generate_series(1, 100) n")
            streamed = [row[0] for row in cursor]
        with c.cursor("back", scrollable=True) as cursor:
            cursor.execute("SELECT n FROM generate_series(1, 10) n")
            scrolled = [cursor.fetchmany(3), cursor.scroll(-2), cursor.fetchone(), cursor.fetchall()]
        c.commit()
        with c.cursor("held", withhold=True) as cursor:
            cursor.execute("SELECT n FROM generate_series(1, 4) n")
            c.commit()
            held = cursor.fetchall()
        stream = [row[0] for row in c.cursor().stream("SELECT generate_series(1, %s)", (50,))]
        return streamed, scrolled, held, stream


@behaviour
def copy_both_ways():
    with connect() as c:
        c.execute("CREATE TEMP TABLE t (id int, name text, raw bytea)")
        with c.cursor().copy("COPY t FROM STDIN") as copy:
            for n in range(2000):
                copy.write_row((n, f"name\t{n}\n\\", bytes([n % 256])))
        with c.cursor().copy("COPY t FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int4", "text", "bytea"])
            for n in range(100):
                copy.write_row((n, None, b""))
        cursor = c.cursor()
        with cursor.copy("COPY t FROM STDIN (FORMAT csv)") as copy:
            copy.write('1,"a ""quoted"" one",\\x00\n2,,\n')
        counted = cursor.statusmessage
        outs = []
        for options in ("", "(FORMAT csv, HEADER)", "(FORMAT binary)"):
            with c.cursor().copy(f"COPY (SELECT * FROM t ORDER BY id, name, raw) TO STDOUT {options}") as copy:
                content = b"".join(bytes(block) for block in copy)
            outs.append([len(content), hashlib.sha256(content).hexdigest()])
        with c.cursor().copy("COPY t FROM STDIN"):
            pass
        return counted, outs, c.execute("SELECT count(*) FROM t").fetchall()


@behaviour
def copy_failing():
    answers = []
    with connect() as c:
        c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY)")
        for statement, lines in (
            ("COPY t FROM STDIN", "1\nnot a number\n3\n"),
            ("COPY t FROM STDIN", "1\n1\n"),
            ("COPY t FROM STDIN (FORMAT binary)", b"rubbish"),
            ("COPY absent FROM STDIN", "1\n"),
            ("COPY t (absent) FROM STDIN", "1\n"),
            ("COPY absent TO STDOUT", None),
            ("COPY (SELECT 1/(5 - n) FROM generate_series(1, 9) n) TO STDOUT", None),
        ):
            try:
                with c.cursor().copy(statement) as copy:
                    if lines is None:
                        answers.append([bytes(block) for block in copy])
                    else:
                        for _ in range(3):
                            copy.write(lines)
                answers.append("did not fail")
            except psycopg.Error as error:
                answers.append(diagnosis(error))
            answers.append(pq.TransactionStatus(c.pgconn.transaction_status).name)
        try:
            with c.cursor().copy("COPY t FROM STDIN") as copy:
                copy.write("7\n")
                raise ValueError("the client changes its mind")
        except ValueError:
            answers.append(c.execute("SELECT * FROM t").fetchall())
        # Several in one simple query.
        p = c.pgconn
        p.send_query(b"COPY t FROM STDIN; SELECT 5; COPY (SELECT 6) TO STDOUT; SELECT 7")
        while (result := p.get_result()) is not None:
            status = pq.ExecStatus(result.status).name
            answers.append([status, result.command_status])
            if status == "COPY_IN":
                p.put_copy_data(b"70\n")
                p.put_copy_end()
            elif status == "COPY_OUT":
                while (block := p.get_copy_data(0))[0] > 0:
                    answers.append(bytes(block[1]))
    return answers


def cancelled(c, how="cancel_safe"):
    """A sleeping statement, cancelled once it runs; and the connection's use afterwards."""
    pid = c.execute("SELECT pg_backend_pid()").fetchone()[0]

    def cancel():
        with connect() as other:
            query = "SELECT state = 'active' AND query LIKE '%%pg_sleep%%' FROM pg_stat_activity WHERE pid = %s"
            eventually(lambda: other.execute(query, (pid,)).fetchone()[0])
        getattr(c, how)()

    thread = threading.Thread(target=cancel)
    thread.start()
    result = fails(c, "SELECT pg_sleep(60)")
    thread.join()
    return result


@behaviour
def cancel():
    with connect() as c:
        results = [cancelled(c), cancelled(c, "cancel")]
        # A cancel with nothing to cancel is without effect.
        c.cancel_safe()
        return results, c.execute("SELECT 1").fetchall()


@behaviour
def notices():
    with connect() as c:
        heard = []
        c.add_notice_handler(lambda diag: heard.append(diagnosis(diag)))
        c.execute(
            """DO $$ BEGIN
                 RAISE NOTICE 'a notice' USING HINT = 'a hint', DETAIL = 'a detail', COLUMN = 'c', TABLE = 't';
                 RAISE WARNING 'a warning'; RAISE INFO 'told'; RAISE LOG 'not told';
               END $$"""
        )
        c.execute("DROP TABLE IF EXISTS absent_table")
        c.execute("COMMIT")
        c.execute("SET client_min_messages = debug1")
        c.execute("DO $$ BEGIN RAISE DEBUG 'told now'; END $$")
        return heard


@behaviour
def listen_and_notify():
    with connect() as c, connect() as other:
        c.execute("LISTEN here; LISTEN \"Odd name\"")
        c.execute("NOTIFY here, 'from myself'")
        with other.transaction():
            other.execute("SELECT pg_notify('here', 'żółć'), pg_notify('Odd name', repeat('z', 7000)), pg_notify('none', '')")
        heard = list(c.notifies(timeout=60, stop_after=3))
        pids = {c.info.backend_pid: "own", other.info.backend_pid: "other"}
        c.execute("UNLISTEN *")
        return [[n.channel, n.payload, pids.get(n.pid)] for n in heard], fails(c, "SELECT pg_notify('', 'x')")


@behaviour
def parameter_changes_are_reported():
    with connect() as c:
        seen = []
        for statement in (
            "SET client_encoding = 'LATIN1'", "SET TimeZone = 'Asia/Kathmandu'", "SET application_name = 'changed'",
            "SET DateStyle = 'German'", "SET IntervalStyle = 'iso_8601'", "SET standard_conforming_strings = off",
            "BEGIN", "SET LOCAL TimeZone = 'UTC'", "ROLLBACK", "RESET ALL", "SET default_transaction_read_only = on",
            "SELECT set_config('TimeZone', 'Europe/Paris', false)", "DISCARD ALL",
        ):  # fmt: skip
            c.execute(statement)
            names = ("client_encoding", "TimeZone", "application_name", "DateStyle", "IntervalStyle",
                     "standard_conforming_strings", "default_transaction_read_only")  # fmt: skip
            seen.append([statement, [c.info.parameter_status(name) for name in names]])
        return seen


@behaviour
def client_encodings_byte_for_byte():
    answers = []
    text = {"LATIN1": "Grüße", "SJIS": "表ソ十能", "EUC_JP": "日本語", "WIN1252": "€uro", "BIG5": "功能", "GB18030": "漢字€"}
    with connect() as c:
        for encoding, word in text.items():
            raw = word.encode({"WIN1252": "cp1252"}.get(encoding, encoding))
            c.execute(f"SET client_encoding = '{encoding}'")
            p = c.pgconn
            # SJIS and BIG5 have bytes inside characters that look like a backslash or a quote.
            for result in (
                p.exec_(b"SELECT '" + raw + b"' AS \"" + raw + b'"'),
                p.exec_params(b"SELECT $1::text, octet_length($1::text)", [raw]),
                p.exec_(b"SELECT no_" + raw + b" FROM \"" + raw + b'"'),
            ):
                answers.append(
                    [
                        encoding,
                        [result.fname(f) for f in range(result.nfields)],
                        [[result.get_value(r, f) for f in range(result.nfields)] for r in range(result.ntuples)],
                        result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY),
                    ]
                )
        c.execute("SET client_encoding = 'UTF8'")
        answers.append(fails(c, "SELECT convert_from('\\xff', 'UTF8')"))
        result = c.pgconn.exec_(b"SELECT '\xff\xfe'")
        answers.append([result.error_field(pq.DiagnosticField.SQLSTATE), result.error_message])
    return answers


@behaviour
def errors_in_full():
    with connect() as c:
        c.execute(
            """CREATE TEMP TABLE t (id int PRIMARY KEY, positive int CHECK (positive > 0), needed text NOT NULL,
                                    parent int REFERENCES t)"""
        )
        c.execute("INSERT INTO t VALUES (1, 1, '')")
        return [
            fails(c, statement)
            for statement in (
                "SELEC 1", "SELECT 'żółć', absent FROM t", "SELECT 1/0", "INSERT INTO t VALUES (1, 1, '')",
                "INSERT INTO t VALUES (2, -1, '')", "INSERT INTO t VALUES (2, 1, NULL)", "INSERT INTO t VALUES (2, 1, '', 7)",
                "SELECT 'x'::int", "SELECT * FROM absent.absent", "SELECT no_function(1)", "COMMIT PREPARED 'absent'",
                "DO $$ BEGIN PERFORM 1/0; END $$", "SELECT set_config('work_mem', 'lots', false)", "SET ROLE no_such_role",
                "SELECT pg_read_file('/etc/passwd')", "LOCK TABLE t", "SELECT 1 WHERE", "CREATE TABLE t (a int, a int)",
            )
        ]  # fmt: skip


@behaviour
def refused_connections():
    return {
        "wrong password": refused(password="wrong"),
        "no password": refused(password="", passfile="/nonexistent"),
        "unknown role": refused(user="no_such_role"),
        "unknown database": refused(dbname="no_such_database"),
        "both unknown": refused(user="no_such_role", dbname="no_such_database"),
        "wrong password for unknown database": refused(password="wrong", dbname="no_such_database"),
    }


@behaviour
def a_name_longer_than_names_can_be():
    return refused(dbname="x" * 300)


@behaviour
def transactions_and_savepoints():
    with connect() as c:
        c.execute("CREATE TEMP TABLE t (id int PRIMARY KEY)")
        seen = []

        def step(statement):
            failed = None
            try:
                status = c.execute(statement).statusmessage
            except psycopg.Error as error:
                status, failed = None, error.sqlstate
            seen.append([statement, status, failed, pq.TransactionStatus(c.pgconn.transaction_status).name])

        for statement in (
            "BEGIN", "INSERT INTO t VALUES (1)", "SAVEPOINT a", "INSERT INTO t VALUES (1)", "SELECT 1", "ROLLBACK TO a",
            "INSERT INTO t VALUES (2)", "SAVEPOINT b", "RELEASE a", "ROLLBACK TO b", "ROLLBACK", "BEGIN", "BEGIN",
            "INSERT INTO t VALUES (3)", "SELECT 1/0", "COMMIT", "COMMIT", "START TRANSACTION READ ONLY",
            "CREATE TABLE in_read_only (a int)", "END", "BEGIN ISOLATION LEVEL SERIALIZABLE", "SHOW transaction_isolation",
            "COMMIT AND CHAIN", "SHOW transaction_isolation", "ROLLBACK AND NO CHAIN", "ABORT", "SAVEPOINT outside",
            "BEGIN; INSERT INTO t VALUES (5); COMMIT; INSERT INTO t VALUES (6); ROLLBACK", "SELECT count(*) FROM t",
        ):  # fmt: skip
            step(statement)
        with c.transaction():
            c.execute("INSERT INTO t VALUES (10)")
            try:
                with c.transaction():
                    c.execute("INSERT INTO t VALUES (10)")
            except psycopg.errors.UniqueViolation:
                pass
        return seen, c.execute("SELECT * FROM t ORDER BY 1").fetchall()


@behaviour
def failing_commit():
    with connect() as c:
        c.execute("CREATE TEMP TABLE t (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        c.execute("BEGIN; INSERT INTO t VALUES (1), (1)")
        return fails(c, "COMMIT"), pq.TransactionStatus(c.pgconn.transaction_status).name


@behaviour
def two_phase_commit():
    answers = []
    with connect() as watcher:
        watcher.execute("DROP TABLE IF EXISTS two_phase; CREATE TABLE two_phase (id int)")
        for ending in ("tpc_commit", "tpc_rollback"):
            for by_another_session in (False, True):
                xid = watcher.xid(1, f"pgtandem {ending}", "branch")
                with contextlib.closing(connect(autocommit=False)) as c:
                    c.tpc_begin(xid)
                    c.execute("INSERT INTO two_phase VALUES (1)")
                    c.tpc_prepare()
                    waiting = [x for x in watcher.tpc_recover() if x.gtrid == xid.gtrid]
                    answers.append([(x.format_id, x.gtrid, x.bqual, x.owner, x.database) for x in waiting])
                    if by_another_session:
                        getattr(watcher, ending)(waiting[0])
                    else:
                        getattr(c, ending)()
                answers.append(watcher.execute("SELECT count(*) FROM two_phase").fetchall())
        answers.append(fails(watcher, "COMMIT PREPARED 'absent'"))
        watcher.execute("DROP TABLE two_phase")
    return answers


@behaviour
def timeouts():
    with connect() as c, connect() as other:
        c.execute("CREATE TABLE IF NOT EXISTS to_lock (id int)")
        statement = fails(c, "SET statement_timeout = '20ms'; SELECT pg_sleep(60)")
        c.execute("RESET statement_timeout")
        with other.transaction():
            other.execute("LOCK TABLE to_lock")
            lock = fails(c, "SET lock_timeout = '20ms'; SELECT * FROM to_lock")
            nowait = fails(c, "LOCK TABLE to_lock NOWAIT")
        c.execute("DROP TABLE to_lock")
        return statement, lock, nowait


@behaviour
def ended_by_the_server():
    """FATAL in mid-session: by another session, and by timeouts of idleness."""
    answers = []
    with connect() as c, connect() as other:
        other.execute("SELECT pg_terminate_backend(%s, 10000)", (c.info.backend_pid,))
        answers.append([fails(c, "SELECT 1"), c.closed])
    for setting in ("idle_session_timeout", "idle_in_transaction_session_timeout"):
        c = connect()
        c.execute(f"SET {setting} = '20ms'")
        if "transaction" in setting:
            c.execute("BEGIN")
        with connect() as other:
            query = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s"
            eventually(lambda: other.execute(query, (c.info.backend_pid,)).fetchone()[0])
        answers.append([fails(c, "SELECT 1"), c.closed])
    with connect() as c:
        answers.append([fails(c, "SELECT pg_terminate_backend(pg_backend_pid())"), c.closed])
    return answers


@behaviour
def large_values():
    """64 MB as one parameter and as one column; many wide rows."""
    with connect() as c:
        big = bytes(range(256)) * (64 * 1024 * 4)
        digest = hashlib.md5(big).hexdigest()
        there = c.execute("SELECT md5(%b), length(%b)", (big, b"x")).fetchone()
        back = c.execute("SELECT decode(repeat('00ff', 32 * 1024 * 1024), 'hex')", binary=True).fetchone()[0]
        wide = c.execute("SELECT sum(length(x)) FROM (SELECT repeat('w', 100000) AS x FROM generate_series(1, 50)) s").fetchone()
        many = 0
        for (text,) in c.cursor().stream("SELECT repeat('v', 1000) FROM generate_series(1, 20000)"):
            many += len(text)
        return there[0] == digest, there, len(back), hashlib.md5(back).hexdigest(), wide, many


@behaviour
def wide_and_empty_shapes():
    with connect() as c:
        columns = c.execute("SELECT " + ", ".join(f"{n} AS c{n}" for n in range(1600))).fetchone()
        none = c.execute("SELECT FROM generate_series(1, 3)")
        parameters = c.execute("SELECT " + " + ".join(["%b::int"] * 3000), [1] * 3000).fetchone()
        return sum(columns), none.rowcount, parameters, fails(c, "SELECT " + ", ".join("1" for _ in range(1665)))


@behaviour
def session_state():
    with connect() as c:
        answers = []
        for statement in (
            "CREATE TEMP TABLE t (a int)", "INSERT INTO t VALUES (1)", "SELECT pg_try_advisory_lock(42)",
            "SELECT pg_advisory_unlock(42)", "SELECT pg_advisory_unlock(42)", "SET SESSION AUTHORIZATION DEFAULT",
            "SELECT current_user, session_user, current_database(), current_setting('application_name')",
            "SELECT currval('no_such')", "CREATE TEMP SEQUENCE s", "SELECT nextval('s'), lastval()", "DISCARD ALL",
            "SELECT count(*) FROM pg_prepared_statements", "SELECT * FROM t", "CALL no_such()", "SHOW is_superuser",
            "EXPLAIN (COSTS off) SELECT 1", "VACUUM", "CHECKPOINT",
        ):  # fmt: skip
            try:
                answers.append(rows(c.execute(statement)))
            except psycopg.Error as error:
                answers.append(diagnosis(error))
        return answers


@behaviour
def results_in_chunks():
    """Single row mode and chunks, with an error after some rows."""
    with connect() as c:
        p = c.pgconn
        answers = []
        for mode in ("set_single_row_mode", "set_chunked_rows_mode"):
            if not hasattr(p, mode):
                continue
            p.send_query(b"SELECT 10 / (4 - n) FROM generate_series(1, 9) n; SELECT 2")
            getattr(p, mode)(*([2] if "chunked" in mode else []))
            while (result := p.get_result()) is not None:
                answers.append([pq.ExecStatus(result.status).name, result.ntuples])
        return answers


@behaviour
def tls_modes():
    answers = {}
    for mode in ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"):
        for host in ("localhost", "127.0.0.1"):
            try:
                with connect(sslmode=mode, sslrootcert=common.TLS_ROOT, host=host, hostaddr="127.0.0.1", gssencmode="disable") as c:
                    answers[f"{mode} {host}"] = [c.pgconn.ssl_in_use, c.execute("SELECT 1").fetchall(), cancelled(c)["sqlstate"]]
            except psycopg.OperationalError as error:
                answers[f"{mode} {host}"] = str(error).split("failed: ")[-1]
    return answers


@behaviour
def tls_direct_negotiation():
    # Postgres 17 and newer take TLS from the first byte; older servers drop the connection.
    with connect(sslmode="require", sslrootcert=common.TLS_ROOT, sslnegotiation="postgres") as c:
        return c.pgconn.ssl_in_use, c.execute("SELECT repeat('t', 1000000)").fetchone()[0] == "t" * 1000000


@behaviour
def tls_refused_connections():
    return refused(sslmode="require", password="wrong"), refused(sslmode="require", dbname="no_such_database")


if __name__ == "__main__":
    for function in common.selected():
        try:
            common.record(function.__name__, function())
        except Exception as error:  # noqa: BLE001: whatever it is, the test shows it
            common.record_unexpected(function.__name__, error)
