"""Flips there and back under load, through two proxies: how long anybody was held, by step, and
that nothing failed, was dropped, or differs afterwards."""

import collections
import glob
import json
import os
import statistics
import subprocess
import time
from datetime import datetime

from load import percentile, rows_different
from machinery import CLIENT, Pgtandem, environment, eventually

DBNAME = "flipped"
# Longer than all flips take; it is ended when they are through.
LOAD_SECONDS = 900


def flips(bench):
    options = bench.options
    clients, idle = options.flip_clients, options.flip_idle
    more = f", {options.flip_tables} more tables" if options.flip_tables else ""
    print(f"\n{options.flips} flips under TPC-B by {clients} clients and {idle} idle sessions, through two proxies{more}", flush=True)
    for server in (bench.legacy, bench.new):
        server.create_database(DBNAME)
    proxies = [Pgtandem(bench.workshop, bench.program, bench.legacy, bench.new, DBNAME, "dual_write", name=f"flips-{n}") for n in (1, 2)]
    bench.initialise(proxies[0].port, DBNAME, "dtGvp")
    for first in range(0, options.flip_tables, 50):
        tables = range(first, min(first + 50, options.flip_tables))
        bench.client_sql(proxies[0].port, DBNAME, "; ".join(f"CREATE TABLE more_{n} (id bigserial PRIMARY KEY, note text, at timestamptz)" for n in tables))
    proxies[0].wait_caught_up(300)
    prefix = os.path.join(bench.directory, "flips")
    loads = [start_load(bench, proxy, clients // 2, f"{prefix}-{n}") for n, proxy in enumerate(proxies)]
    idlers = [start_idle(bench, proxy, idle // 2) for proxy in proxies]
    sessions = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{DBNAME}' AND usename = '{CLIENT}'"
    eventually("all sessions", lambda: int(bench.legacy.sql(sessions)) >= clients + idle // 2 * 2, seconds=120)
    time.sleep(2)
    told = []
    for number in range(options.flips):
        proxy, to = proxies[number % 2], ("new", "legacy")[number % 2]
        told.append(flip(proxy, to))
        # What was written since is mirrored back, and the load finds its pace.
        time.sleep(1.5)
    failures = [text for load in loads for text in end(load)]
    dropped = sum(idler.poll() is not None for idler in idlers)
    for idler in idlers:
        idler.terminate()
        idler.wait()
    for proxy in proxies:
        proxy.wait_caught_up(300)
    different = rows_different(bench.legacy, bench.new, DBNAME)
    waits = longest_waits(prefix, told)
    report(bench, told, waits, failures, dropped, different)
    for proxy in proxies:
        bench.workshop.stop(proxy.process)


def start_load(bench, proxy, clients, prefix):
    command = [
        bench.pgbench, "-n", "-h", "127.0.0.1", "-p", str(proxy.port), "-U", CLIENT, "-M", "prepared", "-c", str(clients), "-j", "1",
        "-T", str(LOAD_SECONDS), "--log", f"--log-prefix={prefix}", DBNAME,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=bench.directory)


def start_idle(bench, proxy, sessions):
    script = os.path.join(bench.directory, "idle-flips.sql")
    with open(script, "w") as file:
        file.write("SELECT 1;\n\\sleep 900 s\n")
    command = [bench.pgbench, "-n", "-h", "127.0.0.1", "-p", str(proxy.port), "-U", CLIENT, "-f", script, "-c", str(sessions), "-j", "1", "-t", "1", DBNAME]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())


def flip(proxy, to):
    """The flip's own record, as `switchover --history --json` tells it. A gate may be closed for a
    moment by the lag of a busy machine."""
    until = time.monotonic() + 60
    while True:
        done = subprocess.run([proxy.program, "switchover", "--to", to, "--config", proxy.config], capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            break
        if "gate is closed" not in done.stdout + done.stderr or time.monotonic() > until:
            raise SystemExit(f"bench: switchover --to {to}: {done.stdout}{done.stderr}")
        time.sleep(0.5)
    history = subprocess.run([proxy.program, "switchover", "--history", "--json", "--config", proxy.config], capture_output=True, text=True, check=True)
    return json.loads(history.stdout)["flips"][0]


def end(load):
    """What a load has to say of errors: pgbench ends its client at the first one."""
    if load.poll() is None:
        load.terminate()
    _, errors = load.communicate(timeout=60)
    return [line for line in errors.splitlines() if "error" in line or "FATAL" in line or "aborted" in line]


def longest_waits(prefix, told):
    """Of the transactions that ended while a flip was under way or right after it, the longest; in ms.
    Their own work is part of it."""
    windows = [(seconds(flip["at"]) - 0.05, seconds(flip["ended"]) + 0.5) for flip in told]
    longest, others = [0.0] * len(told), []
    for path in glob.glob(f"{prefix}-*"):
        with open(path) as file:
            for line in file:
                fields = line.split()
                if len(fields) < 6 or not fields[2].isdigit():
                    continue
                ended, ms = int(fields[4]) + int(fields[5]) / 1e6, int(fields[2]) / 1000
                inside = next((n for n, (begin, finish) in enumerate(windows) if begin <= ended <= finish), None)
                if inside is None:
                    others.append(ms)
                else:
                    longest[inside] = max(longest[inside], ms)
        os.remove(path)
    return longest, others


def seconds(text):
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def within_hold(told):
    """What the proxies did while they held: waited for open transactions, then moved the sessions."""
    parts = {"drain_ms": [], "carry_ms": []}
    for one in told:
        holding = next((step["measured"] for step in one["steps"] if step["name"] == "fencing"), {})
        said = [proxy for proxy in holding.values() if isinstance(proxy, dict)]
        for name, values in parts.items():
            values.append(max((proxy.get(name, 0.0) for proxy in said), default=0.0))
    return parts


def report(bench, told, waits, failures, dropped, different):
    longest, others = waits
    held = [flip["held_ms"] for flip in told]
    steps = collections.defaultdict(list)
    for one in told:
        for step in one["steps"]:
            steps[step["name"]].append(step["ms"])
    print(f"  clients held: median {statistics.median(held):.0f} ms, worst {max(held):.0f} ms; sessions carried {told[-1]['sessions_carried']}")
    print("  of holding: " + ", ".join(f"{name} {statistics.median(ms):.0f}" for name, ms in within_hold(told).items()) + " (median ms, the slower proxy)")
    print("  by step, median ms: " + ", ".join(f"{name} {statistics.median(ms):.0f}" for name, ms in steps.items()))
    print(
        f"  longest transaction around a flip: median {statistics.median(longest):.0f} ms, worst {max(longest):.0f} ms "
        f"(all others: median {statistics.median(others):.0f} ms, p99 {percentile(others, 0.99):.0f} ms)"
    )
    print(f"  errors {len(failures)} {failures[:3]}, idle sessions' loads ended {dropped}, rows different {different}", flush=True)
    bench.report.mirroring["flips"] = {"held_ms": held, "longest_ms": longest, "steps_ms": steps, "errors": failures, "rows_different": different}
    bench.report.target("flips: clients held, median ms", statistics.median(held), 50, True, "{:.0f}")
    bench.report.target("flips: clients held, worst ms", max(held), 200, True, "{:.0f}")
    bench.report.target("flips: failed statements and dropped connections", len(failures) + dropped, 0, True, "{:.0f}")
    bench.report.target("flips: rows different", different, 0, True, "{:.0f}")
