"""After a loss of all power: every VM that ran starts once, what matters most first.

Nothing proves then that a VM stands still, except its own host when it is back and shows nothing
running. So VMs wait for their hosts and start where they were, group by group: priority, then
order; a group when the one before runs. After `Timings.cold_s` nobody waits any more. Highly
available or not: the record says that they run. VMs whose host does not come back are left to the
fencing ladder.

It is recognised by this: records say that VMs run, no answering host has a process of any, and
each of their hosts that answers has another boot than when this manager last saw anything run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from godwit.cluster.facts import ColdStart, Memory, Snapshot, VmSeen


@dataclass(frozen=True)
class Cold:
    """``held``: VMs that may not be started yet. ``due``: those whose turn it is."""

    held: frozenset[str] = frozenset()
    due: frozenset[str] = frozenset()
    sentence: str = ""


def remember(memory: Memory, snapshot: Snapshot, now: float) -> Memory:
    """Notice a loss of all power, and what is left of it to do."""
    if not snapshot.store.leader:
        return memory
    running = [vm for vm in snapshot.vms.values() if vm.wanted]
    pending = frozenset(vm.name for vm in running if not vm.processes)
    cold = memory.cold
    if cold is not None:
        rest = cold.vms & pending
        cold = ColdStart(cold.since, rest) if rest else None
    elif pending and len(pending) == len(running) and _all_new(memory, snapshot, running):
        cold = ColdStart(now, pending)
    boots = memory.boots
    if len(pending) < len(running) or not running:
        boots = {name: host.boot_id for name, host in snapshot.hosts.items()}
    return replace(memory, cold=cold, boots=boots)


def _all_new(memory: Memory, snapshot: Snapshot, running: list[VmSeen]) -> bool:
    """A host is back with nothing running, and none that answers is still the boot of before."""
    back = False
    for name in {vm.owner.host for vm in running if vm.owner.host}:
        host = snapshot.hosts.get(name)
        if host is None or not host.listed:
            continue
        if memory.boots.get(name) == host.boot_id:
            return False
        back = back or host.guarded
    return back


def phase(snapshot: Snapshot, now: float) -> Cold:
    """Whose turn it is. Without a loss of power nobody is held."""
    cold = snapshot.heard.cold
    if cold is None:
        return Cold()
    vms = [snapshot.vms[name] for name in sorted(cold.vms) if name in snapshot.vms]
    vms = [vm for vm in vms if vm.wanted and not vm.refused]
    if not vms:
        return Cold()
    names = frozenset(vm.name for vm in vms)
    away = sorted({vm.owner.host for vm in vms if vm.owner.host and not _is_back(snapshot, vm)})
    left = cold.since + snapshot.timings.cold_s - now
    if away and left > 0:
        return Cold(held=names, sentence=_waiting(away, left))
    ready = [vm for vm in vms if _is_back(snapshot, vm)]
    if not ready:
        return Cold(sentence=_gone(away))
    first = min(_turn(vm) for vm in ready)
    due = frozenset(vm.name for vm in ready if _turn(vm) == first or left <= 0)
    held = frozenset(vm.name for vm in ready) - due
    return Cold(held=held, due=due, sentence=f"all power was lost: {_list(sorted(due))} first")


def _turn(vm: VmSeen) -> tuple[int, int]:
    return (-vm.vm.rules.priority, vm.vm.rules.order)


def _is_back(snapshot: Snapshot, vm: VmSeen) -> bool:
    host = snapshot.hosts.get(vm.owner.host or "")
    return host is not None and host.guarded and host.listed


def _waiting(away: list[str], left: float) -> str:
    return f"all power was lost: waiting for {_list(away)}, at most {left:.0f} s more"


def _gone(away: list[str]) -> str:
    return f"all power was lost and {_list(away)} did not come back"


def _list(names: list[str]) -> str:
    return ", ".join(names)
