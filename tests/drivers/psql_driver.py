"""psql: libpq as most people meet it. Each behaviour is a script, and its result all that psql
prints and its exit code. The psql of the server's version, and the newest for protocol 3.2."""

import os
import re
import signal
import subprocess
import tempfile
import time

import common
from common import DBNAME, HOST, PASSWORD, PORT, USER

PSQL = os.environ["DRIVER_PSQL"]
PSQL_NEWEST = os.environ["DRIVER_PSQL_NEWEST"]

scratch = tempfile.TemporaryDirectory()


def command(psql=PSQL, **options):
    settings = {"host": HOST, "port": PORT, "user": USER, "dbname": DBNAME, "sslmode": "disable", "connect_timeout": 60}
    settings.update(options)
    conninfo = " ".join(f"{name}='{value}'" for name, value in settings.items())
    return [psql, "--no-psqlrc", "--no-password", "--dbname", conninfo]


ENVIRONMENT = {"PGPASSWORD": PASSWORD, "LC_ALL": "C", "HOME": "/", "PATH": os.environ["PATH"]}


def canonical(output):
    text = output.decode("latin-1")
    text = text.replace(scratch.name, "SCRATCH")
    text = re.sub(r"psql:.*?:(\d+):", r"psql:\1:", text)
    # Whoever refuses a connection need not do so in the same line of C.
    if "FATAL" in text and "connection to server" in text:
        text = re.sub(r"LOCATION:.*\n", "", text)
    text = re.sub(r"server process with PID \d+", "server process with PID N", text)
    text = re.sub(r"\b(lo_import|lo_unlink) \d+", r"\1 N", text)
    text = re.sub(r"(Backend PID +\| )\d+", r"\1N", text)
    text = re.sub(r"Time: [\d.,]+ ms( \([\d:.]+\))?", "Time: T", text)
    return text


def run(script, psql=PSQL, arguments=(), environment=None, **options):
    done = subprocess.run(
        [*command(psql, **options), *arguments],
        input=script if isinstance(script, bytes) else script.encode(),
        capture_output=True,
        env={**ENVIRONMENT, **(environment or {})},
    )
    return {"out": canonical(done.stdout), "err": canonical(done.stderr), "exit": done.returncode}


