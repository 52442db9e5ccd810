"""The hand-over of disks, with each part of it killed and frozen at each hold point.

Beside the invariants of every fault: no two processes ever have the image open for writing, and
every record the guest's disk acknowledged is in the image, whether the guest lived on or not.
It is done with QEMU's image locks and without, on files and on a server, and over NBD to another
host: what holds without a lock, holds because of gates and ownership.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from godwit.host.run import run as run_program
from godwit.lab.logcheck import LogCheck, check_log
from godwit.model.errors import Conflict, GodwitError, NotFound
from godwit.storage import formats

from . import cells, evidence, lent
from .cells import Cell
from .cluster import Cluster
from .guest import Guest, NoAnswer
from .openings import Judge, Openings, image_locks
from .report import Say, Section, tell
from .table import Expected

VM = "gated"
RECORDS_PER_S = 50
POINTS = {
    "source": ("pre-switchover", "committing", "completed", "swapped", "running"),
    "destination": ("prepared", "take-over", "started"),
}
ASK_S = 0.1
BROKERS = ("source-broker", "destination-broker")
AGENTS = ("source-agent", "destination-agent")
EITHER = Expected(("completed", "failed", "cancelled"), ("source", "destination"))
"""A broker is replaced, or the move goes back: the VM runs in any case."""


def every() -> tuple[Cell, ...]:
    """All cells: QEMUs and agents as the failure table has them, and the brokers."""
    tabled = tuple(
        cell
        for cell in cells.every()
        if cell.point in POINTS[cell.role]
        and cell.victim.partition("-")[2] in ("qemu", "agent")
        and cell.kind in ("kill", "freeze")
    )
    brokers = tuple(
        Cell(role, point, kind, victim)
        for role, points in POINTS.items()
        for point in points
        for kind in ("kill", "freeze")
        for victim in BROKERS
        # Once D runs, S's broker has been ended in order; before D is prepared it has none.
        if (victim, point) != ("source-broker", "running")
    )
    return tabled + brokers


def sample(seed: int, *, brokers: bool = True) -> tuple[Cell, ...]:
    """Each victim once, at a point and in a way drawn by the seed."""
    drawn = random.Random(seed)
    cells_there = [cell for cell in every() if brokers or cell.victim not in BROKERS]
    victims = sorted({cell.victim for cell in cells_there})
    return tuple(
        drawn.choice([cell for cell in cells_there if cell.victim == victim]) for victim in victims
    )


def lent_sample(seed: int) -> tuple[Cell, ...]:
    """One cell for a VM whose I/O goes through the other host: that host's part of it breaks."""
    return (random.Random(seed).choice(lent.lender_cells()),)


@dataclass(frozen=True)
class Setting:
    """What the VM's disk is like, and how its hand-over is seen.

    ``witness``: somebody watches who opens the image. That is no use on a server, which opens it
    for everybody, and for a disk that QEMU opens by itself (``qcow2``), inactive beside another.
    ``locks``: whether QEMU's image lock is held on it. ``lent``: its I/O goes over NBD, through
    the host that it moves to.
    """

    kind: Literal["vhdx", "qcow2"] = "vhdx"
    witness: bool = True
    locks: bool = True
    lent: bool = False


PLAIN = Setting()
UNLOCKED = Setting(locks=False)
DIRECT = Setting("qcow2", witness=False, locks=False)
LENT = Setting(locks=False, lent=True)
SERVED = Setting(witness=False, locks=False)


