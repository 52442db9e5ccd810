"""A host that is cut off, and one whose guard hangs: what its VMs do, counted many times.

``web`` is highly available, ``plain`` is not; both run on host1. Times count from the last answered
renewal, as the guard noted it; a VM's processor time, as the kernel counts it, says whether it ran.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from godwit.guard.deadline import FREEZE_S, RESET_S
from godwit.host.cgroup import Cgroup, open_cgroup
from godwit.host.process import is_alive
from godwit.lab import fault
from godwit.model import keys
from godwit.model.errors import GodwitError
from godwit.model.membership import Renewal
from godwit.model.vm import VmState

from . import evidence
from .cluster import Cluster
from .report import Say, Section, tell

HOST = "host1"
NAMES = ("web", "plain")
MEMORY = 128 << 20
DARK_S = (0.5, 1.5, 3.0)
"""How long it stays cut off after the freeze; a taker could begin 6.4 s after it."""
LATE_S, THAW_S, RESET_LATE_S = 1.0, 4.0, 1.0


def run(cluster: Cluster, *, cuts: int, hangs: int, say: Say = tell) -> Section:
    """Cut the management network ``cuts`` times, let the guard hang ``hangs`` times."""
    section = Section("deadline")
    found: dict[str, list[Any]] = {"frozen_s": [], "thawed_s": [], "reset_s": [], "wrong": []}
    for name in NAMES:
        task = cluster.client.vms.create(
            name, memory_bytes=MEMORY, image="demo", ha=name == NAMES[0]
        )
        cluster.client.wait(task)
    try:
        for number in range(cuts):
            _ready(cluster)
            _cut(cluster, found, DARK_S[number % len(DARK_S)])
            say(f"cut {number + 1}: {found['frozen_s'][-1]} s, {found['thawed_s'][-1]} s")
        for number in range(hangs):
            _ready(cluster)
            _hang(cluster, found)
            say(f"hang {number + 1}: reset after {found['reset_s'][-1]} s")
    finally:
        for name in NAMES:
            _stop(cluster, name)
            with contextlib.suppress(GodwitError):  # what went wrong before is to be told
                cluster.client.wait(cluster.client.vms.delete(name))
    section.figures = found
    section.judge(
        f"a host that is cut off freezes what is highly available at {FREEZE_S:g} s, {cuts} times",
        all(FREEZE_S - 0.1 <= at < FREEZE_S + LATE_S for at in found["frozen_s"]),
        found["frozen_s"],
    )
    section.judge(
        f"back again it goes on within {THAW_S:g} s",
        len(found["thawed_s"]) == cuts and all(at < THAW_S for at in found["thawed_s"]),
        found["thawed_s"],
    )
    section.judge(
        f"a guard that hangs costs its host within {RESET_S:g} s, {hangs} times",
        len(found["reset_s"]) == hangs
        and all(at < RESET_S + RESET_LATE_S for at in found["reset_s"]),
        found["reset_s"],
    )
    section.judge(
        "a frozen VM uses no processor time, and one that is not highly available is not touched",
        not found["wrong"],
        found["wrong"] or "nothing",
    )
    return section


def _cut(cluster: Cluster, found: dict[str, list[Any]], dark_s: float) -> None:
    web, plain = (_group(cluster, name) for name in NAMES)
    began = time.time()
    fault.cut_network(cluster.lab, HOST, "mgmt")
    try:
        found["frozen_s"].append(round(_until(web.frozen, 15) - _counts_from(cluster), 2))
        used = web.cpu_seconds(), plain.cpu_seconds()
        time.sleep(dark_s)
        if web.cpu_seconds() != used[0]:
            found["wrong"].append("the frozen one ran")
        if plain.cpu_seconds() == used[1] or plain.frozen():
            found["wrong"].append("the other one stood still")
    finally:
        fault.restore_network(cluster.lab, HOST, "mgmt")
    back = _now()
    found["thawed_s"].append(round(_until(lambda: not web.frozen(), 15) - back, 2))
    _until(lambda: web.cpu_seconds() > used[0], 10)
    if len(evidence.spans(cluster, NAMES[1], since=began)) != 1:
        found["wrong"].append("the other one did not run all the time")


def _hang(cluster: Cluster, found: dict[str, list[Any]]) -> None:
    lab = cluster.lab.reload()
    first = lab.init(HOST)
    fault.freeze_process(lab, HOST, "guard", hold=True)
    counts = _counts_from(cluster)
    found["reset_s"].append(round(_until(lambda: not is_alive(first), 20) - counts, 2))
    fault.power_on(cluster.lab.reload(), HOST)


def _ready(cluster: Cluster) -> None:
    """Both VMs run on host1, and its guard says that it keeps the deadline."""
    cluster.admit(HOST)
    for name in NAMES:
        evidence.await_settled(cluster, name)
        view = cluster.client.vms.get(name)
        if (view.state, view.host) != (VmState.RUNNING, HOST):
            _stop(cluster, name)
            cluster.client.wait(cluster.client.vms.start(name, host=HOST))

    def armed() -> bool:
        said = cluster.store(lambda records: records.get(keys.host_renewal(HOST), Renewal))
        return said is not None and said.value.guard == "armed" and said.value.watchdog

    _until(armed, 15)


def _stop(cluster: Cluster, name: str) -> None:
    with contextlib.suppress(GodwitError):  # it may have stopped by itself
        cluster.client.wait(cluster.client.vms.stop(name, force=True))


def _group(cluster: Cluster, vm: str) -> Cgroup:
    return open_cgroup(f"{cluster.lab.layout.cgroup(HOST)}/godwit/{HOST}/{vm}")


def _counts_from(cluster: Cluster) -> float:
    notes = cluster.lab.reload().root_of(HOST) / "run/godwit/guard.json"
    return float(json.loads(notes.read_text())["counts_from"])


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _until(true: Callable[[], bool], seconds: float) -> float:
    """Wait, and return when it came true, on the clock of guards; the kernel announces nothing."""
    limit = _now() + seconds
    while not true():
        assert _now() < limit, "it did not come true in time"
        time.sleep(0.01)
    return _now()
