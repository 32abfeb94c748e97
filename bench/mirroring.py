"""What mirroring costs, and how closely the secondary follows: the parts of the benchmark that
write."""

import os
import statistics
import time

from load import TABLES, both_servers_at_once, measure, pgbench_command, rows_different, run_pgbench
from machinery import pid_cpu_seconds, server_cpu_seconds

# Serial keys, clocks and random values: what a second run of the statement gives differently.
VOLATILE = """CREATE TABLE volatile (id bigserial PRIMARY KEY, worker int, born timestamptz DEFAULT clock_timestamp(),
    seen timestamptz, dice float8 DEFAULT random())"""


def writes(bench):
    """TPC-B and simple-update through pgtandem, against two pgbench on both servers at once and
    against pgpool-II."""
    print("\nwrites: two pgbench on both servers at once, pgtandem until the secondary has caught up, pgpool-II", flush=True)
    different = {}
    for workload in ("tpcb", "simple-update"):
        for mode in bench.options.modes:
            for clients in [count for count in bench.options.clients if count > 1]:
                legs = {"twice": [], "mirrored": [], "pgpool": []}
                for _ in range(bench.options.repetitions):
                    for leg in legs:
                        legs[leg].append(one_write_run(bench, leg, workload, mode, clients))
                report_writes(bench, workload, mode, clients, legs)
    for name, port, dbname, other in (
        ("pgtandem", bench.mirroring.port, "mirrored", bench.new),
        ("pgpool", bench.pgpool.port, "pooled", bench.twin),
    ):
        bench.client_sql(port, dbname, VOLATILE)
        command = pgbench_command(bench.pgbench, port, dbname, "volatile", "simple", 16, bench.options.seconds)
        run_pgbench(command, bench.options.seconds)
        if name == "pgtandem":
            bench.mirroring.wait_caught_up(300)
        different[name] = rows_different(bench.legacy, other, dbname, (*TABLES, "volatile"))
        rows = bench.legacy.sql("SELECT count(*) FROM volatile", dbname)
        print(f"  {name}: rows different after all of it, with {rows} rows of serial keys, clocks and random values: {different[name]}")
    bench.report.mirroring["rows_different"] = different
    bench.report.target("rows different after all writes through pgtandem", different["pgtandem"], 0, True, "{:.0f}")


def one_write_run(bench, leg, workload, mode, clients):
    seconds = bench.options.seconds
    if leg == "twice":
        ports = (bench.legacy.port, bench.new.port)
        return both_servers_at_once(bench.pgbench, ports, "plain", workload, mode, clients, seconds)
    port, dbname = (bench.mirroring.port, "mirrored") if leg == "mirrored" else (bench.pgpool.port, "pooled")
    tps, transactions, _ = run_pgbench(pgbench_command(bench.pgbench, port, dbname, workload, mode, clients, seconds), seconds)
    if leg == "pgpool":
        return tps
    # Without waiting, work that is still to be done would count as done.
    left = bench.mirroring.wait_caught_up(300)
    return transactions / (transactions / tps + left)


def report_writes(bench, workload, mode, clients, legs):
    medians = {leg: statistics.median(runs) for leg, runs in legs.items() if runs}
    twice, mirrored = medians["twice"], medians["mirrored"]
    line = f"  {workload:14}{mode:10}{clients:3} clients: both at once {twice:6.0f} tps, mirrored and caught up {mirrored:6.0f} ({mirrored / twice:.2f})"
    what = f"{workload} {mode}, {clients} clients, dual_write until caught up:"
    bench.report.target(f"{what} of two pgbench at once", mirrored / twice, 1.0, False)
    line += f", pgpool-II {medians['pgpool']:6.0f} (pgtandem {mirrored / medians['pgpool']:.1f} times)"
    bench.report.target(f"{what} of pgpool-II", mirrored / medians["pgpool"], 2.5, False)
    bench.report.mirroring[f"{workload} {mode} {clients}"] = medians
    print(line, flush=True)


def capture(bench):
    """What capture costs on the primary, with no applier running."""
    dbname = "captured"
    print("\nwhat capture costs on the primary, no applier running: share of plain throughput", flush=True)
    for what, workload, limit in (("TPC-B, 16 clients", "tpcb", 0.85), ("one hammered row, 16 clients", "hammered-row", 0.8)):
        shares = []
        for _ in range(bench.options.repetitions):
            runs = [
                measure(bench.pgbench, bench.legacy.port, name, workload, "prepared", 16, bench.options.seconds, bench.directory).tps
                for name in ("plain", dbname)
            ]
            shares.append(runs[1] / runs[0])
            empty_journal(bench, dbname)
        judge_capture(bench, what, statistics.median(shares), limit)
    rows = 100_000 if bench.options.quick else 1_000_000
    filled = f"SELECT i, 'some text that a row may hold' FROM generate_series(1, {rows}) i"
    file = os.path.join(bench.directory, "legacy", "bulk")
    bench.legacy.sql(f"COPY ({filled}) TO '{file}'")
    for what, before, statement in (
        ("COPY", "TRUNCATE bulk", f"COPY bulk FROM '{file}'"),
        ("UPDATE", f"TRUNCATE bulk; INSERT INTO bulk {filled}", "UPDATE bulk SET b = b || 'x'"),
    ):
        shares = []
        for _ in range(bench.options.repetitions):
            seconds = []
            for name in ("plain", dbname):
                bench.legacy.sql(before, name)
                if name == dbname:
                    empty_journal(bench, dbname)
                began = time.monotonic()
                bench.legacy.sql(statement, name)
                seconds.append(time.monotonic() - began)
            shares.append(seconds[0] / seconds[1])
            empty_journal(bench, dbname)
        judge_capture(bench, f"{what} of {rows} rows", statistics.median(shares), 0.4)


