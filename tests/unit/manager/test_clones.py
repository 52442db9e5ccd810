"""Clones of VMs: identity, what is refused, and what a failure or another manager leaves."""

from __future__ import annotations

from typing import Any

import pytest
from manager_disks import SHARED, disk, make_vm, snapshot
from manager_fakes import GIB

from godwit.manager.views import vm_of
from godwit.manager.work.admit import admit
from godwit.manager.work.clone_rules import define_clone
from godwit.model import keys
from godwit.model import requests as ask
from godwit.model.clones import clones_of
from godwit.model.errors import Conflict, Refused
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import Backing, Boot, Nic, Vm
from godwit.wire.errors import PeerRefused

MAC = "02:00:00:00:00:01"


def clone(**fields: Any) -> ask.CloneVm:
    return ask.CloneVm(name="web", target="two", **fields)


def linked(name: str = "two", **changes: Any) -> Vm:
    stands_on = Backing(path=f"{SHARED}/web/disk0.qcow2", format="qcow2")
    path = f"{SHARED}/{name}/disk0.qcow2"
    return make_vm(name, disk(0, path=path, backing=stands_on), **changes)


# Decisions.


def test_a_clone_is_another_of_the_same_kind() -> None:
    vm = make_vm(
        "web",
        disk(0),
        disk(1, format="vhdx", path=f"{SHARED}/web/disk1.vhdx"),
        nics=(Nic(id="net0", network="lan", mac=MAC), Nic(id="net1", network="lan", mac=MAC)),
        boot=Boot(kernel="/clusterstorage/shared/.godwit/boot/aa", append="a=1"),
        ha=True,
    )
    new = define_clone(vm, clone(), uuid="u-2", mark="abc", taken=[MAC], now=9.0)
    assert (new.name, new.pins, new.ha) == ("two", vm.pins.but(uuid="u-2"), True)
    assert [one.path for one in new.disks] == [
        f"{SHARED}/two/disk0-abc.qcow2",
        f"{SHARED}/two/disk1-abc.vhdx",
    ]
    for old, made in zip(vm.disks, new.disks, strict=True):
        assert made.serial != old.serial
        assert (made.id, made.lun, made.format, made.backing) == (old.id, old.lun, old.format, None)
    macs = [nic.mac for nic in new.nics]
    assert MAC not in macs
    assert len(set(macs)) == 2
    assert new.boot == vm.boot
    other = define_clone(vm, clone(append="a=2"), uuid="u-2", mark="abc", taken=[], now=9.0)
    assert other.boot.append == "a=2"


def test_a_linked_clone_names_what_it_stands_on() -> None:
    vm = make_vm("web", disk(0), disk(1, format="raw", path=f"{SHARED}/web/disk1.raw"))
    new = define_clone(vm, clone(linked=True), uuid="u-2", mark="m", taken=[], now=9.0)
    assert [one.format for one in new.disks] == ["qcow2", "qcow2"]
    assert [one.backing for one in new.disks] == [
        Backing(path=f"{SHARED}/web/disk0.qcow2", format="qcow2"),
        Backing(path=f"{SHARED}/web/disk1.raw", format="raw"),
    ]
    assert clones_of(vm, [vm, new]) == ("two",)
    assert clones_of(new, [vm, new]) == ()


@pytest.mark.parametrize("state", [OwnerState.RUNNING, OwnerState.STARTING, OwnerState.SAVED])
def test_only_a_stopped_vm_is_cloned(state: OwnerState) -> None:
    owner = Owner(host="host1", epoch=1, state=state)
    with pytest.raises(Refused, match="made of a stopped VM"):
        admit(snapshot(make_vm("web", disk(0)), owners={"web": owner}), clone())