class Acknowledged:
    """What the guest last said of its log, asked again and again while the context lasts.

    A guest that dies in a fault cannot be asked afterwards. The count never falls.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="acknowledged")
        self.last: dict[str, Any] = guest.stats()["log"]

    def __enter__(self) -> Acknowledged:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(ASK_S):
            try:
                said = self._guest.stats(timeout=0.5)["log"]
            except NoAnswer:
                continue
            if said["log_id"] == self.last["log_id"]:
                self.last = said


def run(
    cluster: Cluster,
    chosen: Sequence[Cell] | None = None,
    *,
    setting: Setting = PLAIN,
    starts: int = 20,
    say: Say = tell,
) -> Section:
    """The chosen cells (all of them) on one VM with a disk; then so many times (0: not at all)
    both hosts are told at once to start it."""
    cluster.heal()
    guest = cluster.make(VM, host="host1", disks=[f"shared:128M:{setting.kind}"])
    _log_anew(guest)
    section = Section("handover")
    locks = image_locks(_image(cluster))
    held = f"QEMU's image lock is {'held' if setting.locks else 'not held'} while the VM writes"
    section.judge(held, bool(locks) == setting.locks, locks)
    rows = section.figures["cells"] = []
    picked = tuple(every() if chosen is None else chosen)
    for number, cell in enumerate(picked, 1):
        row = _one(cluster, guest, cell, setting)
        rows.append(row)
        say(f"{'✗' if row['wrong'] else '✓'} {number}/{len(picked)} {cell.name}: {row['reason']}")
        for line in row["wrong"]:
            say(f"    {line}")
    section.figures["end"] = end = _read_closed(
        cluster, guest.stats()["log"], setting.kind, stop=True
    )
    _judge(section, rows, end)
    if starts:
        _start_twice(cluster, section, starts, setting.witness, say)
    cluster.client.wait(cluster.client.vms.delete(VM))
    return section


def _start_twice(cluster: Cluster, section: Section, rounds: int, witness: bool, say: Say) -> None:
    """Both agents are asked directly, past the manager: only the owner record stands between."""
    wins: list[list[str]] = []
    wrong: list[str] = []
    for number in range(1, rounds + 1):
        with _openings(cluster, witness) as judge:
            said = cluster.start_at_once(VM)
            running = [copy.host for copy in evidence.copies(cluster, VM)]
        won = [host for host, refused in said.items() if not refused]
        wins.append(won)
        if len(won) != 1 or running != won or judge.together:
            wrong.append(f"round {number}: {said}, QEMUs on {running}, {judge.together}")
        for host in won:
            body = {"force": True}
            cluster.lab.agent(host, "POST", f"/v1/vms/{VM}/stop", body)
    section.figures["starts"] = wins
    say(f"{rounds} times two starts at once: won by {wins}")
    section.judge(
        "two starts of one VM at once: exactly one wins, one opens the image",
        not wrong,
        {"rounds": rounds, "wrong": wrong},
    )


@contextmanager
def _openings(cluster: Cluster, witness: bool) -> Iterator[Judge]:
    """The judgement of the image's witness; an empty one where there is none."""
    if not witness:
        yield Judge()
        return
    with Openings(_image(cluster)) as openings:
        yield openings.judge


def _way(cluster: Cluster, setting: Setting) -> AbstractContextManager[list[str]]:
    """The way of the VM's I/O, and what was found wrong with it."""
    return lent.through_the_other(cluster, VM) if setting.lent else nullcontext([])


