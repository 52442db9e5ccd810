"""Cancelled moves: the VM runs on where it was, and is hardly dark after the cancel."""

from __future__ import annotations

import time
from typing import Any

from . import evidence
from .cells import VM
from .cluster import Cluster
from .report import Say, Section, tell
from .watching import watching

POINTS = ("setup", "precopy", "pre-switchover")
BUDGET_MS = 50.0


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
    return section


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
