"""When records and reality differ after crashes, and the owner's host is there to be asked.

| found | then |
|---|---|
| one QEMU, on the owner at its epoch | it is the VM |
| one runs elsewhere | ended; unless its note matches the record and the owner's QEMU is gone |
| two run | the one that is not the owner's is ended at once, with an alarm |
| two, no engine works on the move | the record decides: the owner's copy runs on |
| none | started by its owner (a new epoch), or elsewhere when it refuses |
| the record says stopped, and one is left | ended |

Never on belief: a host that does not say what it runs is waited for. What an engine drives is left
to it, unless two run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from godwit.cluster import failover, moves
from godwit.cluster.coldstart import Cold
from godwit.cluster.facts import Memory, Process, Snapshot, VmSeen
from godwit.cluster.failover import Place
from godwit.cluster.membership import Standing
from godwit.cluster.steps import (
    Alarm,
    Kill,
    Note,
    PowerOn,
    Start,
    Step,
    Stopped,
    Swap,
    Unplaceable,
)
from godwit.model.host import HostState
from godwit.model.ownership import OwnerState


def remember(memory: Memory, snapshot: Snapshot, now: float) -> Memory:
    """Since when nothing runs of a VM that its record has running, as its own host says."""
    if not snapshot.store.leader:
        return memory
    bare = {}
    for name, vm in snapshot.vms.items():
        host = snapshot.hosts.get(vm.owner.host or "")
        if vm.wanted and not vm.processes and host is not None and host.listed:
            epoch, since = memory.bare.get(name, (vm.owner.epoch, now))
            bare[name] = (epoch, since) if epoch == vm.owner.epoch else (vm.owner.epoch, now)
    return replace(memory, bare=bare)


def resolve(
    snapshot: Snapshot,
    hosts: Mapping[str, Standing],
    *,
    cold: Cold,
    place: Place,
    taken: dict[str, str],
    now: float,
) -> list[Step]:
    """The steps for all VMs whose owner is not lost, what matters most first."""
    steps: list[Step] = []
    for vm in failover.in_order(snapshot.vms.values()):
        if vm.busy:
            continue
        if not vm.wanted:
            steps += _unwanted(snapshot, hosts, vm, place=place, taken=taken)
            continue
        owner = hosts.get(vm.owner.host or "")
        if owner is None:
            why = f"its owner {vm.owner.host} is no host of this cluster: a person must look"
            steps.append(Alarm(subject=vm.name, why=why))
            continue
        if owner.lost:
            continue
        steps += (
            moves.over(snapshot, vm, hosts)
            or moves.peer_lost(snapshot, vm, hosts)
            or _wanted(snapshot, hosts, vm, cold=cold, place=place, taken=taken, now=now)
        )
    return steps


def _unwanted(
    snapshot: Snapshot,
    hosts: Mapping[str, Standing],
    vm: VmSeen,
    *,
    place: Place,
    taken: dict[str, str],
) -> list[Step]:
    """The record says stopped or saved: nothing runs, and perhaps it is to be switched on."""
    if any(process.driven for process in vm.processes):
        return []
    if vm.processes:
        why = f"the record says {vm.owner.state.value}"
        return [Kill(vm=vm.name, host=p.host, epoch=p.epoch, why=why) for p in vm.processes]
    if not vm.vm.ha or vm.owner.state is OwnerState.SAVED:
        return []
    if vm.ended == "guest" and vm.vm.rules.on_shutdown == "restart":
        why = "its guest shut down, and its rules say restart"
    elif vm.ended == "crash":
        why = "its QEMU died and its host gave up"
    else:
        return []  # a clean shutdown, or a person's wish, is no failure
    if worn := failover.worn_out(snapshot, vm):
        return [Alarm(subject=vm.name, why=worn)]
    where = failover.choose(snapshot, hosts, vm, place=place, taken=taken)
    if isinstance(where, Unplaceable):
        return [where]
    taken[vm.name] = where
    return [PowerOn(vm=vm.name, host=where, owner_revision=vm.owner_revision, why=why)]


def _wanted(
    snapshot: Snapshot,
    hosts: Mapping[str, Standing],
    vm: VmSeen,
    *,
    cold: Cold,
    place: Place,
    taken: dict[str, str],
    now: float,
) -> list[Step]:
    owner, mine, others = _sides(vm)
    host = snapshot.hosts[owner]
    strangers = [p for p in others if p.live]
    if strangers and any(p.live for p in mine):
        return _two_run(vm, strangers)
    undriven = moves.undriven(snapshot, vm)
    if any(process.driven for process in vm.processes) and not undriven:
        return []
    if strangers:
        steps = _elsewhere(snapshot, vm, strangers, host_listed=host.listed, mine=mine)
        if vm.owner.state is not OwnerState.STARTING or not host.listed or mine:
            return steps
        # Taken over with proof that what is left there stands still: the start need not wait.
        started = _none(snapshot, hosts, vm, cold=cold, place=place, taken=taken, now=now)
        return [*steps, *started]
    if not host.listed:
        return _unheard(vm)
    if mine:
        return _leftovers(vm, mine, others, undriven=undriven)
    copy = moves.adoptable(vm, hosts)
    if copy is not None:
        why = f"{owner} had let go of it and its QEMU is gone; {copy.host} holds the whole VM"
        return [_handed(vm, copy, why)]
    return [
        *(_kill(vm, p) for p in others),
        *_none(snapshot, hosts, vm, cold=cold, place=place, taken=taken, now=now),
    ]


def _sides(vm: VmSeen) -> tuple[str, list[Process], list[Process]]:
    """The owner, its QEMUs at the record's epoch, and all others."""
    owner = vm.owner.host or ""
    mine = [p for p in vm.processes if p.host == owner and p.epoch == vm.owner.epoch]
    return owner, mine, [p for p in vm.processes if p not in mine]


