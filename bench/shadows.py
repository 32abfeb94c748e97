"""What shadow reads cost the clients and the proxy.

One proxy, whose phase and share change between the runs: `dual_write` (no shadows at all), `dual_read`
with no read sampled, `dual_read` with every read shadowed. In turn, several short times each. Where
there are two cores the secondary has one of its own, with the threads of the proxy that ask it; the
primary, pgbench and the threads that relay share the other, in every run alike. The rate is given, a
share of what goes through without shadows, so that a difference is the shadows' and not saturation's.
"""

import json
import os
import re
import statistics
import subprocess
import time
import urllib.request

from load import latencies_ms, percentile, pgbench_command, run_pgbench
from machinery import Pgtandem, cpu_seconds, eventually, server_cpu_seconds

DATABASE = "shadowed"
# name -> (phase, shadow_percent)
LEGS = {"dual_write": ("dual_write", 0), "sampled 0 %": ("dual_read", 0), "shadowed 100 %": ("dual_read", 100)}
# Of the throughput without shadows.
SHARE_OF_FULL_RATE = 0.3
CLIENTS = 8


def shadows(bench):
    print("\nwhat shadow reads cost: select-only", flush=True)
    for server in (bench.legacy, bench.new):
        server.create_database(DATABASE)
    proxy = Pgtandem(bench.workshop, bench.program, bench.legacy, bench.new, DATABASE, "dual_write", bench.options.worker_threads, name="shadows", more=reads_line(0))
    bench.initialise(proxy.port, DATABASE, "dtGvp")
    proxy.wait_caught_up(300)
    pinned = Pinned.over(bench, proxy)
    print(f"  {pinned.told}", flush=True)
    try:
        for mode in bench.options.modes:
            compare(bench, proxy, pinned, mode)
    finally:
        pinned.release()
        bench.workshop.stop(proxy.process)


def compare(bench, proxy, pinned, mode):
    seconds = bench.options.seconds
    become(proxy, *LEGS["dual_write"])
    command = pinned.load(pgbench_command(bench.pgbench, proxy.port, DATABASE, "select-only", mode, CLIENTS, 2))
    rate = int(run_pgbench(command, 2)[0] * SHARE_OF_FULL_RATE)
    runs = {leg: [] for leg in LEGS}
    for repetition in range(bench.options.repetitions):
        # Each time another one is the first.
        legs = list(LEGS)
        turn = repetition % len(legs)
        for leg in legs[turn:] + legs[:turn]:
            become(proxy, *LEGS[leg])
            runs[leg].append(one_run(bench, proxy, pinned, mode, rate, seconds))
    medians = {leg: {name: statistics.median(run[name] for run in those) for name in those[0]} for leg, those in runs.items()}
    print(f"\n  {mode} protocol, {CLIENTS} clients, {rate} reads/s asked for")
    print(f"    {'':16}{'reads/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'proxy µs/read':>14} {'relaying':>9} {'primary':>8} {'secondary':>10} {'compared':>9}")
    for leg, m in medians.items():
        print(
            f"    {leg:16}{m['tps']:8.0f} {m['p50_ms']:8.3f} {m['p99_ms']:8.3f} {m['proxy_us']:14.1f} {m['relay_us']:9.1f}"
            f" {m['primary_us']:8.1f} {m['secondary_us']:10.1f} {m['compared']:9.1%}",
            flush=True,
        )
    without, none, every = (medians[leg] for leg in LEGS)
    for what, one, other in (("0 % of dual_write", none, without), ("100 % of 0 %", every, none), ("100 % of dual_write", every, without)):
        ratios = {name: one[name] / other[name] if other[name] else float("nan") for name in ("p50_ms", "p99_ms", "proxy_us", "relay_us", "primary_us")}
        print(
            f"    {what}: p50 {ratios['p50_ms']:.2f}, p99 {ratios['p99_ms']:.2f}, the proxy's CPU {ratios['proxy_us']:.2f}, of its relaying threads {ratios['relay_us']:.2f}, the primary's {ratios['primary_us']:.2f}",
            flush=True,
        )
        for name in ("p50_ms", "p99_ms"):
            if one is every or name == "p50_ms":
                limit = 1.1 if one is every else 1.03
                bench.report.target(f"shadow reads, {mode}, {what}: {name[:3]}", ratios[name], limit, True)
        if one is none:
            bench.report.target(f"shadow reads, {mode}, {what}: the proxy's CPU", ratios["proxy_us"], 1.03, True)
    bench.report.target(f"shadow reads, {mode}, 100 %: share compared", every["compared"], 0.99, False)
    bench.report.mirroring[f"shadows {mode}"] = {"rate": rate, "pinned": pinned.told, **medians}


