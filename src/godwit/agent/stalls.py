"""VMs that QEMU has paused because a disk refused a request: told once, and let go on again.

    STOP, QEMU says io-error --> io-error with the reason, one event
                             --> full: room is looked for every second --> cont
                             --> RESUME, from here or by ``vm resume``  --> the stall is over

QEMU keeps the refused requests and sends them again at ``cont``: the guest sees no error and loses
nothing. What refused is asked of QEMU's own devices (``io-status``), for its events are thinned
out and may come late. Only a volume without room is waited for; any other fault needs a person, or
who mends the path.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from godwit.model.errors import GodwitError
from godwit.model.units import format_duration, format_size
from godwit.model.vm import Disk, VmState
from godwit.qmp import MonitorError
from godwit.store.errors import StoreError

if TYPE_CHECKING:
    from godwit.agent.desk import Desk, Slot  # it owns these stalls

POLL_S = 1.0
"""Seconds between looks at a full volume, while a VM waits for it: nothing announces room."""
MEASURE_S = 2.0
"""Seconds a volume may take to say how full it is before the stall is told without it."""
LEAST_ROOM = 16 << 20
MOST_ROOM = 256 << 20


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of a file system: what QEMU's user may still take, and all there are."""

    free: int
    total: int

    @property
    def enough(self) -> int:
        """Free bytes that let a VM run for a while: a hundredth, within bounds."""
        return min(MOST_ROOM, max(LEAST_ROOM, self.total // 100))


@dataclass(eq=False, slots=True)
class Stall:
    """One pause of a VM by its storage; ``full``: for want of room and nothing else."""

    disks: tuple[str, ...]
    full: bool
    since: float
    room: Room | None = None


def refused(blocks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Disk -> ``nospace`` or ``failed``, of those whose request was refused. Pure."""
    return {
        str(block["qdev"]): str(block["io-status"])
        for block in blocks
        if block.get("qdev") and block.get("io-status", "ok") != "ok"
    }


def may_go_on(before: Room | None, now: Room) -> bool:
    """Is there room again? Pure.

    Where it looked as if there were room already when the write failed (a quota, a write larger
    than what is left) only more of it is a reason to try.
    """
    more = before is None or now.free >= before.free + LEAST_ROOM
    return now.free >= now.enough and more


def explain(vm: str, disks: Sequence[Disk], *, full: bool, room: Room | None, host: str) -> str:
    """Why the VM stands still and what lets it go on, in words. Pure.

    Without ``room`` (a volume that is served to QEMU alone) nobody here sees it come back.
    """
    again = f"godwit vm resume {vm}"
    names = ", ".join(disk.id for disk in disks) or "a disk"
    if not full:
        return f"{host} could not read or write {names}; mend its storage, then: {again}"
    volumes = sorted({disk.volume for disk in disks if disk.volume})
    if not volumes:
        return f"the storage of {names} is full; grow it, then: {again}"
    left, then = "", f"then run: {again}"
    if room is not None:
        left = f": {format_size(room.free)} of {format_size(room.total)} free"
        then = f"the VM then goes on by itself, or at once with: {again}"
    plural = "volumes" if len(volumes) > 1 else "volume"
    verb = "are" if len(volumes) > 1 else "is"
    return f"{plural} {', '.join(volumes)} {verb} full{left}; grow it or free space: {then}"


def room_of(folder: Path) -> Room | None:
    """How full the file system is that holds a directory; None when it does not say."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return Room(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


class Stalls:
    """Those of this host's VMs. Belongs to the agent's event loop."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._now: dict[str, Stall] = {}

    async def look(self, slot: Slot) -> bool:
        """Does its storage hold the VM? Then that is told, unless it was told already."""
        try:
            status = await slot.machine.status()
            if status.status != "io-error":
                return False
            blocks = await slot.machine.monitor.execute("query-block")
        except MonitorError:
            return False
        name, faults = slot.vm.name, refused(blocks)
        if name in self._now:
            return True
        stall = Stall(
            disks=tuple(sorted(faults)),
            full=bool(faults) and set(faults.values()) == {"nospace"},
            since=self._desk.clock.monotonic(),
        )
        self._now[name] = stall
        slot.state = VmState.IO_ERROR
        task = self._desk.background(self._tell(slot, stall), f"vm {name}: stalled")
        slot.tasks.add(task)
        task.add_done_callback(slot.tasks.discard)
        return True

    async def over(self, slot: Slot) -> None:
        """The VM runs again, or is to stand still for another reason, or has gone."""
        stall = self._now.pop(slot.vm.name, None)
        slot.reason = ""
        if stall is not None and slot.state is VmState.RUNNING:
            lasted = format_duration(self._desk.clock.monotonic() - stall.since)
            await self._desk.event(
                "vm.io-resumed", slot.vm.name, f"goes on after {lasted} without its storage"
            )

    def full(self, vm: str) -> bool:
        """Whether a VM waits for room on a volume: only room lets it go on."""
        stall = self._now.get(vm)
        return stall is not None and stall.full

    def forget(self, vm: str) -> None:
        """The VM is not here any more."""
        self._now.pop(vm, None)

    async def _tell(self, slot: Slot, stall: Stall) -> None:
        name, desk = slot.vm.name, self._desk
        disks = [disk for disk in slot.vm.disks if disk.id in stall.disks]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MEASURE_S):
                stall.room = await self._measure(disks)
        if self._now.get(name) is not stall:
            return
        slot.reason = explain(name, disks, full=stall.full, room=stall.room, host=desk.host)
        await desk.publish(slot)
        await desk.event("vm.io-error", name, slot.reason, level="error")
        if stall.full:
            await self._wait_for_room(slot, stall, disks)

    async def _wait_for_room(self, slot: Slot, stall: Stall, disks: Sequence[Disk]) -> None:
        while self._now.get(slot.vm.name) is stall:
            await self._desk.clock.sleep(POLL_S)
            room = await self._measure(disks)
            if room is not None and may_go_on(stall.room, room):
                with contextlib.suppress(StoreError, MonitorError, GodwitError):
                    await self._go_on(slot, stall)

    async def _measure(self, disks: Sequence[Disk]) -> Room | None:
        """The fullest of the file systems that hold these images."""
        folders = {Path(disk.path).parent for disk in disks if disk.volume}
        found = [await asyncio.to_thread(room_of, folder) for folder in sorted(folders)]
        rooms = [room for room in found if room is not None]
        return min(rooms, key=lambda room: room.free, default=None)

    async def _go_on(self, slot: Slot, stall: Stall) -> None:
        """Let the VM run, if it is still ours and nobody wants it to stand still."""
        name, desk = slot.vm.name, self._desk
        async with desk.lock(name):
            if self._now.get(name) is not stall or slot.ending or name in desk.moving:
                return
            found = await desk.records.owner(name)
            if found is None or found.value.migration is not None or found.value.paused:
                return
            if (found.value.host, found.value.epoch) == (desk.host, slot.machine.epoch):
                await slot.machine.cont()
