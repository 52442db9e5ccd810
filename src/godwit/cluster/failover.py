"""What becomes of each VM of a lost host: wait, fence, take over, adopt, or say why it cannot be.

Higher `Rules.priority` first, then lower `Rules.order`, then names. Each takes its place before the
next is asked for, so what does not fit is what matters least. One step per VM and decision: fence,
swap and start follow each other as the facts change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from godwit.cluster import fencing, moves
from godwit.cluster.facts import HOUR_S, Rung, Snapshot, VmSeen
from godwit.cluster.fencing import Proof, Wait
from godwit.cluster.membership import Standing
from godwit.cluster.quorum import Quorum
from godwit.cluster.steps import Alarm, Note, Step, Swap, Unplaceable
from godwit.model.vm import Vm


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a VM goes; ``host`` None: nowhere. ``rejected`` has all reasons against each host.

    ``why``: the smallest of them, where who places knows better than to count.
    """

    host: str | None
    why: str = ""
    rejected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Place(Protocol):
    """Chooses a host by memory, CPUs, networks, volumes and pins (`godwit.planner.placement`).

    ``taken``: VM -> host of what this decision has placed already and no record shows yet: its
    memory and CPUs are promised there. ``exclude``: more reasons against hosts; such a host is
    never chosen.
    """

    def __call__(
        self, vm: Vm, taken: Mapping[str, str], exclude: Mapping[str, tuple[str, ...]]
    ) -> Placed: ...


def in_order(vms: Iterable[VmSeen]) -> list[VmSeen]:
    """What matters most first."""
    return sorted(vms, key=lambda vm: (-vm.vm.rules.priority, vm.vm.rules.order, vm.name))


def plan(
    snapshot: Snapshot,
    hosts: Mapping[str, Standing],
    *,
    quorum: Quorum,
    place: Place,
    taken: dict[str, str],
    now: float,
) -> list[Step]:
    """The steps for all VMs whose owner is lost. ``taken`` gains what is placed here."""
    affected = [vm for vm in snapshot.vms.values() if vm.wanted and _is_lost(hosts, vm.owner.host)]
    steps: list[Step] = []
    asked: set[str] = set()
    for vm in in_order(affected):
        for step in _one(snapshot, hosts, vm, quorum=quorum, place=place, taken=taken, now=now):
            if step.key not in asked:  # one host's power is switched once for all its VMs
                asked.add(step.key)
                steps.append(step)
    return steps


def _is_lost(hosts: Mapping[str, Standing], host: str | None) -> bool:
    return host is not None and host in hosts and hosts[host].lost


def _one(
    snapshot: Snapshot,
    hosts: Mapping[str, Standing],
    vm: VmSeen,
    *,
    quorum: Quorum,
    place: Place,
    taken: dict[str, str],
    now: float,
) -> list[Step]:
    source = vm.owner.host or ""
    if not vm.vm.ha:
        return [Note(subject=vm.name, why=f"it is not highly available and stays with {source}")]
    local = [disk.id for disk in vm.vm.written if disk.local]
    if local:
        why = f"disk {local[0]} lies on the own storage of {source}: it waits for that host"
        return [Alarm(subject=vm.name, why=why)]
    found = fencing.proof(snapshot, vm, source)
    if not quorum.automatic and (found is None or found.rung is not Rung.PERSON):
        return [Alarm(subject=vm.name, why=f"no automatic failover: {quorum.sentence}")]
    copy = moves.adoptable(vm, hosts)
    if copy is None and (worn := worn_out(snapshot, vm)):
        return [Alarm(subject=vm.name, why=worn)]
    if found is None:
        return [_without_proof(fencing.next_step(snapshot, vm, source, now), vm)]
    if copy is not None:
        return [_swap(snapshot, vm, copy.host, found, adopt=True)]
    if waits := moves.unheard(snapshot, vm, hosts):
        return [Note(subject=vm.name, why=waits)]
    where = choose(snapshot, hosts, vm, place=place, taken=taken)
    if isinstance(where, Unplaceable):
        return [where]
    taken[vm.name] = where
    return [*moves.leftovers(vm), _swap(snapshot, vm, where, found)]


