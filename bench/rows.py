"""Existing rows: how fast both sides are compared, beside hashing the whole table in psql."""

import json
import statistics
import subprocess
import threading
import time

from machinery import PROXY, Pgtandem, environment, peak_memory_mb

PLANTED = 100
# Of the sort that people have: numbers, text, a time, a null now and then. 10 million rows: 1.1 GB.
TABLE = """CREATE TABLE rows (id bigint PRIMARY KEY, customer int NOT NULL, note text, total numeric(12, 2), at timestamptz NOT NULL)"""
FILL = """INSERT INTO rows SELECT i, i % 10007, CASE WHEN i % 10 > 0 THEN md5(i::text) END, (i % 100000) / 7.0,
    timestamptz '2024-01-01' + i * interval '1 second' FROM generate_series(1, {rows}) i"""
HASH = "SELECT sum(hashtext(t::text)) FROM rows AS t"


def verify(bench):
    """`pgtandem verify` of a large table against hashing it whole on both servers at once; without
    and with planted differences; and the proxy's peak memory."""
    rows = bench.options.rows
    dbname = "existing"
    print(f"\nverify: a table of {rows} rows on both sides", flush=True)
    for server in (bench.legacy, bench.new):
        server.create_database(dbname)
        server.sql(TABLE, dbname)
        server.sql(FILL.format(rows=rows), dbname)
        server.sql("VACUUM ANALYZE rows", dbname)
    proxy = Pgtandem(bench.workshop, bench.program, bench.legacy, bench.new, dbname, "dual_write", name="verify")
    # It compares by itself what was there before; the figures come after that.
    proxy.wait_caught_up(300)
    wait_synced(bench, dbname)

    runs = {"hashed": [], "equal": [], "planted": []}
    for repetition in range(bench.options.repetitions):
        runs["hashed"].append(hash_both(bench, dbname))
        runs["equal"].append(timed_verify(proxy, 0))
        plant(bench, dbname, rows, repetition)
        runs["planted"].append(timed_verify(proxy, PLANTED))
        mend(proxy)
    medians = {name: statistics.median(seconds) for name, seconds in runs.items()}
    peak = peak_memory_mb(proxy.process)
    speed, cost = medians["hashed"] / medians["equal"], medians["planted"] / medians["equal"]
    print(f"  hashed whole on both at once {medians['hashed']:.1f} s; verify {medians['equal']:.1f} s ({rows / medians['equal']:.0f} rows/s, {speed:.2f} times as fast)")
    print(f"  with {PLANTED} planted differences {medians['planted']:.1f} s ({cost:.2f} of without); the proxy's peak memory {peak:.0f} MB", flush=True)
    bench.report.mirroring["verify"] = {"rows": rows, "seconds": medians, "peak_memory_mb": peak}
    bench.report.target("verify, no differences, times as fast as sum(hashtext(t::text)) on both at once", speed, 1.0, False)
    bench.report.target(f"verify with {PLANTED} differences, of without", cost, 1.2, True)
    bench.report.target("memory of the process during verify, MB", peak, 256, True, "{:.0f}")


def wait_synced(bench, dbname):
    until = time.monotonic() + 600
    while bench.new.sql("SELECT state FROM pgtandem.seeding", dbname) != "synced":
        if time.monotonic() > until:
            raise SystemExit("bench: the table was not found equal at the start")
        time.sleep(0.2)


def hash_both(bench, dbname):
    found = {}
    began = time.monotonic()
    threads = [
        threading.Thread(target=lambda server=server: found.__setitem__(server.name, server.sql(HASH, dbname)))
        for server in (bench.legacy, bench.new)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    if len(found) != 2:
        raise SystemExit("bench: hashing a table failed")
    return took


def timed_verify(proxy, differing):
    began = time.monotonic()
    command = [proxy.program, "verify", "--table", "rows", "--json", "--config", proxy.config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment())
    took = time.monotonic() - began
    events = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode not in (0, 1) or events[-1]["event"] != "done":
        raise SystemExit(f"bench: pgtandem verify: {done.stdout[-2000:]}{done.stderr}")
    found = sum(events[-1]["report"]["tables"][0]["differing"].values())
    if found != differing:
        raise SystemExit(f"bench: verify found {found} rows different, {differing} were planted")
    return took


def plant(bench, dbname, rows, repetition):
    """Spread over the whole table: as many ranges as there can be have one."""
    bench.new.sql(
        f"SET session_replication_role = replica; SET SESSION AUTHORIZATION {PROXY}; UPDATE rows SET customer = -1"
        f" WHERE id = ANY (ARRAY(SELECT {repetition + 1} + i * {rows // PLANTED} FROM generate_series(0, {PLANTED - 1}) i)::bigint[])",
        dbname,
    )


def mend(proxy):
    done = subprocess.run([proxy.program, "repair", "--config", proxy.config], capture_output=True, text=True, timeout=1800, env=environment())
    if done.returncode != 0:
        raise SystemExit(f"bench: pgtandem repair: {done.stdout}{done.stderr}")