# name: (script, arguments of run)
SCRIPTS = {
    "formats": ("SELECT 1 AS a, NULL AS b, 'x' AS c;\nSELECT;\nSELECT 1 WHERE false;\nTABLE pg_am;", {"arguments": ["-c", "\\x", "-f", "-"]}),
    "connection_info": (
        "\\echo :USER :DBNAME :HOST :ENCODING :SERVER_VERSION_NAME :SERVER_VERSION_NUM\nSHOW server_version;\nSELECT current_user;",
        {},
    ),
    "many_statements_in_one": ("SELECT 1\\; SELECT 2\\; SELECT 1/0\\; SELECT 3;\n", {"arguments": ["-v", "SHOW_ALL_RESULTS=1"]}),
    "many_by_c": ("", {"arguments": ["-c", "SELECT 1; SELECT 2; CREATE TEMP TABLE t (); SELECT 'end'"]}),
    "single_transaction": (
        "CREATE TABLE of_psql (a int);\nINSERT INTO of_psql VALUES (1);\nSELECT 1/0;\nSELECT 2;",
        {"arguments": ["-1", "-v", "ON_ERROR_STOP=1", "-f", "-"]},
    ),
    "errors_verbose": (
        "\\set VERBOSITY verbose\nSELEC 1;\nSELECT 'żółć' || absent FROM pg_class;\nSELECT 1/0;\n"
        "CREATE TEMP TABLE t (id int PRIMARY KEY, CHECK (id < 5));\nINSERT INTO t VALUES (1), (1);\nINSERT INTO t VALUES (7);\n"
        "SELECT * FROM\n  absent\nWHERE true;\n\\errverbose\n",
        {},
    ),
    "notices": (
        "\\set VERBOSITY verbose\nDO $$ BEGIN RAISE NOTICE 'n' USING HINT = 'h', DETAIL = 'd'; RAISE WARNING 'w'; RAISE INFO 'i'; END $$;\n"
        "DROP TABLE IF EXISTS absent;\nCOMMIT;\nSET client_min_messages = debug5;\nSELECT 1;",
        {"arguments": ["-q"]},
    ),
    "transactions_in_the_prompt": (
        "\\set AUTOCOMMIT off\nSELECT 1;\n\\echo :SQLSTATE\nSELECT 1/0;\nSELECT 2;\nROLLBACK;\n\\set AUTOCOMMIT on\n"
        "\\set ON_ERROR_ROLLBACK on\nBEGIN;\nSELECT 1/0;\nSELECT 3;\nCOMMIT;\n\\echo :ERROR :ROW_COUNT :LAST_ERROR_SQLSTATE\n",
        {},
    ),
    "copy": (
        "CREATE TEMP TABLE t (a int, b text);\nCOPY t FROM STDIN;\n1\tone\n2\t\\N\n\\.\nCOPY t FROM STDIN (FORMAT csv);\n3,\"three\nlines\"\n\\.\n"
        "COPY t TO STDOUT;\nCOPY t TO STDOUT (FORMAT csv, HEADER);\n\\copy t to SCRATCH/out\n\\copy t from SCRATCH/out\n"
        "\\copy (SELECT count(*) FROM t) to stdout\n\\copy t to program 'cat > /dev/null'\n",
        {},
    ),
    "copy_failing": (
        "CREATE TEMP TABLE t (a int PRIMARY KEY);\nCOPY t FROM STDIN;\n1\nx\n3\n\\.\nSELECT count(*) FROM t;\nCOPY t FROM STDIN;\n5\n5\n\\.\n"
        "COPY absent TO STDOUT;\nCOPY t FROM '/etc/passwd';\n\\copy t from /nonexistent\n\\copy absent from stdin\n1\n\\.\n"
        "SELECT 'still here';\nCOPY (SELECT 1/(3-n) FROM generate_series(1,5) n) TO STDOUT;\nSELECT 'here too';",
        {},
    ),
    "copy_and_queries_in_one": (
        "CREATE TEMP TABLE t (a int);\nSELECT 1\\; COPY t FROM STDIN\\; SELECT 2\\; COPY t TO STDOUT\\; SELECT 3;\n1\n2\n\\.\nSELECT 4;",
        {"arguments": ["-v", "SHOW_ALL_RESULTS=1"]},
    ),
    "fetch_count": ("\\set FETCH_COUNT 7\nSELECT n, 10 / (15 - n) FROM generate_series(1, 20) n;\nSELECT n FROM generate_series(1, 20) n;", {}),
    "describes": ("CREATE TEMP TABLE d (a int PRIMARY KEY, b text DEFAULT 'x');\n\\d d\n\\gdesc\nSELECT a, b FROM d \\gdesc\n\\encoding\n\\conninfo\n", {}),
    "gexec_gset_crosstab": (
        "SELECT format('SELECT %s AS n', n) FROM generate_series(1, 3) n \\gexec\nSELECT 7 AS seven \\gset\n\\echo :seven\n"
        "SELECT a, b, a * b FROM generate_series(1,2) a, generate_series(1,2) b \\crosstabview\n",
        {},
    ),
    "timing_and_pager": ("\\timing on\nSELECT 1;\n\\pset format html\nSELECT '<&>';\n\\pset format csv\nSELECT 'a,b';\n", {}),
    "large_objects_by_fastpath": (
        "\\! printf 'large\\0object' > SCRATCH/lo\n\\lo_import SCRATCH/lo 'comment'\n\\set oid :LASTOID\nSELECT length(lo_get(:oid));\n"
        "\\lo_export :oid SCRATCH/back\n\\! cmp SCRATCH/lo SCRATCH/back && echo same\n\\lo_unlink :oid\n\\lo_unlink 1\n\\lo_export 1 SCRATCH/none\n"
        "BEGIN;\n\\lo_import /nonexistent\n\\lo_unlink 1\nSELECT 1;\nROLLBACK;\n",
        {},
    ),
    "listen_and_notify": ("LISTEN here;\nNOTIFY here, 'a payload';\nSELECT 1;\nUNLISTEN here;\nNOTIFY here, 'unheard';\nSELECT 2;", {}),
    "reconnects": ("SELECT 1;\n\\connect -reuse-previous=on dbname=OTHER\nSELECT current_database();", {}),
    "latin1": (b"\\encoding LATIN1\nSELECT 'Gr\xfc\xdfe', length('Gr\xfc\xdfe') AS \"\xfc\";\nSELECT \xfc;\nSELECT E'\xe6\xbc';\n", {}),
    "sjis": (b"\\encoding SJIS\nSELECT '\x95\x5c\x83\x5c' AS \"\x95\x5c\";\nSELECT '\x83\x5c', no_\x83\x5c;\n", {}),
    "sql_ascii": (b"\\encoding SQL_ASCII\nSELECT '\xfc';\nSELECT 'ok', '\xc3\xbc';\n", {"environment": {"PGCLIENTENCODING": "SQL_ASCII"}}),
    "encoding_by_environment": (b"SELECT 'Gr\xfc\xdfe';\nSHOW client_encoding;\n", {"environment": {"PGCLIENTENCODING": "WIN1252", "PGAPPNAME": "psql \xfc"}}),
    "environment_options": (
        "SHOW work_mem;\nSHOW DateStyle;\nSHOW TimeZone;\nSHOW geqo;\nSHOW application_name;\nSHOW search_path;",
        {"options": "-c work_mem=9MB -c search_path=a,public", "application_name": "the shop",
         "environment": {"PGDATESTYLE": "German", "PGTZ": "Asia/Tokyo", "PGGEQO": "off"}},
    ),
    "ended_by_itself": ("SELECT pg_terminate_backend(pg_backend_pid());\nSELECT 'connected again';", {}),
    "statement_timeout": ("SET statement_timeout = '20ms';\nSELECT pg_sleep(60);\nSELECT 1;", {"arguments": ["-v", "VERBOSITY=verbose"]}),
    "wrong_password": ("", {"environment": {"PGPASSWORD": "wrong"}}),
    "no_password": ("", {"environment": {"PGPASSWORD": ""}}),
    "unknown_role": ("", {"user": "no_such_role"}),
    "unknown_database": ("", {"dbname": "no_such_database"}),
    "unknown_option": ("", {"options": "-c no_such_setting=1"}),
    "bad_option_value": ("", {"options": "-c work_mem=lots"}),
    "require_auth_scram": ("SELECT 1", {"psql": PSQL_NEWEST, "require_auth": "scram-sha-256"}),
    "require_auth_md5": ("SELECT 1", {"psql": PSQL_NEWEST, "require_auth": "md5"}),
    "protocol_3_2": ("\\conninfo\nSELECT 1;", {"psql": PSQL_NEWEST, "min_protocol_version": "3.2", "max_protocol_version": "3.2"}),
    "protocol_latest": ("SELECT 1;\n\\bind 7 'x' \\g\nSELECT $1::int + 1, $2 \\bind 7 'x' \\g", {"psql": PSQL_NEWEST, "max_protocol_version": "latest"}),
    "pipelines": (
        "\\startpipeline\nSELECT $1 \\bind 1 \\sendpipeline\nSELECT 1/$1::int \\bind 0 \\sendpipeline\nSELECT 'skipped' \\bind \\sendpipeline\n"
        "\\syncpipeline\nSELECT $1 AS one \\parse one\n\\bind_named one 'named' \\sendpipeline\n\\flushrequest\n\\getresults\n"
        "\\close_prepared one\n\\endpipeline\nSELECT 'after';",
        {"psql": PSQL_NEWEST},
    ),
    "a_long_answer": ("SELECT repeat(md5(n::text), 300) FROM generate_series(1, 3000) n \\g SCRATCH/long\n\\! md5sum < SCRATCH/long\n", {"arguments": ["-At"]}),
    "a_long_statement": ("SELECT md5('" + "long " * 1_000_000 + "');", {"arguments": ["-At"]}),
    "ipv4_and_unix_names": ("SELECT 1", {"host": "localhost", "hostaddr": HOST, "target_session_attrs": "read-write"}),
    "standby_wanted": ("SELECT 1", {"target_session_attrs": "standby"}),
}  # fmt: skip


