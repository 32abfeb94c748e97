"""Existing rows: how fast they are brought over, beside psql's COPY into psql's COPY, what writers
notice of it, and how much memory it takes."""

import json
import subprocess
import threading
import time

from load import measure
from machinery import CLIENT, Pgtandem, environment, peak_memory_mb

COLUMNS = "(id bigint PRIMARY KEY, n int NOT NULL, name text NOT NULL, at timestamptz NOT NULL, amount numeric(12,2))"
ROWS = (
    "SELECT i, i % 1000, md5(i::text), '2020-01-01'::timestamptz + i * interval '1 second', (i % 100000) / 7.0"
    " FROM generate_series(1, {rows}) i"
)
DBNAME = "existing"
# Writers that leave the machine some room: at its limit, the latency would be that of the queue.
WRITERS, RATE = 4, 200


def backfill(bench):
    rows = 200_000 if bench.options.quick else bench.options.rows
    print(f"\nexisting rows: a table of {rows}, with its key on both sides", flush=True)
    fill(bench, rows)
    piped = pipe(bench)
    print(f"  psql COPY | psql COPY: {piped:.1f} s, {rows / piped:.0f} rows/s", flush=True)

    proxy = Pgtandem(bench.workshop, bench.program, bench.legacy, bench.new, DBNAME, "dual_write", name="existing")
    compared(bench)
    results = {"rows": rows, "piped_seconds": piped}
    for workers, limit in ((1, 0.8), (2, 1.5)):
        took = copied(bench, proxy, f"existing_{workers}", workers, rows)
        results[f"seconds_{workers}"] = took
        print(f"  pgtandem backfill, {workers} worker{'s' if workers > 1 else ''}: {took:.1f} s, {rows / took:.0f} rows/s ({piped / took:.2f})", flush=True)
        bench.report.target(f"backfill with {workers} worker{'s' if workers > 1 else ''}, of psql COPY | psql COPY: rows a second", piped / took, limit, False)

    alone, during = writers(bench, proxy, rows)
    results["writers_p99_ms"] = [alone, during]
    print(f"  writers at {RATE} updates/s on the table that is copied: p99 {alone:.2f} ms without, {during:.2f} ms during it", flush=True)
    bench.report.target("writers' p99 during a backfill, of without", during / alone, 1.5, True)

    peak = peak_memory_mb(proxy.process)
    results["peak_mb"] = peak
    print(f"  the proxy's memory at its peak: {peak:.0f} MB", flush=True)
    bench.report.target("the proxy's peak memory over the backfills, MB", peak, 256, True, "{:.0f}")
    proxy.wait_caught_up(300)
    results["rows_different"] = different = rows_different(bench)
    bench.report.target("backfill: rows different afterwards", different, 0, True, "{:.0f}")
    bench.report.mirroring["backfill"] = results
    bench.workshop.stop(proxy.process)


NAMES = ("existing_1", "existing_2", "existing_writers")


def fill(bench, rows):
    for server in (bench.legacy, bench.new):
        server.create_database(DBNAME)
        for name in NAMES:
            server.sql(f"CREATE TABLE {name} {COLUMNS}; ALTER TABLE {name} OWNER TO {CLIENT}", DBNAME)
    bench.new.create_database("piped")
    bench.new.sql(f"CREATE TABLE existing_1 {COLUMNS}", "piped")
    for name in NAMES:
        bench.legacy.sql(f"INSERT INTO {name} {ROWS.format(rows=rows)}", DBNAME)
    bench.legacy.sql("VACUUM ANALYZE", DBNAME)
    # What filling has left to write must not slow down the first one that is measured.
    for server in (bench.legacy, bench.new):
        server.sql("CHECKPOINT")


def pipe(bench):
    def psql(server, dbname, statement):
        return [f"{server.binaries}/psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-d", server.conninfo("postgres", dbname), "-c", statement]

    began = time.monotonic()
    out = subprocess.Popen(psql(bench.legacy, DBNAME, "COPY existing_1 TO STDOUT"), stdout=subprocess.PIPE, env=environment())
    into = subprocess.run(psql(bench.new, "piped", "COPY existing_1 FROM STDIN"), stdin=out.stdout, env=environment())
    if out.wait() != 0 or into.returncode != 0:
        raise SystemExit("bench: psql COPY | psql COPY failed")
    return time.monotonic() - began


def compared(bench):
    """A proxy that starts compares such tables once, to see whether they are equal already."""
    time.sleep(1)
    while any(
        server.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgtandem verify'", DBNAME) != "0"
        for server in (bench.legacy, bench.new)
    ):
        time.sleep(0.2)


def copied(bench, proxy, name, workers, rows):
    bench.new.sql("CHECKPOINT")
    began = time.monotonic()
    command = [bench.program, "backfill", "--json", "--table", name, "--workers", str(workers), "--config", proxy.config]
    done = subprocess.run(command, capture_output=True, text=True)
    took = time.monotonic() - began
    lines = done.stdout.strip().split("\n")
    status = json.loads(lines[-1])["databases"][DBNAME] if done.returncode == 0 else None
    if not status or status["read"] < rows:
        raise SystemExit(f"bench: pgtandem backfill: {done.stdout[-2000:]}{done.stderr}\n{open(proxy.process.log).read()[-2000:]}")
    return took


def writers(bench, proxy, rows):
    seconds = bench.options.both_seconds
    extra = ["-D", f"rows={rows}", "-R", str(RATE)]

    def p99():
        return measure(bench.pgbench, proxy.port, DBNAME, "existing", "prepared", WRITERS, seconds, bench.directory, extra=extra).p99_ms

    alone = p99()
    copying = threading.Thread(target=copied, args=(bench, proxy, "existing_writers", 2, rows))
    copying.start()
    during = p99()
    if not copying.is_alive():
        print("  (the backfill was over before the writers were: more rows make a better figure)")
    copying.join()
    return alone, during


def rows_different(bench):
    different = 0
    for name in NAMES:
        digest = f"SELECT count(*), sum(hashtextextended(t::text, 0)::numeric) FROM {name} t"
        one, other = (server.sql(digest, DBNAME).split("|") for server in (bench.legacy, bench.new))
        if one != other:
            different += max(1, abs(int(one[0]) - int(other[0])))
    return different
