"""What a host's own daemons cost while its VMs do nothing, and how quick `vm list` is.

Processor time is read from the scheduler's own count in nanoseconds, over all threads of agent and
guard, with no VM and with some idle ones. What QEMU itself takes is not in it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ground import HOSTS, Ground

UNITS = ("agent", "guard")
SETTLE_S = 6.0
MEMORY_MIB = 128
FIRST_ADDRESS = 150


@dataclass(frozen=True)
class Cost:
    """Shares of one core, 0.01 = 1 %."""

    seconds: float
    vms: int
    without: dict[str, float]
    idle: dict[str, float]

    @property
    def per_vm(self) -> float:
        """What one idle VM adds, agent and guard together."""
        return (sum(self.idle.values()) - sum(self.without.values())) / self.vms


def cost(ground: Ground, *, vms: int, seconds: float) -> Cost:
    """Measure on the first host, which must have no VM; leaves it so."""
    time.sleep(SETTLE_S)
    without = shares(ground, seconds)
    names = [f"idle{number}" for number in range(vms)]
    try:
        for number, name in enumerate(names):
            address = f"10.91.0.{FIRST_ADDRESS + number}"
            ground.must(
                "vm", "create", name, "--memory", f"{MEMORY_MIB}M", "--image", "demo",
                "--network", "lan", "--append", f"godwit.ip={address}/22",
            )  # fmt: skip
            ground.must("vm", "start", name, "--host", HOSTS[0])
            ground.wait_guest(address)
        time.sleep(SETTLE_S)
        idle = shares(ground, seconds)
    finally:
        for name in names:
            ground.godwit("vm", "stop", name, "--force")
            ground.godwit("vm", "delete", name)
    return Cost(seconds, vms, without, idle)


def shares(ground: Ground, seconds: float) -> dict[str, float]:
    """Each daemon's share of a core on the first host over a time."""
    pids = {unit: ground.lab.process(HOSTS[0], unit).pid for unit in UNITS}
    before = {unit: on_cpu_ns(pid) for unit, pid in pids.items()}
    started = time.monotonic()
    time.sleep(seconds)
    spent = (time.monotonic() - started) * 1e9
    return {unit: (on_cpu_ns(pid) - before[unit]) / spent for unit, pid in pids.items()}


def on_cpu_ns(pid: int) -> int:
    """Nanoseconds that the threads of a process have run."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it ended just now
            total += int((thread / "schedstat").read_text().split()[0])
    return total


def memory(ground: Ground) -> dict[str, dict[str, int]]:
    """Resident bytes of each daemon of each host: now, and the most there ever was."""
    found: dict[str, dict[str, int]] = {}
    for host in HOSTS:
        for unit in UNITS:
            text = Path(f"/proc/{ground.lab.process(host, unit).pid}/status").read_text()
            rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            now, most = (int(rows[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
            found[f"{host} {unit}"] = {"now_bytes": now, "most_bytes": most}
    return found


def listing(ground: Ground, *, times: int = 7) -> dict[str, Any]:
    """Seconds that `godwit vm list` takes from start to end."""
    taken = []
    for _ in range(times):
        done = ground.godwit("vm", "list")
        if done.code != 0:
            raise RuntimeError(f"godwit vm list: {done.err}")
        taken.append(done.wall_s)
    return {"seconds": taken, "median": statistics.median(taken), "worst": max(taken)}
