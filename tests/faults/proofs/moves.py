"""The sections of issue A: one VM moves between two hosts."""

from __future__ import annotations

import subprocess
import time

from tests.faults.kit import (
    cancels,
    everyday,
    matrix,
    old,
    outrun,
    refusals,
    stamping,
)
from tests.faults.kit.cluster import Cluster
from tests.faults.kit.report import Section
from tests.faults.proofs.setting import BENCH_S, REPOSITORY, Work, on_lab
from tests.system.qemu.old_qemu import NoOldQemu, old_qemu

CANCELS = 5
MOVES, QUICK_MOVES = 50, 4


def _everyday(cluster: Cluster) -> Section:
    both = Section("everyday")
    for part in (everyday.adoption, everyday.scripting):
        found = part(cluster)
        both.figures[found.name] = found.figures
        both.criteria += found.criteria
    found = everyday.traffic(cluster, moves=10)
    both.figures[found.name] = found.figures
    both.criteria += found.criteria
    return both


def _old() -> Section:
    try:
        return old.run(old_qemu())
    except NoOldQemu as problem:
        section = Section("old-qemu")
        section.judge("QEMU 7.2 can be had", False, str(problem))
        return section


def _bench() -> Section:
    """The comparison with others, by its own script; it judges its own promises."""
    section = Section("bench")
    script = REPOSITORY / "scripts" / "bench"
    if not script.exists():
        section.judge("scripts/bench is there", False, "missing")
        return section
    start = time.monotonic()
    done = subprocess.run([script], cwd=REPOSITORY, capture_output=True, text=True, timeout=BENCH_S)
    section.figures = {
        "exit": done.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "output": done.stdout.splitlines()[-60:],
        "errors": done.stderr.splitlines()[-20:],
    }
    section.judge("scripts/bench holds its promises", done.returncode == 0, done.returncode)
    return section


SECTIONS: dict[str, Work] = {
    "matrix": lambda: on_lab(matrix.run),
    "cancel": lambda: on_lab(lambda cluster: cancels.run(cluster, repeats=CANCELS)),
    "hung-agent": lambda: on_lab(lambda cluster: cancels.hung(cluster, repeats=CANCELS)),
    "stamp": lambda: on_lab(lambda c: stamping.run(c, live=MOVES, quick=QUICK_MOVES)),
    "everyday": lambda: on_lab(_everyday),
    "refusals": lambda: on_lab(refusals.run),
    "outrun": outrun.run,
    "old-qemu": _old,
    "bench": _bench,
}
