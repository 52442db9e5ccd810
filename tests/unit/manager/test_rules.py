"""Rules of VMs and settings of the cluster through the API: set, shown, obeyed, refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from manager_fakes import GIB, host_info, refused

from godwit.manager.rooms import rooms_of
from godwit.manager.snapshot import Snapshot
from godwit.model.marks import HostMark
from godwit.model.migration import Migration
from godwit.model.ownership import Owner, OwnerState
from godwit.model.rules import Rules
from godwit.model.settings import ClusterSettings
from godwit.model.task import Task
from godwit.model.vm import Pins, Vm
from godwit.wire.errors import PeerRefused

PINS = Pins(uuid="u", machine="pc-q35-10.0", cpu_model="Nehalem-v1", accelerator="tcg")


async def test_rules_are_given_at_creation_shown_and_changed(api: Any) -> None:
    await api.make_vm("web", ha=True, priority=70, apart=["db", "db"], allow_hosts=["host1"])
    shown = await api.api.get("/v1/vms/web")
    assert shown["rules"] == {
        "priority": 70,
        "order": 0,
        "apart": ["db"],
        "hosts": ["host1"],
        "restarts": 3,
        "autostart": False,
        "on_shutdown": "stop",
    }
    task = await api.act(
        "POST",
        "/v1/vms/web/actions/set",
        {"ha": False, "any_host": True, "order": 4, "on_shutdown": "restart"},
    )
    assert task["state"] == "completed", task
    shown = await api.api.get("/v1/vms/web")
    rules = shown["rules"]
    assert (shown["ha"], rules["hosts"], rules["order"]) == (False, [], 4)
    assert (rules["apart"], rules["priority"]) == (["db"], 70), "what is not said stays"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"allow_hosts": ["host9"]}, 404, "no host host9"),
        ({}, 400, "say what is to change"),
        ({"apart": ["a"], "no_apart": True}, 400, "--no-apart"),
        ({"priority": 101}, 400, "priority"),
    ],
)
async def test_rules_that_cannot_be_are_refused(
    api: Any, body: dict[str, Any], status: int, words: str
) -> None:
    await api.make_vm("web")
    with pytest.raises(PeerRefused) as caught:
        await api.api.post("/v1/vms/web/actions/set", body)
    assert caught.value.status == status
    assert words in caught.value.problem.detail


async def test_a_first_host_that_the_rules_do_not_allow_is_refused(api: Any) -> None:
    with pytest.raises(PeerRefused) as caught:
        await api.make_vm("web", host="host2", allow_hosts=["host1"])
    assert "its rules do not allow host2" in caught.value.problem.detail


async def test_rules_hold_for_starts_and_for_a_destination_that_is_named(api: Any) -> None:
    await api.make_vm("one", apart=["db"], start="host1")
    await api.make_vm("two", apart=["db"])
    task = await api.act("POST", "/v1/vms/two/actions/start", {})
    assert task["result"]["host"] == "host2"
    task = await api.act("POST", "/v1/vms/two/actions/migrate", {"to": "host1"})
    assert task["state"] == "failed"
    assert task["reason"] == "one is on host1, and two is kept apart from it (db)"
    plan = await api.api.post(
        "/v1/vms/two/actions/migrate", {"to": "host1"}, query={"dry_run": True}
    )
    assert plan["checks"][0]["message"] == task["reason"]


async def test_rules_may_change_while_the_vm_moves(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host1"].hold.clear()
    move = await api.api.post("/v1/vms/web/actions/migrate", {})
    await api.agents["host1"].was_asked("migrate")
    task = await api.act("POST", "/v1/vms/web/actions/set", {"priority": 90})
    assert task["state"] == "completed", task
    api.agents["host1"].hold.set()
    done = await api.api.get(f"/v1/tasks/{move['id']}", query={"wait": 10})
    assert done["state"] == "completed", done
    assert (await api.api.get("/v1/vms/web"))["rules"]["priority"] == 90


async def test_a_running_vms_host_knows_before_the_record_says_that_it_is_ha(api: Any) -> None:
    """Else it might be started elsewhere while nobody would stop it here."""
    await api.make_vm("web", start="host1")
    path, agent = "/v1/vms/web/actions/set", api.agents["host1"]
    assert (await api.act("POST", path, {"ha": True}))["state"] == "completed"
    assert agent.said_ha == [("web", True, False), ("web", True, True)]
    assert (await api.api.get("/v1/vms/web"))["ha"] is True
    agent.said_ha.clear()
    assert (await api.act("POST", path, {"ha": False}))["state"] == "completed"
    assert agent.said_ha == [("web", False, False)], "the record first, where it is taken away"
    agent.said_ha.clear()
    assert (await api.act("POST", path, {"priority": 7}))["state"] == "completed"
    assert agent.said_ha == []
    agent.refuse["set-ha"] = refused("its guard is away")
    task = await api.act("POST", path, {"ha": True})
    assert (task["state"], task["reason"]) == ("failed", "its guard is away")
    assert (await api.api.get("/v1/vms/web"))["ha"] is False


async def test_it_cannot_become_ha_while_it_moves(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host1"].hold.clear()
    move = await api.api.post("/v1/vms/web/actions/migrate", {})

    def moving(now: Any) -> bool | None:
        return True if now.owner("web").migration is not None else None

    assert await api.manager.world.cache.until(moving, timeout=10)
    task = await api.act("POST", "/v1/vms/web/actions/set", {"ha": True})
    assert task["state"] == "failed"
    assert "is being moved by m-" in task["reason"]
    assert api.agents["host1"].said_ha == api.agents["host2"].said_ha == []
    api.agents["host1"].hold.set()
    await api.api.get(f"/v1/tasks/{move['id']}", query={"wait": 10})
    task = await api.act("POST", "/v1/vms/web/actions/set", {"ha": True})
    assert task["state"] == "completed", task
    assert api.agents["host2"].said_ha[0] == ("web", True, False)


async def test_settings_are_shown_and_changed_one_by_one(api: Any) -> None:
    path = "/v1/cluster/settings"
    assert await api.api.get(path) == ClusterSettings().model_dump()
    for body in ({"moves_per_host": 2}, {"moves_per_network": 4}):
        task = await api.act("POST", "/v1/cluster/actions/set", body)
        assert task["state"] == "completed", task
    found = await api.api.get(path)
    assert (found["moves_per_host"], found["moves_per_network"]) == (2, 4)


def test_rooms_see_marks_groups_and_moves_that_still_wait() -> None:
    def vm(name: str) -> Vm:
        rules = Rules(apart=("db",))
        return Vm(name=name, cpus=3, memory_bytes=2 * GIB, rules=rules, pins=PINS, created_at=1.0)

    move = Migration(id="m-1", vm="a", source="host1", destination="host2")
    task = Task(
        id="t-1",
        request={"kind": "vm.migrate"},
        subject="vm/a",
        created_at=1.0,
        progress={"migration": "m-1"},
    )
    names = ("host1", "host2")
    world = Snapshot(
        hosts={name: host_info(name) for name in names},
        leases=frozenset(names),
        agents=frozenset(names),
        vms={"a": vm("a")},
        owners={"a": Owner(host="host1", state=OwnerState.RUNNING)},
        migrations={"m-1": move},
        tasks={"t-1": task},
        marks={"host1": HostMark(state="draining", since=1.0, reason="dust")},
        settings=ClusterSettings(cpus_per_core=2),
    )
    free: dict[str, int | None] = dict.fromkeys(names, 8 * GIB)
    first, second = rooms_of(world, free)
    assert (first.state.value, first.reason) == ("draining", "dust; 1 VM is still there")
    assert (second.cpus_promised, second.cpus_limit) == (3, 8)
    assert (second.memory_free_bytes or 0) < 6 * GIB, "what is on its way is promised"
    assert second.groups == {"db": frozenset({"a"})}
    dead = dataclasses.replace(world, tasks={})
    assert rooms_of(dead, free)[1].cpus_promised == 0, "nobody works on that move any more"
