"""A lost host in the middle of a move: whose record counts, which copy goes, which may go on.

The rules are those of ``docs/design/0002``: the record alone says who may run the VM, and a warm
copy changes hands only as a gift of the owner's live agent. A failover takes that place only with
the proof that the source saw ``completed`` (`Process.released`): then the source cannot have run
again, and the destination's copy is the VM.

| lost | record names | then |
|---|---|---|
| S | S | fence S; D's copy goes on if complete and released, else it is ended and the VM restarts |
| S | D | D goes on, the record is freed in S's place; D waits for a page source till S is off |
| D | S | S runs on; its agent calls the move off |
| D | D | fence D; S's copy is ended, for D may have written; the VM restarts |

And where both hosts are there, and S says that no engine of its drives the move any more:

| S has | record names | then |
|---|---|---|
| its QEMU | S | S's agent takes the move up: it is called off by the record, the VM runs on there |
| nothing | S | as after a loss of S, with its own word for proof |
| its QEMU | D | S's agent takes the move up: it waits for D, and ends its own |
| nothing, D runs | D | the record is freed |
"""

from __future__ import annotations

from collections.abc import Mapping

from godwit.cluster.facts import Process, Snapshot, VmSeen
from godwit.cluster.membership import Standing, is_off
from godwit.cluster.steps import Conclude, Kill, Note, Resume, Step
from godwit.model.ownership import MoveIntent, MovePhase


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


def unheard(snapshot: Snapshot, vm: VmSeen, hosts: Mapping[str, Standing]) -> str:
    """Why a VM waits for what its destination has to say; empty when it does not, or not any more.

    Its agent may be on its way back, as a hung one is within 2 s, and the copy is the VM.
    """
    move = vm.owner.migration
    if move is None or vm.owner.host != move.source or move.phase is not MovePhase.COMMITTING:
        return ""
    there, said = hosts.get(move.destination), snapshot.hosts.get(move.destination)
    if there is None or there.lost or said is None or said.listed:
        return ""
    settle_s = snapshot.timings.settle_s
    if snapshot.silence(move.source) >= snapshot.timings.takeover_s + settle_s:
        return ""
    return f"{move.destination} may hold all of it and does not say so: {settle_s:g} s are its"


def undriven(snapshot: Snapshot, vm: VmSeen) -> bool:
    """The source owns the VM, and says that no engine there works on its move any more.

    What the destination has of it only waits for the record then.
    """
    move = vm.owner.migration
    if move is None or vm.owner.host != move.source or not snapshot.hosts[move.source].listed:
        return False
    waits = all(copy.state == "incoming" for copy in vm.on(move.destination))
    return waits and not any(copy.driven for copy in vm.on(move.source))


def over(snapshot: Snapshot, vm: VmSeen, hosts: Mapping[str, Standing]) -> tuple[Step, ...]:
    """The destination owns the VM, and nobody at the source works on the end of the move."""
    move = vm.owner.migration
    if move is None or vm.owner.host != move.destination:
        return ()
    source, there = snapshot.hosts.get(move.source), hosts.get(move.source)
    left: tuple[Process, ...] = ()
    lost = source is None or there is None or there.lost
    if source is not None and not lost:
        left = vm.on(move.source)
        if not source.listed or any(copy.driven or copy.live for copy in left):
            return ()  # it says so itself; or two run, which is another matter
    if left:
        return (resume(vm, move, f"nobody works on {move.id} any more"),)
    if move.phase is MovePhase.PAGE_SOURCE or not _has(vm, move.destination):
        return ()
    gone = "is lost" if lost else "has nothing of it left"
    why = f"{move.source} {gone}, {move.destination} has it: the move is over"
    return (Conclude(vm=vm.name, migration=move.id, owner_revision=vm.owner_revision, why=why),)


def resume(vm: VmSeen, move: MoveIntent, why: str) -> Resume:
    """Have the source's agent take the move up: back before the swap, forward after it."""
    return Resume(vm=vm.name, host=move.source, migration=move.id, why=why)


def _has(vm: VmSeen, host: str) -> bool:
    """Its agent has taken it over: it is on its way in no more."""
    return any(
        copy.epoch == vm.owner.epoch
        and not copy.driven
        and copy.state in ("running", "frozen", "paused")
        for copy in vm.on(host)
    )


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
    then = "ends the move" if vm.owner.host == move.source else "goes on"
    return (Note(subject=vm.name, why=f"{other} is lost: {vm.owner.host} has it and {then}"),)


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
