"""Who may run a VM: one record, changed only by compare-and-swap, epochs only rise.

    stopped --start--> starting --(vCPUs run)--> running --stop--> stopped
                                                 running --save--> saved --restore--> starting
    running --intent--> running + migration --commit--> ... --swap--> running on D, epoch + 1
                              '--rollback--> running on S, same epoch, migration gone
    starting, running --(proven to run nowhere)--> starting on any host, epoch + 1

A QEMU may have running vCPUs only on ``host`` at ``epoch``. Every function here is pure: it takes
the record as read and returns the record to write, or raises ``Refused``/``Conflict`` when the
step is not allowed from there. The caller writes it in one transaction that compares the
revision it has read. Each changes the record it was given, so that what a newer version keeps in it
stays.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from godwit.model.base import Name, Record
from godwit.model.errors import Conflict, Refused


class OwnerState(StrEnum):
    """What the owner is meant to do with the VM."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    SAVED = "saved"


class MovePhase(StrEnum):
    """How far a move has bound its two hosts."""

    INTENT = "intent"  # both prepare; anyone may still call it off
    COMMITTING = "committing"  # the source was told to let go; see the proof point
    PAGE_SOURCE = "page-source"  # post-copy: runs on D, S still holds pages and must not be stopped


class MoveIntent(Record):
    """The move that binds this VM; every other action on the VM compares it and waits."""

    id: str
    method: Literal["live", "quick"]
    source: Name
    destination: Name
    phase: MovePhase = MovePhase.INTENT


class SavedState(Record):
    """A saved memory image; consumed once, by the transaction that raises the epoch."""

    path: str
    epoch: int
    disk_ids: tuple[str, ...]
    paused: bool = False


class Owner(Record):
    """The ownership record: host, epoch (the VM's fencing token), intent and running move.

    ``unlock``: a host that was lost may still hold locks of its images: one that is cut off and has
    it frozen, or an NFS client that is gone. It may be started without locks, until once it could
    be started with them.
    """

    host: Name | None = None
    epoch: int = 0
    state: OwnerState = OwnerState.STOPPED
    paused: bool = False  # the run state the user wants, which travels along
    migration: MoveIntent | None = None
    saved: SavedState | None = None
    unlock: bool = False


class Restarts(Record):
    """When failovers started the VM lately: seconds since 1970, oldest first.

    Beside the ownership record, so that a limit an hour holds whoever leads.
    """

    times: tuple[float, ...] = ()

    def with_one(self, at: float, *, kept_s: float = 3600.0) -> Restarts:
        """One more; those that no limit asks about any more are dropped."""
        return self.but(times=(*(one for one in self.times if at - one < kept_s), at))


def _idle(owner: Owner, verb: str) -> None:
    if owner.migration is not None:
        raise Conflict(
            f"cannot {verb}: the VM is being moved by {owner.migration.id}",
            hint=f"wait for it, or run: godwit migration cancel {owner.migration.id}",
        )


def power_on(owner: Owner, *, host: str) -> Owner:
    """Take the VM for ``host`` to start it; every power-on raises the epoch, also on one host."""
    _idle(owner, "start")
    if owner.state in (OwnerState.STARTING, OwnerState.RUNNING):
        raise Conflict(
            f"the VM already runs on {owner.host}", hint="look with: godwit vm show NAME"
        )
    return owner.but(host=host, epoch=owner.epoch + 1, state=OwnerState.STARTING, paused=False)


def running(owner: Owner, *, paused: bool = False) -> Owner:
    """The VM's vCPUs run (or it stands paused as wanted); a saved image is void from here."""
    return owner.but(state=OwnerState.RUNNING, saved=None, paused=paused)


def stopped(owner: Owner) -> Owner:
    """The QEMU of this epoch is gone; the host keeps its name only as the last place seen."""
    return owner.but(state=OwnerState.STOPPED, migration=None, saved=None, paused=False)


def saved(owner: Owner, image: SavedState) -> Owner:
    """The memory lies durably in ``image`` and no QEMU of this epoch runs any more."""
    _idle(owner, "save")
    return owner.but(state=OwnerState.SAVED, saved=image)


def begin_move(owner: Owner, intent: MoveIntent) -> Owner:
    """Bind the VM to one move; the owner stays the source."""
    _idle(owner, "move")
    if owner.state is not OwnerState.RUNNING:
        raise Refused(
            f"cannot move: the VM is {owner.state.value}", hint="start it first: godwit vm start"
        )
    if owner.host != intent.source:
        raise Conflict(f"the VM is owned by {owner.host}, not by {intent.source}", hint="ask again")
    if intent.source == intent.destination:
        raise Refused(f"the VM already runs on {owner.host}", hint="name another host with --to")
    return owner.but(migration=intent)


def _mine(owner: Owner, migration_id: str) -> MoveIntent:
    if owner.migration is None or owner.migration.id != migration_id:
        raise Conflict(f"the record no longer names the move {migration_id}", hint="look again")
    return owner.migration


def committing(owner: Owner, migration_id: str) -> Owner:
    """Record that the source's QEMU is about to be told to let go."""
    intent = _mine(owner, migration_id)
    return owner.but(migration=intent.but(phase=MovePhase.COMMITTING))


def swap(owner: Owner, migration_id: str, *, postcopy: bool = False) -> Owner:
    """Hand the VM to the destination: one transaction, epoch + 1.

    The finished move's id stays in the record (phase COMMITTING, or PAGE_SOURCE while the source
    still serves pages) until the destination runs, so that a source which lost the answer
    recognises its own success.
    """
    intent = _mine(owner, migration_id)
    phase = MovePhase.PAGE_SOURCE if postcopy else MovePhase.COMMITTING
    return owner.but(
        host=intent.destination,
        epoch=owner.epoch + 1,
        migration=intent.but(phase=phase),
    )


def finished(owner: Owner, migration_id: str) -> Owner:
    """The move is over and its source cleaned up: the VM is free for other actions again."""
    _mine(owner, migration_id)
    return owner.but(migration=None, state=OwnerState.RUNNING)


def rolled_back(owner: Owner, migration_id: str) -> Owner:
    """Call the move off before its swap. The write alone makes a late swap of a dead agent fail."""
    intent = _mine(owner, migration_id)
    if owner.host != intent.source:
        raise Conflict("the swap had succeeded: the VM belongs to the destination", hint="go on")
    return owner.but(migration=None)


def gift_back(owner: Owner, migration_id: str) -> Owner:
    """The destination's live agent returns a copy it never started: (S, epoch + 1)."""
    intent = _mine(owner, migration_id)
    if owner.host != intent.destination:
        raise Conflict("only the owner may give the VM back", hint="read the record")
    return owner.but(host=intent.source, epoch=owner.epoch + 1, migration=None)


def fail_over(owner: Owner, *, host: str, unlock: bool = False) -> Owner:
    """Take the VM for ``host`` to start it from its disks; ``host`` may be the owner it had.

    Only for who holds a proof that the epoch of the record runs nowhere and will not run again
    (`godwit.cluster.fencing`). A move that bound the VM is over with it, and so is a saved image
    that was being restored.
    """
    if owner.state not in (OwnerState.STARTING, OwnerState.RUNNING):
        raise Refused(f"the VM is {owner.state.value}: there is nothing to restart", hint="")
    return owner.but(
        host=host,
        epoch=owner.epoch + 1,
        state=OwnerState.STARTING,
        paused=False,
        migration=None,
        saved=None,
        unlock=unlock or owner.unlock,
    )
