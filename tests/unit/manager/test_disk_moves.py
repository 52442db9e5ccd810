"""Disks on their way to another image: what is refused, who writes the record, what is left."""

from __future__ import annotations

from typing import Any

import pytest
from manager_disks import SHARED, add, disk, make_vm, snapshot, spec, verbs
from manager_fakes import GIB, host_info

from godwit.manager.work.admit import admit, may_join
from godwit.manager.work.disk_rules import moved_disk
from godwit.model import keys
from godwit.model import requests as ask
from godwit.model.errors import Conflict, InvalidRequest, NotFound, OperationFailed, Refused
from godwit.model.ownership import Owner, OwnerState
from godwit.model.task import Task
from godwit.store.records import encode

MOVE = "/v1/vms/web/disks/disk0/actions/move"


def moving(**fields: Any) -> ask.MoveDisk:
    return ask.MoveDisk(name="web", disk="disk0", **fields)


def test_the_new_image_has_a_name_and_nodes_of_its_own_and_the_same_place() -> None:
    old = disk(tier="direct")
    new = moved_disk(make_vm("web", old), moving(format="vhdx"), mark="abc")
    assert (new.path, new.generation) == (f"{SHARED}/web/disk0-abc.vhdx", 1)
    assert new.tier == "auto", "VHDX is never direct"
    kept = {"format", "path", "generation", "tier"}
    assert new.model_dump(exclude=kept) == old.model_dump(exclude=kept)
    again = moved_disk(make_vm("web", new), moving(to="fast", format="raw"), mark="def")
    assert (again.volume, again.path) == ("fast", "/clusterstorage/fast/web/disk0-def.raw")
    assert again.generation == 2