def interrupted(psql=PSQL, **options):
    """Ctrl-C while a statement runs: psql sends a CancelRequest and goes on."""
    name = f"interrupted {os.getpid()}"
    psql = subprocess.Popen(
        command(psql, application_name=name, **options),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    psql.stdin.write(b"SELECT pg_sleep(60);\nSELECT 'and goes on';\n")
    psql.stdin.flush()
    query = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}' AND state = 'active' AND query LIKE '%pg_sleep%'"
    while run(query, arguments=["-At"])["out"] != "1\n":
        time.sleep(0.01)
    psql.send_signal(signal.SIGINT)
    out, err = psql.communicate()
    return [canonical(out), canonical(err), psql.returncode]


def tls():
    for mode in ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"):
        options = {"sslmode": mode, "sslrootcert": common.TLS_ROOT, "hostaddr": HOST}
        for host in ("localhost", "127.0.0.1"):
            common.record(f"tls {mode} {host}", run("SELECT 1;\n\\echo :HOST", host=host, **options))
    options = {"sslrootcert": common.TLS_ROOT, "sslmode": "verify-full", "host": "localhost"}
    # What psql says of the encryption it got.
    said = run("\\conninfo", **options)["out"]
    common.record("tls conninfo", re.findall(r"TLSv[\d.]+", said))
    common.record("tls wrong root", run("SELECT 1", sslmode="verify-ca", sslrootcert="/etc/hostname"))
    common.record("tls copy", run("COPY (SELECT repeat('t', 1000) FROM generate_series(1, 1000)) TO STDOUT", **options)["out"] == ("t" * 1000 + "\n") * 1000)
    common.record("tls wrong password", run("", environment={"PGPASSWORD": "wrong"}, **options))
    common.record("tls interrupted", interrupted(**options))


def main():
    if common.TLS_ROOT:
        return tls()
    for name, (script, options) in SCRIPTS.items():
        if isinstance(script, str):
            script = script.replace("SCRATCH", scratch.name).replace("OTHER", os.environ["DRIVER_OTHER_DBNAME"])
        common.record(name, run(script, **options))
    common.record("interrupted", interrupted())
    common.record("interrupted_3_2", interrupted(psql=PSQL_NEWEST, max_protocol_version="latest"))


main()
