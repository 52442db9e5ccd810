"""Brokers on real storage daemons: nothing lost, nothing swallowed, nobody writes twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from tests.system.storage.broker.rig import (
    NOBODY,
    PROGRAM,
    Connect,
    IoFailed,
    Load,
    Start,
    is_clean,
    make_image,
    verify,
)

from godwit.host.cgroup import open_cgroup
from godwit.host.errors import ProcessGone
from godwit.host.process import freeze, is_alive, kill
from godwit.model.errors import Conflict, OperationFailed, OutcomeUnknown, Refused
from godwit.model.vm import DiskFormat
from godwit.storage import nodes
from godwit.storage.broker import Broker, Opening, listen
from godwit.storage.broker_daemon import DaemonPlace
from godwit.storage.broker_record import load_broker
from godwit.storage.gate import GateState
from godwit.storage.nodes import BrokerDisk
from godwit.storage.settle import settle

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(PROGRAM is None, reason="qemu-storage-daemon is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
SIZE = 64 << 20
FORMATS = get_args(DiskFormat)
EIO = "Input/output error"


async def _fails(doing: Awaitable[object]) -> None:
    with pytest.raises(IoFailed, match=EIO):
        await doing


@pytest.mark.parametrize("image", FORMATS)
async def test_a_gate_opens_closes_and_opens_again(
    image: str, root: Path, start: Start, connect: Connect
) -> None:
    disk = make_image(root, image, size=SIZE, owner=NOBODY)
    broker = await start(disk)
    client = await connect(disk)
    for offset in (0, SIZE - 4096):
        await _fails(client.write(1, offset))
        await _fails(client.check(0, offset))
    await _fails(client.do("write -z 0 64k"))

    await broker.acquire("disk0", epoch=1)
    await client.write(11, 0)
    await client.write(12, SIZE - 4096)
    await client.check(11, 0)

    await broker.release("disk0")
    verify(disk, {0: 11, SIZE - 4096: 12})  # closed: its lock is free, all of it is there
    assert is_clean(disk)
    await _fails(client.write(13, 0))
    await _fails(client.check(11, 0))
    with pytest.raises(Refused, match="epoch 0 is over"):
        await broker.acquire("disk0", epoch=0)

    await broker.acquire("disk0", epoch=2)
    await client.check(11, 0)
    await client.check(12, SIZE - 4096)
    await client.write(14, 1 << 20)
    await client.do("flush")
    await broker.release("disk0")
    verify(disk, {0: 11, 1 << 20: 14, SIZE - 4096: 12})
    assert is_clean(disk)


@pytest.mark.parametrize("image", FORMATS)
async def test_a_broker_killed_under_load_loses_nothing(
    image: str, root: Path, start: Start, connect: Connect
) -> None:
    disk = make_image(root, image, size=SIZE, owner=NOBODY)
    broker = await start(disk, disk0=Opening(1))
    load = Load(await connect(disk), spread=SIZE // 4096)
    restarts = []

    async def three_deaths() -> None:
        for _ in range(3):
            kill(broker.record.process)
            await broker.ended()
            assert broker.gate("disk0").state is GateState.CLOSED
            assert broker.gate("disk0").unsettled
            begun = time.monotonic()
            await broker.restart({"disk0": Opening(1)})
            restarts.append(time.monotonic() - begun)
            assert broker.gate("disk0").state is GateState.OPEN
            assert not broker.gate("disk0").unsettled
            await asyncio.sleep(0.3)

    await load.during(three_deaths())
    assert len(load.written) > 50
    for offset, pattern in load.written.items():
        await load.client.check(pattern, offset)
    await broker.release("disk0")
    verify(disk, load.written)
    assert is_clean(disk, leaks=True)
    print(
        f"\n{image}: {len(load.written)} records over 3 deaths, longest write "
        f"{load.longest_s * 1000:.0f} ms, restart {statistics.median(restarts) * 1000:.0f} ms"
    )


async def test_qcow2_without_write_through_would_lose_what_was_acknowledged(
    root: Path, start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why `nodes.export` writes qcow2 through: its new mappings die with the daemon."""
    monkeypatch.setattr(nodes, "_WRITE_THROUGH", frozenset())
    disk = make_image(root, "qcow2", size=SIZE, owner=NOBODY)
    broker = await start(disk, disk0=Opening(1))
    client = await connect(disk)
    await client.write(5, 0)
    kill(broker.record.process)
    await broker.ended()
    await broker.restart({"disk0": Opening(1)})
    await client.do("flush")  # the guest is told: all of it is safe
    with pytest.raises(IoFailed, match="verification failed"):
        await client.check(5, 0)


