"""A VM that its storage stops is told of once, waits, and goes on when there is room."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent import stalls as room
from godwit.agent.stalls import Room, Stalls, explain, may_go_on, refused
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import Disk, VmState
from godwit.qmp import MonitorLost

MIB = 1 << 20
FULL = Room(free=12 * MIB, total=2048 * MIB)


def disk(n: int = 0, **more: Any) -> Disk:
    values: dict[str, Any] = {
        "id": f"disk{n}",
        "volume": "shared",
        "path": f"/clusterstorage/shared/web/disk{n}.qcow2",
        "size_bytes": 1 << 20,
        "serial": f"GW{n}",
        "lun": n,
    }
    return Disk.model_validate(values | more)


# Decisions.


def test_what_refused_is_read_off_the_devices() -> None:
    blocks = [
        {"qdev": "disk0", "io-status": "nospace"},
        {"qdev": "disk1", "io-status": "ok"},
        {"qdev": "disk2", "io-status": "failed"},
        {"qdev": "disk3"},
        {"device": "floppy", "io-status": "failed"},
    ]
    assert refused(blocks) == {"disk0": "nospace", "disk2": "failed"}


def test_the_reason_says_what_to_do() -> None:
    said = explain("web", [disk()], full=True, room=FULL, host="host1")
    assert said.startswith("volume shared is full: 12 MiB of 2 GiB free; grow it or free space")
    assert said.endswith("godwit vm resume web")
    unseen = explain("web", [disk()], full=True, room=None, host="host1")
    assert unseen.endswith("is full; grow it or free space: then run: godwit vm resume web")
    device = disk(1, volume="", path="/dev/sdb", format="raw", source="device")
    assert "storage of disk1 is full" in explain("web", [device], full=True, room=None, host="h")
    two = explain("web", [disk(), disk(1, volume="b")], full=True, room=None, host="h")
    assert two.startswith("volumes b, shared are full")
    broken = explain("web", [disk()], full=False, room=None, host="host1")
    assert broken == (
        "host1 could not read or write disk0; mend its storage, then: godwit vm resume web"
    )


@pytest.mark.parametrize(
    ("before", "free", "good"),
    [
        (FULL, 12 * MIB, False),
        (FULL, 20 * MIB, False),  # a hundredth is 20.48 MiB
        (FULL, 28 * MIB, True),
        (None, 28 * MIB, True),
        (Room(500 * MIB, 2048 * MIB), 500 * MIB, False),  # a quota: statvfs sees no lack
        (Room(500 * MIB, 2048 * MIB), 516 * MIB, True),
    ],
)
def test_it_goes_on_only_with_room_for_a_while(before: Room | None, free: int, good: bool) -> None:
    assert may_go_on(before, Room(free, 2048 * MIB)) is good


def test_the_room_that_is_enough_is_bounded() -> None:
    assert Room(0, 1 << 50).enough == room.MOST_ROOM
    assert Room(0, 64 * MIB).enough == room.LEAST_ROOM


# What is done.


class World:
    """A desk with one VM, whose QEMU says what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.qemu = "io-error"
        self.blocks: list[dict[str, Any]] = [{"qdev": "disk0", "io-status": "nospace"}]
        self.room: Room | None = FULL
        self.owner = Owner(host="host1", epoch=3, state=OwnerState.RUNNING)
        self.events: list[tuple[str, str]] = []
        self.published: list[tuple[VmState, str]] = []
        self.continued = 0
        self.ticks: asyncio.Queue[None] = asyncio.Queue()
        self.tasks: list[asyncio.Task[None]] = []
        self.lock = asyncio.Lock()
        monitor = SimpleNamespace(execute=self._execute)
        machine = SimpleNamespace(status=self._status, monitor=monitor, cont=self._cont, epoch=3)
        self.slot: Any = SimpleNamespace(
            vm=SimpleNamespace(name="web", disks=(disk(),)),
            machine=machine,
            state=VmState.RUNNING,
            reason="",
            tasks=set(),
            ending=False,
        )
        self.desk: Any = SimpleNamespace(
            host="host1",
            moving=set(),
            clock=SimpleNamespace(monotonic=lambda: 0.0, sleep=self._sleep),
            records=SimpleNamespace(owner=self._owner),
            lock=lambda _vm: self.lock,
            event=self._event,
            publish=self._publish,
            background=self._background,
        )
        self.stalls = Stalls(self.desk)
        monkeypatch.setattr(room, "room_of", lambda _folder: self.room)

    async def _execute(self, command: str) -> Any:
        assert command == "query-block"
        return self.blocks

    async def _status(self) -> Any:
        if self.qemu == "lost":
            raise MonitorLost("web", "it has gone")
        return SimpleNamespace(status=self.qemu)

    async def _cont(self) -> None:
        self.continued += 1
        self.qemu = "running"
        self.slot.state = VmState.RUNNING  # as the desk does at RESUME
        await self.stalls.over(self.slot)

    async def _sleep(self, _seconds: float) -> None:
        await self.ticks.get()

    async def _owner(self, _vm: str) -> Any:
        return SimpleNamespace(value=self.owner)

    async def _event(self, kind: str, _vm: str, message: str, *, level: str = "info") -> None:
        self.events.append((kind, message))

    async def _publish(self, slot: Any) -> None:
        self.published.append((slot.state, slot.reason))

    def _background(self, work: Coroutine[Any, Any, None], _name: str) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self.tasks.append(task)
        return task

    async def tick(self) -> None:
        """One look at the volume, to its end."""
        self.ticks.put_nowait(None)
        await self.settle()

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = World(monkeypatch)
    yield made
    await made.close()


async def test_told_once_and_let_go_on_when_there_is_room(world: World) -> None:
    assert await world.stalls.look(world.slot)
    assert await world.stalls.look(world.slot), "the next refused request tells nothing new"
    await world.settle()
    assert [kind for kind, _ in world.events] == ["vm.io-error"]
    assert world.published[-1][0] is VmState.IO_ERROR
    assert "12 MiB of 2 GiB free" in world.published[-1][1]
    await world.tick()
    assert world.continued == 0
    world.room = Room(100 * MIB, 2048 * MIB)
    await world.tick()
    assert world.continued == 1
    assert [kind for kind, _ in world.events] == ["vm.io-error", "vm.io-resumed"]
    assert world.slot.reason == ""
    assert world.tasks[0].done(), "nobody looks at the volume any more"


@pytest.mark.parametrize("who", ["paused", "moved", "stopping", "elsewhere"])
async def test_it_stays_when_somebody_wants_it_to(who: str, world: World) -> None:
    await world.stalls.look(world.slot)
    world.room = Room(100 * MIB, 2048 * MIB)
    if who == "paused":
        world.owner = world.owner.but(paused=True)
    elif who == "moved":
        world.desk.moving.add("web")
    elif who == "stopping":
        world.slot.ending = True
    else:
        world.owner = world.owner.but(epoch=4)
    await world.settle()
    await world.tick()
    assert world.continued == 0


async def test_a_broken_path_is_told_and_not_tried_again(world: World) -> None:
    world.blocks = [{"qdev": "disk0", "io-status": "failed"}]
    await world.stalls.look(world.slot)
    await world.settle()
    assert "could not read or write disk0" in world.slot.reason
    assert world.tasks[0].done()
    assert world.continued == 0


@pytest.mark.parametrize("status", ["paused", "running", "lost"])
async def test_another_pause_is_none_of_it(status: str, world: World) -> None:
    world.qemu = status
    assert not await world.stalls.look(world.slot)
    assert not world.tasks
    assert world.slot.state is VmState.RUNNING