@pytest.mark.parametrize(
    ("fields", "one", "kind", "words"),
    [
        ({"to": "nope"}, disk(), NotFound, "no volume nope"),
        ({"to": "shared"}, disk(), Refused, "is qcow2 in shared already"),
        ({"format": "qcow2"}, disk(), Refused, "already"),
        ({"format": "vhd"}, disk(size_bytes=3 << 40), InvalidRequest, "at most 2040 GiB"),
        (
            {"to": "shared"},
            disk(source="device", volume="", format="raw", path="/dev/sdb"),
            Refused,
            "is a device",
        ),
        ({"format": "raw"}, disk(3), NotFound, "no disk disk0"),
    ],
)
def test_what_cannot_move(
    fields: dict[str, Any], one: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        admit(snapshot(make_vm("web", one)), moving(**fields))
    assert caught.value.hint  # type: ignore[attr-defined]


def test_a_move_goes_somewhere() -> None:
    with pytest.raises(InvalidRequest, match="say where to"):
        ask.parse_request({"kind": "vm.disk.move", "name": "web", "disk": "disk0"})


def test_nothing_else_begins_while_a_disk_moves_but_a_cut_of_the_power() -> None:
    task = Task(
        id="t-1",
        request={"kind": "vm.disk.move", "name": "web", "disk": "disk0"},
        subject="vm/web",
        created_at=0,
    )
    owner = Owner(host="host1", epoch=1, state=OwnerState.RUNNING)
    world = snapshot(make_vm("web", disk()), owners={"web": owner}, tasks={"t-1": task})
    for request in (
        ask.MigrateVm(name="web", to="host2"),
        ask.AddDisk(name="web", volume="shared", size_bytes=1),
        ask.ResizeDisk(name="web", disk="disk0", size_bytes=9 * GIB),
        ask.SaveVm(name="web"),
        moving(format="raw"),
    ):
        with pytest.raises(Conflict, match="busy") as caught:
            admit(world, request)
        assert "godwit task cancel t-1" in caught.value.hint
    assert may_join(ask.StopVm(name="web", force=True), task)


# Acting.


async def _made(api: Any, *, start: str | None) -> Any:
    await api.make_vm("web", start=start)
    await add(api, size_bytes=GIB)
    for agent in api.agents.values():
        agent.disks |= api.agents[start or "host1"].disks  # one volume for all
    (made,) = (await spec(api)).disks
    return made


async def test_the_host_of_a_running_vm_writes_the_record(api: Any) -> None:
    old = await _made(api, start="host2")
    task = await api.act("POST", MOVE, {"format": "raw"})
    assert task["state"] == "completed", task
    (now,) = (await spec(api)).disks
    assert (now.format, now.generation, now.path) == ("raw", 1, task["result"]["path"])
    assert api.agents["host2"].disks == {now.path}
    assert task["result"]["stood_ms"] == 12.5
    assert "stood still for 12 ms" in task["reason"]
    assert task["progress"]["copied_bytes"] == GIB
    assert "delete-disks" not in verbs(api, "host2"), "the host deletes it by itself"
    assert old.path not in api.agents["host2"].disks


async def test_of_a_stopped_vm_the_record_is_written_then_the_old_image_goes(api: Any) -> None:
    old = await _made(api, start=None)
    task = await api.act("POST", MOVE, {"format": "vhdx"})
    assert task["state"] == "completed", task
    (now,) = (await spec(api)).disks
    assert now.format == "vhdx"
    agent = api.agents["host1"]
    assert agent.disks == {now.path}
    assert verbs(api)[-3:] == ["disks/move", "disk-move/wait", "delete-disks"]
    assert agent.asked("delete-disks")[0]["disks"][0]["path"] == old.path


async def test_a_kept_image_stays(api: Any) -> None:
    old = await _made(api, start=None)
    task = await api.act("POST", MOVE, {"format": "raw", "keep": True})
    assert task["state"] == "completed", task
    assert old.path in api.agents["host1"].disks


@pytest.mark.parametrize("start", ["host1", None])
async def test_a_cancel_leaves_it_where_it_was(api: Any, start: str | None) -> None:
    old = await _made(api, start=start)
    agent = api.agents["host1"]
    agent.hold.clear()
    posted = await api.api.post(MOVE, {"format": "raw"})
    await agent.was_asked("disk-move/wait")
    task = await api.act("POST", f"/v1/tasks/{posted['id']}/actions/cancel", {})
    assert task["state"] == "completed", task
    moved = await api.api.get(f"/v1/tasks/{posted['id']}")
    assert (moved["state"], moved["error"]["code"]) == ("cancelled", "cancelled")
    assert (await spec(api)).disks == (old,)
    assert agent.disks == {old.path}
    again = await api.act("POST", f"/v1/tasks/{posted['id']}/actions/cancel", {})
    assert (again["state"], "has ended already" in again["reason"]) == ("failed", True)


async def test_a_host_that_refuses_or_forgets_changes_nothing(api: Any) -> None:
    old = await _made(api, start="host1")
    agent = api.agents["host1"]
    agent.refuse["disks/move"] = Conflict("the disks of web are being changed", hint="later")
    assert (await api.act("POST", MOVE, {"format": "raw"}))["error"]["hint"] == "later"
    agent.refuse.clear()
    agent.refuse["disk-move/wait"] = NotFound("knows no move", hint="look")
    task = await api.act("POST", MOVE, {"format": "raw"})
    assert (task["state"], "was restarted" in task["reason"]) == ("failed", True)
    assert (await spec(api)).disks == (old,)


async def test_a_volume_that_the_host_does_not_see(api: Any) -> None:
    await _made(api, start="host1")
    other = host_info("host2", volumes=("shared", "far"))
    await api.records.store.put(keys.host_info("host2"), encode(other))
    task = await api.act("POST", MOVE, {"to": "far"})
    assert "does not see the volume far" in task["reason"]


@pytest.mark.parametrize("start", ["host1", None])
@pytest.mark.parametrize("lost_at", ["disks/move", "disk-move/wait"])
async def test_a_move_is_adopted_and_done_once(
    cluster: Any, start: str | None, lost_at: str
) -> None:
    agent = cluster.agents["host1"]
    async with cluster.serve():
        await _made(cluster, start=start)
        agent.drop_after.add(lost_at)
        posted = await cluster.api.post(MOVE, {"format": "raw"})
        await agent.was_asked(lost_at)
    agent.drop_after.clear()
    async with cluster.serve():
        task = await cluster.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
    assert task["state"] == "completed", task
    (now,) = (await spec(cluster)).disks
    assert agent.disks == {now.path}
    assert len(agent.disk_moves) == 1


async def test_a_copy_that_fails_says_why(api: Any) -> None:
    old = await _made(api, start=None)
    agent = api.agents["host1"]
    agent.refuse["disk-move/wait"] = OperationFailed("no space left", hint="make room")
    task = await api.act("POST", MOVE, {"format": "raw"})
    assert (task["state"], task["error"]["detail"]) == ("failed", "no space left")
    assert (await spec(api)).disks == (old,)
