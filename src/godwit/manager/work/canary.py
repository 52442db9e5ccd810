"""A live validation: a small VM is made, started, moved live, drained from its host, and removed.

It goes the way of every VM: each step is a request of its own, with its own task and record, and
bound by the same checks and the same queue. It needs two hosts that are up and the demo image on
one of them; the VM has no disk and no network card, so nothing of anybody's is touched.

Its host is drained only when nobody else's VM is there, for a drain would move those, too. It
fails over only when a host was named that may lose its power for it (`canary_failover`). Each of
``STEPS`` gets the canary as it is and gives it back with what was seen.
"""

from __future__ import annotations

from functools import partial

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.canary_failover import fail_over, give_power_back, with_failure
from godwit.manager.work.canary_stage import BLACKOUT_MS, Say, Stage, Step
from godwit.manager.work.drain_plan import vms_on
from godwit.manager.work.tasks import TaskRun
from godwit.manager.work.validation_rules import is_up
from godwit.manager.world import World
from godwit.model.errors import GodwitError, NotFound
from godwit.model.requests import (
    CreateVm,
    DeleteVm,
    DrainHost,
    ReturnHost,
    StartVm,
    StopVm,
    ValidateCluster,
)
from godwit.model.validation import Canary

MEMORY_BYTES = 128 << 20
IMAGE = "demo"
_REMOVE_S = 60.0
_AGAIN_S = 2.0


async def try_canary(world: World, run: TaskRun, say: Say) -> Canary:
    """The canary's whole life; what it could not do is in the result. It leaves no VM behind."""
    request, canary = run.request, Canary(vm=f"canary-{run.task.id}"[:63])
    failover = request.failover if isinstance(request, ValidateCluster) else None
    stage = Stage(world, run, say, failover=failover or "")
    if run.adopted:  # what the manager before us had begun
        canary = with_failure(canary, await give_power_back(stage))
        await _give_back(stage)
        await remove(stage, canary.vm)
    now = world.cache.snapshot
    up = [name for name in sorted(now.hosts) if is_up(now, name) and name not in now.marks]
    if len(up) < 2:
        return canary.but(not_done=("two hosts that are up are needed",))
    canary = canary.but(source=up[0], destination=up[1])
    try:
        for step in STEPS:
            canary = await step(stage, canary)
    except NotFound as error:
        canary = canary.but(not_done=(f"{error.message}: {error.hint or 'it is needed'}",))
    except GodwitError as error:
        canary = with_failure(canary, f"the canary VM failed: {error.message}")
    left = await remove(stage, canary.vm)
    if left:
        canary = with_failure(canary, f"{canary.vm} could not be removed: {left}")
    return canary


async def _start(stage: Stage, canary: Canary) -> Canary:
    make = CreateVm(
        name=canary.vm,
        memory_bytes=MEMORY_BYTES,
        image=IMAGE,
        host=canary.source,
        ha=bool(stage.failover),
    )
    _, made = await stage.do(make, "making a small VM")
    start = StartVm(name=canary.vm, host=canary.source)
    _, started = await stage.do(start, f"starting it on {canary.source}")
    return canary.but(steps=(*canary.steps, made, started))


async def _move(stage: Stage, canary: Canary) -> Canary:
    task, step = await stage.move(canary.vm, str(canary.destination))
    found = await stage.world.records.migration(str(task.progress.get("migration", "")))
    canary = canary.but(steps=(*canary.steps, step))
    if found is None:
        return canary
    report = found.value
    return canary.but(migration=report.id, blackout_ms=report.blackout_ms, total_ms=report.total_ms)


async def _drain(stage: Stage, canary: Canary) -> Canary:
    """Empty the host that it is on now, and let it take VMs again, whatever came of it."""
    host = str(canary.destination)
    snapshot = stage.world.cache.snapshot
    others = sorted(set(vms_on(snapshot, host)) - {canary.vm})
    why = f"{', '.join(others[:3])} would have moved, too" if others else ""
    if mark := snapshot.marks.get(host):
        why = f"{host} is {mark.state} already: {mark.reason}"
    if why:
        return canary.but(not_done=(*canary.not_done, f"a drain was not tried: {why}"))
    drain = DrainHost(name=host, reason=stage.mark, max_blackout_ms=BLACKOUT_MS)
    try:
        _, step = await stage.do(drain, f"draining {host}")
    finally:
        await _give_back(stage)
    return canary.but(steps=(*canary.steps, step))


async def _give_back(stage: Stage) -> None:
    """Let the hosts take VMs again that we have marked, and nobody else's."""
    for host, mark in sorted(stage.world.cache.snapshot.marks.items()):
        if mark.reason == stage.mark:
            await stage.try_to(ReturnHost(name=host))


STEPS: tuple[Step, ...] = (_start, _move, _drain, fail_over)


async def remove(stage: Stage, vm: str) -> str:
    """Stop and forget a VM, whatever state it is in; why it is still there, or nothing.

    A VM that has just moved is busy until its source has cleaned up: that shows in the records, so
    it is tried again when they change.
    """
    world = stage.world
    until, why = world.clock.monotonic() + _REMOVE_S, ""
    while vm in world.cache.snapshot.vms:
        seen = world.cache.revision
        await stage.try_to(StopVm(name=vm, force=True))  # refused when it is stopped already
        why = await stage.try_to(DeleteVm(name=vm))
        if why and world.clock.monotonic() > until:
            return why
        if why:
            await world.cache.until(partial(_is_news, since=seen), timeout=_AGAIN_S)
    return ""


def _is_news(snapshot: Snapshot, *, since: int) -> bool | None:
    return snapshot.revision > since or None
