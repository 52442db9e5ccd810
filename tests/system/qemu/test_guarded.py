"""A real guard, a real store daemon, and real QEMUs in control groups: cut off, and back again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from godwit.guard.deadline import FREEZE_S, RESET_S
from godwit.host.cgroup import Cgroup, open_cgroup
from godwit.host.process import is_alive
from godwit.model import keys
from godwit.model.membership import Renewal
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import Vm
from godwit.qemu.intervals import running_spans
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place
from godwit.store.client import StoreClient
from godwit.store.records import encode
from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.identity import HOST

pytestmark = pytest.mark.system

NAMES = ("web", "moved", "plain")


class Wire:
    """Between the guard and the store; what is sent while it is cut arrives when it is mended."""

    def __init__(self, path: Path, store: Path) -> None:
        self.path, self.store = path, store
        self.whole = asyncio.Event()
        self.whole.set()
        self.server: asyncio.Server | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.ends: list[asyncio.StreamWriter] = []

    async def open(self) -> None:
        self.server = await asyncio.start_unix_server(self._join, path=str(self.path))

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ends.append(writer)
        await self.whole.wait()
        there, back = await asyncio.open_unix_connection(str(self.store))
        self.ends.append(back)
        for source, target in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pump(source, target), name="pump")
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await self.whole.wait()
                target.write(data)
                await target.drain()
        target.close()

    async def close(self) -> None:
        if self.server is not None:
            self.server.close()
        for task in [*self.tasks]:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for end in self.ends:
            end.close()
        for end in self.ends:
            with contextlib.suppress(OSError):
                await end.wait_closed()


class Host:
    """A host's guard as its agent sees it, with three VMs and a store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.wire = Wire(root / "wire.sock", root / "store.sock")
        self.store = StoreClient([f"unix:{root}/store.sock"])
        self.machines: dict[str, Machine] = {}
        self.running: list[subprocess.Popen[bytes]] = []

    def program(self, module: str, *argv: str) -> subprocess.Popen[bytes]:
        with (self.root / f"{module}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", module, *argv], stderr=log)
        self.running.append(process)
        return process

    async def begin(self) -> None:
        self.program(
            "godwit.store.daemon.main",
            *("--data", str(self.root / "data"), "--listen", f"unix:{self.root}/store.sock"),
        )
        ca = ClusterCa.create(cluster="test")
        write_identity(self.root / "tls", issue(ca, role=HOST, name="h1", ips=["127.0.0.1"]))
        (self.root / "host.toml").write_text(
            f'host = "h1"\n[paths]\nrun = "{self.root}/run"\nstate = "{self.root}/state"\n'
            f'[store]\nendpoints = ["unix:{self.root}/wire.sock"]\n[tls]\ndir = "{self.root}/tls"\n'
            f'[guard]\nwatchdog = "{self.root}/none"\n'
        )
        await self.until(lambda: (self.root / "store.sock").exists())
        await self.wire.open()
        await self.guard()

    async def guard(self) -> None:
        self.process = self.program("godwit.guard.main", "--config", str(self.root / "host.toml"))
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(OSError):
                    self.line = await asyncio.open_unix_connection(f"{self.root}/run/guard.sock")
                    return
                await asyncio.sleep(0.02)

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        reader, writer = self.line
        writer.write(json.dumps({"op": op, **fields}).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await reader.readline())
        assert "error" not in answer, answer
        return answer

    async def register(self, name: str) -> None:
        runtime = self.machines[name].runtime
        await self.ask(
            "register",
            vm=name,
            pid=runtime.pid,
            start_time=runtime.start_time,
            monitor=str(runtime.guard_monitor),
            epoch=runtime.epoch,
            ha=name != "plain",
            cgroup=runtime.cgroup,
        )

    async def own(self, name: str, *, host: str = "h1", epoch: int = 1) -> None:
        owner = Owner(host=host, epoch=epoch, state=OwnerState.RUNNING)
        await self.store.put(keys.vm_owner(name), encode(owner))

    async def renewal(self) -> Renewal:
        async with asyncio.timeout(10):
            while (found := await self.store.get(keys.host_renewal("h1"))) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return Renewal.model_validate_json(found.value)

    def group(self, name: str) -> Cgroup:
        return open_cgroup(self.machines[name].runtime.cgroup)

    def dots(self, name: str) -> int:
        return self.machines[name].runtime.console_log.stat().st_size

    async def until(self, true: Callable[[], bool], *, seconds: float = 20) -> float:
        """Wait, and return when it came true, as the guard counts."""
        async with asyncio.timeout(seconds):
            while not true():  # noqa: ASYNC110 - the kernel announces no freeze
                await asyncio.sleep(0.01)
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def end(self) -> None:
        self.line[1].close()
        for process in self.running:
            process.kill()
            process.wait()
        await self.wire.close()
        await self.store.aclose()


