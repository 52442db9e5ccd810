"""Moves that are called off: by a person, in time or too late, and by the guard of a host whose
agent dies or hangs at the worst moment. The VM runs on where it was and is not dark for long.
"""

from __future__ import annotations

import time
from typing import Any

from godwit.lab import fault
from godwit.model.errors import GodwitError, Refused

from . import evidence
from .cells import VM
from .cluster import Cluster
from .report import Say, Section, tell
from .watching import watching

POINTS = ("setup", "precopy", "pre-switchover")
BUDGET_MS = 50.0
HUNG_MS = 5000.0
"""How long an agent that is dead or hangs may keep a VM dark."""


def run(cluster: Cluster, *, repeats: int = 1, say: Say = tell) -> Section:
    """Cancel at each point so often."""
    if VM not in {vm.name for vm in cluster.client.vms.list()}:
        cluster.make(VM, host="host1")
    rows = []
    for point in POINTS * repeats:
        row = _one(cluster, point)
        rows.append(row)
        say(f"cancel at {point}: {row['outcome']}, dark {row['dark_ms']:.1f} ms {row['wrong']}")
    section = Section("cancel", {"cancels": rows})
    for point in POINTS:
        dark = [row["dark_ms"] for row in rows if row["point"] == point]
        wrong = [row["wrong"] for row in rows if row["point"] == point and row["wrong"]]
        section.judge(
            f"cancel at {point}: runs on the source, destination clean", not wrong, wrong or "clean"
        )
        section.judge(
            f"cancel at {point}: dark at most {BUDGET_MS:g} ms from the cancel",
            max(dark) <= BUDGET_MS,
            {"dark_ms": dark},
            timing=True,
        )
    late = _late(cluster)
    section.figures["too late"] = late
    section.judge("a cancel after the swap is refused, the move completes", not late["wrong"], late)
    return section


def hung(cluster: Cluster, *, repeats: int = 1, say: Say = tell) -> Section:
    """The source's agent killed and frozen while the VM is dark and nothing is decided yet."""
    if VM not in {vm.name for vm in cluster.client.vms.list()}:
        cluster.make(VM, host="host1")
    section = Section("hung agent")
    for kind in ("kill", "freeze"):
        rows = [_without_agent(cluster, kind, say) for _ in range(repeats)]
        section.figures[kind] = rows
        wrong = [row["wrong"] for row in rows if row["wrong"]]
        section.judge(f"{kind} of the agent: the VM runs at its owner", not wrong, wrong or "clean")
        dark = [row["dark_ms"] for row in rows]
        section.judge(
            f"{kind} of the agent: dark at most {HUNG_MS / 1000:g} s",
            max(dark) <= HUNG_MS,
            {"dark_ms": dark},
            timing=True,
        )
    return section


def _without_agent(cluster: Cluster, kind: str, say: Say) -> dict[str, Any]:
    cluster.heal()
    before = cluster.owner(VM)
    source, since = str(before.host), time.time()
    cluster.hold(source, "pre-switchover", "source")
    with watching(cluster.netns, cluster.address(VM)) as probe:
        migration = cluster.begin(VM, cluster.other(source))
        cluster.await_held(source, "pre-switchover", "source")
        broken = time.monotonic_ns()
        act = fault.kill_process if kind == "kill" else fault.freeze_process
        act(cluster.lab, source, "agent")
        move = cluster.await_end(migration, timeout=60.0)
    seen, wrong, _ = evidence.settle(
        cluster, VM, migration, epoch_before=before.epoch, since=since, within_s=12.0
    )
    outcome = move.state.value if move else "no record"
    dark_ms = probe.dark_after(broken)
    say(f"{kind} of the agent at pre-switchover: {outcome}, dark {dark_ms:.0f} ms {wrong}")
    return {
        "outcome": outcome,
        "reason": move.reason if move else "",
        "runs_on": seen.owner.host,
        "dark_ms": dark_ms,
        "wrong": wrong,
    }


def _late(cluster: Cluster) -> dict[str, Any]:
    """Ask for a cancel when the owner has changed already."""
    cluster.heal()
    source = str(cluster.owner(VM).host)
    to = cluster.other(source)
    cluster.hold(source, "swapped", "source")
    migration = cluster.begin(VM, to)
    cluster.await_held(source, "swapped", "source")
    said, refused = "", False
    try:
        cluster.client.wait(cluster.client.migrations.cancel(migration))
    except GodwitError as error:
        said, refused = error.message, isinstance(error, Refused)
    cluster.release(source)
    move = cluster.await_end(migration, timeout=20.0)
    outcome = move.state.value if move else "no record"
    wrong = [] if refused else [f"the cancel was not refused: {said or 'accepted'}"]
    if outcome != "completed" or cluster.owner(VM).host != to:
        wrong.append(f"the move ended {outcome}, the record names {cluster.owner(VM).host}")
    return {"said": said, "outcome": outcome, "wrong": wrong}


def _one(cluster: Cluster, point: str) -> dict[str, Any]:
    cluster.heal()
    before = cluster.owner(VM)
    source = str(before.host)
    since = time.time()
    cluster.hold(source, point, "source")
    with watching(cluster.netns, cluster.address(VM)) as probe:
        migration = cluster.begin(VM, cluster.other(source))
        cluster.await_held(source, point, "source")
        asked = time.monotonic_ns()
        task = cluster.client.migrations.cancel(migration)
        move = cluster.await_end(migration, timeout=20.0)
        ended = time.monotonic_ns()
        cluster.client.wait(task)
    cluster.release(source)
    seen, wrong, _ = evidence.settle(
        cluster, VM, migration, epoch_before=before.epoch, since=since, within_s=10.0
    )
    outcome = move.state.value if move else "no record"
    if outcome != "cancelled":
        wrong.append(f"the move ended {outcome}: {move.reason if move else ''}")
    if seen.owner.host != source or seen.owner.epoch != before.epoch:
        wrong.append(f"the record names {seen.owner.host} at epoch {seen.owner.epoch}")
    return {
        "point": point,
        "outcome": outcome,
        "reason": move.reason if move else "",
        "dark_ms": probe.dark_after(asked),
        "probe_stalled_ms": probe.report.stalled_ms,
        "answered_in_ms": round((ended - asked) / 1e6, 1),
        "wrong": wrong,
    }
