"""The storage broker dies, freezes, and loses its agent, under a guest that writes through it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from godwit.host.process import Process

from .cluster import Cluster
from .guest import Guest
from .report import Say, Section, tell

VM = "brokered"
DISK = "shared:128M:vhdx"
RECORDS_PER_S = 50
KILL_STALL_MS, FREEZE_STALL_MS = 2000.0, 8000.0


def run(cluster: Cluster, *, repeats: int = 1, say: Say = tell) -> Section:
    """Each fault so many times; the guest must see no error and lose no acknowledged record."""
    cluster.heal()
    guest = cluster.make(VM, host="host1", disks=[DISK])
    guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    section = Section("brokers")
    faults: dict[str, tuple[Callable[[Cluster], None], float]] = {
        "broker killed": (lambda c: _signal(c, signal.SIGKILL), KILL_STALL_MS),
        "broker frozen": (lambda c: _signal(c, signal.SIGSTOP), FREEZE_STALL_MS),
        "agent killed, then the broker": (_orphan, FREEZE_STALL_MS),
    }
    for what, (strike, bound) in faults.items():
        seen = [_once(cluster, guest, strike) for _ in range(repeats)]
        section.figures[what] = seen
        worst = max(one["stall_ms"] for one in seen)
        say(f"{what}: the guest waited {worst:.0f} ms at most")
        section.judge(
            f"{what}: the guest's disk goes on", all(one["went_on"] for one in seen), seen
        )
        section.judge(f"{what}: the guest sees no error", not any(o["errors"] for o in seen), seen)
        section.judge(
            f"{what}: it waits at most {bound / 1e3:g} s", worst <= bound, worst, timing=True
        )
    to = cluster.other(str(cluster.owner(VM).host))
    moved = cluster.cli("vm", "migrate", VM, "--to", to, "-o", "json")  # returns with its task
    section.judge("after all of it the VM moves live", moved.code == 0, moved.err[-300:])
    cluster.client.wait(cluster.client.vms.stop(VM, force=True))
    cluster.client.wait(cluster.client.vms.delete(VM))
    return section


def _once(cluster: Cluster, guest: Guest, strike: Callable[[Cluster], None]) -> dict[str, Any]:
    before = guest.stats()["log"]
    began = time.monotonic()
    strike(cluster)
    went_on, last, stall = False, began, 0.0
    count = before["acknowledged"]
    while time.monotonic() - began < 20.0:
        now = guest.stats()["log"]
        if now["acknowledged"] > count:
            stall = max(stall, time.monotonic() - last)
            count, last = now["acknowledged"], time.monotonic()
        if time.monotonic() - began > 6.0 and count > before["acknowledged"] + RECORDS_PER_S:
            went_on = True
            break
        time.sleep(0.01)  # the guest has no event for an acknowledged record
    return {
        "went_on": went_on,
        "stall_ms": round(max(stall, time.monotonic() - last) * 1e3, 1),
        "errors": now["errors"] - before["errors"],
    }


def _broker(cluster: Cluster) -> Process:
    """The daemon as the real machine counts it."""
    return cluster.lab.process(str(cluster.owner(VM).host), f"broker:{VM}")


def _signal(cluster: Cluster, number: signal.Signals) -> None:
    os.kill(_broker(cluster).pid, number)


def _orphan(cluster: Cluster) -> None:
    """The agent's successor finds a broker that died while nobody looked."""
    host = str(cluster.owner(VM).host)
    daemon = _broker(cluster)
    os.kill(cluster.lab.process(host, "agent").pid, signal.SIGKILL)
    os.kill(daemon.pid, signal.SIGKILL)
