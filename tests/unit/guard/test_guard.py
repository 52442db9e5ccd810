"""The guard over its real socket, with its spare monitors on fake QEMUs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from godwit.guard import socket as guard_socket
from godwit.guard.lease import HostLease
from godwit.guard.notes import load as load_notes
from godwit.guard.socket import AgentLine
from godwit.guard.vms import Vms
from godwit.host.process import identify
from godwit.host.sockets import bind_unix
from godwit.model.world import Clock
from godwit.qmp import Monitor
from godwit.qmp.fake import FakeQemu, link
from godwit.store.memory import MemoryStore


class MovableClock:
    """Real time plus what a test adds to it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead

    def realtime(self) -> float:
        return self.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Agent:
    """The agent's end of the socket, under a test's control."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        self.writer.write(json.dumps({"op": op, **fields}).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await self.reader.readline())
        return answer

    async def die(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


class Guarded:
    """A guard, an agent, and a pair of QEMUs in the middle of a move."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = MovableClock()
        self.log = path / "guard.log"
        self.source = FakeQemu(name="s")
        self.target = FakeQemu(name="d", incoming=True, autostart=False)
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.source.listen(self.path / "qmp.sock")
        await self.source.listen(self.path / "spare.sock")
        await self.target.listen(self.path / "d.sock")
        link(self.source, self.target)
        self.monitor = await Monitor.connect(self.path / "qmp.sock", name="s", deadline=2)
        self.d = await Monitor.connect(self.path / "d.sock", name="d", deadline=2)
        await self.start_guard()

    async def start_guard(self) -> None:
        clock: Clock = self.clock
        wake = asyncio.Event()
        self.vms = Vms(now=clock.monotonic, log=self.log, notify=wake.set)
        lease = HostLease(MemoryStore(), clock, host="host1", boot_id=lambda: "b")
        self.line = AgentLine(self.vms, lease, clock)
        self.line.look = wake
        listener = bind_unix(self.path / "guard.sock")
        self.tasks = [
            asyncio.create_task(self.line.serve(listener), name="serve"),
            asyncio.create_task(self.line.act(), name="act"),
        ]
        self.agent = await self.connect()

    async def stop_guard(self) -> None:
        await self.agent.die()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.vms.close()

    async def connect(self) -> Agent:
        streams = await asyncio.open_unix_connection(str(self.path / "guard.sock"))
        agent = Agent(*streams)
        await agent.ask("hello", pid=os.getpid())
        return agent

    async def register(self) -> None:
        me = identify(os.getpid())
        assert me is not None
        await self.agent.ask(
            "register",
            vm="web",
            pid=me.pid,
            start_time=me.start_time,
            monitor=str(self.path / "spare.sock"),
            epoch=7,
        )
        await self.until(lambda: self.vms.vms["web"].monitor is not None)

    async def arm(self, role: str = "source") -> None:
        await self.register()
        await self.agent.ask("arm", vm="web", migration="m-1", role=role)

    async def move_to(self, status: str) -> None:
        """Begin a move and wait until the source, and the guard, stand at this status."""
        on = ("events", "return-path", "pause-before-switchover")
        for monitor, names in ((self.monitor, on), (self.d, on[:2])):
            states = [{"capability": name, "state": True} for name in names]
            await monitor.execute("migrate-set-capabilities", {"capabilities": states})
        await self.monitor.execute("migrate-set-parameters", {"max-bandwidth": 0})
        await self.d.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        await self.monitor.execute("migrate", {"uri": "tcp:127.0.0.1:40000"})
        if status == "device":
            await self.until(lambda: self.source.migration.status == "pre-switchover")
            self.target.freeze()
            await self.monitor.execute("migrate-continue", {"state": "pre-switchover"})
        await self.until(lambda: self.source.migration.status == status)
        watch = self.vms.vms["web"]
        await self.until(lambda: watch.status == status)

    async def until(self, true: Callable[[], bool], *, seconds: float = 3.0) -> None:
        async with asyncio.timeout(seconds):
            while not true():  # noqa: ASYNC110 - fakes change without telling
                await asyncio.sleep(0.005)

    def received(self, command: str) -> int:
        return sum(1 for entry in self.source.received if entry.command == command)

    def notes(self) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    async def stop(self) -> None:
        self.target.thaw()
        self.source.thaw()
        await self.stop_guard()
        for fake in (self.source, self.target):
            await fake.die()
        await self.monitor.close()
        await self.d.close()


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    found = Guarded(tmp_path)
    await found.start()
    yield found
    await found.stop()


