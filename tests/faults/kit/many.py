"""Sixteen hosts on one machine: all up, eight live moves at once, lists in under a second.

What the lab costs is told: resident memory of its daemons, and the CPU they use while nothing
happens.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from godwit.host.process import cpu_seconds, rss_bytes
from godwit.lab.layout import GROUPS
from godwit.model.migration import Migration

from .cluster import MIB, Cluster
from .report import Section, quantile

HOSTS, MOVES = 16, 8
MEMORY_MIB = 128
LIST_S, BLACKOUT_MS, TURN_S = 1.0, 500.0, 2.0
REST_S = 10.0
ASKED = (("vm", "list"), ("host", "list"), ("cluster", "status"))


def run(cluster: Cluster, *, moves: int = MOVES) -> Section:
    """A VM on each of the first hosts moves to its own other one, all at the same moment."""
    section = Section("many-hosts")
    rows = cluster.client.rows("hosts")
    up = [row["name"] for row in rows if row["state"] == "up"]
    names = [f"vm{number}" for number in range(1, moves + 1)]
    for name, host in zip(names, cluster.hosts[:moves], strict=True):
        words = f"godwit.ip={cluster.address(name)}/22 godwit.host={name}"
        made = cluster.client.vms.create(
            name, memory_bytes=MEMORY_MIB * MIB, image="demo", append=words, networks=["lan"]
        )
        cluster.client.wait(made)
        cluster.boot(name, host=host)
    cost = _cost(cluster)
    targets = cluster.hosts[moves : 2 * moves]
    with ThreadPoolExecutor(moves) as pool:
        done = list(pool.map(lambda pair: _move(cluster, *pair), zip(names, targets, strict=True)))
    asked = {" ".join(words): _wall(cluster, words) for words in ASKED}
    section.figures = {
        "hosts": len(cluster.hosts),
        "up": len(up),
        "moves": [_told(move) for move in done],
        "asked_s": asked,
        "cost": cost,
    }
    _judge(section, cluster, done, asked)
    for name in names:
        cluster.remove(name)
    return section


def _move(cluster: Cluster, vm: str, to: str) -> Migration:
    client = cluster.new_client()
    try:
        task = client.wait(client.vms.migrate(vm, to=to))
        found = client.migration_of(task)
        assert found is not None, task.reason
        return client.migrations.get(found.id)
    finally:
        client.close()


def _told(move: Migration) -> dict[str, Any]:
    waited = None if move.turn_at is None else round(move.turn_at - move.accepted_at, 3)
    return {
        "vm": move.vm,
        "outcome": move.outcome,
        "waited_s": waited,
        "total_ms": move.total_ms,
        "blackout_ms": move.blackout_ms,
    }


def _wall(cluster: Cluster, words: tuple[str, ...]) -> float:
    """The median of three: the first one after moves may find caches cold."""
    seen = [cluster.cli(*words).wall_s for _ in range(3)]
    return round(sorted(seen)[1], 3)


def _cost(cluster: Cluster) -> dict[str, float]:
    """The lab's daemons, without QEMU: memory, and cores while nothing is asked of them."""
    pids = _daemons(cluster)
    before, at = {pid: cpu_seconds(pid) for pid in pids}, time.monotonic()
    time.sleep(REST_S)  # what is measured is rest
    spent = sum(cpu_seconds(pid) - before[pid] for pid in pids if Path(f"/proc/{pid}").exists())
    return {
        "daemons": len(pids),
        "memory_mib": round(sum(rss_bytes(pid) for pid in pids) / MIB),
        "cores_at_rest": round(spent / (time.monotonic() - at), 3),
    }


def _daemons(cluster: Cluster) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            groups = (folder / "cgroup").read_text()
            environ = (folder / "environ").read_bytes()
        except OSError:
            continue
        mine = f"/{GROUPS}/{cluster.name}/" in groups or cluster.name.encode() in environ
        named = any(cluster.name.encode() in word for word in words)
        if (mine or named) and b"qemu-system" not in words[0]:
            found.append(int(folder.name))
    return found


def _judge(
    section: Section, cluster: Cluster, moves: list[Migration], asked: dict[str, float]
) -> None:
    figures = section.figures
    section.judge("every host is up", figures["up"] == len(cluster.hosts), figures["up"])
    outcomes = [move.outcome for move in moves]
    section.judge(
        f"{len(moves)} live moves at once, one a host: all complete",
        all(outcome == "completed" for outcome in outcomes),
        outcomes,
    )
    waits = [one["waited_s"] for one in figures["moves"]]
    section.judge(
        "none waited for a turn that was free",
        all(waited is not None and waited <= TURN_S for waited in waits),
        waits,
    )
    dark = [move.blackout_ms for move in moves]
    section.judge(
        f"every blackout is reported, and at most {BLACKOUT_MS:g} ms",
        all(ms is not None and ms <= BLACKOUT_MS for ms in dark),
        {"all": dark, "median": quantile([ms for ms in dark if ms is not None], 0.5)},
        timing=True,
    )
    section.judge(
        f"status and lists within {LIST_S:g} s",
        all(seconds <= LIST_S for seconds in asked.values()),
        asked,
        timing=True,
    )
