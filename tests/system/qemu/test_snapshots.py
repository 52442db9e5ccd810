"""Snapshots in the images of a real QEMU that runs: all disks or none, and it still moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent.checkpoints import Checkpoints
from godwit.host.run import run_async
from godwit.model.errors import Conflict, OperationFailed, Refused
from godwit.model.vm import Disk, DiskFormat, Vm
from godwit.qemu import hotplug
from godwit.qemu import snapshots as live
from godwit.qemu.launch import Binary
from godwit.qemu.layout import broker_id
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place
from godwit.storage.broker import Broker, Opening, listen
from godwit.storage.broker_daemon import DaemonPlace
from godwit.storage.images import create_image
from godwit.storage.nodes import BrokerDisk

pytestmark = pytest.mark.system

SIZE = 4 << 20
NOBODY = (65534, 65534)
MakeDisk = Callable[..., Awaitable[Disk]]


@pytest.fixture
def make_disk(root: Path) -> MakeDisk:
    """Images of QEMU's user, with their records."""

    async def make(n: int, kind: DiskFormat) -> Disk:
        path = root / f"hot{n}.{kind}"
        await create_image(path, format=kind, size_bytes=SIZE, owner=(65534, 65534))
        return Disk(
            id=f"hot{n}",
            volume="shared",
            path=str(path),
            size_bytes=SIZE,
            format=kind,
            serial=f"GWHOT{n}",
            lun=n,
        )

    return make


async def _move(source: Machine, target: Machine) -> str:
    for machine in (source, target):
        caps = [{"capability": name, "state": True} for name in ("events", "return-path")]
        await machine.monitor.execute("migrate-set-capabilities", {"capabilities": caps})
    await target.monitor.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    port = (await target.query_migrate())["socket-address"][0]["port"]
    with source.monitor.events("MIGRATION") as events:
        await source.monitor.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
        end = await events.wait(
            lambda event: event.data["status"] in ("completed", "failed"), timeout=30
        )
    return str(end.data["status"])


@pytest.fixture
async def running(
    make_vm: Callable[..., Vm],
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    make_disk: MakeDisk,
) -> tuple[Machine, list[Disk]]:
    """A VM that runs with two qcow2 disks."""
    disks = [await make_disk(1, "qcow2"), await make_disk(2, "qcow2")]
    machine = await start(make_vm(), make_place())
    await machine.cont()
    await hotplug.add_disks(machine, disks, make_place())
    return machine, disks


async def tags(machine: Machine, disks: list[Disk]) -> list[tuple[str, ...]]:
    return [one.tags for one in (await live.look(machine, disks)).values()]


async def test_all_disks_or_none(
    running: tuple[Machine, list[Disk]],
    make_place: Callable[..., Place],
    make_disk: MakeDisk,
) -> None:
    machine, disks = running
    await live.take(machine, disks, "godwit-a")
    assert await tags(machine, disks) == [("godwit-a",), ("godwit-a",)]
    raw = await make_disk(3, "raw")
    await hotplug.add_disk(machine, raw, make_place())
    with pytest.raises(OperationFailed, match="could not be held"):
        await live.take(machine, [*disks, raw], "godwit-b")
    assert await tags(machine, disks) == [("godwit-a",), ("godwit-a",)]
    await live.drop(machine, disks[0], "godwit-a")
    with pytest.raises(OperationFailed, match="could not be dropped"):
        await live.drop(machine, disks[0], "godwit-a")
    assert (await machine.status()).running
    with pytest.raises(OperationFailed, match="has no disk"):
        await live.look(machine, [raw.but(id="other")])


async def test_it_moves_with_them(
    running: tuple[Machine, list[Disk]],
    make_vm: Callable[..., Vm],
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
) -> None:
    machine, disks = running
    vm = make_vm().but(disks=tuple(disks))
    target = await start(vm, make_place("h2"), incoming=True)
    # The copy has its images open already; what it reads of them then must not count.
    await live.take(machine, disks, "godwit-late")
    assert await _move(machine, target) == "completed"
    await target.cont()
    assert await tags(target, disks) == [("godwit-late",), ("godwit-late",)]
    for disk in disks:
        await live.drop(target, disk, "godwit-late")


def desk(machine: Machine, **more: Any) -> Any:
    lock = asyncio.Lock()
    values: dict[str, Any] = {
        "moving": set(),
        "changing": set(),
        "lock": lambda _name: lock,
        "slot": lambda _name: SimpleNamespace(machine=machine),
        "slots": {"web": machine},
        "catalog": SimpleNamespace(files=lambda _volume: SimpleNamespace(node=lambda _path: None)),
    }
    return SimpleNamespace(**(values | more))


async def _mine(_slot: Any) -> None:
    """This host owns it."""


