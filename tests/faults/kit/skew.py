"""Agents and guards of an earlier commit with this manager and this store, then upgraded.

The earlier commit is a fixed one: its agent tells no level, drops fields that it does not know, and
lacks what a failover asks of agents. Its configuration is today's.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from godwit.lab import older
from godwit.model import keys
from godwit.model.errors import GodwitError
from godwit.model.skew import LEVEL
from godwit.store.api import mod_is, put
from godwit.store.records import Records

from . import evidence
from .cells import VM
from .cluster import Cluster
from .report import Say, Section, tell

REPOSITORY = Path(__file__).resolve().parents[3]
COMMIT = "bb492b12dcc4b61e8fe6355b0c156ce552d7fa81"
"""Before agents could say what runs, and before records named what this version keeps."""
NEIGHBOUR = "neighbour"
UPGRADED_S = 30.0
_NEWS = {"of": ["a later version", None], "at": 1.5}


class NoHistory(Exception):
    """The earlier commit cannot be had here; the text says why."""


@contextmanager
def old_source() -> Iterator[Path]:
    """The tree of the earlier commit; NoHistory where git or the commit is not there."""
    with TemporaryDirectory(prefix="godwit-skew-") as folder:
        unpacked = Path(folder)
        for path, data in _files(_archive()):
            target = unpacked / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        yield unpacked


def _archive() -> bytes:
    argv = ["git", "-C", str(REPOSITORY), "archive", COMMIT, "src/godwit"]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=60.0)
    except FileNotFoundError:
        raise NoHistory("git is not installed") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else "no reason given"
        raise NoHistory(
            f"commit {COMMIT[:7]} is not in this clone ({why}); "
            "a shallow one gets it by: git fetch --unshallow"
        )
    return done.stdout


def _files(archive: bytes) -> Iterator[tuple[Path, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield Path(member.name), content.read()


def run(cluster: Cluster, *, neighbour: bool = True, say: Say = tell) -> Section:
    """A VM moves among old agents, between old and new in both directions, and runs on through
    both upgrades; with ``neighbour`` another one stays where it is, and there are more moves."""
    section = Section("skew")
    first, second = cluster.hosts[:2]
    _are_old(cluster, section)
    guest = cluster.make(VM, host=first)
    if neighbour:
        cluster.make(NEIGHBOUR, host=second)
    uptime = float(guest.stats()["uptime_s"])
    if neighbour:
        _moves(cluster, section, "old to old, and back", (second, first), say=say)
    _upgrade(cluster, section, second, (NEIGHBOUR, VM) if neighbour else (VM,), say=say)
    _moves(cluster, section, "old to new, and back", (second, first), say=say)
    _upgrade(cluster, section, first, (VM, NEIGHBOUR) if neighbour else (VM,), say=say)
    if neighbour:
        _keeps_what_is_newer(cluster, section, second)
        _moves(cluster, section, "new to new", (second,), say=say)
    later = float(guest.stats()["uptime_s"])
    section.judge("the guest's clock never began anew", later > uptime, [uptime, later])
    found = json.loads(cluster.cli("cluster", "status", "-o", "json").out)
    section.judge(
        "once all are of one version nobody is told to upgrade",
        found["level"] == LEVEL and not any("upgrade" in one["next"] for one in found["hosts"]),
        found,
    )
    for vm in (VM, NEIGHBOUR) if neighbour else (VM,):
        cluster.remove(vm)
    return section


def _are_old(cluster: Cluster, section: Section) -> None:
    rows = json.loads(cluster.cli("host", "list", "-o", "json").out)
    section.judge(
        "the hosts' agents are of the earlier commit, and up",
        all(row["level"] == 0 and row["state"] == "up" for row in rows)
        and all(older.is_older(cluster.lab, host) for host in cluster.hosts),
        rows,
    )
    status = json.loads(cluster.cli("cluster", "status", "-o", "json").out)
    section.judge(
        "the status names them as those to upgrade",
        all("upgrade Godwit there" in one["next"] for one in status["hosts"]),
        status["hosts"],
    )
    section.judge("they lack what this version has", _lacks_a_verb(cluster), "GET /v1/processes")


def _lacks_a_verb(cluster: Cluster) -> bool:
    """An agent of this commit answers it; without this the rest would prove nothing."""
    try:
        cluster.lab.agent(cluster.hosts[0], "GET", "/v1/processes", deadline_s=5.0)
    except GodwitError:
        return True
    return False


def _moves(
    cluster: Cluster, section: Section, name: str, ways: tuple[str, ...], *, say: Say
) -> None:
    ends = []
    for to in ways:
        move = cluster.move(VM, to)
        cluster.await_task(VM)
        ends.append([to, move.state.value, move.reason, move.blackout_ms, cluster.owner(VM).host])
    say(f"skew: {name}: {ends}")
    section.figures[name] = ends
    section.judge(
        f"it moves live: {name}",
        all(state == "completed" and to == host for to, state, _, _, host in ends)
        and cluster.guest(VM).alive(),
        ends,
    )


def _upgrade(
    cluster: Cluster, section: Section, host: str, vms: tuple[str, ...], *, say: Say
) -> None:
    """The host's guard and agent end and start as this version's; no VM may notice."""
    before, since = {vm: _standing(cluster, vm) for vm in vms}, time.time()
    start = time.monotonic()
    older.upgrade(cluster.lab, host)
    _adopted(cluster, host, [vm for vm in vms if before[vm]["host"] == host])
    spent = time.monotonic() - start
    after = {vm: _standing(cluster, vm) for vm in vms}
    ran = {vm: len(evidence.spans(cluster, vm, since=since)) for vm in vms}
    same = all(
        {**after[vm], "uptime_s": 0} == {**before[vm], "uptime_s": 0}
        and after[vm]["uptime_s"] > before[vm]["uptime_s"]
        for vm in vms
    )
    say(f"skew: {host} upgraded in {spent:.1f} s, processes untouched: {same}")
    section.figures[f"upgrade of {host}"] = {
        "seconds": round(spent, 2),
        "before": before,
        "after": after,
        "spans": ran,
    }
    section.judge(
        f"the upgrade of {host} leaves every QEMU, epoch and guest as it was",
        same and set(ran.values()) == {1},
        section.figures[f"upgrade of {host}"],
    )
    rows = {row["name"]: row for row in cluster.client.rows("hosts")}
    section.judge(f"{host} is of this version", rows[host]["level"] == LEVEL, rows[host])


def _standing(cluster: Cluster, vm: str) -> dict[str, Any]:
    owner = cluster.owner(vm)
    return {
        "host": owner.host,
        "epoch": owner.epoch,
        "state": owner.state.value,
        "pids": [copy.pid for copy in evidence.copies(cluster, vm)],
        "uptime_s": float(cluster.guest(vm).stats()["uptime_s"]),
    }


def _adopted(cluster: Cluster, host: str, vms: list[str]) -> None:
    """Wait until the new agent has told what it is, and has its VMs."""
    cluster.lab.tell(host, "wait-ready", units=list(older.UNITS), timeout=UPGRADED_S)
    until = time.monotonic() + UPGRADED_S
    while True:
        try:
            rows = {row["name"]: row for row in cluster.client.rows("hosts")}
            here = {row["vm"] for row in cluster.lab.agent(host, "GET", "/v1/vms", deadline_s=1.0)}
            if rows[host]["level"] == LEVEL and rows[host]["state"] == "up" and here >= set(vms):
                return
            why = f"{rows[host]['state']}, level {rows[host]['level']}, has {sorted(here)}"
        except GodwitError as error:
            why = error.message
        assert time.monotonic() < until, f"{host} does not come back: {why}"
        time.sleep(0.1)


def _keeps_what_is_newer(cluster: Cluster, section: Section, to: str) -> None:
    """A field of a later version in the VM's records survives a whole move by this one."""
    for key in (keys.vm_owner(VM), keys.vm_spec(VM)):
        assert cluster.store(lambda records, key=key: _add_news(records, key))
    before = cluster.owner(VM).host
    move = cluster.move(VM, to)
    cluster.await_task(VM)
    kept = {
        key: json.loads(value).get("later")
        for key, value in cluster.dump().items()
        if key in (keys.vm_owner(VM), keys.vm_spec(VM))
    }
    section.judge(
        "what a later version keeps in a VM's records survives a move by this one",
        move.state.value == "completed"
        and before != to
        and len(kept) == 2
        and all(value == _NEWS for value in kept.values()),
        kept,
    )
    back = cluster.move(VM, str(before))
    cluster.await_task(VM)
    section.judge("and back", back.state.value == "completed", back.reason)


async def _add_news(records: Records, key: str) -> bool:
    found = await records.store.get(key)
    assert found is not None
    value = json.dumps({**json.loads(found.value), "later": _NEWS}).encode()
    return (await records.store.txn([mod_is(key, found.mod_revision)], [put(key, value)])).succeeded
