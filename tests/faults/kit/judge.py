"""The invariants that hold after every fault, as a pure function over evidence.

Each violation is one sentence; no sentence means that all of them hold. What is expected of a cell
(who runs the VM, how the move ended) comes from the failure table.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from godwit.model.migration import Migration
from godwit.model.ownership import Owner, OwnerState
from godwit.qemu.intervals import Span, overlaps

NOWHERE = "nowhere"


@dataclass(frozen=True)
class Copy:
    """A QEMU process of the VM; ``status`` is its run state by its own agent, "" = not known."""

    host: str
    pid: int
    status: str
    stopped: bool = False  # by a signal


@dataclass(frozen=True)
class Evidence:
    """What is to be seen some time after a fault."""

    vm: str
    epoch_before: int
    epochs_seen: tuple[int, ...]  # in the order of the owner record's changes
    owner: Owner
    migration: Migration | None
    spans: tuple[Span, ...]
    copies: tuple[Copy, ...]
    answers: bool  # the guest, over the VM network
    left: tuple[str, ...]  # what hosts that do not run the VM still have of it


def faults(seen: Evidence) -> list[str]:
    """Every invariant that does not hold."""
    return [
        *_two_running(seen),
        *_epochs(seen),
        *_record(seen),
        *_one_copy(seen),
        *(f"left behind: {what}" for what in seen.left),
    ]


def _two_running(seen: Evidence) -> list[str]:
    return [
        f"two ran at once for {min(a.end, b.end) - max(a.start, b.start):.4f} s: "
        f"pid {a.pid} on {a.host} (epoch {a.epoch}) and pid {b.pid} on {b.host} (epoch {b.epoch})"
        for a, b in overlaps(seen.spans)
    ]


def _epochs(seen: Evidence) -> list[str]:
    row = (seen.epoch_before, *seen.epochs_seen, seen.owner.epoch)
    fell = [(a, b) for a, b in itertools.pairwise(row) if b < a]
    return [f"the epoch fell from {a} to {b}" for a, b in fell]


def _record(seen: Evidence) -> list[str]:
    found = []
    move = seen.migration
    if move is None:
        return ["the move has no record"]
    if not move.state.final:
        found.append(f"the move did not end: {move.state.value}, {move.progress.stage.value}")
    elif len(move.reason.split()) < 3:
        found.append(f"the reason is no sentence: {move.reason!r}")
    if seen.owner.migration is not None and move.state.final:
        found.append(f"the owner record is still bound by {seen.owner.migration.id}")
    return found


def _one_copy(seen: Evidence) -> list[str]:
    running = seen.owner.state is OwnerState.RUNNING
    hosts = [copy.host for copy in seen.copies]
    if not running:
        word = seen.owner.state.value
        found = [f"the record says {word}, but a QEMU is on {host}" for host in hosts]
        return found + ([f"the record says {word}, but the guest answers"] if seen.answers else [])
    if hosts != [seen.owner.host]:
        return [f"the record names {seen.owner.host}, QEMUs are on {', '.join(hosts) or NOWHERE}"]
    copy = seen.copies[0]
    if copy.stopped:
        return [f"the VM's QEMU on {copy.host} stands still by a signal"]
    if copy.status not in ("running", ""):
        return [f"the VM's QEMU on {copy.host} is {copy.status}"]
    return [] if seen.answers else [f"the guest on {copy.host} does not answer"]


def runs_on(seen: Evidence) -> str:
    """The host that runs the VM, or ``nowhere``."""
    alive = [copy.host for copy in seen.copies if not copy.stopped]
    running = seen.owner.state is OwnerState.RUNNING and seen.answers
    return str(seen.owner.host) if running and alive == [seen.owner.host] else NOWHERE