async def test_gates_are_closed_after_a_restart_unless_told_otherwise(
    disk: BrokerDisk, start: Start, connect: Connect
) -> None:
    broker = await start(disk, disk0=Opening(4))
    client = await connect(disk)
    await client.write(1, 0)
    await broker.kill()
    with pytest.raises(Refused, match="epoch 3 is over"):
        await broker.restart({"disk0": Opening(3)})
    await broker.restart()
    await _fails(client.check(1, 0))
    await broker.acquire("disk0", epoch=5)
    await client.check(1, 0)


async def test_a_frozen_broker_is_killed_and_its_exit_awaited(
    disk: BrokerDisk, start: Start, connect: Connect
) -> None:
    broker = await start(disk, disk0=Opening(1))
    client = await connect(disk)
    await client.write(1, 0)
    old = broker.record.process
    freeze(old)
    waiting = asyncio.create_task(client.write(2, 4096), name="write")
    with pytest.raises(OutcomeUnknown, match="went silent"):
        await broker.release("disk0", timeout=0.3)
    assert broker.gate("disk0").state is GateState.UNKNOWN
    with pytest.raises(Conflict, match="the gate is unknown"):
        await broker.acquire("disk0", epoch=2)

    begun = time.monotonic()
    released = await broker.release_all(timeout=0.3)
    print(f"\na frozen broker was gone after {(time.monotonic() - begun) * 1000:.0f} ms")
    assert released.how == "killed"
    assert not is_alive(old)
    assert broker.gate("disk0").state is GateState.CLOSED
    verify(disk, {0: 1})  # nobody holds its lock
    assert not waiting.done()

    await broker.restart({"disk0": Opening(2)})
    await asyncio.wait_for(waiting, 20)
    await client.check(2, 4096)


async def test_release_all_closes_in_order_when_the_broker_answers(
    root: Path, start: Start, connect: Connect
) -> None:
    first = make_image(root, "vhd", size=SIZE, owner=NOBODY)
    second = make_image(root, "vhdx", size=SIZE, owner=NOBODY).but(id="disk1")
    broker = await start(first, second, disk0=Opening(1), disk1=Opening(1))
    clients = [await connect(first), await connect(second)]
    for client in clients:
        await client.write(9, 0)
    assert (await broker.release_all()).how == "closed"
    assert (await broker.release_all()).how == "closed"
    verify(first, {0: 9})
    verify(second, {0: 9})
    assert broker.alive


@pytest.mark.parametrize("image", FORMATS)
async def test_release_and_acquire_take_milliseconds(
    image: str, root: Path, start: Start, connect: Connect
) -> None:
    disk = make_image(root, image, size=SIZE, owner=NOBODY)
    broker = await start(disk, disk0=Opening(1))
    client = await connect(disk)
    released, acquired = [], []
    for turn in range(20):
        await client.write(turn + 1, turn * 4096)
        begun = time.monotonic()
        await broker.release("disk0")
        between = time.monotonic()
        await broker.acquire("disk0", epoch=1)
        released.append(between - begun)
        acquired.append(time.monotonic() - between)
    for turn in range(20):
        await client.check(turn + 1, turn * 4096)
    print(
        f"\n{image}: release {statistics.median(released) * 1000:.1f} ms "
        f"(worst {max(released) * 1000:.1f}), acquire {statistics.median(acquired) * 1000:.1f} ms "
        f"(worst {max(acquired) * 1000:.1f})"
    )


async def test_an_image_that_another_broker_has_is_not_opened(
    disk: BrokerDisk, place: DaemonPlace, root: Path, start: Start, connect: Connect
) -> None:
    source = await start(disk, disk0=Opening(1))
    there = replace(place, host="h2", run=root / "r2", state=root / "s2")
    destination = await start(disk, place=there)
    here, yonder = await connect(disk), await connect(disk, host="h2")
    await here.write(1, 0)
    with pytest.raises(Conflict, match="in use by another process"):
        await destination.acquire("disk0", epoch=2)
    assert destination.gate("disk0").state is GateState.CLOSED
    await source.release("disk0")
    await destination.acquire("disk0", epoch=2)
    await yonder.check(1, 0)
    await yonder.write(2, 4096)
    await _fails(here.write(3, 0))
    # The late way back.
    await destination.release("disk0")
    await source.acquire("disk0", epoch=3)
    await here.check(2, 4096)


