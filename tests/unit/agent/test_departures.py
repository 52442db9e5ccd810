"""A move of ours that nobody drives: taken up once, by its record or by the owner's."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent import departures as module
from godwit.agent.departures import Departures
from godwit.model import keys
from godwit.model.errors import OperationFailed
from godwit.model.host import HostInfo, QemuFacts
from godwit.model.migration import Migration, MoveState
from godwit.model.ownership import MoveIntent
from godwit.model.vm import VmState
from godwit.qmp import MonitorLost
from godwit.store.memory import MemoryStore
from godwit.store.records import Records, encode

BOUND = MoveIntent(id="m-1", method="live", source="host1", destination="host2")
ORDER = Migration(
    id="m-1", vm="web", source="host1", destination="host2", state=MoveState.RUNNING, log=("why",)
)


class Engine:
    """In place of the real one: what it was given, and how it ends."""

    made: list[Migration]
    error: Exception | None = None

    def __init__(self, order: Migration, _vm: Any, _world: Any) -> None:
        Engine.made.append(order)
        self.move = SimpleNamespace(
            order=order, report=lambda _outcome, reason: order.but(reason=reason)
        )

    async def adopt(self) -> Migration:
        if Engine.error is not None:
            raise Engine.error
        await asyncio.Event().wait()
        raise AssertionError


class Desk:
    """The parts of host1 that are asked."""

    def __init__(self) -> None:
        self.host = "host1"
        self.records = Records(MemoryStore())
        self.moving: set[str] = set()
        self.slots: dict[str, Any] = {}
        self.changing: set[str] = set()
        self.published: list[VmState] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.peers = SimpleNamespace(to=lambda host, url: (host, url))
        self._lock = asyncio.Lock()

    def lock(self, _vm: str) -> asyncio.Lock:
        return self._lock

    def background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self.tasks.append(asyncio.create_task(work, name=name))

    async def publish(self, slot: Any) -> None:
        self.published.append(slot.state)


def slot(*, runs: bool = True, silent: bool = False, paused: bool = False) -> Any:
    async def status() -> Any:
        if silent:
            raise MonitorLost("query-status", "gone")
        return SimpleNamespace(running=runs)

    machine = SimpleNamespace(status=status, exited=asyncio.Event())
    vm = SimpleNamespace(name="web")
    return SimpleNamespace(vm=vm, machine=machine, state=VmState.PAUSED, paused=paused)


@pytest.fixture
async def desk(monkeypatch: pytest.MonkeyPatch) -> Any:
    Engine.made, Engine.error = [], None
    monkeypatch.setattr(module, "SourceMove", Engine)
    monkeypatch.setattr(module, "settle_soon", lambda *_: None)
    monkeypatch.setattr(Departures, "_source_world", lambda *_: None)
    made = Desk()
    info = HostInfo(
        name="host2",
        agent_url="https://host2",
        cpus=1,
        memory_bytes=1,
        qemu=QemuFacts(version=(10, 0, 0), accelerator="tcg"),
        migration_address="10.0.0.2",
    )
    await made.records.store.put(keys.host_info("host2"), encode(info))
    yield made
    for task in made.tasks:
        task.cancel()
    await asyncio.gather(*made.tasks, return_exceptions=True)


async def test_it_is_taken_up_once_however_often_that_is_asked(desk: Any) -> None:
    await desk.records.store.put(keys.migration("m-1"), encode(ORDER))
    moves, here = Departures(desk), slot()
    await asyncio.gather(moves.take_up(here, BOUND), moves.take_up(here, BOUND))
    assert Engine.made == [ORDER]
    assert desk.moving == {"web"}
    assert here.state is VmState.RUNNING  # the engine tells what becomes of it


@pytest.mark.parametrize("paused", [True, False])
async def test_a_move_without_a_record_is_known_by_the_owners(desk: Any, paused: bool) -> None:
    here = slot(paused=paused)
    await Departures(desk).take_up(here, BOUND)
    assert Engine.made == [ORDER.but(log=())]
    assert here.state is (VmState.PAUSED if paused else VmState.RUNNING)


async def test_one_that_leads_to_no_host_any_more_is_told(desk: Any) -> None:
    with pytest.raises(OperationFailed, match="no host any more"):
        await Departures(desk).take_up(slot(), BOUND.but(destination="host9"))
    assert (Engine.made, desk.moving) == ([], set())


@pytest.mark.parametrize(
    ("runs", "silent", "state"),
    [(False, False, VmState.PAUSED), (True, False, VmState.RUNNING), (True, True, VmState.RUNNING)],
)
async def test_an_engine_that_breaks_leaves_its_vm_as_it_is_seen(
    desk: Any, runs: bool, silent: bool, state: VmState
) -> None:
    """So that whoever reads what this host runs sees that nobody works on it, and asks again."""
    Engine.error = RuntimeError("a fault of ours")
    moves = Departures(desk)
    here = desk.slots["web"] = slot(runs=runs, silent=silent)
    await moves.take_up(here, BOUND)
    (result,) = await asyncio.gather(*desk.tasks, return_exceptions=True)
    assert isinstance(result, RuntimeError)
    assert (desk.moving, desk.published) == (set(), [state])
    await moves.take_up(here, BOUND)
    assert len(Engine.made) == 2