def _one(cluster: Cluster, guest: Guest, cell: Cell, setting: Setting) -> dict[str, Any]:
    either = (*BROKERS, lent.LENDER, *(AGENTS if setting.lent else ()))
    want = EITHER if cell.victim in either else None
    with ExitStack() as done:
        judge = done.enter_context(_openings(cluster, setting.witness))
        left = done.enter_context(_way(cluster, setting))
        log = done.enter_context(Acknowledged(guest))
        before = log.last["acknowledged"]
        try:
            result = cells.perform(cluster, cell, VM, want=want)
            row = result.as_json()
        except (GodwitError, AssertionError, OSError, TimeoutError) as error:
            row = {**dataclasses.asdict(cell), "name": cell.name, "reason": "not carried out"}
            row["wrong"] = [f"{type(error).__name__}: {error}"]
    row["openings"] = judge.openings
    row["together"] = judge.together
    wrong = [*row["wrong"], *left]
    if judge.together:
        wrong.append(f"two had the image open for writing: pids {judge.together}")
    if setting.witness and not judge.openings:
        wrong.append("nobody had the image open for writing: the witness saw nothing")
    row["acknowledged"] = log.last["acknowledged"] - before
    stopped = cluster.owner(VM).state.value == "stopped"
    if stopped or not guest.alive():
        # The guest is gone, and with it what it knew: its image is judged by what it last said.
        row["log"] = _read_closed(cluster, log.last, setting.kind, stop=not stopped)
        wrong += _losses(row["log"])
        cells.ready(cluster, VM)
        _log_anew(guest)
    else:
        said = guest.stats()["log"]
        if said["errors"]:
            wrong.append(f"the guest saw {said['errors']} errors of its disk")
            _log_anew(guest)
    row["wrong"] = wrong
    return row


def _log_anew(guest: Guest) -> None:
    """Return when the guest's new log has records: what it says before belongs to the old one."""
    old = guest.stats()["log"]["log_id"]
    guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    until = time.monotonic() + 20.0
    while (said := guest.stats()["log"])["log_id"] == old or not said["acknowledged"]:
        assert time.monotonic() < until, f"the guest does not log: {said}"
        time.sleep(0.05)  # the guest has no event for an acknowledged record


def _image(cluster: Cluster) -> Path:
    (disk,) = cluster.client.vms.get(VM).disks
    return cluster.lab.layout.volume.parent / Path(disk.path).relative_to("/clusterstorage")


def _read_closed(
    cluster: Cluster, log: dict[str, Any], kind: Literal["vhdx", "qcow2"], *, stop: bool
) -> dict[str, Any]:
    if stop:
        _stop(cluster)
    driver = formats.FORMATS[kind].driver
    image = _image(cluster)
    with tempfile.TemporaryDirectory(prefix="godwit-log-") as folder:
        raw = Path(folder) / "raw"
        run_program(
            ["qemu-img", "convert", "-f", driver, "-O", "raw", str(image), str(raw)], timeout=60.0
        )
        run_program(["qemu-img", "check", "-q", "-f", driver, str(image)], timeout=60.0)
        with raw.open("rb") as stream:
            found: LogCheck = check_log(
                stream, acknowledged=log["acknowledged"], log_id=log["log_id"]
            )
    return dataclasses.asdict(found)


def _stop(cluster: Cluster) -> None:
    """Return when the record says that the VM is stopped."""
    cluster.heal()
    with suppress(NotFound, Conflict):  # its QEMU has just died, and its agent is about to say so
        cluster.client.wait(cluster.client.vms.stop(VM, force=True))
    until = time.monotonic() + 20.0
    while cluster.owner(VM).state.value != "stopped":
        assert time.monotonic() < until, f"it does not stop: {cluster.owner(VM)}"
        time.sleep(0.05)  # what the record will say is asked for, not waited for


def _losses(check: dict[str, Any]) -> list[str]:
    lost, torn = check["lost"], check["torn"]
    return [f"{lost} acknowledged records lost, {torn} torn: {check}"] if lost or torn else []


def _judge(section: Section, rows: list[dict[str, Any]], end: dict[str, Any]) -> None:
    bad = {row["name"]: row["wrong"] for row in rows if row["wrong"]}
    section.judge(
        "QEMUs, brokers and agents of both sides killed and frozen at each hold point of the "
        "hand-over: the table's outcome, never two open gates, 0 lost acknowledged records, "
        "nothing left behind",
        bool(rows) and not bad,
        {"cells": len(rows), "wrong": bad},
    )
    section.judge("the closed image holds every acknowledged record", not _losses(end), end)


__all__ = ["Acknowledged", "Setting", "every", "lent_sample", "run", "sample"]
