"""How long a whole failover decision takes: every host and VM of the cluster in one snapshot.

The snapshot is what the leading manager's loop reads (`godwit.cluster.seam`), made here of the
records; the decision and the placement are the real ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from godwit.cluster.decide import decide, listen
from godwit.cluster.facts import HostSeen as Host
from godwit.cluster.facts import Memory, Process, StoreSeen, VmSeen
from godwit.cluster.facts import Snapshot as Seen
from godwit.cluster.failover import Placed
from godwit.manager.rooms import rooms_of
from godwit.manager.snapshot import Snapshot
from godwit.model.errors import Refused
from godwit.model.host import ConfirmedDown
from godwit.model.membership import Renewal
from godwit.model.ownership import OwnerState
from godwit.model.rules import Rules
from godwit.model.vm import Vm
from godwit.planner.placement import Need, choose

GROUPS = 1000  # VMs of one group are kept apart; two VMs or so of each lost host are in one
WALL = 1_790_000_000.0


def seen(snapshot: Snapshot, *, lost: int) -> Seen:
    """The cluster with its first hosts lost, and a person's word that they are down."""
    gone = set(sorted(snapshot.hosts)[:lost])
    hosts = {}
    for number, (name, info) in enumerate(sorted(snapshot.hosts.items()), start=1):
        renewal = Renewal(boot_id=info.boot_id, number=9, guard="armed", watchdog=True)
        word = ConfirmedDown(boot_id=info.boot_id, time=WALL, by="a person")
        away = name in gone
        hosts[name] = Host(
            name=name,
            boot_id=info.boot_id,
            renewal=renewal,
            renewal_revision=number,
            agent=not away,
            answers=not away,
            listed=not away,
            confirmed_down=word if away else None,
        )
    vms = {}
    for number, (name, vm) in enumerate(sorted(snapshot.vms.items())):
        owner = snapshot.owner(name)
        apart = (f"group{number % GROUPS}",) if number % 10 == 0 else ()
        runs = owner.state is OwnerState.RUNNING and owner.host is not None
        here = Process(host=owner.host or "", epoch=owner.epoch, state="running")
        vms[name] = VmSeen(
            vm=vm.model_copy(update={"rules": Rules(apart=apart)}),
            owner=owner,
            owner_revision=7,
            processes=(here,) if runs and owner.host not in gone else (),
        )
    return Seen(store=StoreSeen(), hosts=hosts, vms=vms, volumes=snapshot.volumes, wall=WALL)


def placing(snapshot: Snapshot, free: Mapping[str, int | None]) -> Callable[..., Placed]:
    """The planner behind the decision's question where a VM goes."""
    rooms = rooms_of(snapshot, free)

    def place(vm: Vm, taken: Mapping[str, str], exclude: Mapping[str, tuple[str, ...]]) -> Placed:
        try:
            found = choose(rooms, Need.of(vm), exclude=exclude)
        except Refused as error:
            return Placed(host=None, rejected=dict(error.context.get("rejected", {})))
        return Placed(host=found.host, rejected=found.rejected)

    return place


def _renewed(facts: Seen) -> dict[str, Host]:
    """All hosts but the lost ones have renewed once more."""
    return {
        name: host
        if host.confirmed_down
        else replace(host, renewal_revision=host.renewal_revision + len(facts.hosts))
        for name, host in facts.hosts.items()
    }


def cycle(snapshot: Snapshot, free: Mapping[str, int | None], *, lost: int) -> dict[str, Any]:
    """Processor time of listening and deciding; how many hosts are lost, and VMs go elsewhere."""
    facts, place = seen(snapshot, lost=lost), placing(snapshot, free)
    left, at, memory = facts.timings, 0.0, Memory()
    while at < left.takeover_s + left.gap_s:
        clock = StoreSeen(asked_at=at, answered_at=at)
        facts = replace(facts, store=clock, hosts=_renewed(facts))
        began = time.process_time()
        memory = listen(memory, facts, at)
        listened = time.process_time() - began
        at += left.gap_s / 2
    began = time.process_time()
    decision = decide(replace(facts, heard=memory), at, place=place)
    decided = time.process_time() - began
    swaps = sum(type(step).__name__ == "Swap" for step in decision.steps)
    return {
        "lost": sum(one.lost for one in decision.hosts.values()),
        "swaps": swaps,
        "listen_s": listened,
        "decide_s": decided,
    }
