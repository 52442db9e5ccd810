"""The ways to be sure that a host does nothing any more, each tried for a validation.

Nothing is switched or cut off: devices are read, fencing daemons say whether they could.
"""

from __future__ import annotations

import asyncio

from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import GodwitError
from godwit.model.membership import Renewal
from godwit.model.power import PowerConfig, PowerState
from godwit.model.validation_facts import HostSeen, RungSeen
from godwit.power.choose import opened
from godwit.store.errors import StoreError

_DEVICE_S = 10.0
_KINDS = {"redfish": "Redfish", "ipmi": "IPMI", "fence-agent": "the fence agent"}


async def rungs_seen(world: World, hosts: tuple[HostSeen, ...]) -> tuple[RungSeen, ...] | None:
    """Every way to fence these hosts, tried side by side; None when the store does not answer."""
    try:
        deadlines = await deadline_rungs(world, hosts)
    except StoreError:
        return None
    powers = world.cache.snapshot.powers
    with_device = [host for host in hosts if host.name in powers]
    devices = await asyncio.gather(
        *(power_rung(world, host, powers[host.name]) for host in with_device)
    )
    return (*await storage_rungs(world, hosts), *deadlines, *devices)


async def storage_rungs(world: World, hosts: tuple[HostSeen, ...]) -> list[RungSeen]:
    """Each host and each volume with a fencing daemon, as the daemon says it now."""
    records, cutter = world.cache.snapshot, world.cutter
    fenced = [volume for _, volume in sorted(records.volumes.items()) if volume.fence_url]
    await asyncio.gather(*(cutter.ask(url) for url in {one.fence_url for one in fenced}))
    unbound = cutter.unbound(records)
    rungs = []
    for volume in fenced:
        why = cutter.problem(volume)
        device = f"the fencing daemon of {volume.name} at {volume.fence_url}"
        for host in hosts:
            reason = why or unbound.get((volume.name, host.name), "")
            rungs.append(
                RungSeen(
                    host=host.name,
                    rung="storage",
                    answers=not reason,
                    device=device,
                    reason=reason,
                )
            )
    return rungs


async def deadline_rungs(world: World, hosts: tuple[HostSeen, ...]) -> list[RungSeen]:
    """Hosts whose own deadline is proof: a watchdog stands behind it, and the guard keeps it.

    As their guards said with the last renewal that is in the store; of a host that is silent now it
    says nothing of later.
    """
    leases = world.cache.snapshot.leases
    found = await world.records.list(keys.HOSTS, Renewal, suffix="/renewal")
    rungs = []
    for host in hosts:
        record = found.get(keys.host_renewal(host.name))
        if record is None or not record.value.watchdog or host.name not in leases:
            continue
        armed = record.value.guard == "armed"
        reason = "" if armed else "the guard cannot freeze a highly available VM there"
        rungs.append(RungSeen(host=host.name, rung="deadline", answers=armed, reason=reason))
    return rungs


async def power_rung(world: World, host: HostSeen, config: PowerConfig) -> RungSeen:
    """One reading of a host's power device. One that says off of a host that has just answered
    is another machine's."""
    device_name = f"{_KINDS.get(config.type, config.type)} at {config.agent or config.address}"
    rung = RungSeen(host=host.name, rung="power", answers=False, device=device_name)
    try:
        async with opened(host.name, config, vault=world.vault, clock=world.clock) as device:
            state = await device.state(deadline_s=_DEVICE_S)
    except GodwitError as error:
        return rung.but(reason=error.message)
    if state is PowerState.UNKNOWN:
        return rung.but(reason="it answers, and cannot tell whether the host is on")
    if state is PowerState.OFF and host.probe is not None:
        reason = "it says that the host is off, and the host answers: it is another machine's"
        return rung.but(reason=reason)
    return rung.but(answers=True)