@pytest.mark.parametrize(
    ("changes", "fields", "words"),
    [
        ({"source": "device", "volume": "", "format": "raw", "path": "/dev/sdb"}, {}, "device"),
        ({"format": "vhdx"}, {"linked": True}, "stands on raw or qcow2"),
        (
            {"backing": Backing(path=f"{SHARED}/a/b.qcow2", format="qcow2")},
            {"linked": True},
            "linked clone itself",
        ),
    ],
)
def test_disks_that_cannot_be_cloned(changes: Any, fields: Any, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        admit(snapshot(make_vm("web", disk(0, **changes))), clone(**fields))
    assert caught.value.hint


def test_a_name_that_is_taken() -> None:
    with pytest.raises(Conflict, match="there is a VM two already"):
        admit(snapshot(make_vm("web", disk(0)), make_vm("two")), clone())


@pytest.mark.parametrize(
    "request_",
    [
        ask.StartVm(name="web"),
        ask.DeleteVm(name="web"),
        ask.AddDisk(name="web", volume="shared", size_bytes=GIB),
        ask.ResizeDisk(name="web", disk="disk0", size_bytes=4 * GIB),
        ask.RemoveDisk(name="web", disk="disk0"),
    ],
)
def test_what_linked_clones_stand_on_stays_as_it_is(request_: Any) -> None:
    found = snapshot(make_vm("web", disk(0)), linked(), linked("three"))
    with pytest.raises(Refused, match="linked clones stand on its images: three, two"):
        admit(found, request_)
    view = vm_of(found, "web")
    assert view is not None
    assert view.clones == ("three", "two")
    admit(snapshot(make_vm("web", disk(0)), make_vm("two", disk(1))), request_)


def test_it_can_be_cloned_again_and_copied() -> None:
    found = snapshot(make_vm("web", disk(0)), linked())
    admit(found, ask.CloneVm(name="web", target="three", linked=True))
    admit(found, ask.ExportDisk(name="web", disk="disk0", target=f"{SHARED}/x.qcow2"))
    admit(found, ask.StartVm(name="two"))


# What is done.


async def spec(api: Any, vm: str) -> Vm | None:
    found = await api.records.vm(vm)
    return found.value if found else None


async def make(api: Any, **more: Any) -> None:
    one = {"volume": "shared", "size_bytes": GIB}
    await api.make_vm("web", disks=[one, one], **more)


async def ask_clone(api: Any, **body: Any) -> Any:
    return await api.act("POST", "/v1/vms/web/actions/clone", {"target": "two", **body})


async def test_a_clone_is_there_once_its_images_are_whole(api: Any) -> None:
    await make(api)
    task = await ask_clone(api, linked=True)
    assert task["state"] == "completed", task
    assert task["reason"] == "two is a linked clone of web"
    made = await spec(api, "two")
    assert made is not None
    assert {one.path for one in made.disks} <= api.agents["host1"].disks
    first = await spec(api, "web")
    assert first is not None
    assert clones_of(first, [made]) == ("two",)
    with pytest.raises(PeerRefused) as caught:
        await api.act("POST", "/v1/vms/web/actions/start")
    assert "a linked clone stands on its images: two" in caught.value.problem.detail
    assert (await api.act("DELETE", "/v1/vms/two"))["state"] == "completed"
    assert {one.path for one in first.disks} == api.agents["host1"].disks
    assert (await api.act("POST", "/v1/vms/web/actions/start"))["state"] == "completed"


async def test_a_clone_that_fails_leaves_nothing(api: Any) -> None:
    await make(api)
    before = set(api.agents["host1"].disks)
    api.agents["host1"].clones_left = 1
    task = await ask_clone(api)
    assert (task["state"], task["error"]["detail"]) == ("failed", "no room")
    assert await spec(api, "two") is None
    assert api.agents["host1"].disks == before


async def test_a_vm_that_starts_meanwhile_is_not_cloned(api: Any) -> None:
    await make(api)
    before = set(api.agents["host1"].disks)

    async def start() -> None:
        owner = Owner(host="host1", epoch=1, state=OwnerState.RUNNING)
        await api.records.update(keys.vm_owner("web"), Owner, lambda _: owner)

    api.agents["host1"].on_clone = start
    task = await ask_clone(api, linked=True)
    assert task["state"] == "failed"
    assert "was started or changed meanwhile" in task["error"]["detail"]
    assert await spec(api, "two") is None
    assert api.agents["host1"].disks == before


async def test_a_start_that_had_read_the_record_before_must_fail(api: Any) -> None:
    await make(api)
    before = await api.records.owner("web")
    await ask_clone(api, linked=True)
    after = await api.records.owner("web")
    assert after.value == before.value
    assert after.revision > before.revision, "a compare-and-swap on what was read fails now"


async def test_a_clone_is_adopted_and_begun_again(cluster: Any) -> None:
    agent = cluster.agents["host1"]
    async with cluster.serve():
        await make(cluster)
        before = set(agent.disks)
        agent.drop_after.add("disks/clone")
        posted = await cluster.api.post("/v1/vms/web/actions/clone", {"target": "two"})
        await agent.was_asked("disks/clone")
    agent.drop_after.clear()
    async with cluster.serve():
        task = await cluster.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
    assert task["state"] == "completed", task
    made = await spec(cluster, "two")
    assert made is not None
    assert agent.disks == before | {one.path for one in made.disks}, (
        "the first try's images are gone"
    )
    assert all(one.path.endswith("2.qcow2") for one in made.disks), "under other names"