async def test_asked_twice_and_after_what_was_cut_short(
    running: tuple[Machine, list[Disk]],
) -> None:
    machine, disks = running
    power: Any = SimpleNamespace(mine=_mine)
    files: Any = SimpleNamespace(disk_path=lambda disk: Path(disk.path))
    room = Checkpoints(desk(machine), power, files)
    await live.take(machine, disks, "godwit-left")
    await live.take(machine, disks[:1], "godwit-one")  # by hand, of one disk alone
    for _ in range(2):
        await room.take("web", disks, "godwit-one", ["godwit-kept"])
        assert await tags(machine, disks) == [("godwit-one",), ("godwit-one",)]
    for _ in range(2):
        await room.drop("web", disks, "godwit-one")
        assert await tags(machine, disks) == [(), ()]
    with pytest.raises(Refused, match="runs here"):
        await room.revert("web", disks, "godwit-one")
    moving = Checkpoints(desk(machine, moving={"web"}), power, files)
    with pytest.raises(Conflict, match="being moved"):
        await moving.take("web", disks, "godwit-one", [])


async def _served(root: Path, socket: Path, disks: list[Disk], listener: Any) -> Broker:
    served = [
        BrokerDisk(id=broker_id(one), path=one.path, format="qcow2", size_bytes=SIZE)
        for one in disks
    ]
    return await Broker.start(
        DaemonPlace("h1", root / "b", root / "b", Binary("qemu-storage-daemon", user=NOBODY)),
        "web",
        socket=socket,
        listener=listener,
        disks=served,
        opening={one.id: Opening(epoch=1) for one in served},
    )


async def test_direct_and_brokered_disks_at_one_instant(
    make_vm: Callable[..., Vm],
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    make_disk: MakeDisk,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    socket, direct = root / "nbd.sock", [await make_disk(1, "qcow2")]
    brokered = [(await make_disk(n, "qcow2")).but(tier="brokered") for n in (2, 3)]
    disks, place = [*direct, *brokered], make_place(broker=str(socket))
    names = [broker_id(one) for one in brokered]
    with listen(socket, user=NOBODY) as listener:
        broker = await _served(root, socket, brokered, listener)
        try:
            machine = await start(make_vm(), place)
            await machine.cont()
            await hotplug.add_disks(machine, disks, place)
            room = _room(machine, broker)
            held: list[str] = []
            _watch(monkeypatch, machine, broker, held)

            async def all_tags() -> list[tuple[str, ...]]:
                there = await broker.held(names)
                return [*await tags(machine, direct), *(one.tags for one in there.values())]

            await broker.take_snapshots(names[:1], "godwit-left")  # cut short
            held.clear()
            for _ in range(2):
                await room.take("web", disks, "godwit-one", ["godwit-kept"])
                assert await all_tags() == [("godwit-one",)] * 3
            assert held == ["broker paused", "qemu paused"], "once, with the VM standing still"
            assert (await machine.status()).running
            await live.take(machine, direct, "godwit-two")
            with pytest.raises(OperationFailed, match="could not be held"):
                await _past_the_look(room, machine, disks)
            assert (await all_tags())[1:] == [("godwit-one",)] * 2, "all or none"
            assert (await machine.status()).running
            await live.drop(machine, direct[0], "godwit-two")
            await room.drop("web", disks, "godwit-one")
            assert await all_tags() == [()] * 3
            await machine.quit()
        finally:
            await broker.release_all()
            await broker.kill()
            broker.discard()
    for one in disks:
        await run_async(["qemu-img", "check", "-q", "-f", "qcow2", one.path], timeout=20)


def _room(machine: Machine, broker: Broker) -> Checkpoints:
    @asynccontextmanager
    async def at_home(_vm: str, _what: str) -> AsyncIterator[Broker]:
        yield broker

    power: Any = SimpleNamespace(mine=_mine)
    files: Any = SimpleNamespace(disk_path=lambda disk: Path(disk.path))
    slot = SimpleNamespace(machine=machine, vm=SimpleNamespace(name="web"))
    brokers = SimpleNamespace(at_home=at_home)
    more = {"brokers": brokers, "standing": set(), "slot": lambda _name: slot}
    return Checkpoints(desk(machine, **more), power, files)


def _watch(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, broker: Broker, held: list[str]
) -> None:
    """Notes who took snapshots, and what the VM did meanwhile."""
    of_broker, of_qemu = broker.take_snapshots, live.take

    async def broker_takes(names: Any, tag: str) -> None:
        held.append(f"broker {(await machine.status()).status}")
        await of_broker(names, tag)

    async def qemu_takes(one: Machine, disks: Any, tag: str) -> None:
        held.append(f"qemu {(await machine.status()).status}")
        await of_qemu(one, disks, tag)

    monkeypatch.setattr(broker, "take_snapshots", broker_takes)
    monkeypatch.setattr(live, "take", qemu_takes)


async def _past_the_look(room: Checkpoints, machine: Machine, disks: list[Disk]) -> None:
    """As `take`, past the look that would have dropped the one that is in the way."""
    slot: Any = SimpleNamespace(machine=machine, vm=SimpleNamespace(name="web"))
    async with room._images(slot, disks) as images:
        await images.take("godwit-two")


def test_a_guest_is_not_held_for_long() -> None:
    images = {"disk0": live.Held((), live.LIVE_LIMIT // 2), "disk1": live.Held((), 0)}
    live.check_wait("web", images)
    images["disk1"] = live.Held((), live.LIVE_LIMIT)
    with pytest.raises(Refused, match="would stand still for 4 s"):
        live.check_wait("web", images)