def _without_proof(step: Step | Wait, vm: VmSeen) -> Step:
    if not isinstance(step, Wait):
        return step
    kind = Alarm if step.person else Note
    return kind(subject=vm.name, why=step.sentence)


def worn_out(snapshot: Snapshot, vm: VmSeen) -> str:
    """Why it is not restarted once more; empty when it may be. A clock that was set back counts."""
    recent = [at for at in vm.restarts if snapshot.wall - at < HOUR_S]
    if len(recent) < vm.vm.rules.restarts:
        return ""
    return (
        f"restarted {len(recent)} times within an hour, its limit: it stays down; "
        f"start it by hand: godwit vm start {vm.name}"
    )


def _swap(snapshot: Snapshot, vm: VmSeen, to: str, found: Proof, *, adopt: bool = False) -> Swap:
    source = vm.owner.host or ""
    return Swap(
        vm=vm.name,
        source=source,
        to=to,
        epoch=vm.owner.epoch + 1,
        owner_revision=vm.owner_revision,
        renewal_revision=snapshot.hosts[source].renewal_revision,
        proof=found.sentence,
        adopt=adopt,
        counts=not adopt,
        unlock=True,
    )


def choose(
    snapshot: Snapshot,
    hosts: Mapping[str, Standing],
    vm: VmSeen,
    *,
    place: Place,
    taken: Mapping[str, str],
) -> str | Unplaceable:
    """The host that takes a VM over, or why none can: the reason of the host that lacks least."""
    exclude = excluded(snapshot, hosts, vm, taken)
    placed = place(vm.vm, taken, exclude)
    if placed.host is not None and placed.host not in exclude:
        return placed.host
    rejected = {**placed.rejected}
    for host, reasons in exclude.items():
        more = tuple(one for one in rejected.get(host, ()) if one not in reasons)
        rejected[host] = (*reasons, *more)
    return Unplaceable(vm=vm.name, why=placed.why or smallest(rejected), rejected=rejected)


def smallest(rejected: Mapping[str, tuple[str, ...]]) -> str:
    """What stands against the host with the fewest reasons; the first by name among equals."""
    if not rejected:
        return "no host is known"
    host = min(sorted(rejected), key=lambda name: len(rejected[name]))
    return f"{host}: {'; '.join(rejected[host])}"


def excluded(
    snapshot: Snapshot, hosts: Mapping[str, Standing], vm: VmSeen, taken: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Reasons of the cluster's own against hosts: state, marks, the VM's rules, failed starts."""
    rules, found = vm.vm.rules, {}
    apart = _apart_from(snapshot, vm, taken)
    for name, here in hosts.items():
        reasons = []
        if not here.takes:
            reasons.append(f"it is {here.state.value}")
        if rules.hosts and name not in rules.hosts:
            reasons.append(f"it is not one of {', '.join(rules.hosts)}")
        if name in apart:
            reasons.append(f"{apart[name]} is kept apart from it")
        if name in vm.refused:
            reasons.append(f"it could not start it: {vm.refused[name]}")
        if reasons:
            found[name] = tuple(reasons)
    return found


def _apart_from(snapshot: Snapshot, vm: VmSeen, taken: Mapping[str, str]) -> dict[str, str]:
    """Host -> a VM of a shared group that is, or is about to be, there; the first by name."""
    groups = set(vm.vm.rules.apart)
    if not groups:
        return {}
    found: dict[str, str] = {}
    for name in sorted(snapshot.vms):
        other = snapshot.vms[name]
        if name == vm.name or not groups & set(other.vm.rules.apart):
            continue
        move = other.owner.migration
        places = {taken.get(name)}
        if other.wanted and name not in taken:
            places = {other.owner.host, move.destination if move else None}
        for place in places - {None}:
            found.setdefault(str(place), name)
    return found
