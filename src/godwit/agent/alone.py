"""What becomes of highly available VMs at the deadline, seen from the agent.

The guard freezes and thaws them; the agent tells the store and people about it as soon as it can.
When the guard is silent the agent freezes them itself, and leaves the rest to the next guard, which
reads the owner record before anything runs on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from godwit.agent.guardlink import BEAT_S
from godwit.guard.deadline import FREEZE_S, Stand
from godwit.guard.decide import AGENT_SILENCE_S
from godwit.guard.freezer import Freezer, apart
from godwit.host.errors import HostError
from godwit.model import keys
from godwit.model.units import format_duration
from godwit.model.vm import VmState, VmStatus
from godwit.store.errors import StoreError
from godwit.store.records import encode

if TYPE_CHECKING:
    from godwit.agent.desk import Desk, Slot

_WORK_S = 0.5
_AGAIN_S = 1.0
_log = logging.getLogger("agent")


@dataclass(frozen=True)
class View:
    """What the agent knows of its guard. Times are seconds of one clock.

    ``answered_at``: when the guard last answered; ``counts_from``: from when the deadline counts,
    as it said then.
    """

    answered_at: float
    counts_from: float


def must_act(view: View, *, now: float) -> bool:
    """Whether the agent itself has to freeze what the guard would: pure."""
    return now - view.answered_at >= AGENT_SILENCE_S and now - view.counts_from >= FREEZE_S


class Alone:
    """Belongs to the agent's event loop; run ``serve`` and ``tell`` as tasks."""

    def __init__(self, desk: Desk, *, freezer: Callable[..., Freezer] = Freezer) -> None:
        self._desk = desk
        self._freezer = freezer
        self._since: dict[str, float] = {}  # names of VMs of which it is still to be told
        self._stood: dict[str, float] = {}

    async def serve(self) -> None:
        """Look after the guard, for ever."""
        desk = self._desk
        began = desk.clock.monotonic()
        while True:
            await desk.clock.sleep(BEAT_S)
            guard = desk.guard
            view = View(
                began if guard.answered_at is None else guard.answered_at,
                began if guard.counts_from is None else guard.counts_from,
            )
            if must_act(view, now=desk.clock.monotonic()):
                ours = [slot for slot in desk.slots.values() if slot.vm.ha]
                await asyncio.gather(*(self._freeze(slot) for slot in ours))

    async def _freeze(self, slot: Slot) -> None:
        name, runtime = slot.vm.name, slot.machine.runtime
        if name in self._desk.guard.frozen_alone:
            return
        freezer = self._freezer(runtime.process, runtime.cgroup)
        try:
            stand = await apart(freezer.freeze, timeout=_WORK_S)
        except (TimeoutError, HostError, OSError) as error:
            _log.error("%s: cannot be frozen: %s", name, error or "the freezer hangs")
            return
        if stand is Stand.FROZEN:
            why = "the guard is silent and the lease was not renewed: frozen by the agent"
            _log.error("%s: %s", name, why)
            self._note(name, why)
            self._desk.guard.froze(name, why)

    def _note(self, vm: str, why: str) -> None:
        """In the guard's own log: one place says when a VM stood still."""
        line = {
            "time": self._desk.clock.realtime(),
            "vm": vm,
            "act": "freeze",
            "sentence": why,
            "result": Stand.FROZEN.value,
        }
        log = self._desk.config.paths.state / "guard.log"
        with contextlib.suppress(OSError), log.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    async def tell(self) -> None:
        """Say which VMs stand still, and that they go on, for ever."""
        desk = self._desk
        while True:
            await desk.guard.frozen_changed.wait()
            desk.guard.frozen_changed.clear()
            told = await asyncio.gather(
                *(self._goes_on(name) for name in self._gone()),
                *(self._stands(name, why) for name, why in desk.guard.frozen.items()),
            )
            if not all(told):
                # The store is away more often than not: nothing tells when it is back.
                await desk.clock.sleep(_AGAIN_S)
                desk.guard.frozen_changed.set()

    def _gone(self) -> list[str]:
        return [name for name in self._since if name not in self._desk.guard.frozen]

    async def _stands(self, name: str, why: str) -> bool:
        """Publish that a VM stands still; False when it has to be told again."""
        desk = self._desk
        slot = desk.slots.get(name)
        if slot is None:
            return True
        self._since.setdefault(name, desk.clock.monotonic())
        slot.state, slot.reason = VmState.FROZEN, why
        return await self._publish(slot)

    async def _goes_on(self, name: str) -> bool:
        """Publish that a VM runs again; False when it has to be told again."""
        desk = self._desk
        slot = desk.slots.get(name)
        if slot is None or slot.machine.exited.is_set():
            self._drop(name)
            return True
        stood = self._stood.setdefault(name, desk.clock.monotonic() - self._since[name])
        if slot.state is VmState.FROZEN:
            slot.state, slot.reason = VmState.PAUSED if slot.paused else VmState.RUNNING, ""
        if not await self._publish(slot):
            return False
        self._drop(name)
        await desk.event(
            "vm.thawed",
            name,
            f"stood still for {format_duration(stood)}: its host could not renew its lease",
            level="warning",
        )
        return True

    def _drop(self, name: str) -> None:
        self._since.pop(name, None)
        self._stood.pop(name, None)

    async def _publish(self, slot: Slot) -> bool:
        """What is seen of a VM, as `Desk.publish` says it; False when the store did not take it."""
        desk, name = self._desk, slot.vm.name
        status = VmStatus(
            state=slot.state,
            host=desk.host,
            epoch=slot.machine.epoch,
            reason=slot.reason,
            since=desk.clock.realtime(),
        )
        try:
            await desk.records.store.put(keys.vm_status(name), encode(status), timeout=_AGAIN_S)
        except StoreError:
            return False
        return True
