"""The failure matrix as a section of the proof."""

from __future__ import annotations

from collections.abc import Sequence

from . import cells
from .cells import Cell
from .cluster import Cluster
from .report import Say, Section, tell


def run(cluster: Cluster, chosen: Sequence[Cell] | None = None, *, say: Say = tell) -> Section:
    """Carry out the chosen cells (all of them) on the VM ``web``, which is made if need be."""
    if cells.VM not in {vm.name for vm in cluster.client.vms.list()}:
        cluster.make(cells.VM, host="host1")
    results = cells.run(cluster, cells.every() if chosen is None else chosen, say=say)
    section = Section("matrix", {"cells": [result.as_json() for result in results]})
    bad = {r.cell.name: list(r.wrong) for r in results if r.wrong}
    section.judge(
        "every process killed and frozen at every hold point, and the migration network cut: "
        "the outcome is the table's, never two running, nothing left behind",
        not bad,
        {"cells": len(results), "wrong": bad},
    )
    return section
