"""The next daemon stands ready while one serves: it opens nothing early, and is gone with us."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.system.storage.broker.rig import PROGRAM, Connect, Load, Start, is_clean, verify

from godwit.host.process import Process, identify, is_alive, kill, wait_exit
from godwit.model.errors import OperationFailed
from godwit.storage.broker import Broker, Opening
from godwit.storage.broker_daemon import DaemonPlace
from godwit.storage.broker_standby import MONITOR
from godwit.storage.gate import GateState
from godwit.storage.nodes import BrokerDisk

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(PROGRAM is None, reason="qemu-storage-daemon is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
TURNS = 5
DAEMON_S = 5.0
# A latch held by a process of its own; it tells the number of the daemon that waits there.
HOLDER = """
import asyncio, os, subprocess, sys, json
from godwit.storage.latch import Latch
latch = Latch()
image = {"driver": "raw", "node-name": "img", "file": {"driver": "file", "filename": sys.argv[2]}}
argv = [sys.argv[1], "--blockdev", json.dumps(latch.node()), "--blockdev", json.dumps(image)]
child = subprocess.Popen(argv, pass_fds=[latch.theirs.fileno()], stderr=subprocess.DEVNULL)
latch.theirs.close()
async def main():
    await latch.reached()
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def _opened(process: Process, disk: BrokerDisk) -> bool:
    """Whether the process has the image open."""
    folder = Path(f"/proc/{process.pid}/fd")
    return any(os.readlink(one) == disk.path for one in folder.iterdir())  # noqa: PTH115


async def test_the_next_daemon_waits_and_takes_over(
    disk: BrokerDisk, start: Start, connect: Connect
) -> None:
    broker = await start(disk, disk0=Opening(1))
    load = Load(await connect(disk), spread=1024)
    took: dict[bool, list[float]] = {True: [], False: []}

    async def turns() -> None:
        for turn in range(2 * TURNS):
            ready = turn % 2 == 0
            if ready:
                await broker.prepare({"disk0": Opening(1)})
                assert broker._ready is not None
                waiting = broker._ready.standby.process
                assert is_alive(waiting)
                assert not _opened(waiting, disk)
                assert _opened(broker.record.process, disk)
            await broker.kill()
            begun = time.monotonic()
            await broker.restart({"disk0": Opening(1)})
            took[ready].append(time.monotonic() - begun)
            if ready:
                assert broker.record.process == waiting
            assert broker.gate("disk0").state is GateState.OPEN
            await asyncio.sleep(0.1)

    await load.during(turns())
    assert len(load.written) > 20
    await broker.release("disk0")
    verify(disk, load.written)
    assert is_clean(disk)
    ready_ms, cold_ms = (statistics.median(took[one]) * 1e3 for one in (True, False))
    print(f"\nanother daemon serves: ready {ready_ms:.0f} ms, cold {cold_ms:.0f} ms")


async def test_a_daemon_that_was_made_for_something_else_is_sent_away(
    disk: BrokerDisk, place: DaemonPlace, start: Start, connect: Connect
) -> None:
    broker = await start(disk, disk0=Opening(1))
    client = await connect(disk)
    await client.write(1, 0)
    await broker.prepare({"disk0": Opening(1)})
    assert broker._ready is not None
    waiting = broker._ready.standby.process
    await broker.restart({"disk0": Opening(2)})
    assert broker.record.process != waiting
    assert not is_alive(waiting)
    await client.check(1, 0)
    await broker.prepare({"disk0": Opening(2)})
    await broker.dismiss()
    assert not (place.run / MONITOR).exists()
    await client.check(1, 0)  # the one that serves never noticed


async def test_one_that_died_while_it_waited_is_replaced(
    disk: BrokerDisk, start: Start, connect: Connect
) -> None:
    broker = await start(disk, disk0=Opening(1))
    client = await connect(disk)
    await client.write(1, 0)
    await broker.prepare({"disk0": Opening(1)})
    assert broker._ready is not None
    waiting = broker._ready.standby.process
    kill(waiting)
    await wait_exit(waiting)
    await broker.restart({"disk0": Opening(1)})
    await client.check(1, 0)


async def test_an_image_that_is_gone_by_then_is_told_and_nothing_is_left(
    disk: BrokerDisk, start: Start
) -> None:
    broker = await start(disk, disk0=Opening(1))
    await broker.prepare({"disk0": Opening(1)})
    assert broker._ready is not None
    waiting = broker._ready.standby.process
    await broker.kill()
    away = Path(disk.path).rename(f"{disk.path}.away")
    # Killed with its image open: it is synced first, which meets the same fate.
    with pytest.raises(OperationFailed):
        await broker.restart({"disk0": Opening(1)})
    away.rename(disk.path)
    await broker.dismiss()
    assert not is_alive(waiting)
    await broker.restart({"disk0": Opening(1)})
    assert broker.gate("disk0").state is GateState.OPEN


async def test_a_daemon_at_its_latch_ends_with_whoever_holds_it(disk: BrokerDisk) -> None:
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, str(PROGRAM), disk.path), stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    waiting = identify(int(await holder.stdout.readline()))
    assert waiting is not None
    assert not _opened(waiting, disk)
    holder.kill()
    await holder.communicate()
    async with asyncio.timeout(DAEMON_S):
        await wait_exit(waiting)


async def test_an_agent_that_ends_leaves_no_daemon_at_its_latch(
    disk: BrokerDisk, place: DaemonPlace, start: Start, connect: Connect
) -> None:
    broker = await start(disk, disk0=Opening(1))
    client = await connect(disk)
    await broker.prepare({"disk0": Opening(1)})
    assert broker._ready is not None
    waiting = broker._ready.standby.process
    await broker.close()
    assert not is_alive(waiting)
    await client.write(1, 0)
    adopted = await Broker.adopt(place, broker.record)
    assert adopted.gate("disk0").state is GateState.OPEN
    await adopted.close()
