"""Hosts are updated one after the other; the first failure stops it, with the host kept empty."""

from __future__ import annotations

from typing import Any

from godwit.model import keys
from godwit.model.host import HostInfo
from godwit.model.task import Task

LONG = 25
UPDATE = "/v1/cluster/actions/update"
COMMAND = {"command": "/usr/bin/apt-get -y upgrade"}


async def allowed(api: Any) -> None:
    for name in ("a", "b"):
        await api.make_vm(name, start="host1")
    for agent in api.agents.values():
        agent.commands = [["/usr/bin/apt-get", "-y", "upgrade"]]


def where(api: Any) -> dict[str, str]:
    owners = api.manager.world.cache.snapshot.owners
    return {name: owner.host for name, owner in sorted(owners.items())}


async def state(api: Any, host: str) -> str:
    return str((await api.api.get(f"/v1/hosts/{host}"))["state"])


async def test_each_host_is_emptied_updated_and_filled_again(api: Any) -> None:
    await allowed(api)
    seen: list[tuple[str, str, dict[str, str]]] = []
    for name, agent in api.agents.items():

        async def look(name: str = name) -> None:
            seen.append((name, await state(api, name), where(api)))

        agent.on_upkeep = look
    task = await api.act("POST", UPDATE, COMMAND, wait=LONG)
    assert task["state"] == "completed", task
    assert task["reason"] == "updated: host1, host2"
    assert seen == [
        ("host1", "maintenance", {"a": "host2", "b": "host2"}),
        ("host2", "maintenance", {"a": "host1", "b": "host1"}),
    ]
    assert where(api) == {"a": "host1", "b": "host1"}
    assert [await state(api, name) for name in ("host1", "host2")] == ["up", "up"]


async def test_a_host_that_does_not_allow_it_stops_it_before_anything_moves(api: Any) -> None:
    await allowed(api)
    api.agents["host2"].commands = [["/usr/bin/apt-get", "-y", "dist-upgrade"]]
    task = await api.act("POST", UPDATE, COMMAND, wait=LONG)
    assert task["state"] == "failed"
    assert task["reason"] == "host2 does not allow this command"
    assert "[maintenance] commands = ['/usr/bin/apt-get -y upgrade']" in task["error"]["hint"]
    assert await api.api.get("/v1/migrations") == []
    assert all(not agent.asked("upkeep") for agent in api.agents.values())


async def test_a_command_that_fails_stops_it_there(api: Any) -> None:
    await allowed(api)
    api.agents["host1"].upkeep = {"state": "done", "exit": 100, "output": "a\nE: no space left\n"}
    task = await api.act("POST", UPDATE, COMMAND, wait=LONG)
    assert task["state"] == "failed"
    assert task["reason"] == (
        "the update stopped at host1: the command ended with 100: E: no space left "
        "(updated before: none)"
    )
    assert "godwit host maintenance exit host1 --bring-back" in task["error"]["hint"]
    assert await state(api, "host1") == "maintenance", "nothing starts on what is half updated"
    assert where(api) == {"a": "host2", "b": "host2"}
    assert not api.agents["host2"].asked("upkeep")


async def test_a_host_that_does_not_restart_is_not_healthy(api: Any) -> None:
    await allowed(api)
    body = {**COMMAND, "reboots": True, "healthy_s": 0.3, "hosts": ["host1"]}
    task = await api.act("POST", UPDATE, body, wait=LONG)
    assert task["state"] == "failed"
    assert "host1 is not healthy after 0.3 s: it did not restart" in task["reason"]

    await api.act("POST", "/v1/hosts/host1/actions/exit-maintenance", {})
    agent = api.agents["host1"]

    async def restart() -> None:
        await api.records.update(
            keys.host_info("host1"), HostInfo, lambda info: info.but(boot_id="another")
        )

    agent.on_upkeep = restart
    task = await api.act("POST", UPDATE, {**body, "healthy_s": 10.0}, wait=LONG)
    assert task["state"] == "completed", task


async def test_it_is_called_off_while_it_empties_a_host(api: Any) -> None:
    await allowed(api)
    api.agents["host1"].hold.clear()
    update = await api.api.post(UPDATE, COMMAND)

    def moving(now: Any) -> bool | None:
        return True if any(m.state.value == "running" for m in now.migrations.values()) else None

    assert await api.manager.world.cache.until(moving, timeout=10)
    cancelled = await api.act("POST", f"/v1/tasks/{update['id']}/actions/cancel", {}, wait=LONG)
    assert cancelled["state"] == "completed", cancelled
    ended = await api.api.get(f"/v1/tasks/{update['id']}")
    assert ended["state"] == "cancelled"
    assert where(api) == {"a": "host1", "b": "host1"}
    assert await state(api, "host1") == "up"


async def test_a_manager_that_dies_in_an_update_goes_on_with_the_step(cluster: Any) -> None:
    async with cluster.serve():
        await allowed(cluster)
        cluster.agents["host1"].hold.clear()
        update = await cluster.api.post(UPDATE, COMMAND)

        def moving(now: Any) -> bool | None:
            running = [m for m in now.migrations.values() if m.state.value == "running"]
            return True if running else None

        assert await cluster.manager.world.cache.until(moving, timeout=10)
    cluster.agents["host1"].hold.set()
    async with cluster.serve():

        def ended(now: Any) -> Task | None:
            task = now.tasks.get(update["id"])
            return task if task is not None and task.state.final else None

        done = await cluster.manager.world.cache.until(ended, timeout=LONG)
        assert done is not None
        assert done.state.value == "completed", done
        assert [len(agent.asked("upkeep")) for agent in cluster.agents.values()] == [1, 1]
        assert where(cluster) == {"a": "host1", "b": "host1"}


async def test_a_part_that_was_begun_and_not_noted_is_found_again(cluster: Any) -> None:
    async with cluster.serve():
        await allowed(cluster)
    enter = Task(
        id="t-2",
        request={
            "kind": "host.maintenance.enter",
            "name": "host1",
            "reason": "update (t-1)",
            "allow_quick": False,
            "allow_shutdown": False,
            "force": False,
            "max_blackout_ms": 300.0,
            "deadline_s": 600.0,
        },
        subject="host/host1",
        created_at=1.0,
        by="me (cluster.update t-1)",
        worker="m0/1",
    )
    update = Task(
        id="t-1",
        request={"kind": "cluster.update", **COMMAND, "hosts": ["host1"]},
        subject="cluster/update",
        created_at=1.0,
        by="me",
        progress={"hosts": ["host1"], "done": [], "host": "host1", "step": "enter"},
        worker="m0/1",
    )
    for task in (enter, update):
        await cluster.records.cas(keys.task(task.id), task, 0)
    async with cluster.serve():

        def ended(now: Any) -> Task | None:
            task = now.tasks.get("t-1")
            return task if task is not None and task.state.final else None

        done = await cluster.manager.world.cache.until(ended, timeout=LONG)
        assert done is not None
        assert done.state.value == "completed", done
        entered = [
            task
            for task in cluster.manager.world.cache.snapshot.tasks.values()
            if task.request["kind"] == "host.maintenance.enter"
        ]
        assert [task.id for task in entered] == ["t-2"]
