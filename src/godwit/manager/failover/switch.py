"""The third rung: a lost host's power device switches it off, and reads the state back."""

from __future__ import annotations

from godwit.manager.work.power_rules import device_of
from godwit.manager.world import World
from godwit.power.choose import opened

OFF_S = 15.0
"""Seconds for one attempt; a device that is silent for longer is tried again by the ladder."""


class PowerSwitch:
    """See `godwit.manager.failover.acting.Switch`."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def off(self, host: str) -> str:
        """Off, as the device says after it was asked; NotFound without a device.

        Errors: those of `godwit.power.errors`; what is not known to be off is no proof.
        """
        world = self._world
        config = device_of(world.cache.snapshot, host)
        async with opened(host, config, vault=world.vault, clock=world.clock) as device:
            proof = await device.off(deadline_s=OFF_S)
        return f"{proof.device} says {proof.state.value} ({proof.took_s:.1f} s)"
