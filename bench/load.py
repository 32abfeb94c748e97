"""pgbench runs, and what they measured."""

import glob
import os
import re
import statistics
import subprocess
import time
from dataclasses import dataclass

from machinery import CLIENT, cpu_seconds, environment, eventually, memory_kb

# Which built-in script, and how many transactions go into the latency log: writing the log must
# not become the load.
WORKLOADS = {
    "select-only": (["-S"], 0.1),
    "tpcb": ([], 1.0),
    "simple-update": (["-N"], 1.0),
    # One statement that writes, committed by itself.
    "autocommit": (["-f", os.path.join(os.path.dirname(os.path.abspath(__file__)), "autocommit.sql")], 1.0),
    "hammered-row": (["-f", os.path.join(os.path.dirname(os.path.abspath(__file__)), "hammered-row.sql")], 1.0),
    "existing": (["-f", os.path.join(os.path.dirname(os.path.abspath(__file__)), "existing.sql")], 1.0),
    "volatile": (["-f", os.path.join(os.path.dirname(os.path.abspath(__file__)), "volatile.sql")], 1.0),
}


@dataclass
class Measured:
    tps: float
    p50_ms: float
    p99_ms: float
    # The proxy's CPU time for one transaction; nothing when there is none in between.
    cpu_us: float | None
    # Transactions that pgbench counts as failed.
    failed: int


def pgbench_command(pgbench, port, dbname, workload, mode, clients, seconds, log_prefix=None):
    script, sampling = WORKLOADS[workload]
    command = [
        pgbench, "-n", "-h", "127.0.0.1", "-p", str(port), "-U", CLIENT, *script, "-M", mode, "-c", str(clients),
        "-j", str(min(clients, 2)), "-T", str(seconds),
    ]  # fmt: skip
    if log_prefix:
        command += ["--log", f"--log-prefix={log_prefix}"]
        if sampling < 1:
            command += [f"--sampling-rate={sampling}"]
    return [*command, dbname]


def parse_summary(output):
    tps = float(re.search(r"tps = ([\d.]+) \(without initial", output).group(1))
    transactions = int(re.search(r"transactions actually processed: (\d+)", output).group(1))
    failed = re.search(r"number of failed transactions: (\d+)", output)
    return tps, transactions, int(failed.group(1)) if failed else 0


def run_pgbench(command, seconds):
    """Transactions a second, how many, and how many failed. Ended where it does not end itself."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=seconds + 120)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"bench: no end of {' '.join(command)}")
    if done.returncode != 0:
        raise SystemExit(f"bench: {' '.join(command)}:\n{done.stderr[-3000:]}")
    return parse_summary(done.stdout)


def latencies_ms(log_prefix, scheduled=False):
    """The third column of the per-transaction log is microseconds; failed ones have no number. Of
    transactions begun at a given rate (`scheduled`) it counts from when they were due; how late they
    began, the last column, is taken off."""
    found = []
    for path in glob.glob(f"{log_prefix}.*"):
        with open(path) as file:
            for line in file:
                columns = line.split()
                if columns[2].isdigit():
                    late = int(columns[6]) if scheduled else 0
                    found.append((int(columns[2]) - late) / 1000)
        os.remove(path)
    return found


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def measure(pgbench, port, dbname, workload, mode, clients, seconds, directory, proxy=None, extra=()):
    prefix = os.path.join(directory, "latency")
    command = pgbench_command(pgbench, port, dbname, workload, mode, clients, seconds, prefix)
    command[1:1] = extra
    before = cpu_seconds(proxy) if proxy else None
    tps, transactions, failed = run_pgbench(command, seconds)
    after = cpu_seconds(proxy) if proxy else None
    latencies = latencies_ms(prefix)
    return Measured(
        tps=tps,
        p50_ms=statistics.median(latencies),
        p99_ms=percentile(latencies, 0.99),
        cpu_us=(after - before) * 1e6 / transactions if proxy else None,
        failed=failed,
    )


def median_of(runs):
    cpu = [run.cpu_us for run in runs if run.cpu_us is not None]
    return Measured(
        tps=statistics.median(run.tps for run in runs),
        p50_ms=statistics.median(run.p50_ms for run in runs),
        p99_ms=statistics.median(run.p99_ms for run in runs),
        cpu_us=statistics.median(cpu) if cpu else None,
        failed=sum(run.failed for run in runs),
    )


def both_servers_at_once(pgbench, ports, dbname, workload, mode, clients, seconds):
    """The same load by two pgbench processes, one on each server: the naive price of doing all
    work twice. The mean of the two throughputs."""
    processes = [
        subprocess.Popen(
            pgbench_command(pgbench, port, dbname, workload, mode, clients, seconds),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )
        for port in ports
    ]  # fmt: skip
    outputs = [process.communicate(timeout=seconds + 120) for process in processes]
    for process, (_, errors) in zip(processes, outputs):
        if process.returncode != 0:
            raise SystemExit(f"bench: pgbench: {errors[-3000:]}")
    return statistics.mean(parse_summary(out)[0] for out, _ in outputs)


TABLES = ("pgbench_accounts", "pgbench_tellers", "pgbench_branches", "pgbench_history")


def rows_different(one, other, dbname, tables=TABLES):
    """How many rows are not on both servers alike."""
    different = 0
    digest = "SELECT count(*), coalesce(sum(('x' || substr(md5(t::text), 1, 15))::bit(60)::bigint), 0) FROM {} t"
    for table in tables:
        query = digest.format(table)
        if one.sql(query, dbname) != other.sql(query, dbname):
            rows = [server.sql(f"SELECT t::text FROM {table} t", dbname).split("\n") for server in (one, other)]
            counts = {}
            for side, sign in zip(rows, (1, -1)):
                for row in side:
                    counts[row] = counts.get(row, 0) + sign
            different += sum(abs(count) for count in counts.values())
    return different


@dataclass
class Memory:
    rss_kb: float
    pss_kb: float


def idle_sessions(pgbench, port, dbname, process, server, sessions, directory):
    """Memory that a proxy needs for each idle session which has run one query."""
    script = os.path.join(directory, "idle.sql")
    with open(script, "w") as file:
        # Long enough to be measured; the load is ended once it has been.
        file.write("SELECT 1 AS idle_session;\n\\sleep 600 s\n")

    def start(count):
        command = [pgbench, "-n", "-h", "127.0.0.1", "-p", str(port), "-U", CLIENT, "-f", script, "-c", str(count), "-j", "1", "-t", "1", dbname]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())

    def idle_now():
        query = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{dbname}' AND state = 'idle' AND query LIKE 'SELECT 1 AS idle_session%'"
        return int(server.sql(query))

    def hold(count):
        load = start(count)

        def all_idle():
            if load.poll() is not None:
                raise SystemExit(f"bench: pgbench for idle sessions: {load.stderr.read().decode()[-2000:]}")
            return idle_now() == count

        eventually(f"{count} idle sessions", all_idle, seconds=180)
        # Buffers are given back a moment after a session falls idle.
        time.sleep(3)
        return load

    def end(load):
        load.terminate()
        load.wait()
        eventually("the end of the idle sessions", lambda: idle_now() == 0)
        time.sleep(1)

    # What every first session brings with it is not counted.
    end(hold(20))
    before = memory_kb(process)
    load = hold(sessions)
    after = memory_kb(process)
    end(load)
    return Memory(*((now - then) / sessions for then, now in zip(before, after)))
