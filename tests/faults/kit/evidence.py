"""Gathers what ``judge`` needs from outside: processes, records, files, links, QEMU's trace."""

from __future__ import annotations

import json
import time
from pathlib import Path

from godwit.host.process import identify, is_stopped
from godwit.lab.layout import GROUPS
from godwit.model.errors import GodwitError
from godwit.qemu.intervals import Span, running_spans
from godwit.qemu.layout import tap_name

from . import judge
from .cluster import Cluster
from .judge import Copy, Evidence

SETTLE_S = 60.0


def spans(cluster: Cluster, vm: str, *, since: float) -> tuple[Span, ...]:
    """When the VM's vCPUs ran, on every host, from a moment on."""
    now = time.time()
    found = []
    for host in cluster.hosts:
        folder = cluster.lab.layout.node_dir(host) / "state"
        state, guard = folder / "vms" / vm, folder / "guard.log"
        ran = running_spans(state, until=now, guard=guard)
        found += [span for span in ran if span.end >= since]
    return tuple(sorted(found))


def copies(cluster: Cluster, vm: str) -> tuple[Copy, ...]:
    """Every QEMU process of the VM on this machine, with its agent's view of it."""
    found = []
    for folder in Path("/proc").iterdir():
        host = _host_of(cluster, folder, vm) if folder.name.isdigit() else None
        process = identify(int(folder.name)) if host else None
        if host and process is not None:
            status = _status(cluster, host, vm)
            found.append(Copy(host, process.pid, status, is_stopped(process)))
    return tuple(sorted(found, key=lambda copy: copy.host))


def await_settled(cluster: Cluster, vm: str) -> None:
    """Until the cluster has settled what became of a VM: record, list and processes agree.

    A VM of a host that came back is looked at for some seconds before its record says that nothing
    of it runs. AssertionError when that takes too long.
    """
    until = time.monotonic() + SETTLE_S
    while True:
        owner, row = cluster.owner(vm), cluster.client.vms.get(vm)
        if row.state.value in ("stopped", "failed", "saved") and owner.state.value == "stopped":
            return
        here = any(copy.host == owner.host for copy in copies(cluster, vm))
        if row.state.value == "running" and owner.state.value == "running" and here:
            return
        said = f"{vm} is {row.state.value} ({row.reason}), its record says {owner.state.value}"
        assert time.monotonic() < until, said
        time.sleep(0.1)


def _host_of(cluster: Cluster, folder: Path, vm: str) -> str | None:
    try:
        words = (folder / "cmdline").read_bytes().split(b"\0")
        if b"qemu" not in words[0] or not any(w.startswith(f"{vm},".encode()) for w in words):
            return None
        groups = (folder / "cgroup").read_text()
    except OSError:
        return None
    return next((h for h in cluster.hosts if f"/{GROUPS}/{cluster.name}/{h}/" in groups), None)


def _status(cluster: Cluster, host: str, vm: str) -> str:
    try:
        rows = cluster.lab.agent(host, "GET", "/v1/vms", deadline_s=2.0)
    except GodwitError:
        return ""
    return next((row["state"] for row in rows if row["vm"] == vm), "unknown to its agent")


def left_on(cluster: Cluster, host: str, vm: str) -> list[str]:
    """What a host that does not run the VM still has of it, the process apart."""
    found = []
    root = cluster.lab.root_of(host)
    folder = root / "run" / "godwit" / "vms" / vm
    if folder.exists():
        found.append(f"{host}: {', '.join(p.name for p in folder.iterdir()) or 'an empty folder'}")
    links = json.loads(cluster.lab.run(host, ["ip", "-j", "link"]))
    names = {link["ifname"] for link in links}
    taps = {tap_name(vm, f"net{number}") for number in range(4)}
    found += [f"{host}: tap {name}" for name in sorted(names & taps)]
    for tree in Path("/sys/fs/cgroup").iterdir():
        group = tree / cluster.lab.layout.cgroup(host) / "godwit" / host / vm
        if group.is_dir():
            found.append(f"{host}: control group {group.relative_to('/sys/fs/cgroup')}")
    try:
        view = cluster.lab.agent(host, "GET", "/v1/lab/holds", deadline_s=2.0)
        found += [f"{host}: held at {held['point']}" for held in view["held"]]
    except GodwitError as error:
        found.append(f"{host}: its agent does not answer: {error.message}")
    return found


def gather(
    cluster: Cluster, vm: str, migration_id: str, *, epoch_before: int, since: float
) -> Evidence:
    """Everything, now."""
    owner = cluster.owner(vm)
    running = copies(cluster, vm)
    left = [
        line
        for host in cluster.hosts
        if host != owner.host or owner.state.value == "stopped"
        for line in left_on(cluster, host, vm)
    ]
    left += [f"{h}: memory reserved for {vm}" for h, v in cluster.reservations().items() if vm in v]
    left += [f"saved memory {p.name}" for p in cluster.lab.layout.volume.glob(f"{vm}/saved-*.mem")]
    ran = spans(cluster, vm, since=since)
    return Evidence(
        vm=vm,
        epoch_before=epoch_before,
        epochs_seen=tuple(span.epoch for span in ran if span.epoch),
        owner=owner,
        migration=cluster.migration(migration_id),
        spans=ran,
        copies=running,
        answers=cluster.guest(vm).alive(timeout=1.5),
        left=tuple(left),
    )


def settle(
    cluster: Cluster,
    vm: str,
    migration_id: str,
    *,
    epoch_before: int,
    since: float,
    within_s: float,
) -> tuple[Evidence, list[str], float]:
    """Gather until no invariant is broken any more, or the time is up.

    Cleaning up goes on after a move has its final record, so a first look may be too early; two
    that ran at once stay in the evidence for ever.
    """
    start = time.monotonic()
    while True:
        seen = gather(cluster, vm, migration_id, epoch_before=epoch_before, since=since)
        wrong = judge.faults(seen)
        spent = time.monotonic() - start
        if not wrong or spent > within_s or any("two ran" in line for line in wrong):
            return seen, wrong, spent
        time.sleep(0.2)