def judge_capture(bench, what, share, limit):
    print(f"  {what}: {share:.2f}", flush=True)
    bench.report.mirroring[f"capture {what}"] = share
    bench.report.target(f"capture, {what}: of plain throughput", share, limit, False)


def empty_journal(bench, dbname):
    bench.legacy.sql("TRUNCATE pgtandem.change_0, pgtandem.change_1, pgtandem.change_2", dbname)


def steady(bench):
    """Lag at the primary's full rate, the applier's share of the primary, and how fast a backlog
    drains."""
    seconds, clients = bench.options.both_seconds, 16
    print(f"\nTPC-B, prepared protocol, {clients} clients, {seconds} s in dual_write", flush=True)
    applier_pids = bench.legacy.sql("SELECT pid FROM pg_stat_activity WHERE datname = 'mirrored' AND usename = 'pgtandem'").split()
    before = server_cpu_seconds(bench.legacy), sum(map(pid_cpu_seconds, applier_pids))
    began = bench.legacy.sql("SELECT now()::timestamp")
    command = pgbench_command(bench.pgbench, bench.mirroring.port, "mirrored", "tpcb", "prepared", clients, seconds)
    tps, _, _ = run_pgbench(command, seconds)
    after = server_cpu_seconds(bench.legacy), sum(map(pid_cpu_seconds, applier_pids))
    bench.mirroring.wait_caught_up(300)
    # When each row of the history was committed on the secondary, less when its transaction began.
    lags = bench.new.sql(
        "SELECT percentile_cont(ARRAY[0.5, 0.99, 1]) WITHIN GROUP (ORDER BY extract(epoch FROM pg_xact_commit_timestamp(xmin) - mtime::timestamptz) * 1000)"
        f" FROM pgbench_history WHERE mtime >= '{began}'",
        "mirrored",
    )
    p50, p99, most = (float(value) for value in lags.strip("{}").split(","))
    share = (after[1] - before[1]) / (after[0] - before[0])
    print(f"  {tps:.0f} tps; lag p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest {most:.0f} ms; the applier took {share:.1%} of the primary's CPU", flush=True)
    drained = drain(bench, tps, clients)
    bench.report.mirroring["steady"] = {"tps": tps, "lag_ms": [p50, p99, most], "applier_share": share, "drain": drained}
    bench.report.target("steady TPC-B: lag p99, ms", p99, 250, True, "{:.0f}")
    bench.report.target("steady TPC-B: the applier's share of the primary's CPU", share, 0.05, True, "{:.3f}")
    bench.report.target("a backlog drains, times as fast as it was written", drained, 5, False, "{:.1f}")


def drain(bench, rate, clients):
    """Writes that find no proxy, past it; then how fast they are applied once it is back."""
    bench.mirroring.kill()
    seconds = bench.options.both_seconds
    command = pgbench_command(bench.pgbench, bench.legacy.port, "mirrored", "tpcb", "prepared", clients, seconds)
    tps, transactions, _ = run_pgbench(command, seconds)
    began = time.monotonic()
    bench.mirroring.start()
    bench.mirroring.wait_caught_up(600)
    took = time.monotonic() - began
    print(f"  a backlog of {transactions} transactions, written in {seconds} s, was applied {took:.1f} s after the proxy's start", flush=True)
    return transactions / took / tps


def latency(bench):
    """What a client waits for an autocommitted write in dual_write, against initial."""
    print("\none UPDATE, autocommitted: latency in dual_write against initial", flush=True)
    for mode in bench.options.modes:
        for clients in (1, 16):
            p50 = {"initial": [], "dual_write": []}
            for _ in range(bench.options.repetitions):
                for leg in p50:
                    port, dbname, process = bench.legs[leg]
                    p50[leg].append(
                        measure(bench.pgbench, port, dbname, "autocommit", mode, clients, bench.options.seconds, bench.directory, process).p50_ms
                    )
            medians = {leg: statistics.median(values) for leg, values in p50.items()}
            ratio = medians["dual_write"] / medians["initial"]
            print(f"  {mode}, {clients} clients: p50 {medians['initial']:.3f} ms, {medians['dual_write']:.3f} ms ({ratio:.2f})", flush=True)
            bench.report.mirroring[f"latency {mode} {clients}"] = medians
            bench.report.target(f"autocommit UPDATE {mode}, {clients} clients, p50 in dual_write of initial", ratio, 1.15, True)
