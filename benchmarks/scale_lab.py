"""Sixteen hosts in one lab: how quick status and lists are, and what all of it costs at rest.

    .venv/bin/python benchmarks/scale_lab.py [--hosts 16] [--store etcd] [--managers 1]

Raises a lab of its own (needs root), waits until every host is up, takes the time of the commands
that people look with, and reads memory and processor time of every daemon. Memory is the
proportional share (PSS): pages that daemons have in common are counted once. No VM runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import facts
from idle import on_cpu_ns
from scale import NO_GUEST, ROOT

from godwit.lab.handle import Lab

LAB = "scale"
LIMIT_S = 1.0
UP_S = 300.0
COMMANDS = (
    ("host", "list"),
    ("vm", "list"),
    ("volume", "list"),
    ("cluster", "status"),
    ("lab", "status", "--name", LAB),
)
PROGRAM = str(Path(sys.executable).with_name("godwit"))


def godwit(*words: str) -> tuple[float, str]:
    """A command's time from start to end, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(
        [PROGRAM, *words], capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"godwit {' '.join(words)}: {done.stderr}")
    return time.perf_counter() - began, done.stdout


def all_up(hosts: int) -> float:
    """Seconds until every host is up."""
    began = time.monotonic()
    while time.monotonic() - began < UP_S:
        rows = json.loads(godwit("host", "list", "-o", "json", "--context", LAB_CONTEXT)[1])
        if sum(row["state"] == "up" for row in rows) == hosts:
            return time.monotonic() - began
        time.sleep(0.2)  # what a person does: looks again
    raise RuntimeError(f"not all of {hosts} hosts came up")


LAB_CONTEXT = LAB


def proportional_bytes(pid: int) -> int:
    """A process's memory, with its share of what it has in common with others."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("Pss:")) * 1024


def at_rest(lab: Lab, seconds: float) -> dict[str, Any]:
    """Memory and share of a core of all daemons of a kind together."""
    nodes = [*lab.status()["hosts"], "control"]
    names = [node if isinstance(node, str) else node["name"] for node in nodes]
    pids = {(name, unit): lab.process(name, unit).pid for name in names for unit in lab.units(name)}
    before = {key: on_cpu_ns(pid) for key, pid in pids.items()}
    began = time.monotonic()
    time.sleep(seconds)  # nothing announces that a time of rest is over
    spent = (time.monotonic() - began) * 1e9
    found: dict[str, Any] = {}
    for (name, unit), pid in pids.items():
        kind = found.setdefault(unit, {"processes": 0, "bytes": 0, "cores": 0.0})
        kind["processes"] += 1
        kind["bytes"] += proportional_bytes(pid)
        kind["cores"] += (on_cpu_ns(pid) - before[name, unit]) / spent
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--store", default="etcd")
    parser.add_argument("--managers", default="1")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/proof/bench-scale-lab.json")
    given = parser.parse_args()
    result: dict[str, Any] = {
        "commit": facts.commit(),
        "machine": facts.machine(NO_GUEST),
        "load": {"before": os.getloadavg()},
        "hosts": given.hosts,
        "store": given.store,
        "managers": given.managers,
    }
    try:
        result["up_s"], _ = godwit(
            "lab", "up", "--name", LAB, "--hosts", str(given.hosts), "--store", given.store,
            "--managers", given.managers,
        )  # fmt: skip
        result["all_up_s"] = result["up_s"] + all_up(given.hosts)
        result["rest"] = at_rest(Lab.load(LAB), given.seconds)
        result["commands"] = {}
        for words in COMMANDS:
            more = () if words[0] == "lab" else ("--context", LAB_CONTEXT)
            times = [godwit(*words, *more)[0] for _ in range(given.rounds)]
            result["commands"][" ".join(words[:2])] = {
                "median_s": sorted(times)[len(times) // 2],
                "worst_s": max(times),
            }
    finally:
        godwit("lab", "down", "--name", LAB)
    result["load"]["after"] = os.getloadavg()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{given.hosts} hosts, {given.store}: up after {result['all_up_s']:.0f} s")
    for unit, cost in sorted(result["rest"].items()):
        print(
            f"  {unit:12} {cost['processes']:3} x  {cost['bytes'] / (1 << 20):6.0f} MiB"
            f"  {100 * cost['cores']:6.1f} % of a core"
        )
    for name, took in result["commands"].items():
        print(f"  godwit {name:16} {took['median_s']:.2f} s, worst {took['worst_s']:.2f} s")
    late = [name for name, took in result["commands"].items() if took["median_s"] >= LIMIT_S]
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
