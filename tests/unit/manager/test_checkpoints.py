"""Checkpoints: what is refused, in which order steps happen, what a failure leaves."""

from __future__ import annotations

from typing import Any

import pytest
from manager_disks import SHARED, disk, make_vm, snapshot
from manager_fakes import GIB, refused

from godwit.manager.work.admit import admit
from godwit.manager.work.checkpoint_rules import MOST, with_checkpoint, without_checkpoint
from godwit.model import requests as ask
from godwit.model.errors import Conflict, GodwitError, NotFound, OperationFailed, Refused
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import Backing, Checkpoint, Vm
from godwit.wire.errors import PeerRefused

RUNNING = Owner(host="host1", epoch=1, state=OwnerState.RUNNING)
CREATE = ask.CreateCheckpoint(name="web", checkpoint="one")
REVERT = ask.RevertCheckpoint(name="web", checkpoint="one")
DELETE = ask.DeleteCheckpoint(name="web", checkpoint="one")


def kept(name: str = "one", *disks: str) -> Checkpoint:
    return Checkpoint(
        name=name, tag=f"godwit-{name}-x", disks=disks or ("disk0",), running=True, created_at=1.0
    )


# Decisions.


def test_a_checkpoint_is_in_the_record_once() -> None:
    vm = with_checkpoint(with_checkpoint(make_vm("web", disk(0)), kept("a")), kept("b"))
    assert [one.name for one in with_checkpoint(vm, kept("a", "disk1")).checkpoints] == ["b", "a"]
    assert [one.name for one in without_checkpoint(vm, "a").checkpoints] == ["b"]


VM = make_vm("web", disk(0), checkpoints=(kept(),))
REFUSALS: list[tuple[Vm, Owner, Any, type[GodwitError], str]] = [
    (make_vm("web"), Owner(), CREATE, Refused, "has no disks"),
    (make_vm("web", disk(0, format="raw")), Owner(), CREATE, Refused, "disk0 of web is raw"),
    (
        make_vm("web", disk(0, source="device", volume="", format="raw", path="/dev/sdb")),
        Owner(),
        CREATE,
        Refused,
        "is a device",
    ),
    (make_vm("web", disk(0, format="vhdx")), RUNNING, CREATE, Refused, "disk0 of web is vhdx"),
    (VM, Owner(), CREATE, Conflict, "has a checkpoint one already"),
    (
        make_vm("web", disk(0), checkpoints=tuple(kept(f"c{n}") for n in range(MOST))),
        Owner(),
        CREATE,
        Refused,
        "which is the most",
    ),
    (make_vm("web", disk(0)), Owner(), REVERT, NotFound, "no checkpoint one"),
    (make_vm("web", disk(0)), Owner(), DELETE, NotFound, "no checkpoint one"),
    (VM, RUNNING, REVERT, Refused, "web runs"),
    (VM.but(disks=()), Owner(), REVERT, Refused, "does not have disk0"),
    (VM, Owner(host="h", epoch=1, state=OwnerState.SAVED), DELETE, Refused, "is saved"),
    (VM, Owner(host="h", epoch=1, state=OwnerState.STARTING), CREATE, Conflict, "just starting"),
    (VM, Owner(), ask.RemoveDisk(name="web", disk="disk0"), Refused, "in its checkpoints: one"),
    (
        VM,
        Owner(),
        ask.MoveDisk(name="web", disk="disk0", format="raw"),
        Refused,
        "in its checkpoints: one",
    ),
    (
        make_vm("web", disk(0, backing=Backing(path=f"{SHARED}/a/b.qcow2", format="qcow2"))),
        Owner(),
        ask.MoveDisk(name="web", disk="disk0", format="raw"),
        Refused,
        "is a linked clone's",
    ),
]


