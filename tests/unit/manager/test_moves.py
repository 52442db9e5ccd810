"""Moves through the API: choice, checks, exclusion, queue, cancel, and a manager that dies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from manager_fakes import GIB, refused

from godwit.model import keys
from godwit.model.errors import Conflict
from godwit.model.migration import Migration, MoveState
from godwit.model.requests import MigrateVm
from godwit.model.task import Task, TaskState
from godwit.wire.errors import PeerRefused

HOURGLASS_S = 5.0


async def eventually(cluster: Any, look: Any) -> Any:
    found = await cluster.manager.world.cache.until(look, timeout=HOURGLASS_S)
    assert found is not None, "it did not come about"
    return found


def move_in(state: MoveState, vm: str = "web") -> Any:
    def look(snapshot: Any) -> Migration | None:
        for move in snapshot.migrations.values():
            if move.vm == vm and move.state is state:
                return move  # type: ignore[no-any-return]
        return None

    return look


async def test_a_move_runs_to_its_report(api: Any) -> None:
    await api.make_vm("web", start="host1")
    task = await api.act("POST", "/v1/vms/web/actions/migrate", {"max_blackout_ms": 200})
    assert task["state"] == "completed", task
    assert task["reason"] == "web runs on host2, dark for 42 ms"
    move = await api.api.get(f"/v1/migrations/{task['progress']['migration']}")
    assert (move["source"], move["destination"], move["outcome"]) == (
        "host1",
        "host2",
        "completed",
    )
    assert move["limits"]["max_blackout_ms"] == 200
    assert move["accepted_at"] == task["created_at"]
    assert move["forecast"]["blackout_ms"] == 60
    assert "only host that can" in move["log"][0]
    assert "host1: the VM runs there now" in move["log"][0]
    vm = await api.api.get("/v1/vms/web")
    assert (vm["host"], vm["epoch"], vm["state"]) == ("host2", 2, "running")
    asked = api.agents["host1"].asked("plan")
    assert asked[0]["peer_url"].startswith("https://")
    assert asked[0]["to"] == "host2"


async def test_a_second_move_is_a_conflict_at_once(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host1"].hold.clear()
    path = "/v1/vms/web/actions/migrate"
    answers = await asyncio.gather(
        *(api.api.post(path, {"to": "host2"}) for _ in range(5)), return_exceptions=True
    )
    refusals = [answer for answer in answers if isinstance(answer, PeerRefused)]
    assert len(refusals) == 4, "exactly one of five is admitted"
    assert {no.status for no in refusals} == {409}
    assert {no.error.exit_code for no in refusals} == {4}
    await eventually(api, move_in(MoveState.RUNNING))
    with pytest.raises(PeerRefused) as caught:
        await api.api.post(path, {"to": "host2"})
    assert "godwit migration cancel m-" in caught.value.problem.hint
    assert (await api.api.get("/v1/vms/web"))["state"] == "migrating"
    api.agents["host1"].hold.set()
    await eventually(api, move_in(MoveState.COMPLETED))
    assert len(await api.api.get("/v1/migrations")) == 1


async def test_admission_sees_what_was_admitted_before(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host1"].hold.clear()
    tasks, cache = api.manager.tasks, api.manager.world.cache
    answers = await asyncio.gather(
        *(tasks.submit(MigrateVm(name="web", to="host2"), by="me") for _ in range(3)),
        return_exceptions=True,
    )
    admitted = [answer for answer in answers if isinstance(answer, Task)]
    assert len(admitted) == 1
    assert sum(isinstance(answer, Conflict) for answer in answers) == 2
    assert admitted[0].id in cache.snapshot.tasks, "whoever gets the task can read it"


async def test_same_host_and_unknown_host_are_refused(api: Any) -> None:
    await api.make_vm("web", start="host1")
    for to, status in (("host1", 409), ("host9", 404)):
        with pytest.raises(PeerRefused) as caught:
            await api.api.post("/v1/vms/web/actions/migrate", {"to": to})
        assert caught.value.status == status
    assert await api.api.get("/v1/migrations") == []


async def test_failed_checks_are_told_all_and_leave_no_move(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host1"].checks = [
        {
            "name": "memory",
            "result": "fail",
            "message": "host2 is full",
            "hint": "free some",
        },
        {"name": "cpu", "result": "fail", "message": "no such CPU", "hint": "take another"},
    ]
    task = await api.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2"})
    assert task["state"] == "failed"
    assert task["error"]["code"] == "checks-failed"
    assert task["reason"] == "web cannot move to host2: host2 is full (and 1 more)"
    assert [c["name"] for c in task["error"]["context"]["checks"]] == ["memory", "cpu"]
    assert await api.api.get("/v1/migrations") == []
    assert api.agents["host1"].asked("migrate") == []


async def test_dry_run_plans_and_changes_nothing(api: Any) -> None:
    await api.make_vm("web", start="host1")
    before = (await api.store.range(keys.ROOT)).revision

    async def dry(**body: Any) -> Any:
        answer = await api.api.request(
            "POST", "/v1/vms/web/actions/migrate", json=body, query={"dry_run": True}
        )
        assert answer.status == 200
        return answer.json()

    plan = await dry()
    assert plan["destination"] == "host2"
    assert plan["forecast"]["converges"] is True
    by_host = {c["host"]: c for c in plan["candidates"]}
    assert by_host["host2"]["eligible"] is True
    assert by_host["host1"]["reasons"] == ["the VM runs there now"]
    api.agents["host2"].free = 1 << 20
    plan = await dry()
    assert plan["destination"] is None
    assert plan["checks"][0]["result"] == "fail"
    assert "not enough memory" in plan["candidates"][1]["reasons"][0]
    leases = [kv for kv in (await api.store.range(keys.ROOT)).kvs if kv.mod_revision > before]
    assert leases == []


async def test_moves_that_share_a_host_go_one_after_the_other(api: Any) -> None:
    await api.make_vm("web", start="host1")
    await api.make_vm("db", start="host2")
    api.agents["host1"].hold.clear()
    await api.api.post("/v1/vms/web/actions/migrate", {"to": "host2"})
    first = await eventually(api, move_in(MoveState.RUNNING))
    task = await api.api.post("/v1/vms/db/actions/migrate", {"to": "host1"})

    def waits(snapshot: Any) -> Task | None:
        found = snapshot.tasks[task["id"]]
        return found if found.state is TaskState.WAITING else None

    waiting = await eventually(api, waits)
    assert waiting.reason == (
        f"waits for {first.id} (web from host1 to host2), which uses host2 "
        "(limit: one move per host at a time)"
    )
    await eventually(api, lambda s: move_in(MoveState.WAITING, "db")(s))
    assert api.agents["host2"].asked("migrate") == []
    api.agents["host1"].hold.set()
    done = await api.api.get(f"/v1/tasks/{task['id']}", query={"wait": 5})
    assert done["state"] == "completed"
    assert (await api.api.get("/v1/vms/db"))["host"] == "host1"


async def test_cancel_a_waiting_and_a_running_move(api: Any) -> None:
    await api.make_vm("web", start="host1")
    await api.make_vm("db", start="host2")
    api.agents["host1"].hold.clear()
    first = await api.api.post("/v1/vms/web/actions/migrate", {"to": "host2"})
    running = await eventually(api, move_in(MoveState.RUNNING))
    second = await api.api.post("/v1/vms/db/actions/migrate", {"to": "host1"})
    waiting = await eventually(api, move_in(MoveState.WAITING, "db"))
    task = await api.act("POST", f"/v1/migrations/{waiting.id}/actions/cancel")
    assert task["state"] == "completed"
    ended = await api.api.get(f"/v1/tasks/{second['id']}", query={"wait": 5})
    assert ended["state"] == "cancelled"
    assert ended["error"]["code"] == "cancelled"
    assert api.agents["host2"].asked("migrate") == []
    # A task is cancelled through its move.
    task = await api.act("POST", f"/v1/tasks/{first['id']}/actions/cancel")
    assert task["state"] == "completed", task
    ended = await api.api.get(f"/v1/tasks/{first['id']}", query={"wait": 5})
    assert ended["state"] == "cancelled"
    assert (await api.api.get("/v1/vms/web"))["host"] == "host1"
    task = await api.act("POST", f"/v1/migrations/{running.id}/actions/cancel")
    assert task["error"]["code"] == "refused"
    assert "has ended already: cancelled" in task["reason"]


async def test_cancel_between_acceptance_and_the_first_record(api: Any) -> None:
    """The record still says waiting, but the agent has the move: closing it would be a lie."""
    await api.make_vm("web", start="host1")
    api.agents["host1"].slow_start.clear()
    posted = await api.api.post("/v1/vms/web/actions/migrate", {"to": "host2"})
    await api.agents["host1"].was_asked("migrate")
    move = await eventually(api, move_in(MoveState.WAITING))
    task = await api.act("POST", f"/v1/migrations/{move.id}/actions/cancel")
    assert task["state"] == "completed", task
    assert move.id in api.agents["host1"].cancelled
    ended = await api.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 5})
    assert (ended["state"], ended["reason"]) == ("cancelled", "called off")


async def test_a_refused_launch_closes_the_record(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host1"].refuse["migrate"] = refused("the guard does not answer")
    task = await api.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2"})
    assert task["error"]["code"] == "refused"
    (move,) = await api.api.get("/v1/migrations")
    assert (move["state"], move["reason"]) == ("failed", "the guard does not answer")


async def test_a_launch_nobody_takes_up_fails_and_the_vm_is_free(api: Any) -> None:
    await api.make_vm("web", start="host1")

    async def deaf(_vm: str, _body: Any) -> Any:
        from starlette.responses import Response

        return Response(b"{}", status_code=202)

    api.agents["host1"].do_migrate = deaf
    task = await api.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2"})
    assert task["error"]["code"] == "unavailable"
    assert (await api.api.get("/v1/migrations"))[0]["state"] == "failed"


async def test_a_source_that_stays_silent_ends_as_unknown(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host1"].hold.clear()
    posted = await api.api.post("/v1/vms/web/actions/migrate", {"to": "host2"})
    await eventually(api, move_in(MoveState.RUNNING))
    await api.store.delete(keys.host_lease("host1"))
    task = await api.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 20})
    assert (task["state"], task["error"]["code"]) == ("unknown", "outcome-unknown")
    assert "host1 owns web" in task["reason"]


async def test_the_destination_is_the_emptier_host(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host2"].free = GIB // 8
    task = await api.act("POST", "/v1/vms/web/actions/migrate")
    assert task["error"]["code"] == "refused"
    assert "no host can take web" in task["reason"]


# What another manager left.


async def test_a_manager_that_dies_in_a_move_comes_back_to_it(cluster: Any) -> None:
    async with cluster.serve():
        await cluster.make_vm("web", start="host1")
        cluster.agents["host1"].hold.clear()
        posted = await cluster.api.post("/v1/vms/web/actions/migrate", {"to": "host2"})
        await eventually(cluster, move_in(MoveState.RUNNING))
    left = await cluster.records.task(posted["id"])
    assert left.value.state is TaskState.RUNNING, "the end of a manager ends no task"
    cluster.agents["host1"].hold.set()
    async with cluster.serve():
        task = await cluster.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
        assert task["state"] == "completed", task
        assert task["worker"] == "m1/2"
        assert len(cluster.agents["host1"].asked("migrate")) == 1, "it is not begun twice"


async def test_a_start_whose_answer_was_lost_is_read_off_the_record(api: Any) -> None:
    await api.make_vm("web")
    api.agents["host1"].drop_after.add("start")
    path = "/v1/vms/web/actions/start"
    posted = await api.api.post(path, {"host": "host1"})

    await api.agents["host1"].was_asked("start")
    await api.lose("host1")
    task = await api.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
    assert task["state"] == "completed", task
    assert task["reason"] == "web started on host1 (the answer was lost, the record shows it)"


async def test_a_start_that_nobody_can_confirm_is_unknown(api: Any) -> None:
    await api.make_vm("web")
    api.agents["host1"].drop_before.add("start")
    posted = await api.api.post("/v1/vms/web/actions/start", {"host": "host1"})
    await api.agents["host1"].was_asked("start")
    await api.lose("host1")
    task = await api.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
    assert (task["state"], task["error"]["code"]) == ("unknown", "outcome-unknown")


async def test_a_create_is_adopted_and_makes_its_disks_anew(cluster: Any) -> None:
    body = {
        "name": "web",
        "memory_bytes": 1 << 28,
        "disks": [{"volume": "shared", "size_bytes": 1 << 20}],
    }
    async with cluster.serve():
        cluster.agents["host1"].drop_after.add("create-disks")
        posted = await cluster.api.post("/v1/vms", body)
        await cluster.agents["host1"].was_asked("create-disks")
        uuid = (await cluster.records.vm("web")).value.pins.uuid
    cluster.agents["host1"].drop_after.clear()
    async with cluster.serve():
        task = await cluster.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
        assert task["state"] == "completed", task
        assert (await cluster.api.get("/v1/vms/web"))["uuid"] == uuid
    verbs = [name for name, _ in cluster.agents["host1"].calls]
    assert verbs == ["create-disks", "delete-disks", "create-disks"]


async def test_a_start_is_adopted_and_not_done_twice(cluster: Any) -> None:
    async with cluster.serve():
        await cluster.make_vm("web")
        cluster.agents["host1"].drop_after.add("start")
        posted = await cluster.api.post("/v1/vms/web/actions/start", {"host": "host1"})
        await eventually(
            cluster, lambda s: True if s.owner("web").state.value == "running" else None
        )
    async with cluster.serve():
        task = await cluster.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
    assert task["state"] == "completed", task
    assert "asking manager is gone" in task["reason"]
    assert len(cluster.agents["host1"].asked("start")) == 1