async def test_an_agent_that_dies_at_pre_switchover_costs_one_cancel(guarded: Guarded) -> None:
    await guarded.arm()
    await guarded.move_to("pre-switchover")
    await guarded.agent.die()
    await guarded.until(lambda: guarded.source.run_state == "running", seconds=1)
    await asyncio.sleep(3 * guard_socket.LOOK_S)
    assert guarded.received("migrate_cancel") == 1
    (note,) = guarded.notes()
    assert (note["vm"], note["migration"], note["act"]) == ("web", "m-1", "cancel")
    assert note["result"] == "done"


async def test_an_agent_that_hangs_is_gone_after_two_silent_seconds(guarded: Guarded) -> None:
    await guarded.arm()
    await guarded.move_to("pre-switchover")
    await guarded.agent.ask("beat")
    guarded.clock.ahead += 1.5
    assert guarded.line.gone_for() == 0.0
    await asyncio.sleep(1.1 * guard_socket.LOOK_S)
    assert guarded.received("migrate_cancel") == 0
    guarded.clock.ahead = 2.5
    await guarded.until(lambda: guarded.source.run_state == "running", seconds=1)
    assert guarded.received("migrate_cancel") == 1


async def test_an_agent_that_beats_is_trusted(guarded: Guarded) -> None:
    await guarded.arm()
    await guarded.move_to("pre-switchover")
    for _ in range(6):
        guarded.clock.ahead += 1.5
        await guarded.agent.ask("beat")
        await asyncio.sleep(guard_socket.LOOK_S / 2)
    assert guarded.received("migrate_cancel") == 0
    assert guarded.notes() == []


async def test_qemu_that_pauses_by_itself_long_after_the_agent_died(guarded: Guarded) -> None:
    """The move went on alone; nobody looks every moment, the event itself wakes the guard."""
    await guarded.arm()
    guarded.source.migration.link_bytes_per_s = 2e8
    await guarded.agent.die()
    started = asyncio.get_running_loop().time()
    with contextlib.suppress(TimeoutError):
        await guarded.move_to("cancelled")
    assert guarded.source.run_state == "running"
    assert guarded.received("migrate_cancel") == 1
    assert asyncio.get_running_loop().time() - started < 2


async def test_the_last_pages_are_cut_only_after_patience(guarded: Guarded) -> None:
    await guarded.arm()
    await guarded.move_to("device")
    await guarded.agent.die()
    await asyncio.sleep(2 * guard_socket.LOOK_S)
    assert guarded.received("yank") == 0
    guarded.clock.ahead = 2.1
    await guarded.until(lambda: guarded.source.run_state == "running", seconds=1)
    assert guarded.received("yank") == 1
    assert [entry.oob for entry in guarded.source.received if entry.command == "yank"] == [True]
    assert guarded.received("migrate_cancel") == 0


async def test_a_main_loop_that_hangs_is_yanked_out_of_band(guarded: Guarded) -> None:
    await guarded.arm()
    await guarded.move_to("pre-switchover")
    guarded.source.hang("migrate_cancel")
    await guarded.agent.die()
    await guarded.until(lambda: guarded.received("yank") == 1)
    await guarded.until(lambda: guarded.notes() != [])
    assert guarded.notes()[0]["result"] == "the main loop hangs, yanked instead"
    guarded.source.hang("migrate_cancel").set()


@pytest.mark.parametrize("role", ["source", "destination"])
async def test_disarmed_or_receiving_vms_are_left_alone(guarded: Guarded, role: str) -> None:
    await guarded.arm(role)
    if role == "source":
        await guarded.agent.ask("disarm", vm="web")
    await guarded.move_to("pre-switchover")
    await guarded.agent.die()
    await asyncio.sleep(3 * guard_socket.LOOK_S)
    assert guarded.received("migrate_cancel") == guarded.received("yank") == 0


