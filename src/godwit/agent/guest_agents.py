"""What the agent inside a guest is asked for: is a disk still in use, and set your clock.

A guest without one, or with one that is silent, is treated as one that was made without the port.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from godwit.model.vm import Disk
from godwit.qemu.guest_agent import Mount, NoGuestAgent, mounts, set_clock

if TYPE_CHECKING:
    from godwit.agent.desk import Desk, Slot

CLOCK_PATIENCE_S = 10.0
"""Seconds that a guest has to set its clock after a stand-still: it may have much to do first."""
_RETRY_S = 0.5
_log = logging.getLogger("agent")


async def mounted(slot: Slot, disk: Disk) -> list[Mount]:
    """The file systems on a disk that the guest says it has mounted; none when it says nothing."""
    if not slot.vm.guest_agent:
        return []
    try:
        return await mounts(slot.machine.runtime.guest_agent, disk)
    except NoGuestAgent as error:
        _log.info("%s: not asked whether %s is in use: %s", slot.vm.name, disk.id, error)
        return []


def set_clock_soon(desk: Desk, slot: Slot) -> None:
    """The guest stood still and its clock with it: have it set, without waiting for that."""
    if slot.vm.guest_agent:
        desk.background(_set_clock(desk, slot), f"vm {slot.vm.name}: clock")


async def _set_clock(desk: Desk, slot: Slot) -> None:
    until = desk.clock.monotonic() + CLOCK_PATIENCE_S
    while True:
        try:
            await set_clock(slot.machine.runtime.guest_agent, desk.clock.realtime())
        except NoGuestAgent as error:
            if desk.clock.monotonic() > until:
                message = f"its clock stays behind by the time it stood still: {error}"
                await desk.event("vm.clock", slot.vm.name, message, level="warning")
                return
            await asyncio.sleep(_RETRY_S)  # nothing announces that the guest is ready
        else:
            return