def one_run(bench, proxy, pinned, mode, rate, seconds):
    prefix = os.path.join(bench.directory, "latency")
    command = pgbench_command(bench.pgbench, proxy.port, DATABASE, "select-only", mode, CLIENTS, seconds)
    command[1:1] = ["-R", str(rate), "--log", f"--log-prefix={prefix}"]
    counted = reads(proxy)

    def spent():
        servers = server_cpu_seconds(bench.legacy), server_cpu_seconds(bench.new)
        return cpu_seconds(proxy.process), relay_seconds(proxy.process), *servers

    before = spent()
    tps, transactions, _ = run_pgbench(pinned.load(command), seconds)
    # What is still to be compared belongs to this run.
    eventually("the last shadows", lambda: reads(proxy)["waiting"] == 0, 120)
    after = spent()
    proxy_us, relay_us, primary_us, secondary_us = ((now - then) * 1e6 / transactions for now, then in zip(after, before))
    now = reads(proxy)
    if now["mismatched"] or now["dropped"] != counted["dropped"]:
        print(f"    {now['mismatched']} mismatched, {now['dropped'] - counted['dropped']} dropped")
    latencies = latencies_ms(prefix, scheduled=True)
    return {
        "tps": tps,
        "p50_ms": statistics.median(latencies),
        "p99_ms": percentile(latencies, 0.99),
        "proxy_us": proxy_us,
        "relay_us": relay_us,
        "primary_us": primary_us,
        "secondary_us": secondary_us,
        "compared": (now["compared"] - counted["compared"]) / transactions,
    }


def reads_line(percent):
    # A queue that is large enough: its bound is there to drop, which is not what is measured.
    return f"reads: {{ shadow_percent: {percent}, shadow_queue: 50000 }}\n"


def become(proxy, phase, percent):
    """Edits proxy.yaml as an operator would, and reloads."""
    with open(proxy.config) as file:
        text = file.read()
    text = re.sub(r"^phase: .*$", f"phase: {phase}", text, flags=re.M)
    text = re.sub(r"^reads: .*\n", "", text, flags=re.M)
    text += reads_line(percent)
    with open(proxy.config, "w") as file:
        file.write(text)
    done = subprocess.run([proxy.program, "reload", "--config", proxy.config], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"bench: pgtandem reload: {done.stdout}{done.stderr}")
    # A moment for the catalogs.
    time.sleep(0.5)


def reads(proxy):
    with urllib.request.urlopen(f"http://127.0.0.1:{proxy.admin_port}/api/v1/shadows", timeout=10) as answer:
        totals = json.load(answer)["databases"].get(DATABASE, {}).get("totals", {})
    return {
        "waiting": totals.get("waiting", 0),
        "compared": totals.get("compared", 0),
        "mismatched": totals.get("mismatched", 0),
        "dropped": sum(totals.get("dropped", {}).values()),
    }


def threads(process):
    for thread in os.listdir(f"/proc/{process.pid}/task"):
        try:
            yield int(thread), open(f"/proc/{process.pid}/task/{thread}/comm").read().strip()
        except OSError:
            pass


def is_relay(name):
    return name.startswith("sessions-")


def relay_seconds(process):
    """CPU time of the threads that relay."""
    ticks = 0
    for thread, name in threads(process):
        if is_relay(name):
            with open(f"/proc/{process.pid}/task/{thread}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Pinned:
    """Who runs where. New processes of a server are pinned with their postmaster."""

    def __init__(self, ours, theirs, told):
        self.ours, self.theirs, self.told = ours, theirs, told
        self.before = {}

    @classmethod
    def over(cls, bench, proxy):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            return cls(None, None, "one core for all of it: the secondary has none of its own")
        half = max(1, len(cores) // 2)
        ours, theirs = set(cores[:half]), set(cores[half:])
        pinned = cls(ours, theirs, f"cores {sorted(theirs)}: the secondary and the proxy's threads that ask it; cores {sorted(ours)}: the primary, pgbench, the proxy's relaying threads")
        pinned.pin_tree(bench.legacy.process.pid, ours)
        pinned.pin_tree(bench.new.process.pid, theirs)
        for thread, name in threads(proxy.process):
            pinned.pin(thread, ours if is_relay(name) else theirs)
        return pinned

    def pin(self, thread, cores):
        try:
            self.before.setdefault(thread, os.sched_getaffinity(thread))
            os.sched_setaffinity(thread, cores)
        except OSError:
            pass

    def pin_tree(self, pid, cores):
        self.pin(pid, cores)
        for child in open(f"/proc/{pid}/task/{pid}/children").read().split():
            self.pin(int(child), cores)

    def load(self, command):
        if not self.ours:
            return command
        return ["taskset", "-c", ",".join(map(str, sorted(self.ours))), *command]

    def release(self):
        for thread, cores in self.before.items():
            try:
                os.sched_setaffinity(thread, cores)
            except OSError:
                pass
