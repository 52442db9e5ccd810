"""A VM in the middle of a move whose source is lost: its copy goes on, or it starts anew."""

from __future__ import annotations

import asyncio
from typing import Any

from godwit.model import keys, ownership
from godwit.model.migration import Migration, MoveState, Outcome
from godwit.model.ownership import MoveIntent, Owner, OwnerState
from godwit.model.processes import QemuProcess
from godwit.model.task import Task, TaskState
from godwit.store.records import encode

from .test_failover import RUNS, Cluster, cluster, vm

__all__ = ["cluster"]

MOVE = MoveIntent(id="m-1", method="live", source="host1", destination="host2")
ASKED = Task(
    id="t-1", subject="vm/web", request={"kind": "vm.migrate", "name": "web"}, created_at=0.0,
    state=TaskState.RUNNING,
)  # fmt: skip
BOUND = ownership.committing(ownership.begin_move(RUNS, MOVE), "m-1")


def copy(**more: Any) -> QemuProcess:
    """On its way in at host2; its engine waits for the record."""
    about = {"epoch": 5, "state": "incoming", "migration": "m-1", "driven": True}
    return QemuProcess(vm="web", **{**about, **more})


async def begin(cluster: Cluster, **more: Any) -> None:
    """A move in its hand-over; the task that somebody asked for it with looks on."""
    cluster.hosts.processes["host2"] = [copy(**more)]
    move = Migration(
        id="m-1", vm="web", source="host1", destination="host2", state=MoveState.RUNNING
    )
    await cluster.store.put(keys.migration("m-1"), encode(move))
    await cluster.store.put(keys.task("t-1"), encode(ASKED))
    await cluster.add(vm("web"), BOUND)


async def until_owner(cluster: Cluster, epoch: int, *, bound: bool) -> Owner:
    """The record once it has this epoch, and (not) a move."""
    async with asyncio.timeout(10):
        while True:
            owner = await cluster.owner("web")
            if owner.epoch == epoch and (owner.migration is not None) == bound:
                return owner
            await asyncio.sleep(0.05)  # the store's watch has tests of its own


async def test_a_whole_copy_goes_on_and_nothing_is_started(cluster: Cluster) -> None:
    await begin(cluster, complete=True, released=True)
    await cluster.dies("host1")
    owner = await until_owner(cluster, 5, bound=True)
    assert (owner.host, owner.state) == ("host2", OwnerState.RUNNING)
    cluster.hosts.processes["host2"] = [QemuProcess(vm="web", epoch=5, state="running")]
    free = await until_owner(cluster, 5, bound=False)
    assert free.host == "host2"
    assert cluster.hosts.asked == []
    move = await cluster.records.migration("m-1")
    assert move is not None
    assert move.value.outcome is Outcome.COMPLETED


async def test_a_copy_that_nobody_let_go_of_is_ended(cluster: Cluster) -> None:
    """It may be whole: its source may have gone on by itself, and written."""
    await begin(cluster, complete=True)
    await cluster.dies("host1")
    owner = await until_owner(cluster, 5, bound=False)
    assert owner.state in (OwnerState.STARTING, OwnerState.RUNNING)
    # With its move the task is over: whoever looks on for it sees the move's record.
    await cluster.store.put(keys.task("t-1"), encode(ASKED.but(state=TaskState.FAILED)))
    (stray,) = await cluster.was_asked("end-stray")
    assert stray == ("host2", "/v1/vms/web/end-stray", {"epoch": 5})
    await cluster.was_asked("take-over")
    move = await cluster.records.migration("m-1")
    assert move is not None
    assert move.value.outcome is Outcome.FAILED


async def test_a_move_that_nobody_drives_is_taken_up(cluster: Cluster) -> None:
    await begin(cluster)
    stands = QemuProcess(vm="web", epoch=4, state="paused")
    cluster.hosts.processes["host1"] = [stands]
    ((host, path, body), *_) = await cluster.was_asked("take-up-move")
    assert (host, path, body) == ("host1", "/v1/vms/web/take-up-move", {"migration": "m-1"})
    assert await cluster.owner("web") == BOUND


async def test_an_engine_that_works_is_left_alone(cluster: Cluster) -> None:
    await begin(cluster)
    driven = QemuProcess(vm="web", epoch=4, state="running", driven=True)
    cluster.hosts.processes["host1"] = [driven]
    async with asyncio.timeout(10):
        while "host1" not in cluster.failover.standings:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)  # nothing is to happen, and nothing tells of that
    assert cluster.hosts.asked == []