async def test_an_image_of_another_size_is_not_served(
    disk: BrokerDisk, start: Start, connect: Connect
) -> None:
    wrong = disk.but(size_bytes=SIZE // 2)
    broker = await start(wrong)
    client = await connect(wrong)
    with pytest.raises(OperationFailed, match=r"holds 67108864 bytes, the record says 33554432"):
        await broker.acquire("disk0", epoch=1)
    assert broker.gate("disk0").state is GateState.CLOSED
    await _fails(client.write(1, 0))
    verify(disk, {0: 0})
    with pytest.raises(OperationFailed, match="the record says"):
        await broker.restart({"disk0": Opening(1)})
    assert not broker.alive


async def test_an_image_that_is_not_there_says_so(root: Path, start: Start) -> None:
    disk = BrokerDisk(id="disk0", path=str(root / "none"), format="vhdx", size_bytes=SIZE)
    broker = await start(disk)
    with pytest.raises(OperationFailed, match="No such file"):
        await broker.acquire("disk0", epoch=1)
    assert broker.gate("disk0").state is GateState.CLOSED
    with pytest.raises(OperationFailed, match=r"did not come up.*No such file"):
        await broker.restart({"disk0": Opening(1)})


async def test_an_agent_that_restarts_adopts(
    disk: BrokerDisk, place: DaemonPlace, start: Start, connect: Connect
) -> None:
    before = await start(disk, disk0=Opening(3))
    client = await connect(disk)
    await client.write(1, 0)
    await before.close()
    record = load_broker(place.run)
    assert record is not None
    broker = await Broker.adopt(place, record)
    assert broker.gate("disk0").state is GateState.OPEN
    assert broker.record.process == before.record.process
    await client.write(2, 4096)
    with pytest.raises(Refused):
        await broker.acquire("disk0", epoch=2)
    await broker.release("disk0")
    verify(disk, {0: 1, 4096: 2})
    await broker.close()


async def test_a_gate_that_was_on_its_way_is_closed_by_the_next_agent(
    disk: BrokerDisk, place: DaemonPlace, start: Start, connect: Connect
) -> None:
    before = await start(disk, disk0=Opening(3))
    client = await connect(disk)
    await client.write(1, 0)
    await before.close()
    record = load_broker(place.run)
    assert record is not None
    served = record.disks["disk0"]
    cut = served.but(gate=served.gate.but(state=GateState.CLOSING))
    broker = await Broker.adopt(place, record.but(disks={"disk0": cut}))
    assert broker.gate("disk0").state is GateState.CLOSED
    await _fails(client.write(2, 0))
    verify(disk, {0: 1})
    await broker.close()


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "start cut short"])
async def test_revive_ends_what_the_record_stands_for(
    recorded: bool, disk: BrokerDisk, place: DaemonPlace, start: Start, connect: Connect, root: Path
) -> None:
    before = await start(disk, disk0=Opening(3))
    client = await connect(disk)
    await client.write(1, 0)
    await before.close()
    record = load_broker(place.run)
    assert record is not None
    orphan = record.process
    if not recorded:
        record = record.but(pid=0, start_time=0)
    with contextlib.ExitStack() as stack:
        # The path is bound anew here: the agent's own death had closed the old socket.
        (root / "h1.sock").unlink()
        listener = stack.enter_context(listen(root / "h1.sock"))
        broker = await Broker.revive(
            place, record, listener=listener, opening={"disk0": Opening(4)}
        )
        assert not is_alive(orphan)
        await client.check(1, 0)
        await client.write(2, 4096)
        await broker.release("disk0")
        verify(disk, {0: 1, 4096: 2})
        await broker.kill()
    with pytest.raises(ProcessGone):
        await Broker.adopt(place, record.but(pid=orphan.pid, start_time=orphan.start_time))


async def test_disks_come_and_go(root: Path, start: Start, connect: Connect) -> None:
    broker = await start()
    disk = make_image(root, "qcow2", size=SIZE, owner=NOBODY)
    for turn in (1, 2):
        await broker.add_disk(disk, Opening(turn))
        with pytest.raises(Conflict, match="already"):
            await broker.add_disk(disk)
        client = await connect(disk)
        await client.write(turn, 0)
        with pytest.raises(Conflict, match="in use"):
            await broker.remove_disk("disk0")
        await client.check(turn, 0)
        await client.close()
        await broker.remove_disk("disk0")
        verify(disk, {0: turn})
        assert is_clean(disk)
    await broker.add_disk(disk, Opening(3))
    await connect(disk)
    await broker.remove_disk("disk0", force=True)
    assert "disk0" not in broker.record.disks
    verify(disk, {0: 2})


