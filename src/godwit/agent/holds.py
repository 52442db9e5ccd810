"""Hold points of the engine, armed through the agent's lab interface and refused elsewhere."""

from __future__ import annotations

import asyncio

from godwit.agent.disk_journal import GROWTH_HOLDS
from godwit.agent.disk_journal import HOLDS as DISK_HOLDS
from godwit.migration.world import DESTINATION_HOLDS, SOURCE_HOLDS
from godwit.model.errors import InvalidRequest, Refused

_POINTS = {
    "source": SOURCE_HOLDS,
    "destination": DESTINATION_HOLDS,
    "disk": (*DISK_HOLDS, *GROWTH_HOLDS),
}


class LabHolds:
    """Implements ``godwit.migration.world.Holds``; with ``enabled`` False nothing can be armed."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._armed: dict[tuple[str, str], asyncio.Event] = {}
        self._reached: dict[tuple[str, str], str] = {}
        self._changed = asyncio.Condition()

    def arm(self, point: str, role: str) -> None:
        """Hold the next move that comes to ``point``, and every later one, until released."""
        if not self._enabled:
            raise Refused("hold points exist only in a lab", hint="use: godwit lab up")
        if point not in _POINTS.get(role, ()):
            known = "; ".join(f"{name}: {', '.join(at)}" for name, at in _POINTS.items())
            raise InvalidRequest(f"no hold point {point!r} of {role!r}", hint=f"known: {known}")
        self._armed.setdefault((point, role), asyncio.Event())

    async def release(self, point: str | None = None) -> None:
        """Let go of one point, or of all of them."""
        for key in [key for key in self._armed if point in (None, key[0])]:
            self._armed.pop(key).set()
        async with self._changed:
            self._changed.notify_all()

    async def reach(self, point: str, *, vm: str, role: str) -> None:
        """Wait here while the point is armed."""
        event = self._armed.get((point, role))
        if event is None:
            return
        self._reached[(point, role)] = vm
        async with self._changed:
            self._changed.notify_all()
        try:
            await event.wait()
        finally:
            self._reached.pop((point, role), None)

    async def wait_reached(self, point: str, role: str, *, timeout: float) -> str:
        """The VM that is held at this point now, or as soon as one is. TimeoutError."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: (point, role) in self._reached)
            return self._reached[(point, role)]

    def view(self) -> dict[str, list[dict[str, str]]]:
        """What is armed and who is held."""
        return {
            "armed": [{"point": point, "role": role} for point, role in self._armed],
            "held": [
                {"point": point, "role": role, "vm": vm}
                for (point, role), vm in self._reached.items()
            ],
        }
