"""The figures as tables, the targets beside them, and the file for machines."""

import json
import os
import platform
import time

from machinery import CHECKOUT

LEGS = ("direct", "pgbouncer", "initial", "dual_write")


class Report:
    def __init__(self, options, versions):
        self.options, self.versions = options, versions
        # (workload, mode, clients) -> leg -> Measured
        self.loads = {}
        self.both = None
        self.memory = {}
        self.mirroring = {}
        self.targets = []

    def print_load(self, key, legs):
        self.loads[key] = legs
        workload, mode, clients = key
        print(f"\n{workload}, {mode} protocol, {clients} client{'s' if clients > 1 else ''}")
        print(f"  {'':12}{'tps':>9} {'p50 ms':>9} {'p99 ms':>9} {'CPU µs/tx':>10}   of direct   of PgBouncer: tps, p99, CPU")
        direct, bouncer = legs.get("direct"), legs.get("pgbouncer")
        for name, m in legs.items():
            cpu = f"{m.cpu_us:10.1f}" if m.cpu_us is not None else f"{'':10}"
            line = f"  {name:12}{m.tps:9.0f} {m.p50_ms:9.3f} {m.p99_ms:9.3f} {cpu}"
            line += f"   {m.tps / direct.tps:9.2f}" if direct else f"   {'':9}"
            if bouncer and m is not bouncer and m.cpu_us is not None:
                line += f"   {m.tps / bouncer.tps:8.2f} {m.p99_ms / bouncer.p99_ms:5.2f} {cpu_ratio(m, bouncer):5.2f}"
            if m.failed:
                line += f"   {m.failed} FAILED"
            print(line, flush=True)

    def target(self, what, value, limit, at_most, text="{:.2f}"):
        reached = value <= limit if at_most else value >= limit
        self.targets.append({"what": what, "value": value, "limit": limit, "at_most": at_most, "reached": reached, "text": text})

    def judge_loads(self):
        for (workload, mode, clients), legs in self.loads.items():
            bouncer = legs.get("pgbouncer")
            if workload != "select-only" or not bouncer:
                continue
            for phase, cpu_limit in (("initial", 1.1), ("dual_write", 1.2)):
                if phase not in legs:
                    continue
                m = legs[phase]
                what = f"select-only {mode}, {clients} clients, {phase}:"
                self.target(f"{what} CPU per transaction", cpu_ratio(m, bouncer), cpu_limit, True)
                self.target(f"{what} throughput", m.tps / bouncer.tps, 0.95, False)
                self.target(f"{what} p99", m.p99_ms / bouncer.p99_ms, 1.1, True)

    def print_targets(self):
        print("\nTargets (of PgBouncer's in the same run, where nothing else is said)")
        for t in self.targets:
            sign = "≤" if t["at_most"] else "≥"
            verdict = "PASS" if t["reached"] else "short"
            value, limit = t["text"].format(t["value"]), t["text"].format(t["limit"])
            print(f"  {verdict:5}  {t['what']}: {value} (to reach: {sign} {limit})")
        reached = sum(t["reached"] for t in self.targets)
        print(f"\n{reached} of {len(self.targets)} targets reached")

    def write(self):
        directory = os.path.join(CHECKOUT, "bench", "results")
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, time.strftime("%Y%m%d-%H%M%S.json"))
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": {"cores": os.cpu_count(), "kernel": platform.release()},
            "versions": self.versions,
            "options": vars(self.options),
            "loads": [
                {"workload": workload, "mode": mode, "clients": clients, "legs": {name: vars(m) for name, m in legs.items()}}
                for (workload, mode, clients), legs in self.loads.items()
            ],
            "tpcb_both": self.both,
            "mirroring": self.mirroring,
            "memory_per_idle_session_kb": {name: vars(m) for name, m in self.memory.items()},
            "targets": [{name: t[name] for name in ("what", "value", "limit", "at_most", "reached")} for t in self.targets],
        }
        with open(path, "w") as file:
            json.dump(content, file, indent=2)
        print(f"written to {os.path.relpath(path)}")


def cpu_ratio(m, bouncer):
    # A short run can be too short for the clock of process times.
    return m.cpu_us / bouncer.cpu_us if bouncer.cpu_us else float("nan")