@pytest.fixture
async def host(root: Path) -> AsyncIterator[Host]:
    found = Host(root)
    try:
        await found.begin()
        yield found
    finally:
        await found.end()


async def test_cut_off_and_back(
    host: Host,
    make_vm: Callable[..., Vm],
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    wait_for_console: Callable[[Machine, str], Awaitable[None]],
) -> None:
    """One VM goes on, one that moved is killed, one without HA notices nothing.

    In the dark the guard is killed: what the next one does, it knows from notes and kernel.
    """
    for name in NAMES:
        group = f"godwit-test-{os.getpid()}/h1/{name}"
        place = make_place(
            run=host.root / name / "r", state=host.root / "state" / name, cgroup=group
        )
        host.machines[name] = await start(make_vm(name=name), place, epoch=1)
        await host.own(name)
        await host.register(name)
        await host.machines[name].cont()
    for machine in host.machines.values():
        await wait_for_console(machine, "GW\n....")
    async with asyncio.timeout(10):
        while (await host.renewal()).guard != "armed":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert (await host.renewal()).watchdog is False  # there is none here

    host.wire.whole.clear()
    counts = float((await host.ask("beat"))["counts_from"])
    frozen = await host.until(lambda: all(host.group(name).frozen() for name in NAMES[:2]))
    late = frozen - counts
    assert FREEZE_S - 0.05 <= late < FREEZE_S + 1, late
    said = (await host.ask("beat"))["frozen"]
    assert set(said) == set(NAMES[:2])

    host.line[1].close()
    host.process.kill()
    host.process.wait()
    stood = {name: host.dots(name) for name in NAMES}
    await host.guard()
    await host.until(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > counts + RESET_S)
    assert {name: host.dots(name) == stood[name] for name in NAMES} == {
        "web": True,
        "moved": True,
        "plain": False,
    }
    await host.own("moved", host="h2", epoch=2)
    back = time.clock_gettime(time.CLOCK_BOOTTIME)
    host.wire.whole.set()
    thawed = await host.until(lambda: not host.group("web").frozen())
    await host.until(lambda: host.machines["moved"].exited.is_set())
    await host.until(lambda: host.dots("web") > stood["web"])
    assert is_alive(host.machines["web"].runtime.process)
    assert host.dots("moved") == stood["moved"], "it never ran again"
    print(f"frozen {late:.2f} s after the last renewal, thawed {thawed - back:.2f} s after the cut")

    log = host.root / "state" / "guard.log"
    await host.until(lambda: {"thaw", "gone"} <= set(re.findall(r'"(thaw|gone)"', log.read_text())))
    state = host.machines["web"].runtime.state
    first, second = running_spans(state, until=time.time(), guard=log)
    assert second.start - first.end > RESET_S - FREEZE_S - 0.5
    (only,) = running_spans(host.machines["moved"].runtime.state, until=time.time(), guard=log)
    assert only.end < second.start
    assert len(running_spans(host.machines["plain"].runtime.state, until=0, guard=log)) <= 1
