"""A lost host in the middle of a move: whose record counts, which copy goes, which may go on.

The rules are those of ``docs/design/0002``: the record alone says who may run the VM, and a warm
copy changes hands only as a gift of the owner's live agent. A failover takes that place only with
the proof that the source saw ``completed`` (`Process.released`): then the source cannot have run
again, and the destination's copy is the VM.

| lost | record names | then |
|---|---|---|
| S | S | fence S; D's copy goes on if complete and released, else it is ended and the VM restarts |
| S | D | D goes on; a page source is left to D's agent unless S is known to be off |
| D | S | S runs on; its agent calls the move off |
| D | D | fence D; S's copy is ended, for D may have written; the VM restarts |
"""

from __future__ import annotations

from collections.abc import Mapping

from godwit.cluster.facts import Process, Snapshot, VmSeen
from godwit.cluster.membership import Standing, is_off
from godwit.cluster.steps import Kill, Note, Step
from godwit.model.ownership import MovePhase


def adoptable(vm: VmSeen, hosts: Mapping[str, Standing]) -> Process | None:
    """The destination's copy that may go on in place of a lost owner; None when there is none."""
    move = vm.owner.migration
    if move is None or vm.owner.host != move.source or move.phase is not MovePhase.COMMITTING:
        return None
    there = hosts.get(move.destination)
    if there is None or there.lost:
        return None
    for copy in vm.on(move.destination):
        if copy.migration == move.id and copy.complete and copy.released:
            return copy
    return None


def leftovers(vm: VmSeen, keep: Process | None = None) -> tuple[Kill, ...]:
    """Ends for every copy on the other host of the move: the VM starts anew, from its disks."""
    move = vm.owner.migration
    if move is None:
        return ()
    other = move.destination if vm.owner.host == move.source else move.source
    why = f"{vm.owner.host} is lost and the VM starts from its disks: this copy is void"
    return tuple(
        Kill(vm=vm.name, host=other, epoch=copy.epoch, why=why)
        for copy in vm.on(other)
        if copy is not keep
    )


def peer_lost(snapshot: Snapshot, vm: VmSeen, hosts: Mapping[str, Standing]) -> tuple[Step, ...]:
    """The owner is there, the other host of its move is lost."""
    move = vm.owner.migration
    if move is None:
        return ()
    other = move.destination if vm.owner.host == move.source else move.source
    there = hosts.get(other)
    if there is None or not there.lost:
        return ()
    if move.phase is MovePhase.PAGE_SOURCE and vm.owner.host == move.destination:
        return _page_source(snapshot, vm, other)
    return (
        Note(subject=vm.name, why=f"{other} is lost: {vm.owner.host} has it and ends the move"),
    )


def _page_source(snapshot: Snapshot, vm: VmSeen, source: str) -> tuple[Step, ...]:
    off = is_off(snapshot, source)
    if not vm.on(vm.owner.host):
        return ()
    if not off:
        why = f"{source} may still serve pages: {vm.owner.host} waits for it, at most two minutes"
        return (Note(subject=vm.name, why=why),)
    why = f"the pages that {source} held are gone ({off})"
    return tuple(
        Kill(vm=vm.name, host=copy.host, epoch=copy.epoch, why=why, own=vm.owner_revision)
        for copy in vm.on(vm.owner.host)
    )
