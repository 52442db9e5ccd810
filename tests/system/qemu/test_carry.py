"""A disk goes along from one real QEMU to another, over NBD, while its guest writes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from godwit.host.run import run_async
from godwit.model.errors import OperationFailed
from godwit.model.vm import Vm
from godwit.qemu.carry import Sender, offer, withdraw
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place
from godwit.storage.images import create_image

from .test_hotplug import _move, _nodes, _writing_guest
from .test_mirror import NOBODY, SIZE, _goes_on, _writes

pytestmark = pytest.mark.system


@pytest.fixture
async def pair(
    make_vm: Callable[..., Vm],
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    wait_for_console: Callable[[Machine, str], Awaitable[None]],
    root: Path,
) -> tuple[Machine, Machine, Vm, Vm]:
    """A machine that writes, and one that waits with an empty image; both know the same disk."""
    vm = make_vm(disks=1, kernel=False)
    Path(vm.disks[0].path).write_bytes(_writing_guest().ljust(SIZE, b"\1"))
    (root / "there").mkdir()
    path = root / "there" / "disk0.qcow2"
    await create_image(path, format="qcow2", size_bytes=SIZE, owner=NOBODY)
    there = vm.but(disks=(vm.disks[0].but(path=str(path), format="qcow2"),))
    source = await start(vm, make_place("h1"))
    await source.cont()
    await wait_for_console(source, "www")
    target = await start(there, make_place("h2"), incoming=True)
    return source, target, vm, there


async def test_it_is_whole_on_the_other_side(pair: tuple[Machine, Machine, Vm, Vm]) -> None:
    source, target, vm, there = pair
    nodes, heard = await _nodes(source), list[tuple[int, int]]()
    port = await offer(target, there.disks, address="127.0.0.1")
    sender = Sender(source, vm.disks)
    await sender.copy(
        "127.0.0.1", port, tls_hostname="", heard=lambda done, of: heard.append((done, of))
    )
    assert heard[-1][0] >= SIZE
    assert (await source.query_migrate()).get("blocked-reasons", []) == []
    await source.stop()
    await sender.settle()
    assert await _nodes(source) == nodes, "nothing of it is left"
    assert await _move(source, target) == "completed"
    await withdraw(target)
    await source.kill()
    words = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", "-U"]
    await run_async([*words, vm.disks[0].path, there.disks[0].path], timeout=20)
    before = await _writes(target)
    await target.cont()
    await _goes_on(target, before)
    await target.kill()
    await run_async(["qemu-img", "check", "-q", there.disks[0].path], timeout=20)


async def test_it_is_called_off(pair: tuple[Machine, Machine, Vm, Vm]) -> None:
    source, target, vm, there = pair
    nodes = await _nodes(source)
    sender = Sender(source, vm.disks)
    port = await offer(target, there.disks, address="127.0.0.1")
    await sender.copy("127.0.0.1", port, tls_hostname="", heard=lambda _done, _of: None)
    await sender.drop()
    await sender.drop()
    assert await _nodes(source) == nodes
    assert await source.monitor.execute("query-jobs") == []
    await _goes_on(source, await _writes(source))
    await withdraw(target)
    await withdraw(target)


async def test_the_other_side_dies(pair: tuple[Machine, Machine, Vm, Vm]) -> None:
    source, target, vm, there = pair
    nodes = await _nodes(source)
    sender = Sender(source, vm.disks)
    port = await offer(target, there.disks, address="127.0.0.1")
    await sender.copy("127.0.0.1", port, tls_hostname="", heard=lambda _done, _of: None)
    await target.kill()
    await source.stop()
    with pytest.raises(OperationFailed, match="cannot be copied"):
        await sender.settle()
    await sender.drop()
    await source.cont()
    assert await _nodes(source) == nodes
    await _goes_on(source, await _writes(source))
