"""The plan of emptying a host: facts from the records and the hosts, the rest is pure.

Nothing here changes anything; it answers ``--dry-run`` and precedes every drain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from godwit.manager.rooms import RUNS, rooms_of
from godwit.manager.snapshot import Snapshot
from godwit.manager.work.admit import need_of
from godwit.manager.work.lookup import known
from godwit.manager.work.mark_rules import EmptyHost, host_that_answers
from godwit.manager.work.moves import ask_plan, excluded
from godwit.manager.world import World
from godwit.model.drain import DrainPlan, PlannedVm
from godwit.model.errors import GodwitError
from godwit.model.host import HostInfo
from godwit.model.migration import MovePlan
from godwit.model.ownership import OwnerState
from godwit.model.requests import MigrateVm
from godwit.model.vm import Vm
from godwit.planner.drain import Leaving, Placed, bound, in_order, place_all, settle
from godwit.planner.placement import Room

_AT_ONCE = 8  # plans asked of agents side by side


def vms_on(snapshot: Snapshot, host: str) -> tuple[str, ...]:
    """The VMs that a host owns and that are not at rest, by name. Pure."""
    found = (
        name
        for name, owner in snapshot.owners.items()
        if owner.host == host and owner.state in RUNS and name in snapshot.vms
    )
    return tuple(sorted(found))


async def plan_drain(
    world: World, request: EmptyHost, *, only: Collection[str] | None = None
) -> DrainPlan:
    """What emptying the host would be; ``only`` these of its VMs. Agents are asked, not told."""
    snapshot = world.cache.snapshot
    info = host_that_answers(snapshot, request.name)
    names = [name for name in vms_on(snapshot, info.name) if only is None or name in only]
    rooms = rooms_of(snapshot, await world.free.for_placement(snapshot))
    planner = _Planner(world, snapshot, info, request)
    best = await planner.best_ways(names, rooms)
    settled = [
        settle(
            one,
            allow_quick=request.allow_quick,
            allow_shutdown=request.allow_shutdown,
            force=request.force,
        )
        for one in best
    ]
    vms = in_order(one for one, _ in settled)
    refused = tuple(why for _, why in settled if why)
    networks = {host.name: host.migration_subnet for host in snapshot.hosts.values()}
    seconds, why = bound(info.name, vms, limits=snapshot.settings, networks=networks)
    needs = sorted({one.needs for one in vms if one.way == "stay" and one.needs})
    return DrainPlan(
        host=info.name,
        vms=vms,
        bound_s=seconds,
        bound_reason=why,
        refused=refused,
        hint=f"allow it: {' '.join(needs)}; or leave them there: --force" if refused else "",
        reason=_summary(vms),
    )


def _summary(vms: Sequence[PlannedVm]) -> str:
    if not vms:
        return "no VM runs there"
    words = {"live": "live", "quick": "quick", "shutdown": "shut down", "stay": "staying"}
    counts = ((sum(one.way == way for one in vms), word) for way, word in words.items())
    return f"{len(vms)} VMs: " + ", ".join(f"{count} {word}" for count, word in counts if count)


class _Planner:
    """Finds for each VM the gentlest way there is: live, else quick, else a shutdown."""

    def __init__(
        self, world: World, snapshot: Snapshot, host: HostInfo, request: EmptyHost
    ) -> None:
        self._world = world
        self._snapshot = snapshot
        self._host = host
        self._request = request
        self._turn = asyncio.Semaphore(_AT_ONCE)

    async def best_ways(self, names: Sequence[str], rooms: Sequence[Room]) -> list[PlannedVm]:
        """Live for those that can; for the others their place is sought once more."""
        asked = [self._move(name, "live") for name in names]
        placed = place_all(rooms, [self._leaving(one) for one in asked])
        found = await asyncio.gather(*(self._try(one, placed[one.name]) for one in asked))
        left = rooms
        for one in found:
            if one.destination is not None:
                need = need_of(self._snapshot, one.vm)
                left = [
                    room.taking(need) if room.info.name == one.destination else room
                    for room in left
                ]
        again = [self._move(one.vm, "quick") for one in found if one.destination is None]
        placed = place_all(left, [self._leaving(one) for one in again])
        quick = await asyncio.gather(*(self._try(one, placed[one.name]) for one in again))
        second = {one.vm: one for one in quick}
        return [self._gentlest(one, second.get(one.vm)) for one in found]

    def _gentlest(self, live: PlannedVm, quick: PlannedVm | None) -> PlannedVm:
        if quick is None:
            return live
        if quick.destination is not None:
            return quick.but(reason=live.reason)
        return live.but(way="shutdown")

    def _move(self, name: str, method: str) -> MigrateVm:
        return MigrateVm.model_validate(
            {
                "name": name,
                "method": method,
                "max_blackout_ms": self._request.max_blackout_ms,
                "deadline_s": self._request.deadline_s,
            }
        )

    def _leaving(self, move: MigrateVm) -> Leaving:
        return Leaving(
            need=need_of(self._snapshot, move.name),
            excluded=excluded(self._snapshot, self._host, move),
        )

    async def _try(self, move: MigrateVm, placed: Placed) -> PlannedVm:
        """The VM with that way, or with no destination and the reason why it cannot go so."""
        vm: Vm = known(self._snapshot.vms.get(move.name), "vm", move.name)
        one = PlannedVm(
            vm=vm.name,
            way=move.method,
            reason=placed.reason,
            memory_bytes=vm.memory_bytes,
            priority=vm.rules.priority,
        )
        if placed.host is None:
            return one
        if self._snapshot.owner(vm.name).state is not OwnerState.RUNNING:
            return one.but(destination=placed.host, reason="it starts just now")
        try:
            async with self._turn:
                plan = await ask_plan(self._world, self._host, move, placed.host)
        except GodwitError as error:
            return one.but(reason=error.message)
        return _judged(one.but(destination=placed.host), plan)


def _judged(one: PlannedVm, plan: MovePlan) -> PlannedVm:
    odd = tuple(check for check in plan.checks if check.result != "pass")
    one = one.but(checks=odd, forecast=plan.forecast)
    if plan.failed:
        return one.but(destination=None, reason=plan.failed[0].message)
    if one.way == "live" and plan.forecast.converges is False:
        return one.but(destination=None, reason="it writes faster than the link carries")
    return one
