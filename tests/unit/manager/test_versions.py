"""A manager among agents, managers and records of other versions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from godwit.manager.agents import _refusal
from godwit.manager.keyspace import MEMBERS
from godwit.model import keys
from godwit.model.errors import InvalidRequest, TooOld, Unavailable
from godwit.model.skew import our_own
from godwit.model.task import Task, TaskState
from godwit.store.memory import MemoryStore
from godwit.store.records import Records, Unreadable, encode
from godwit.wire.errors import PeerRefused
from godwit.wire.problem import Problem

from .manager_fakes import host_info

OLD = {"version": "0.0.9", "level": 0}


async def rewrite(store: MemoryStore, key: str, **fields: Any) -> None:
    """Write a record as a newer version would: with more in it."""
    found = await store.get(key)
    assert found is not None
    await store.put(key, json.dumps({**json.loads(found.value), **fields}).encode())


async def test_an_agent_that_does_not_know_a_verb_is_named(api: Any) -> None:
    call = api.manager.world.agents.call
    info = api.manager.world.cache.snapshot.hosts["host1"]
    with pytest.raises(TooOld, match="the agent of host1 is too old for this") as caught:
        await call(info, "POST", "/v1/levitations/web", {})
    assert "POST /v1/levitations/web" in caught.value.message
    assert "upgrade Godwit on host1" in caught.value.hint
    with pytest.raises(TooOld, match=r"it is Godwit 0\.0\.9"):
        await call(info.but(**OLD), "POST", "/v1/levitations/web", {})
    with pytest.raises(TooOld, match="is too old for this"):
        await call(info, "DELETE", "/v1/capacity")


async def test_a_word_that_an_older_agent_refuses_is_told_as_that(api: Any) -> None:
    await api.make_vm("web", start="host1")
    agent, world = api.agents["host1"], api.manager.world
    agent.refuse["stop"] = InvalidRequest("softly: Extra inputs are not permitted")
    info = world.cache.snapshot.hosts["host1"]
    with pytest.raises(InvalidRequest):  # of our own version: it is what it says
        await world.agents.call(info, "POST", "/v1/vms/web/stop", {"softly": True})
    with pytest.raises(TooOld, match=r"does not take this .*softly.* it is Godwit 0\.0\.9"):
        await world.agents.call(info.but(**OLD), "POST", "/v1/vms/web/stop", {"softly": True})


async def test_an_agent_is_sent_what_was_said_and_not_what_was_not(api: Any) -> None:
    await api.make_vm("web", start="host1")
    await api.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2", "deadline_s": 60.0})
    asked = api.agents["host1"].asked("plan")[0]
    assert {**asked, "peer_url": ""} == {
        "name": "web",
        "to": "host2",
        "deadline_s": 60.0,
        "peer_url": "",
    }


async def test_a_field_of_the_future_survives_what_the_manager_does(api: Any) -> None:
    await api.make_vm("web", start="host1")
    for key in (keys.vm_spec("web"), keys.vm_owner("web")):
        await rewrite(api.store, key, later={"a": [1, None]})
    await api.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2"})
    await api.act("POST", "/v1/vms/web/actions/set", {"priority": 80})
    await api.act("POST", "/v1/vms/web/actions/stop", {})
    for key in (keys.vm_spec("web"), keys.vm_owner("web")):
        found = await api.store.get(key)
        assert json.loads(found.value)["later"] == {"a": [1, None]}, key
    assert (await api.records.owner("web")).value.epoch == 2
    assert (await api.records.vm("web")).value.rules.priority == 80


async def test_a_vm_that_cannot_be_read_is_told_and_what_it_may_use_stays(api: Any) -> None:
    await api.make_vm("web")
    await rewrite(api.store, keys.vm_spec("web"), cpus="as many as it likes")
    await api.manager.world.cache.reached((await api.store.range(keys.LEADER)).revision)
    status = (await api.api.request("GET", "/v1/cluster")).json()
    assert status["unreadable"] == [keys.vm_spec("web")]
    assert "of a newer version than this manager" in status["words"]
    with pytest.raises(PeerRefused) as caught:
        await api.api.request("DELETE", "/v1/networks/lan")
    assert caught.value.problem.code == "too-old"
    assert "cpus" in caught.value.problem.detail
    with pytest.raises(Unreadable):
        await api.records.vms()
    await rewrite(api.store, keys.vm_spec("web"), cpus=2)
    await api.manager.world.cache.reached((await api.store.range(keys.LEADER)).revision)
    assert (await api.api.request("GET", "/v1/cluster")).json()["unreadable"] == []
    assert (await api.records.vms())["web"].cpus == 2


async def test_a_record_that_cannot_be_read_is_no_decision(api: Any) -> None:
    """What it was is still shown; whoever acts reads it anew, and is refused."""
    await api.make_vm("web", start="host1")
    await rewrite(api.store, keys.vm_owner("web"), state="floating")
    task = await api.act("POST", "/v1/vms/web/actions/stop", {"force": True})
    assert task["state"] == "failed"
    assert task["error"]["code"] == "too-old"
    found = await api.store.get(keys.vm_owner("web"))
    assert json.loads(found.value)["state"] == "floating"


async def test_a_task_in_newer_words_is_left_to_a_newer_manager(cluster: Any) -> None:
    def task(task_id: str, **request: Any) -> Task:
        return Task(
            id=task_id,
            request=request,
            subject="host/host1",
            state=TaskState.RUNNING,
            created_at=1.0,
            worker="m0/1",
        )

    newer = task("t-1", kind="host.levitate", name="host1")
    known = task("t-2", kind="host.drain", name="nobody")
    for one in (newer, known):
        await cluster.records.cas(keys.task(one.id), one, 0)

    async with cluster.serve():
        ended = await cluster.manager.world.cache.until(
            lambda now: now.tasks["t-2"] if now.tasks["t-2"].state.final else None, timeout=5
        )
        assert ended is not None
        assert cluster.manager.world.cache.snapshot.tasks["t-1"] == newer


async def test_managers_tell_what_they_are(api: Any) -> None:
    await api.manager.world.cache.until(lambda now: now.members or None, timeout=5)
    await api.store.put(MEMBERS + "m9.1", b"{}")
    await api.manager.world.cache.reached((await api.store.range(keys.LEADER)).revision)
    found = (await api.api.request("GET", "/v1/cluster")).json()
    said = {one["name"]: one for one in found["managers"]}
    assert said["m1"]["version"] == our_own().version
    assert said["m1"]["next"] == ""
    assert "tells no version" in said["m9"]["next"]
    assert "upgrade the manager of m9" in found["words"]


async def test_lists_leave_out_what_cannot_be_read_where_that_concludes_nothing() -> None:
    records = Records(MemoryStore())
    await records.store.put(keys.host_info("host1"), encode(host_info("host1")))
    await records.store.put(keys.host_info("host2"), b'{"name": "host2", "cpus": "many"}')
    assert set(await records.hosts()) == {"host1"}
    await records.store.put(keys.vm_spec("web"), b"{}")
    with pytest.raises(Unreadable) as caught:
        await records.vms()
    assert caught.value.exit_code == 4
    assert isinstance(caught.value, ValueError)
    await records.store.aclose()


def test_something_else_that_answers_is_no_old_agent() -> None:
    error = PeerRefused(Problem(status=502, code="http-502", detail="Bad Gateway"))
    peer = "the agent of host1"
    found = _refusal("host1", peer, error, asked=our_own(), verb="x")
    assert isinstance(found, Unavailable)
