"""The last step of a live validation, for a host that was named: it loses its power.

The canary is on it, and nobody is told. The cluster has to notice, to find its proof and to start
the canary elsewhere, as it would on any other night; what that took is the figure. Only a host is
taken on which nothing else runs, and never the last manager or a member that the store's majority
needs.

Whatever comes of it, the host is switched on again. That its power was cut is written down before
it is: a manager that takes the task over switches the host on, and cuts no power a second time.
"""

from __future__ import annotations

from functools import partial

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.canary_stage import Stage
from godwit.manager.work.power_acts import check_not_the_last
from godwit.manager.work.power_rules import device_of, refuse_with_vms, vms_at
from godwit.manager.work.validation_rules import is_up
from godwit.model import keys
from godwit.model.errors import GodwitError, OperationFailed
from godwit.model.event import Event
from godwit.model.ownership import OwnerState
from godwit.model.validation import Canary, CanaryStep
from godwit.power.choose import opened
from godwit.store.errors import StoreError

CUT = "cut"
"""In the task's progress: the host whose power was cut and is not back yet."""
SWITCH_S = 60.0
TAKEN_S = 120.0
BACK_S = 900.0
"""Seconds that a host may take to boot; servers take minutes."""


async def fail_over(stage: Stage, canary: Canary) -> Canary:
    """Bring the canary there, cut the power, time the rest; or say why it was not tried."""
    host, world = stage.failover, stage.world
    if not host:
        return canary.but(
            not_done=(*canary.not_done, "a failover was not tried: --failover names a host")
        )
    if stage.run.adopted:
        said = "a failover was not tried again: the manager that had begun this is gone"
        return canary.but(not_done=(*canary.not_done, said))
    if world.cache.snapshot.owner(canary.vm).host != host:
        _, step = await stage.move(canary.vm, host)
        canary = canary.but(steps=(*canary.steps, step))
    refuse_with_vms(host, [vm for vm in vms_at(world.cache.snapshot, host) if vm != canary.vm])
    await check_not_the_last(world, host)
    try:
        canary = await _lose(stage, canary, host)
    except GodwitError as error:
        canary = canary.but(failure=error.message)
    except StoreError as error:  # one of its members may have been there
        canary = canary.but(failure=f"the store: {error}")
    return with_failure(canary, await give_power_back(stage))


def with_failure(canary: Canary, why: str) -> Canary:
    """The canary with one more thing that went wrong, if it did."""
    return canary.but(failure="; ".join(filter(None, (canary.failure, why))))


async def _lose(stage: Stage, canary: Canary, host: str) -> Canary:
    world, what = stage.world, f"cutting the power of {host}"
    config = device_of(world.cache.snapshot, host)
    again = f"waiting until {canary.vm} runs elsewhere"
    await stage.run.say(f"{what}, then {again}", progress={CUT: host})
    began, at = world.clock.monotonic(), world.clock.realtime()
    async with opened(host, config, vault=world.vault, clock=world.clock) as device:
        proof = await device.off(deadline_s=SWITCH_S)
    said = f"{host} is off, says {proof.device}"
    cut = CanaryStep(name=what, seconds=world.clock.monotonic() - began, message=said)
    runs = partial(_runs_elsewhere, vm=canary.vm, host=host)
    to = await world.cache.until(runs, timeout=TAKEN_S)
    spent = world.clock.monotonic() - began
    if to is None:
        raise OperationFailed(
            f"{host} lost its power, and {canary.vm} did not start elsewhere within {spent:.0f} s",
            hint=f"see: godwit event follow --since 0 --subject host/{host}",
        )
    started = CanaryStep(name=again, seconds=spent - cut.seconds, message=f"it runs on {to}")
    return canary.but(
        steps=(*canary.steps, cut, started),
        detection_s=await _noticed_s(stage, canary.vm, host, at),
        restart_s=round(spent, 3),
    )


async def _noticed_s(stage: Stage, vm: str, host: str, since: float) -> float | None:
    """Seconds until the cluster held the host for lost; None when its log does not say so.

    It fences the host, or has its proof already and takes the VM over.
    """
    signs = {("host.fencing", f"host/{host}"), ("vm.failover", f"vm/{vm}")}
    found = await stage.world.records.list(keys.EVENTS, Event)
    events = (record.value for record in found.values())
    times = [one.time for one in events if (one.kind, one.subject) in signs and one.time >= since]
    return round(min(times) - since, 3) if times else None


async def give_power_back(stage: Stage) -> str:
    """Switch the host on whose power was cut for this, and wait for it.

    What is wrong with it, empty when it is up or nobody's power was cut.
    """
    host, world = str(stage.run.task.progress.get(CUT, "")), stage.world
    if not host:
        return ""
    try:  # before anything is written: the store may be what misses the host
        config = device_of(world.cache.snapshot, host)
        async with opened(host, config, vault=world.vault, clock=world.clock) as device:
            await device.on(deadline_s=SWITCH_S)
    except GodwitError as error:
        return f"{host} is left without power, switch it on by hand: {error.message}"
    await stage.run.say(f"{host} is on again, waiting until it is up", progress={CUT: ""})
    if await world.cache.until(partial(_is_back, host=host), timeout=BACK_S) is None:
        return f"{host} was switched on again, and is not up after {BACK_S:.0f} s"
    return ""


def _is_back(snapshot: Snapshot, *, host: str) -> bool | None:
    return is_up(snapshot, host) or None


def _runs_elsewhere(snapshot: Snapshot, *, vm: str, host: str) -> str | None:
    owner = snapshot.owner(vm)
    return owner.host if owner.host != host and owner.state is OwnerState.RUNNING else None
