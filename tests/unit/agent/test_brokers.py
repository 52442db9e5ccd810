"""When a VM's broker may be worked on, and what is served after an image was to grow."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent import broker_disks
from godwit.agent import brokers as room
from godwit.agent.brokers import Brokers
from godwit.model.errors import OperationFailed, Refused
from godwit.model.vm import Disk
from godwit.storage.broker_life import Opening
from godwit.storage.files import LOCAL
from godwit.storage.nodes import BrokerDisk

MIB = 1 << 20
DISK = Disk(
    id="disk0",
    volume="shared",
    path="/clusterstorage/shared/web/disk0.vhdx",
    size_bytes=MIB,
    format="vhdx",
    serial="GW0",
    lun=0,
)


class FakeBroker:
    """One daemon with one disk, by what is asked of it."""

    def __init__(self) -> None:
        self.alive = True
        self.steps: list[str] = []
        self.silent = 0
        served = SimpleNamespace(
            disk=SimpleNamespace(
                id="disk0", path=DISK.path, format="vhdx", volume="shared", size_bytes=MIB
            ),
            grows_to=0,
        )
        self.record = SimpleNamespace(lenders={}, disks={"disk0": served}, process="p1")

    def note_growth(self, name: str, size: int) -> None:
        self.record.disks[name].grows_to = size
        self.steps.append("noted")

    def settle_growth(self, name: str, size: int) -> None:
        assert not self.alive
        self.record.disks[name].grows_to = 0
        self.record.disks[name].disk.size_bytes = size
        self.steps.append("measured")

    def check_left(self) -> None:
        assert not self.alive, "a daemon that still runs has left nothing behind it"

    async def release_all(self) -> None:
        self.steps.append("closed")

    async def kill(self) -> None:
        if self.alive:
            self.steps.append("ended")
        self.alive = False

    async def restart(self, _wanted: Any, *, listener: Any) -> None:
        self.steps.append("served")
        self.alive = True

    async def ended(self) -> None:
        if self.alive:
            await asyncio.Event().wait()

    async def answers(self, *, timeout: float) -> bool:
        self.silent -= 1
        return self.silent < 0


class World:
    """The rooms around the brokers, as far as they matter here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.image = MIB
        self.reason = ""
        redirects = SimpleNamespace(
            reason=lambda _vm: self.reason, route=self._route, goes=self._goes
        )
        self.desk = SimpleNamespace(
            config=SimpleNamespace(paths=SimpleNamespace(run=Path("/nowhere"))),
            equipment=SimpleNamespace(binary=SimpleNamespace(user=None)),
            clock=SimpleNamespace(monotonic=lambda: 0.0),
            guard=SimpleNamespace(frozen={}),
            redirects=redirects,
            catalog=SimpleNamespace(files=lambda _volume: LOCAL),
            slot=lambda _vm: SimpleNamespace(machine=SimpleNamespace(epoch=4)),
            background=lambda work, _name: work.close(),
        )
        self.brokers = Brokers(self.desk)  # type: ignore[arg-type]
        self.broker = FakeBroker()
        self.brokers._brokers["web"] = self.broker  # type: ignore[assignment]
        self.brokers._sockets._listeners["web"] = SimpleNamespace(close=lambda: None)  # type: ignore[assignment]
        monkeypatch.setattr(broker_disks, "image_info", self._info)

    async def _route(self, _vm: str, _broker: Any, *, epoch: int) -> dict[str, Any]:
        assert epoch == 4
        return {}

    async def _goes(self, _vm: str) -> None:
        return

    async def _info(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(virtual_size=self.image)

    async def enlarge(self, _disk: Disk, size: int) -> None:
        assert not self.broker.alive, "nobody has the image open"
        self.broker.steps.append("image")
        self.image = size


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def test_an_image_grows_between_two_daemons(world: World) -> None:
    assert await world.brokers.grow("web", DISK, 2 * MIB, world.enlarge) == 2 * MIB
    assert world.broker.steps == ["noted", "closed", "ended", "image", "measured", "served"]
    assert not world.brokers._lock("web").locked()


async def test_one_that_does_not_grow_is_served_as_it_is(world: World) -> None:
    async def fails(_disk: Disk, _size: int) -> None:
        raise OperationFailed("no room")

    with pytest.raises(OperationFailed, match="no room"):
        await world.brokers.grow("web", DISK, 2 * MIB, fails)
    assert world.broker.alive
    assert world.broker.record.disks["disk0"].disk.size_bytes == MIB
    assert world.broker.record.disks["disk0"].grows_to == 0


@pytest.mark.parametrize("why", ["lent", "dead", "shut", "none"])
async def test_not_while_its_disks_are_elsewhere(why: str, world: World) -> None:
    if why == "lent":
        world.broker.record.lenders = {"host2": "boot"}
        world.reason = "its I/O goes through host2"
    elif why == "dead":
        world.broker.alive = False
    elif why == "shut":
        world.brokers._shut.add("web")
    else:
        world.brokers._brokers.clear()
    with pytest.raises(Refused, match="disk0 of web cannot grow now: its ") as caught:
        await world.brokers.grow("web", DISK, 2 * MIB, world.enlarge)
    assert ("host2" in caught.value.message) == (why == "lent")
    assert world.broker.steps == []


async def test_a_daemon_that_was_at_work_is_not_taken_for_frozen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did not answer while it took a snapshot; it does when that is over."""
    monkeypatch.setattr(room, "HEARTBEAT_S", 0.01)
    world.broker.silent = 1
    async with world.brokers._lock("web"):
        watching = asyncio.create_task(
            world.brokers._until_lost("web", world.broker)  # type: ignore[arg-type]
        )
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.1)
    assert world.broker.steps == []
    world.broker.silent = 2  # now it is
    await asyncio.wait_for(watching, timeout=5)
    assert world.broker.steps == ["ended"]


async def test_a_daemon_that_the_guard_froze_is_left_to_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "HEARTBEAT_S", 0.01)
    world.desk.guard.frozen["web"] = "not renewed"
    world.broker.silent = 1000
    watching = asyncio.create_task(
        world.brokers._until_lost("web", world.broker)  # type: ignore[arg-type]
    )
    await asyncio.sleep(0.1)
    assert world.broker.steps == []
    world.desk.guard.frozen.clear()
    await asyncio.wait_for(watching, timeout=5)
    assert world.broker.steps == ["ended"]


async def test_a_vhdx_is_looked_at_before_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A VM starts, or gets a disk: whoever had the image open before may have died with a host."""
    world = World(monkeypatch)
    opened: dict[str, bool] = {}

    async def start(*_place: Any, opening: dict[str, Opening], **_more: Any) -> FakeBroker:
        opened.update({disk: one.after_crash for disk, one in opening.items()})
        return world.broker

    async def add(disk: BrokerDisk, opening: Opening) -> None:
        opened[disk.id] = opening.after_crash

    place = SimpleNamespace(run=tmp_path / "run", state=tmp_path / "state")
    monkeypatch.setattr(room, "broker_place", lambda _desk, _vm: place)
    monkeypatch.setattr(room.Broker, "start", start)
    monkeypatch.setattr(world.brokers, "_disk", broker_disks.broker_disk)
    listen = SimpleNamespace(listen=lambda _vm: None, path=lambda _vm: tmp_path / "sock")
    monkeypatch.setattr(world.brokers, "_sockets", listen)
    world.broker.add_disk = add  # type: ignore[attr-defined]
    vhd = DISK.but(id="disk1", format="vhd", serial="GW1", lun=1)
    vm = SimpleNamespace(name="new", disks=(DISK, vhd))

    await world.brokers.start(vm, epoch=4)  # type: ignore[arg-type]
    assert list(opened.values()) == [True, False]
    opened.clear()
    for disk in (DISK.but(id="disk2"), vhd.but(id="disk3")):
        await world.brokers.add(vm, disk, epoch=4)  # type: ignore[arg-type]
    assert list(opened.values()) == [True, False]
