"""The cells of the failure matrix on a real lab: a move, held at a point, and one thing broken.

The cells and what is expected of each are the rows of the failure table
(tests/golden/migration/failure_table.json), which the engine's own tests walk in virtual time.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from godwit.lab import fault
from godwit.model.errors import GodwitError, NotFound

from . import evidence, judge
from .cluster import Cluster
from .table import Expected, rows

VM = "web"
CUT_S = 3.0
END_S = 60.0
SETTLE_S = 12.0
FROZEN_S = 15.0


@dataclass(frozen=True, order=True)
class Cell:
    """One fault (``kill``, ``freeze`` or ``cut``) of one thing at one hold point of one side."""

    role: str
    point: str
    kind: str
    victim: str

    @property
    def name(self) -> str:
        """For people and for pytest: ``kill-source-agent-at-precopy``."""
        return f"{self.kind}-{self.victim}-at-{self.point}"


@dataclass(frozen=True)
class Result:
    """What came of a cell. ``wrong``: broken invariants and what was not as the table says."""

    cell: Cell
    outcome: str
    reason: str
    runs_on: str
    wrong: tuple[str, ...]
    seconds: float
    settled_s: float
    expected: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The raw figures."""
        return {"name": self.cell.name, **dataclasses.asdict(self)}


def every() -> tuple[Cell, ...]:
    """The whole matrix: each row of the table."""
    return tuple(_cells())


def _cells() -> dict[Cell, Expected]:
    table = {}
    for row in rows():
        kind, _, victim = row.fault.partition(" ")
        table[Cell(row.role, row.stage, kind, victim)] = row.expected
    return table


def sample(seed: int) -> tuple[Cell, ...]:
    """Everything that can break once, killed or frozen or cut, at points drawn by the seed."""
    drawn = random.Random(seed)
    victims = sorted({cell.victim for cell in every()})
    return tuple(
        drawn.choice([cell for cell in every() if cell.victim == victim]) for victim in victims
    )


def perform(cluster: Cluster, cell: Cell, vm: str = VM, *, want: Expected | None = None) -> Result:
    """Bring one cell about and judge it by the table, or by ``want``.

    It begins on a healed cluster with the VM running, and leaves both as they then are.
    """
    source = ready(cluster, vm)
    destination = cluster.other(source)
    before = cluster.owner(vm)
    begun, since = time.monotonic(), time.time()
    held_on = source if cell.role == "source" else destination
    cluster.hold(held_on, cell.point, cell.role)
    migration = cluster.begin(vm, destination)
    cluster.await_held(held_on, cell.point, cell.role)
    mend = _break(cluster, cell, vm, source, destination)
    if _holder(cell) != cell.victim:
        cluster.release(held_on)
    mend(migration)
    # A frozen agent is ended by its watchdog, and its hold with it.
    cluster.await_end(migration, timeout=END_S)
    want = want or _cells()[cell]
    seen, wrong, settled = evidence.settle(
        cluster,
        vm,
        migration,
        epoch_before=before.epoch,
        since=since,
        within_s=SETTLE_S,
    )
    where = judge.runs_on(seen)
    side = {source: "source", destination: "destination"}.get(where, where)
    outcome = seen.migration.state.value if seen.migration else "no record"
    wrong += want.differences(outcome=outcome, runs_on=side)
    return Result(
        cell=cell,
        outcome=outcome,
        reason=seen.migration.reason if seen.migration else "",
        runs_on=side,
        wrong=tuple(wrong),
        seconds=round(time.monotonic() - begun, 2),
        settled_s=round(settled, 2),
        expected=want.as_json(),
    )


def _holder(cell: Cell) -> str:
    return f"{cell.role}-agent"


def ready(cluster: Cluster, vm: str = VM) -> str:
    """Heal everything and make the VM run somewhere; the host that runs it."""
    cluster.heal()
    owner = cluster.owner(vm)
    if _fine(cluster, vm):
        return str(owner.host)
    sys.stderr.write("  the VM is started anew\n")
    if owner.state.value not in ("stopped",):
        try:
            cluster.client.wait(cluster.client.vms.stop(vm, force=True))
        except GodwitError as error:
            sys.stderr.write(f"  stop: {error.message}\n")
    _end_strays(cluster, vm)
    cluster.boot(vm, host="host1")
    return "host1"


def _fine(cluster: Cluster, vm: str) -> bool:
    owner = cluster.owner(vm)
    copies = evidence.copies(cluster, vm)
    return (
        owner.state.value == "running"
        and owner.migration is None
        and [copy.host for copy in copies] == [owner.host]
        and cluster.guest(vm).alive()
    )


def _end_strays(cluster: Cluster, vm: str) -> None:
    """A copy that a failed cell left would spoil the next one: end it by its pid."""
    from godwit.host.process import identify, kill, thaw

    until = time.monotonic() + 5.0
    while time.monotonic() < until:
        left = evidence.copies(cluster, vm)
        if not left:
            return
        for copy in left:
            process = identify(copy.pid)
            if process is not None:
                thaw(process)
                kill(process)
        time.sleep(0.2)


Mend = Callable[[str], None]


def _nothing(_migration: str) -> None:
    """A supervisor looks after what was broken."""


def _break(cluster: Cluster, cell: Cell, vm: str, source: str, destination: str) -> Mend:
    """Break it; what comes back mends it as in life, once the move goes on."""
    if cell.kind == "cut":
        fault.cut_network(cluster.lab, destination, "mig")

        def restore(_migration: str) -> None:
            time.sleep(CUT_S)
            fault.restore_network(cluster.lab, destination, "mig")

        return restore
    where, what = _target(cell.victim, vm, source, destination)
    act = fault.kill_process if cell.kind == "kill" else fault.freeze_process
    act(cluster.lab, where, what)
    if cell.kind == "freeze" and what.startswith("qemu:"):
        return lambda migration: _thaw_later(cluster, where, what, migration)
    return _nothing


def _thaw_later(cluster: Cluster, where: str, what: str, migration: str) -> None:
    """A frozen QEMU has no watchdog here: it wakes up once the move is over, if it still lives.

    Waking up late is the point: it must not run if it is not the owner's any more.
    """
    cluster.await_end(migration, timeout=FROZEN_S)
    try:
        fault.thaw_process(cluster.lab, where, what)
    except NotFound:
        return


def _target(victim: str, vm: str, source: str, destination: str) -> tuple[str, str]:
    if victim in ("manager", "store"):
        return "control", victim
    side, _, process = victim.partition("-")
    where = source if side == "source" else destination
    return where, f"{process}:{vm}" if process in ("qemu", "broker", "lent") else process


def run(
    cluster: Cluster, cells: Sequence[Cell], *, say: Callable[[str], None] = print
) -> list[Result]:
    """Cells one after the other; a broken harness is a failed cell, and the next one goes on."""
    results = []
    for number, cell in enumerate(cells, 1):
        try:
            result = perform(cluster, cell)
        except (GodwitError, AssertionError, OSError, TimeoutError) as error:
            result = Result(
                cell, "not carried out", "", "", (f"{type(error).__name__}: {error}",), 0.0, 0.0, {}
            )
        results.append(result)
        mark = "✗" if result.wrong else "✓"
        say(
            f"{mark} {number}/{len(cells)} {cell.name}: {result.outcome}, runs on "
            f"{result.runs_on or '?'} ({result.seconds:.1f} s): {result.reason}"
        )
        for line in result.wrong:
            say(f"    {line}")
    return results


__all__ = ["Cell", "Expected", "Result", "every", "perform", "run", "sample"]