def _kill(vm: VmSeen, process: Process) -> Kill:
    why = f"the record names {vm.owner.host} at epoch {vm.owner.epoch}"
    return Kill(vm=vm.name, host=process.host, epoch=process.epoch, why=why)


def _two_run(vm: VmSeen, strangers: list[Process]) -> list[Step]:
    """What its guard holds frozen is no alarm: it stood still. Nor is the destination of a swap.

    Agents answer one after the other, so a swap may have come between; its agent reads the record
    before it ends anything.
    """
    kills: list[Step] = [_kill(vm, process) for process in strangers]
    ran = [p for p in strangers if p.state != "frozen" and not _matches(vm, p)]
    where = ", ".join(f"{p.host} at epoch {p.epoch}" for p in ran)
    if not where:
        return kills
    why = f"it also ran on {where}: ended; its disks need a look"
    return [*kills, Alarm(subject=vm.name, why=why)]


def _elsewhere(
    snapshot: Snapshot,
    vm: VmSeen,
    strangers: list[Process],
    *,
    host_listed: bool,
    mine: list[Process],
) -> list[Step]:
    """A QEMU runs where the record does not put the VM, and none on its owner."""
    steps: list[Step] = []
    for process in strangers:
        if not _matches(vm, process):
            steps.append(_kill(vm, process))
        elif not host_listed:
            why = f"{vm.owner.host} has not said whether it still has a copy"
            steps.append(Note(subject=vm.name, why=why))
        elif mine:
            steps.append(_kill(vm, process))
        else:
            why = f"{vm.owner.host} says that its QEMU is gone; {process.host} runs what it gave"
            steps.append(_handed(vm, process, why))
    return steps


def _handed(vm: VmSeen, process: Process, why: str) -> Swap:
    return Swap(
        vm=vm.name,
        source=vm.owner.host or "",
        to=process.host,
        epoch=vm.owner.epoch + 1,
        owner_revision=vm.owner_revision,
        renewal_revision=None,
        proof=why,
        adopt=True,
        counts=False,
    )


