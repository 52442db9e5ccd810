"""Moves while every processor is wanted by many: the VM runs on until they are calm, or time is up.

What keeps the processors busy are processes that compute, started and ended here.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from godwit.host import process
from godwit.model.migration import Migration

from .cells import VM
from .cluster import Cluster
from .report import Say, Section, quantile, tell

SPINNERS_A_CORE = 4
BUDGET_MS = 300.0
SPIN = "import os\nwhile os.getppid() == {parent}:\n for _ in range(1000000): pass"
"""Computes for as long as it has this parent: a test that is killed leaves none behind."""
WAITS, CALM = "waiting to stop the VM", "the processors are calm after"
STILL = ("still strained after", "nothing was left to copy")
DEADLINE_S = 120.0


def run(cluster: Cluster, *, moves: int = 1, to_the_end: bool = True, say: Say = tell) -> Section:
    """So many moves whose processors become calm, and one whose do not."""
    if VM not in {vm.name for vm in cluster.client.vms.list()}:
        cluster.make(VM, host="host1")
    section = Section("busy-processors")
    done = [_calmed(cluster, say) for _ in range(moves)]
    section.figures["calmed"] = [_told(move) for move in done]
    section.judge(
        "on busy processors the VM runs on, and is moved once they are calm",
        all(move.outcome == "completed" and _says(move, CALM) for move in done),
        [move.log for move in done],
    )
    dark = [move.blackout_ms for move in done]
    section.judge(
        f"then it is dark for no longer than its budget of {BUDGET_MS:g} ms",
        all(ms is not None and ms <= BUDGET_MS for ms in dark),
        {"all": dark, "median": quantile([ms for ms in dark if ms is not None], 0.5)},
        timing=True,
    )
    if to_the_end:
        _never_calm(cluster, section)
    return section


def _never_calm(cluster: Cluster, section: Section) -> None:
    with busy():
        move = cluster.move(VM, cluster.other(str(cluster.owner(VM).host)), timeout=DEADLINE_S)
    section.figures["busy to the end"] = _told(move)
    section.judge(
        "processors that stay busy are waited for for a bounded time, and it says so",
        move.outcome == "completed" and _says(move, WAITS) and _says(move, *STILL),
        move.log,
    )


def _calmed(cluster: Cluster, say: Say) -> Migration:
    source = str(cluster.owner(VM).host)
    with busy():
        migration = cluster.begin(VM, cluster.other(source))
        _await_word(cluster, migration, WAITS)
    move = cluster.await_end(migration, timeout=DEADLINE_S)
    assert move is not None
    say(f"{move.outcome}, dark {move.blackout_ms} ms: {move.log}")
    return move


def _await_word(cluster: Cluster, migration: str, words: str) -> None:
    """Until the move's record says this; a move that ends without is no wait."""
    while True:
        move = cluster.migration(migration)
        if move is not None and (_says(move, words) or move.state.final):
            return
        time.sleep(0.05)


@contextmanager
def busy() -> Iterator[None]:
    """Every processor wanted by several processes; all of them end with the block."""
    count = SPINNERS_A_CORE * (os.cpu_count() or 1)
    program = SPIN.format(parent=os.getpid())
    spinners = [process.spawn([sys.executable, "-c", program]) for _ in range(count)]
    try:
        yield
    finally:
        for one in spinners:
            process.kill(one)
        for one in spinners:
            os.waitpid(one.pid, 0)


def _says(move: Migration, *words: str) -> bool:
    """Whether the move's log says any of these."""
    return any(one in line for one in words for line in move.log)


def _told(move: Migration) -> dict[str, object]:
    return {
        "outcome": move.outcome,
        "total_ms": move.total_ms,
        "blackout_ms": move.blackout_ms,
        "log": list(move.log),
    }