@pytest.mark.parametrize(("vm", "owner", "request_", "kind", "words"), REFUSALS)
def test_what_is_refused(
    vm: Vm, owner: Owner, request_: Any, kind: type[GodwitError], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        admit(snapshot(vm, owners={"web": owner}), request_)
    assert caught.value.hint


def test_what_is_allowed() -> None:
    brokered = make_vm("web", disk(0, tier="brokered"), checkpoints=(kept("two"),))
    for owner in (Owner(), RUNNING):
        admit(snapshot(brokered, owners={"web": owner}), CREATE)
    admit(snapshot(brokered), ask.RevertCheckpoint(name="web", checkpoint="two"))
    admit(snapshot(VM, owners={"web": RUNNING}), DELETE)
    admit(snapshot(VM), REVERT)


@pytest.mark.parametrize("request_", [CREATE, REVERT, DELETE])
def test_what_linked_clones_stand_on_stays_as_it_is(request_: Any) -> None:
    base = Backing(path=f"{SHARED}/web/disk0.qcow2", format="qcow2")
    clone = make_vm("two", disk(0, path=f"{SHARED}/two/disk0.qcow2", backing=base))
    vm = make_vm("web", disk(0)) if request_ is CREATE else VM
    with pytest.raises(Refused, match="linked clone stands"):
        admit(snapshot(vm, clone), request_)


@pytest.mark.parametrize(
    "request_",
    [
        ask.StartVm(name="web"),
        ask.CloneVm(name="web", target="two"),
        ask.ExportDisk(name="web", disk="disk0", target=f"{SHARED}/x.qcow2"),
        ask.ResizeDisk(name="web", disk="disk0", size_bytes=4 * GIB),
        ask.CreateCheckpoint(name="web", checkpoint="two"),
        DELETE,
        ask.RevertCheckpoint(name="web", checkpoint="other"),
    ],
)
def test_half_way_back_only_the_same_revert_and_a_deletion_help(request_: Any) -> None:
    vm = VM.but(reverting="one", checkpoints=(kept(), kept("other")))
    with pytest.raises(Conflict, match="half way back to the checkpoint one") as caught:
        admit(snapshot(vm), request_)
    assert caught.value.hint == "finish it: godwit vm checkpoint revert web one"
    admit(snapshot(vm), REVERT)
    admit(snapshot(vm), ask.DeleteVm(name="web"))


# What is done.


async def spec(api: Any) -> Vm:
    found = await api.records.vm("web")
    assert found is not None
    return found.value  # type: ignore[no-any-return]


async def make(api: Any, **more: Any) -> None:
    one = {"volume": "shared", "size_bytes": GIB}
    await api.make_vm("web", disks=[one, one], **more)


async def create(api: Any, name: str = "one") -> Any:
    return await api.act("POST", "/v1/vms/web/checkpoints", {"checkpoint": name})


async def revert(api: Any, name: str = "one") -> Any:
    return await api.act("POST", f"/v1/vms/web/checkpoints/{name}/actions/revert")


def verbs(api: Any, host: str = "host1") -> list[str]:
    found = (verb for verb, _ in api.agents[host].calls)
    return [verb.partition("/")[2] for verb in found if verb.startswith("checkpoints/")]


@pytest.mark.parametrize("start", [None, "host1"])
async def test_made_listed_and_deleted(api: Any, start: str | None) -> None:
    await make(api, start=start)
    task = await create(api)
    assert task["state"] == "completed", task
    (found,) = await api.api.get("/v1/vms/web/checkpoints")
    assert (found["name"], found["disks"]) == ("one", ["disk0", "disk1"])
    assert found["running"] is (start is not None)
    assert (await api.api.get("/v1/vms/web/checkpoints/one")) == found
    agent = api.agents["host1"]
    assert all(tags == [found["tag"]] for tags in agent.tags.values())
    task = await api.act("DELETE", "/v1/vms/web/checkpoints/one")
    assert task["state"] == "completed", task
    assert (await spec(api)).checkpoints == ()
    assert not any(agent.tags.values())
    still = "" if start else "-still"
    assert verbs(api) == [f"take{still}", f"drop{still}"]


async def test_a_stopped_vm_goes_back_and_its_record_with_it(api: Any) -> None:
    await make(api)
    await create(api)
    before = await api.records.owner("web")
    task = await revert(api)
    assert task["state"] == "completed", task
    now = await spec(api)
    assert now.reverting is None
    assert [one.size_bytes for one in now.disks] == [api.agents["host1"].device_bytes] * 2
    assert [one.name for one in now.checkpoints] == ["one"], "it stays, to go back once more"
    after = await api.records.owner("web")
    assert after.revision > before.revision, "a start that had read the record before must fail"
    assert after.value == before.value


async def test_a_disk_that_came_later_stays_and_that_is_said(api: Any) -> None:
    await make(api)
    await create(api)
    await api.act("POST", "/v1/vms/web/disks", {"volume": "shared", "size_bytes": GIB})
    assert (await revert(api))["reason"].endswith("; disk2 came later and stays as it is")


@pytest.mark.parametrize("untouched", [True, False])
async def test_a_revert_that_fails(api: Any, untouched: bool) -> None:
    await make(api)
    await create(api)
    agent = api.agents["host1"]
    error = refused("in use") if untouched else OperationFailed("half way", hint="again")
    agent.refuse["checkpoints/revert"] = error
    assert (await revert(api))["state"] == "failed"
    assert (await spec(api)).reverting == (None if untouched else "one")
    agent.refuse.clear()
    if not untouched:
        with pytest.raises(PeerRefused) as caught:
            await api.act("POST", "/v1/vms/web/actions/start")
        assert "half way back" in caught.value.problem.detail
    assert (await revert(api))["state"] == "completed"
    assert (await spec(api)).reverting is None


async def test_the_machine_says_no_and_the_record_has_none(api: Any) -> None:
    await make(api, start="host1")
    api.agents["host1"].refuse["checkpoints/take"] = OperationFailed("no room", hint="make some")
    task = await create(api)
    assert (task["state"], task["error"]["detail"]) == ("failed", "no room")
    assert (await spec(api)).checkpoints == ()


async def test_a_rest_in_the_images_is_said_and_goes_with_the_next(api: Any) -> None:
    await make(api)
    await create(api)
    agent = api.agents["host1"]
    agent.refuse["checkpoints/drop-still"] = OperationFailed("no path", hint="mend it")
    task = await api.act("DELETE", "/v1/vms/web/checkpoints/one")
    assert "its images still hold it: no path" in task["error"]["detail"]
    assert (await spec(api)).checkpoints == ()
    await create(api, "two")
    assert all(len(tags) == 1 for tags in agent.tags.values())


@pytest.mark.parametrize("lost_at", ["checkpoints/take-still", "checkpoints/revert"])
async def test_adopted_and_done_once(cluster: Any, lost_at: str) -> None:
    agent = cluster.agents["host1"]
    async with cluster.serve():
        await make(cluster)
        path = "/v1/vms/web/checkpoints"
        body: Any = {"checkpoint": "one"}
        if lost_at.endswith("revert"):
            await create(cluster)
            path, body = f"{path}/one/actions/revert", {}
        agent.drop_after.add(lost_at)
        posted = await cluster.api.post(path, body)
        await agent.was_asked(lost_at)
    agent.drop_after.clear()
    async with cluster.serve():
        task = await cluster.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
    assert task["state"] == "completed", task
    now = await spec(cluster)
    assert now.reverting is None
    (found,) = now.checkpoints
    assert all(tags == [found.tag] for tags in agent.tags.values())