def _matches(vm: VmSeen, process: Process) -> bool:
    """Its note is the one that this record's move would have led to."""
    move = vm.owner.migration
    return (
        move is not None
        and process.migration == move.id
        and process.host == move.destination
        and process.epoch == vm.owner.epoch + 1
    )


def _unheard(vm: VmSeen) -> list[Step]:
    """What ran is believed to run on; what was to start is waited for, and that is said."""
    if vm.owner.state is not OwnerState.STARTING:
        return []
    why = f"{vm.owner.host} was to start it and does not say what it runs: waiting for its agent"
    return [Note(subject=vm.name, why=why)]


def _leftovers(
    vm: VmSeen, mine: list[Process], others: list[Process], *, undriven: bool
) -> list[Step]:
    """The owner has the VM. A copy of a move that nobody drives is judged by the record."""
    move = vm.owner.migration
    if move is None:
        return [_kill(vm, process) for process in others]
    if not undriven:
        return []
    if not all(process.known for process in mine):
        why = f"its QEMU on {vm.owner.host} does not answer, and {move.id} binds it"
        return [Note(subject=vm.name, why=why)]
    why = f"nobody works on {move.id} any more, and {move.destination} never started it"
    return [moves.resume(vm, move, why)]


def _none(
    snapshot: Snapshot,
    hosts: Mapping[str, Standing],
    vm: VmSeen,
    *,
    cold: Cold,
    place: Place,
    taken: dict[str, str],
    now: float,
) -> list[Step]:
    """No QEMU of it anywhere: its own host says so."""
    owner = vm.owner.host or ""
    if vm.name in cold.held or not hosts[owner].fresh:
        return []
    if owner in vm.refused:
        return _elsewhere_from_disk(snapshot, hosts, vm, place=place, taken=taken)
    if vm.owner.state is OwnerState.STARTING and vm.owner.migration is None:
        return [Start(vm=vm.name, host=owner, epoch=vm.owner.epoch)]
    due = vm.name in cold.due
    if not due and not _settled(snapshot, vm, now):
        return []
    stays = vm.vm.ha or vm.vm.rules.autostart or due
    if not stays:
        why = "nothing of it runs on its host, and it is neither highly available nor autostart"
        return [Stopped(vm=vm.name, owner_revision=vm.owner_revision, why=why)]
    if not due and (worn := failover.worn_out(snapshot, vm)):
        return [Alarm(subject=vm.name, why=worn)]
    if hosts[owner].state in (HostState.DRAINING, HostState.MAINTENANCE) and vm.vm.ha:
        return _elsewhere_from_disk(snapshot, hosts, vm, place=place, taken=taken)
    return [_from_disk(vm, owner, counts=not due)]


def _settled(snapshot: Snapshot, vm: VmSeen, now: float) -> bool:
    """Nothing has run of it for so long that its own agent will do nothing about it."""
    epoch, since = snapshot.heard.bare.get(vm.name, (vm.owner.epoch, now))
    return epoch == vm.owner.epoch and now - since >= snapshot.timings.settle_s


def _elsewhere_from_disk(
    snapshot: Snapshot,
    hosts: Mapping[str, Standing],
    vm: VmSeen,
    *,
    place: Place,
    taken: dict[str, str],
) -> list[Step]:
    if worn := failover.worn_out(snapshot, vm):
        return [Alarm(subject=vm.name, why=worn)]
    where = failover.choose(snapshot, hosts, vm, place=place, taken=taken)
    if isinstance(where, Unplaceable):
        return [where]
    taken[vm.name] = where
    return [_from_disk(vm, where, counts=True)]


def _from_disk(vm: VmSeen, to: str, *, counts: bool) -> Swap:
    return Swap(
        vm=vm.name,
        source=vm.owner.host or "",
        to=to,
        epoch=vm.owner.epoch + 1,
        owner_revision=vm.owner_revision,
        renewal_revision=None,
        proof=f"{vm.owner.host} itself says that nothing of it runs",
        counts=counts,
    )