async def test_a_completed_move_is_left_alone(guarded: Guarded) -> None:
    await guarded.arm()
    await guarded.move_to("pre-switchover")
    await guarded.monitor.execute("migrate-continue", {"state": "pre-switchover"})
    await guarded.until(lambda: guarded.vms.vms["web"].status == "completed")
    await guarded.agent.die()
    guarded.clock.ahead = 60
    await asyncio.sleep(3 * guard_socket.LOOK_S)
    assert guarded.received("migrate_cancel") == guarded.received("yank") == 0


async def test_an_agent_that_comes_back_in_time_keeps_its_vm(guarded: Guarded) -> None:
    await guarded.arm()
    guarded.source.migration.link_bytes_per_s = 1e8
    await guarded.agent.die()
    guarded.agent = await guarded.connect()
    await guarded.move_to("pre-switchover")
    await asyncio.sleep(2 * guard_socket.LOOK_S)
    assert guarded.received("migrate_cancel") == 0


async def test_a_restarted_guard_knows_a_pause_that_began_before_it(guarded: Guarded) -> None:
    await guarded.arm()
    await guarded.move_to("pre-switchover")
    await guarded.stop_guard()
    await asyncio.sleep(0.05)
    assert guarded.received("migrate_cancel") == 0
    await guarded.start_guard()
    await guarded.register()  # and only later, as after a reconnect:
    await guarded.until(lambda: guarded.vms.vms["web"].status == "pre-switchover")
    await guarded.agent.ask("arm", vm="web", migration="m-1", role="source")
    await guarded.agent.die()
    await guarded.until(lambda: guarded.source.run_state == "running", seconds=1)
    assert guarded.received("migrate_cancel") == 1


async def test_the_spare_monitor_is_opened_again(guarded: Guarded) -> None:
    await guarded.arm()
    entry = guarded.vms.vms["web"]
    first = entry.monitor
    assert first is not None
    await first.close()
    await guarded.until(lambda: entry.monitor is not None and entry.monitor is not first)
    await guarded.move_to("pre-switchover")
    await guarded.agent.die()
    await guarded.until(lambda: guarded.source.run_state == "running", seconds=1)


def test_a_guard_reads_the_notes_of_a_newer_one_and_of_an_older_one(tmp_path: Path) -> None:
    entry = {
        "vm": "web",
        "pid": 7,
        "start_time": 8,
        "monitor": "/m",
        "epoch": 3,
        "ha": True,
        "deadline": True,
        "cgroup": "g",
    }
    notes = {"boot_id": "b", "renewed_at": 1.0, "counts_from": 2.0, "number": 5, "vms": [entry]}
    path = tmp_path / "guard.json"
    path.write_text(json.dumps(notes))
    plain = load_notes(path, boot_id="b")
    path.write_text(json.dumps({**notes, "later": 1, "vms": [{**entry, "later": [1]}]}))
    found = load_notes(path, boot_id="b")
    assert found is not None
    assert found == plain
    assert (found.number, found.vms[0].vm, found.vms[0].epoch) == (5, "web", 3)
    assert load_notes(path, boot_id="another") is None


async def test_forgotten_vms_lose_their_monitor(guarded: Guarded) -> None:
    await guarded.register()
    monitor = guarded.vms.vms["web"].monitor
    assert monitor is not None
    await guarded.agent.ask("forget", vm="web")
    assert guarded.vms.vms == {}
    async with asyncio.timeout(1):
        await monitor.wait_lost()


ASKS: list[tuple[str, dict[str, Any], str]] = [
    ("arm", {"vm": "nobody", "migration": "m", "role": "source"}, "cannot do that"),
    ("fly", {}, "unknown request"),
    ("register", {"vm": "web"}, "cannot do that"),
]


@pytest.mark.parametrize(("op", "fields", "said"), ASKS)
async def test_odd_requests_are_answered_and_end_nothing(
    guarded: Guarded, op: str, fields: dict[str, Any], said: str
) -> None:
    assert said in (await guarded.agent.ask(op, **fields))["error"]
    assert "ttl" in await guarded.agent.ask("beat")


async def test_lines_that_are_no_json_are_answered(guarded: Guarded) -> None:
    guarded.agent.writer.write(b"{nonsense\n")
    assert "error" in json.loads(await guarded.agent.reader.readline())
