"""A VM that is held for a moment by its host, not by anybody's wish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from godwit.agent.desk import Desk, Slot

T = TypeVar("T")


@asynccontextmanager
async def standing_still(desk: Desk, slot: Slot) -> AsyncIterator[None]:
    """No vCPU runs in here and nothing is on its way to a disk; the VM runs on if it ran before.

    For a caller that holds the VM's lock. An agent that dies in between leaves it to the next one,
    which lets every VM of its host run that nobody wants to be paused.
    """
    machine, name = slot.machine, slot.vm.name
    runs = (await machine.status()).running
    desk.standing.add(name)
    try:
        if runs:
            await machine.stop()
        yield
    finally:
        desk.standing.discard(name)
        if runs and not machine.exited.is_set():
            await asyncio.shield(machine.cont())


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Also when we are told to end: half-way the VM would stand still until the next agent."""
    doing = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait({doing})
        raise
