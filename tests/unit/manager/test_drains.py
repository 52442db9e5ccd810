"""A host is emptied and filled again through the API: plan, marks, cancel, a manager that dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from godwit.model import keys
from godwit.model.marks import HostMark
from godwit.model.migration import MoveState
from godwit.model.ownership import OwnerState
from godwit.model.task import Task, TaskState
from godwit.wire.errors import PeerRefused

HOURGLASS_S = 10.0
LONG = 20
BACK = {"bring_back": True}
DRAIN = "/v1/hosts/host1/actions/drain"


async def eventually(cluster: Any, look: Callable[[Any], Any]) -> Any:
    found = await cluster.manager.world.cache.until(look, timeout=HOURGLASS_S)
    assert found is not None, "it did not come about"
    return found


def task_of(kind: str, *states: TaskState) -> Callable[[Any], Task | None]:
    def look(snapshot: Any) -> Task | None:
        for task in snapshot.tasks.values():
            if task.request.get("kind") == kind and task.state in states:
                return task  # type: ignore[no-any-return]
        return None

    return look


def running_moves(snapshot: Any) -> list[str]:
    return [m.vm for m in snapshot.migrations.values() if m.state is MoveState.RUNNING]


def where(cluster: Any) -> dict[str, str | None]:
    owners = cluster.manager.world.cache.snapshot.owners
    return {
        name: owner.host if owner.state is OwnerState.RUNNING else None
        for name, owner in sorted(owners.items())
    }


async def host_row(cluster: Any, name: str) -> Any:
    return await cluster.api.get(f"/v1/hosts/{name}")


async def test_a_drain_moves_every_vm_and_the_return_brings_them_back(api: Any) -> None:
    for name in ("a", "b", "c"):
        await api.make_vm(name, start="host1")
    task = await api.act("POST", DRAIN, {"reason": "new disks"}, wait=LONG)
    assert task["state"] == "completed", task
    assert task["reason"].startswith("host1 is empty after ")
    assert task["result"]["left"] == ["a", "b", "c"]
    assert where(api) == dict.fromkeys("abc", "host2")
    row = await host_row(api, "host1")
    assert (row["state"], row["reason"]) == ("draining", "new disks; it is empty")
    refused = await api.act("POST", "/v1/vms/a/actions/migrate", {"to": "host1"})
    assert refused["reason"] == "host1 is draining: new disks; it is empty"
    back = await api.act("POST", "/v1/hosts/host1/actions/return", BACK, wait=LONG)
    assert back["state"] == "completed", back
    assert back["reason"] == ("host1 takes VMs again, 3 of the 3 that were there run there")
    assert where(api) == dict.fromkeys("abc", "host1")
    assert (await host_row(api, "host1"))["state"] == "up"


async def test_maintenance_is_entered_and_left_by_its_own_words(api: Any) -> None:
    await api.make_vm("a", start="host1")
    path = "/v1/hosts/host1/actions"
    task = await api.act("POST", f"{path}/enter-maintenance", {}, wait=LONG)
    assert task["state"] == "completed", task
    row = await host_row(api, "host1")
    assert row["state"] == "maintenance"
    assert "admin" in row["reason"]
    for verb, words in (("drain", "in maintenance already"), ("return", "is in maintenance")):
        with pytest.raises(PeerRefused) as caught:
            await api.api.post(f"{path}/{verb}", {})
        assert words in caught.value.problem.detail
    task = await api.act("POST", f"{path}/exit-maintenance", {})
    assert task["state"] == "completed"
    assert (await host_row(api, "host1"))["state"] == "up"
    assert where(api) == {"a": "host2"}, "only if asked"
    with pytest.raises(PeerRefused, match="carries no mark"):
        await api.api.post(f"{path}/exit-maintenance", {})


async def test_the_plan_is_shown_first_and_changes_nothing(api: Any) -> None:
    await api.make_vm("small", start="host1")
    await api.make_vm("large", start="host1", memory_bytes=1 << 30)
    plan = await api.api.post(DRAIN, {}, query={"dry_run": True})
    assert [(one["vm"], one["way"], one["destination"]) for one in plan["vms"]] == [
        ("large", "live", "host2"),
        ("small", "live", "host2"),
    ]
    assert plan["bound_s"] == pytest.approx(1.8), "two moves of 0.9 s, one at a time"
    assert plan["bound_reason"] == "2 moves of host1, one at a time"
    assert plan["refused"] == []
    assert await api.store.get(keys.host_mark("host1")) is None
    assert await api.api.get("/v1/migrations") == []


async def test_what_cannot_move_is_named_before_anything_moves(api: Any) -> None:
    for name in ("a", "b"):
        await api.make_vm(name, start="host1")
    await api.act("POST", "/v1/vms/b/actions/set", {"allow_hosts": ["host1"]})
    task = await api.act("POST", DRAIN, {}, wait=LONG)
    assert task["state"] == "failed"
    assert task["error"]["code"] == "checks-failed"
    assert "b cannot move live: the rules of b allow only host1" in task["reason"]
    assert "--allow-shutdown" in task["error"]["hint"]
    assert "nothing has moved" in task["error"]["hint"]
    assert await api.api.get("/v1/migrations") == []
    assert (await host_row(api, "host1"))["state"] == "up"
    forced = await api.act("POST", DRAIN, {"force": True}, wait=LONG)
    assert forced["state"] == "completed", forced
    assert forced["result"]["staying"] == ["b"]
    assert where(api) == {"a": "host2", "b": "host1"}
    assert (await host_row(api, "host1"))["state"] == "draining"


async def test_what_cannot_move_live_goes_quick_or_is_shut_down_if_allowed(api: Any) -> None:
    await api.make_vm("a", start="host1")
    agent, plain = api.agents["host1"], api.agents["host1"].do_plan

    async def only_quick(vm: str, body: Any) -> Any:
        if body.get("method", "live") == "live":
            agent.checks = [
                {"name": "blocked", "result": "fail", "message": "a device stays", "hint": "x"}
            ]
        answer = await plain(vm, body)
        agent.checks = []
        return answer

    agent.do_plan = only_quick
    refused = await api.act("POST", DRAIN, {}, wait=LONG)
    assert refused["reason"] == "host1 cannot be emptied: a cannot move live: a device stays"
    assert "--allow-quick" in refused["error"]["hint"]
    path = DRAIN
    shown = await api.api.post(path, {"allow_shutdown": True}, query={"dry_run": True})
    assert [one["way"] for one in shown["vms"]] == ["shutdown"]
    done = await api.act("POST", path, {"allow_quick": True}, wait=LONG)
    assert done["state"] == "completed", done
    (move,) = await api.api.get("/v1/migrations")
    assert (move["method"], move["destination"]) == ("quick", "host2")


async def test_a_vm_that_is_shut_down_for_it_starts_again_on_return(api: Any) -> None:
    await api.make_vm("a", start="host1")
    await api.make_vm("b", start="host1", allow_hosts=["host1"])
    path = "/v1/hosts/host1/actions"
    done = await api.act("POST", f"{path}/drain", {"allow_shutdown": True}, wait=LONG)
    assert done["state"] == "completed", done
    assert done["result"]["stopped"] == ["b"]
    assert where(api) == {"a": "host2", "b": None}
    back = await api.act("POST", f"{path}/return", {"bring_back": True}, wait=LONG)
    assert back["state"] == "completed", back
    assert where(api) == {"a": "host1", "b": "host1"}


async def test_a_cancelled_drain_leaves_every_vm_running_and_the_host_up(api: Any) -> None:
    for name in ("a", "b", "c"):
        await api.make_vm(name, start="host1")
    agent = api.agents["host1"]
    agent.hold.clear()
    drain = await api.api.post(DRAIN, {})
    await eventually(api, lambda now: running_moves(now) or None)
    agent.hold.set()  # the first one completes
    await eventually(api, lambda now: True if now.owner("a").host == "host2" else None)
    agent.hold.clear()
    await eventually(api, lambda now: running_moves(now) or None)
    cancelled = await api.act("POST", f"/v1/tasks/{drain['id']}/actions/cancel", {}, wait=LONG)
    assert cancelled["state"] == "completed", cancelled
    ended = await api.api.get(f"/v1/tasks/{drain['id']}")
    assert ended["state"] == "cancelled"
    assert "called off by admin" in ended["reason"]
    assert ended["error"]["context"]["moved"] == ["a"]
    assert where(api) == {"a": "host2", "b": "host1", "c": "host1"}
    assert (await host_row(api, "host1"))["state"] == "up"
    moves = await api.api.get("/v1/migrations")
    assert {move["state"] for move in moves} == {"completed", "cancelled"}


async def test_a_cancelled_drain_starts_what_it_had_shut_down(api: Any) -> None:
    await api.make_vm("a", start="host1", allow_hosts=["host1"])
    await api.make_vm("b", start="host1", allow_hosts=["host1"])
    agent, stop = api.agents["host1"], api.agents["host1"].do_stop
    second = asyncio.Event()

    async def slow_stop(vm: str, body: Any) -> Any:
        if agent.asked("stop")[1:]:
            await second.wait()
        return await stop(vm, body)

    agent.do_stop = slow_stop
    drain = await api.api.post(DRAIN, {"allow_shutdown": True})
    await eventually(api, lambda now: True if None in where(api).values() else None)
    cancel = asyncio.create_task(
        api.act("POST", f"/v1/tasks/{drain['id']}/actions/cancel", {}, wait=LONG)
    )
    await eventually(api, lambda now: True if now.marks["host1"].cancelled else None)
    second.set()
    assert (await cancel)["state"] == "completed"
    assert where(api) == {"a": "host1", "b": "host1"}


async def test_a_move_that_fails_is_tried_again_and_then_left(api: Any) -> None:
    from manager_fakes import refused

    await api.make_vm("a", start="host1")
    await api.make_vm("b", start="host1")
    agent = api.agents["host1"]
    agent.refuse["migrate"] = refused("the switch is on fire")
    failed = await api.act("POST", DRAIN, {}, wait=LONG)
    assert failed["state"] == "failed"
    assert "host1 is not empty" in failed["reason"]
    assert "the switch is on fire" in failed["reason"]
    assert len(agent.asked("migrate")) == 4, "each of them twice"
    row = await host_row(api, "host1")
    assert (row["state"], row["reason"].partition(";")[2]) == (
        "draining",
        " 2 VMs are still there",
    )
    del agent.refuse["migrate"]
    again = await api.act("POST", DRAIN, {}, wait=LONG)
    assert again["state"] == "completed", "a second try goes on where the first one stopped"
    assert again["result"]["left"] == ["a", "b"]


async def test_a_manager_that_dies_in_a_drain_comes_back_to_it(cluster: Any) -> None:
    async with cluster.serve():
        for name in ("a", "b", "c"):
            await cluster.make_vm(name, start="host1")
        cluster.agents["host1"].hold.clear()
        drain = await cluster.api.post(DRAIN, {})
        await eventually(cluster, lambda now: running_moves(now) or None)
    cluster.agents["host1"].hold.set()
    async with cluster.serve():

        def ended(now: Any) -> Task | None:
            task = now.tasks.get(drain["id"])
            return task if task is not None and task.state.final else None

        done = await eventually(cluster, ended)
        assert done.state is TaskState.COMPLETED, done
        assert where(cluster) == dict.fromkeys("abc", "host2")
        moves = cluster.manager.world.cache.snapshot.migrations.values()
        assert sorted(move.vm for move in moves) == ["a", "b", "c"], "none was moved twice"


async def test_a_vm_that_starts_there_while_it_is_emptied_leaves_too(api: Any) -> None:
    await api.make_vm("a", start="host1")
    await api.make_vm("late")
    agent = api.agents["host1"]
    agent.hold.clear()
    drain = await api.api.post(DRAIN, {})
    await eventually(api, lambda now: running_moves(now) or None)
    await agent.do_start("late", {})  # as one whose start was under way when the mark was set
    await eventually(api, lambda now: True if now.owner("late").host == "host1" else None)
    agent.hold.set()
    done = await api.api.get(f"/v1/tasks/{drain['id']}", query={"wait": LONG})
    assert done["state"] == "completed", done
    assert where(api) == {"a": "host2", "late": "host2"}


async def test_the_mark_is_seen_in_the_list_and_is_one_record(api: Any) -> None:
    mark = HostMark(state="quarantined", since=1.0, reason="three isolations in an hour")
    revision = await api.records.cas(keys.host_mark("host2"), mark, 0)
    await api.manager.world.cache.reached(revision)
    row = await host_row(api, "host2")
    assert (row["state"], row["reason"]) == ("quarantined", "three isolations in an hour")
    await api.make_vm("a")
    task = await api.act("POST", "/v1/vms/a/actions/start", {})
    assert task["result"]["host"] == "host1"
    task = await api.act("POST", "/v1/hosts/host2/actions/return", {})
    assert task["state"] == "completed"
    assert await api.store.get(keys.host_mark("host2")) is None


async def orphan(cluster: Any, progress: dict[str, Any], mark: HostMark | None = None) -> str:
    """A drain that a manager left which died at one moment of it."""
    task = Task(
        id="t-1",
        request={"kind": "host.drain", "name": "host1"},
        subject="host/host1",
        state=TaskState.RUNNING,
        created_at=1.0,
        progress=progress,
        worker="m0/1",
    )
    await cluster.records.cas(keys.task(task.id), task, 0)
    if mark is not None:
        await cluster.records.cas(keys.host_mark("host1"), mark, 0)
    return task.id


async def adopted(cluster: Any, task_id: str) -> Task:
    def ended(now: Any) -> Task | None:
        task = now.tasks.get(task_id)
        return task if task is not None and task.state.final else None

    found: Task = await eventually(cluster, ended)
    return found


async def test_a_drain_that_was_called_off_is_not_begun_again_by_who_adopts_it(
    cluster: Any,
) -> None:
    async with cluster.serve():
        await cluster.make_vm("a", start="host1")
        await cluster.make_vm("b", start="host1")
        await cluster.act("POST", "/v1/vms/b/actions/stop", {})
    gone = HostMark(
        state="draining", since=1.0, left=("a", "b"), stopped=("b",), task="t-1", cancelled="me"
    )
    task_id = await orphan(cluster, {"cleared": gone.model_dump(mode="json")})
    async with cluster.serve():
        done = await adopted(cluster, task_id)
        assert done.state is TaskState.CANCELLED, done
        assert where(cluster) == {"a": "host1", "b": "host1"}
        assert cluster.manager.world.cache.snapshot.marks == {}
        assert cluster.manager.world.cache.snapshot.migrations == {}


@pytest.mark.parametrize(("whole", "state"), [(True, "completed"), (False, "failed")])
async def test_a_drain_whose_end_is_written_only_concludes(
    cluster: Any, whole: bool, state: str
) -> None:
    async with cluster.serve():
        await cluster.make_vm("a", start="host1")
    mark = HostMark(state="draining", since=1.0, left=("a",))
    progress = {"ended": "host1 keeps a", "whole": whole, "staying": ["a"], "took_s": 1.0}
    task_id = await orphan(cluster, progress, mark)
    async with cluster.serve():
        done = await adopted(cluster, task_id)
        assert (done.state.value, done.reason) == (state, "host1 keeps a")
        assert where(cluster) == {"a": "host1"}, "nothing moves any more"
        assert cluster.manager.world.cache.snapshot.marks["host1"] == mark
