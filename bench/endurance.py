"""What only long runs show: whether the journal stays small for an hour, and whether one statement
that changes ten million rows passes with little memory. Neither is part of a benchmark's default."""

import statistics
import time
from subprocess import DEVNULL, PIPE, Popen

from load import TABLES, pgbench_command, rows_different
from machinery import environment, peak_memory_mb, server_cpu_seconds

JOURNAL = "SELECT sum(pg_total_relation_size(c)) FROM unnest(ARRAY['pgtandem.change_0', 'pgtandem.change_1', 'pgtandem.change_2']::regclass[]) c"
# Rotation begins at 16 MiB; three slots take turns.
SLOTS_MB = 3 * 16


def endurance(bench):
    """TPC-B at a steady rate: journal, lag, memory and vacuum work all along."""
    options = bench.options
    seconds = options.minutes * 60
    print(f"\nTPC-B at {options.rate} transactions a second for {options.minutes} minutes in dual_write", flush=True)
    command = pgbench_command(bench.pgbench, bench.mirroring.port, "mirrored", "tpcb", "prepared", 4, seconds)
    command[1:1] = ["-R", str(options.rate)]
    before = vacuum_work(bench.legacy)
    load = Popen(command, stdout=DEVNULL, stderr=PIPE, text=True, env=environment())
    journal_mb, lags, end = [], [], time.monotonic() + seconds + 60
    while load.poll() is None and time.monotonic() < end:
        journal_mb.append(int(bench.legacy.sql(JOURNAL, "mirrored")) / 2**20)
        lags.append(bench.mirroring.wait_caught_up(300))
        time.sleep(2)
    if load.poll() != 0:
        load.kill()
        raise SystemExit(f"bench: pgbench: {load.stderr.read()[-3000:]}")
    bench.mirroring.wait_caught_up(300)
    after = vacuum_work(bench.legacy)
    different = rows_different(bench.legacy, bench.new, "mirrored", TABLES)
    quarter = len(journal_mb) // 4
    first, last = max(journal_mb[:quarter]), max(journal_mb[-quarter:])
    found = {
        "journal_mb": {"median": statistics.median(journal_mb), "most": max(journal_mb), "first_quarter": first, "last_quarter": last},
        "waited_s": {"median": statistics.median(lags), "longest": max(lags)},
        "peak_mb": peak_memory_mb(bench.mirroring.process),
        "autovacuums": {name: after[name] - before.get(name, 0) for name in after},
        "rows_different": different,
    }
    for what, value in found.items():
        print(f"  {what}: {value}", flush=True)
    bench.report.mirroring["endurance"] = found
    bench.report.target("endurance: the journal's size, MB", max(journal_mb), SLOTS_MB + 16, True, "{:.0f}")
    bench.report.target("endurance: peak memory, MB", found["peak_mb"], 256, True, "{:.0f}")
    bench.report.target("endurance: rows different", different, 0, True, "{:.0f}")
    journals = sum(count for name, count in found["autovacuums"].items() if name.startswith("pgtandem.change_"))
    bench.report.target("endurance: autovacuums of the journal", journals, 0, True, "{:.0f}")


def vacuum_work(server):
    """How often autovacuum cleaned each table."""
    lines = server.sql("SELECT schemaname || '.' || relname || ' ' || autovacuum_count FROM pg_stat_user_tables", "mirrored")
    return {name: int(count) for name, count in (line.rsplit(" ", 1) for line in lines.split("\n"))}


def giant(bench):
    """One statement that inserts, one that updates and one that deletes many rows."""
    rows = bench.options.rows
    print(f"\none statement for {rows} rows in dual_write", flush=True)
    bench.client_sql(bench.mirroring.port, "mirrored", "CREATE TABLE giant (id bigint PRIMARY KEY, value text)")
    bench.mirroring.wait_caught_up(60)
    for what, statement in (
        ("INSERT", f"INSERT INTO giant SELECT i, 'row ' || i FROM generate_series(1, {rows}) i"),
        ("UPDATE", "UPDATE giant SET value = value || ' changed'"),
        ("DELETE", "DELETE FROM giant WHERE id % 2 = 0"),
    ):
        began, cpu = time.monotonic(), server_cpu_seconds(bench.legacy)
        bench.client_sql(bench.mirroring.port, "mirrored", statement)
        ran = time.monotonic() - began
        left = bench.mirroring.wait_caught_up(3600)
        different = rows_different(bench.legacy, bench.new, "mirrored", ("giant",))
        peak = peak_memory_mb(bench.mirroring.process)
        print(
            f"  {what}: {ran:.0f} s on the primary ({server_cpu_seconds(bench.legacy) - cpu:.0f} s of CPU there by the end), on the other side "
            f"{left:.0f} s later, peak memory {peak:.0f} MB, rows different: {different}",
            flush=True,
        )
        bench.report.mirroring[f"giant {what}"] = {"rows": rows, "ran_s": ran, "left_s": left, "peak_mb": peak, "rows_different": different}
        bench.report.target(f"{what} of {rows} rows: peak memory, MB", peak, 256, True, "{:.0f}")
        bench.report.target(f"{what} of {rows} rows: rows different", different, 0, True, "{:.0f}")
    bench.client_sql(bench.mirroring.port, "mirrored", "DROP TABLE giant")