async def test_sixty_four_disks(root: Path, start: Start) -> None:
    broker = await start()
    first = make_image(root, "vhdx", size=SIZE, owner=NOBODY)
    disks = []
    for n in range(64):
        path = root / f"d{n}.vhdx"
        shutil.copy(first.path, path)
        os.chown(path, *NOBODY)
        disks.append(first.but(id=f"disk{n}", path=str(path)))
    begun = time.monotonic()
    for disk in disks:
        await broker.add_disk(disk, Opening(1))
    added = time.monotonic()
    assert (await broker.release_all()).how == "closed"
    released = time.monotonic()
    opened = await broker.while_it_answers(*(broker.acquire(disk.id, epoch=2) for disk in disks))
    assert opened == (True, [None] * len(disks))
    print(
        f"\n64 VHDX: added in {added - begun:.2f} s, released in {released - added:.2f} s, "
        f"acquired in {time.monotonic() - released:.2f} s"
    )


async def test_a_cancel_in_the_dark_leaves_nobody_waiting(root: Path, start: Start) -> None:
    """More disks than have their turn at once: what was asked is unknown, the rest untouched."""
    first = make_image(root, "raw", size=SIZE, owner=NOBODY)
    disks = [first]
    for n in range(1, 8):
        path = root / f"d{n}.raw"
        shutil.copy(first.path, path)
        os.chown(path, *NOBODY)
        disks.append(first.but(id=f"disk{n}", path=str(path)))
    broker = await start(*disks)
    opening = asyncio.ensure_future(
        broker.while_it_answers(*(broker.acquire(disk.id, epoch=1) for disk in disks))
    )
    while broker.gate(disks[0].id).state is GateState.CLOSED:  # noqa: ASYNC110 - between its steps
        await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait({opening})
    assert opening.cancelled()
    await asyncio.sleep(0)
    states = {broker.gate(disk.id).state for disk in disks}
    assert states == {GateState.UNKNOWN, GateState.CLOSED}
    assert (await broker.release_all()).how == "killed", "only the end of the daemon leads on"


async def test_the_daemon_is_nobody_in_a_group_of_its_own(
    disk: BrokerDisk, place: DaemonPlace, start: Start
) -> None:
    group = f"godwit-test-{os.getpid()}/broker"
    try:
        broker = await start(disk, place=replace(place, cgroup=group))
        pid = broker.record.pid
        assert pid in open_cgroup(group).pids()
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Uid:\t65534\t65534" in status
        assert "CapEff:\t0000000000000000" in status
        assert Path(f"/proc/{pid}/environ").read_bytes().count(b"\0") <= 2
        await broker.kill()
        broker.discard()
        assert not open_cgroup(group).exists()
    finally:
        for folder in Path("/sys/fs/cgroup").glob(f"**/godwit-test-{os.getpid()}"):
            folder.rmdir()


async def test_a_start_that_fails_leaves_nothing(
    disk: BrokerDisk, place: DaemonPlace, root: Path
) -> None:
    with listen(root / "x.sock") as listener:
        opening = {"disk0": Opening(1)}
        wrong = disk.but(path="/nowhere/x")
        with pytest.raises(OperationFailed, match="No such file"):
            await Broker.start(
                place,
                "web",
                socket=root / "x.sock",
                listener=listener,
                disks=[wrong],
                opening=opening,
            )
    assert load_broker(place.run) is None


async def test_qemu_takes_a_disk_whose_gate_is_closed(
    disk: BrokerDisk, start: Start, root: Path
) -> None:
    """A move's destination: its reads fail while its gate is closed, and it must start even so."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    broker = await start(disk)
    name = nodes.export_name("web", disk.id)
    node = nodes.client_node("disk-disk0", socket=root / "h1.sock", export=name)
    words = ["-machine", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none", "-S"]
    words += ["-blockdev", json.dumps(node), "-device", "virtio-scsi-pci,id=scsi0"]
    words += ["-device", "scsi-hd,bus=scsi0.0,drive=disk-disk0,werror=stop,rerror=stop"]
    words += ["-monitor", "stdio", "-only-migratable"]
    done = await asyncio.to_thread(
        subprocess.run,
        [program, *words],
        input="info block\nquit\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "disk-disk0" in done.stdout
    assert broker.gate("disk0").state is GateState.CLOSED


async def test_settle_says_when_it_cannot(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"x")
    await settle(str(file))
    with pytest.raises(OperationFailed, match="failed") as failure:
        await settle(str(tmp_path / "none"))
    assert "path to the storage" in failure.value.hint
    with pytest.raises(OperationFailed, match="longer than 0 s"):
        await settle(str(file), timeout=0)
