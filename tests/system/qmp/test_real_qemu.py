"""The monitor session against a real QEMU and a real qemu-storage-daemon."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from godwit.qmp import Monitor, MonitorLost, MonitorTimeout, QmpError

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed"),
]


class Started:
    """A QEMU with two monitors, `a` and `b`."""

    def __init__(self, directory: Path, *machine: str) -> None:
        self.a, self.b = directory / "a", directory / "b"
        monitors = [
            argument
            for path in (self.a, self.b)
            for argument in ("-qmp", f"unix:{path},server=on,wait=off")
        ]
        self.process = subprocess.Popen(
            [str(QEMU), *machine, "-nodefaults", "-display", "none", "-S", *monitors]
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Started]:
    started = Started(tmp_path, "-machine", "none")
    yield started
    started.stop()


@pytest.fixture
async def monitor(qemu: Started) -> AsyncIterator[Monitor]:
    async with await Monitor.connect(qemu.a, name="a", deadline=10) as monitor:
        yield monitor


async def test_commands_events_and_both_clocks(tmp_path: Path) -> None:
    started = Started(tmp_path, "-machine", "q35,accel=tcg", "-m", "64M", "-vga", "none")
    try:
        async with await Monitor.connect(started.a, name="a", deadline=10) as monitor:
            assert monitor.oob
            assert monitor.version >= (7, 2, 0)
            stream = monitor.events("RESUME", "STOP")
            await monitor.execute("cont")
            await monitor.execute("stop")
            seen = [await stream.wait(timeout=2) for _ in range(2)]
            assert [event.name for event in seen] == ["RESUME", "STOP"]
            for event in seen:
                assert 0 <= event.arrived - event.timestamp < 0.5
            with pytest.raises(QmpError) as caught:
                await monitor.execute("device_del", {"id": "nothing"})
            assert caught.value.error_class == "DeviceNotFound"
    finally:
        started.stop()


async def test_two_monitors_are_independent(qemu: Started, monitor: Monitor) -> None:
    async with await Monitor.connect(qemu.b, name="b", deadline=10) as spare:
        assert spare.oob
        both = [each.events("SHUTDOWN") for each in (monitor, spare)]
        await asyncio.gather(
            *(each.execute("query-status") for each in (monitor, spare) for _ in range(20))
        )
        await spare.execute("quit")
        for stream in both:
            assert (await stream.wait(timeout=2)).data["reason"] == "host-qmp-quit"
        for each in (monitor, spare):
            assert "closed the connection" in (await each.wait_lost()).reason


async def test_a_monitor_takes_the_next_client(qemu: Started, monitor: Monitor) -> None:
    await monitor.close()
    async with await Monitor.connect(qemu.a, name="again", deadline=5) as again:
        await again.execute("query-status")


async def test_kill_is_told_to_all_waiters_at_once(qemu: Started, monitor: Monitor) -> None:
    qemu.process.send_signal(signal.SIGSTOP)
    waiting = [
        asyncio.create_task(monitor.execute("query-status")),
        asyncio.create_task(monitor.wait_event(lambda event: True, timeout=None)),
    ]
    await asyncio.sleep(0.05)
    killed = time.monotonic()
    qemu.process.kill()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert time.monotonic() - killed < 0.5
    assert [type(outcome) for outcome in outcomes] == [MonitorLost, MonitorLost]


async def test_a_stopped_qemu_times_out_and_answers_late(qemu: Started, monitor: Monitor) -> None:
    qemu.process.send_signal(signal.SIGSTOP)
    with pytest.raises(MonitorTimeout) as caught:
        await monitor.execute("query-status", timeout=0.1)
    with pytest.raises(MonitorTimeout):
        await monitor.execute_oob("yank", {"instances": []}, timeout=0.1)
    qemu.process.send_signal(signal.SIGCONT)
    assert caught.value.late is not None
    assert await caught.value.late == {"running": False, "status": "prelaunch"}
    assert (await monitor.execute("query-version"))["qemu"]["major"] == monitor.version[0]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A storage daemon with a monitor on `qsd` and a disk served on `nbd`."""
    binary = shutil.which("qemu-storage-daemon")
    if binary is None:
        pytest.skip("qemu-storage-daemon is not installed")
    argv = [binary, "--chardev", f"socket,id=c,path={tmp_path}/qsd,server=on,wait=off"]
    argv += ["--monitor", "chardev=c", "--blockdev", "null-co,node-name=zero,size=1048576"]
    argv += ["--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd"]
    argv += ["--export", "nbd,id=e,node-name=zero,name=x"]
    process = subprocess.Popen(argv)
    yield process
    process.kill()
    process.wait()


async def test_oob_frees_a_hung_main_loop(
    qemu: Started, monitor: Monitor, daemon: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    # A frozen disk server hangs a synchronous read, and with it every in-band command of every
    # monitor; yank, out of band, is the way out.
    async with await Monitor.connect(tmp_path / "qsd", name="qsd", deadline=10) as ready:
        await ready.execute("query-block-exports")
    server = {"type": "unix", "path": str(tmp_path / "nbd")}
    node = {"driver": "nbd", "node-name": "disk", "server": server, "export": "x"}
    await monitor.execute("blockdev-add", node | {"read-only": True})
    daemon.send_signal(signal.SIGSTOP)
    read = {"command-line": 'qemu-io disk "read 0 512"'}
    reading = asyncio.create_task(monitor.execute("human-monitor-command", read))
    await asyncio.sleep(0.1)
    piled = [asyncio.create_task(monitor.execute("query-status", timeout=5)) for _ in range(20)]
    with pytest.raises(MonitorTimeout):
        await monitor.execute("query-version", timeout=0.2)
    assert not reading.done()
    asked = time.monotonic()
    yank = {"instances": [{"type": "block-node", "node-name": "disk"}]}
    await monitor.execute_oob("yank", yank, timeout=1)
    await reading
    assert len(await asyncio.gather(*piled)) == 20
    assert time.monotonic() - asked < 1


async def test_descriptors_are_passed(qemu: Started, monitor: Monitor) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    await monitor.pass_fd(reader, "pipe-end")
    os.close(reader)
    await monitor.execute("closefd", {"fdname": "pipe-end"})
    with pytest.raises(QmpError):
        await monitor.execute("closefd", {"fdname": "pipe-end"})


async def test_a_round_trip_is_short(monitor: Monitor) -> None:
    times = []
    for _ in range(200):
        started = time.perf_counter()
        await monitor.execute("query-status")
        times.append(time.perf_counter() - started)
    # 0.4 ms on a quiet machine; the bound leaves room for a busy one.
    assert statistics.median(times) < 0.002


async def test_the_storage_daemon_is_a_qemu_too(
    daemon: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    async with await Monitor.connect(tmp_path / "qsd", name="qsd", deadline=10) as monitor:
        nodes = await monitor.execute("query-named-block-nodes")
        assert [node["node-name"] for node in nodes] == ["zero"]
        await monitor.execute("quit")
        await monitor.wait_lost()
