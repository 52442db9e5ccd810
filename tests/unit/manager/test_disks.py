"""Disks and volumes: what is refused, in which order steps happen, what a failure leaves."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from manager_disks import SHARED, add, disk, make_vm, snapshot, spec, verbs
from manager_fakes import GIB, host_info, refused
from pydantic import ValidationError

from godwit.manager.snapshot import Snapshot
from godwit.manager.views import all_volumes, view_disks
from godwit.manager.work.actions import ACTS
from godwit.manager.work.admit import admit
from godwit.manager.work.define_acts import helpers
from godwit.manager.work.disk_rules import define_disk, define_volume, moved_disk
from godwit.model import keys
from godwit.model import requests as ask
from godwit.model.errors import Conflict, InvalidRequest, NotFound, OperationFailed, Refused
from godwit.model.ownership import MoveIntent, Owner, OwnerState, SavedState
from godwit.model.task import Task
from godwit.model.vm import Boot
from godwit.model.volume import Volume, VolumeOnHost, VolumeState
from godwit.store.records import encode
from godwit.wire.errors import PeerRefused

# Decisions.


def test_every_request_has_its_act() -> None:
    from godwit.manager.api.actions import KINDS

    assert set(ACTS) == set(KINDS.values())


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vhd-fixed", "vhd", "vhdx"])
def test_a_new_disk_takes_the_next_place_and_a_name_of_its_own(image_format: Any) -> None:
    vm = make_vm("web", disk(0), disk(2))
    request = ask.AddDisk(name="web", volume="shared", size_bytes=GIB, format=image_format)
    found = define_disk(vm, request, size_bytes=GIB, mark="abc")
    assert (found.id, found.lun, found.format) == ("disk1", 1, image_format)
    assert found.path.startswith(f"{SHARED}/web/disk1-abc.")
    assert found.serial not in {one.serial for one in vm.disks}


def test_images_and_devices_are_taken_as_they_are() -> None:
    vm = make_vm()

    def path(**fields: Any) -> tuple[str, str, str]:
        request = ask.AddDisk(name="web", **fields)
        found = define_disk(vm, request, size_bytes=1, mark="m")
        return found.path, found.volume, found.format

    image = {"volume": "shared", "format": "vhd"}
    assert path(**image, path="old/x.vhd") == (f"{SHARED}/old/x.vhd", "shared", "vhd")
    assert path(**image, path=f"{SHARED}/x.vhd") == (f"{SHARED}/x.vhd", "shared", "vhd")
    assert path(device="/dev/sdb") == ("/dev/sdb", "", "raw")


def test_places_run_out() -> None:
    full = make_vm("web", *(disk(number) for number in range(256)))
    request = ask.AddDisk(name="web", volume="shared", size_bytes=1)
    with pytest.raises(Refused, match="at most 256 disks"):
        admit(snapshot(full), request)


IMAGE: dict[str, Any] = {"volume": "shared", "format": "raw"}
ADD_REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"volume": "nope", "size_bytes": 1}, NotFound, "no volume nope"),
    ({**IMAGE, "path": "../other/x"}, InvalidRequest, "does not lie in the volume"),
    ({**IMAGE, "path": "/etc/shadow"}, InvalidRequest, "does not lie in the volume"),
    ({**IMAGE, "path": "/clusterstorage/other/x"}, InvalidRequest, "does not lie"),
    ({**IMAGE, "path": "db/disk0.raw"}, Refused, "is disk0 of db"),
    ({"device": "/dev/sdb"}, Refused, "is disk1 of db"),
]


@pytest.mark.parametrize(("fields", "kind", "words"), ADD_REFUSALS)
def test_adding_is_refused_with_reason_and_hint(
    fields: dict[str, Any], kind: type[Exception], words: str
) -> None:
    device = disk(1, source="device", volume="", format="raw", path="/dev/sdb")
    other = make_vm("db", disk(path=f"{SHARED}/db/disk0.raw", format="raw"), device)
    with pytest.raises(kind, match=words) as caught:
        admit(snapshot(make_vm(), other), ask.AddDisk(name="web", **fields))
    assert caught.value.hint  # type: ignore[attr-defined]


MOVE = MoveIntent(id="m-1", method="live", source="host1", destination="host2")
SAVED = SavedState(path=f"{SHARED}/web/saved-1.mem", epoch=1, disk_ids=("disk0",))


@pytest.mark.parametrize(
    "request_",
    [
        ask.AddDisk(name="web", volume="shared", size_bytes=1),
        ask.RemoveDisk(name="web", disk="disk0"),
        ask.ResizeDisk(name="web", disk="disk0", size_bytes=3 * GIB),
        ask.ExportDisk(name="web", disk="disk0", target=f"{SHARED}/copy.qcow2"),
    ],
)
def test_disks_stay_as_they_are_while_the_vm_is_elsewhere_with_its_mind(request_: Any) -> None:
    def with_owner(**owner: Any) -> Snapshot:
        return snapshot(make_vm("web", disk()), owners={"web": Owner(host="host1", **owner)})

    assert admit(with_owner(), request_) == "vm/web"
    with pytest.raises(Conflict, match="is being moved by m-1"):
        admit(with_owner(epoch=1, state=OwnerState.RUNNING, migration=MOVE), request_)
    with pytest.raises(Conflict, match="just starting"):
        admit(with_owner(epoch=1, state=OwnerState.STARTING), request_)
    with pytest.raises(Refused, match="is saved"):
        admit(with_owner(epoch=1, state=OwnerState.SAVED, saved=SAVED), request_)
    task = Task(id="t-1", request={"kind": "vm.disk.add"}, subject="vm/web", created_at=0)
    with pytest.raises(Conflict, match="busy"):
        admit(dataclasses.replace(with_owner(), tasks={"t-1": task}), request_)
    with pytest.raises(NotFound, match="no vm web"):
        admit(snapshot(), request_)


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (ask.RemoveDisk(name="web", disk="disk9"), NotFound, "no disk disk9"),
        (ask.ResizeDisk(name="web", disk="disk9", size_bytes=1), NotFound, "no disk disk9"),
        (ask.ResizeDisk(name="web", disk="disk0", size_bytes=GIB), Refused, "only grows"),
        (ask.ResizeDisk(name="web", disk="disk1", size_bytes=3 << 40), InvalidRequest, "2040"),
        (ask.ExportDisk(name="web", disk="disk0", target=f"{SHARED}/x"), Refused, "runs and"),
    ],
)
def test_what_cannot_be_done_to_a_disk(request_: Any, kind: type[Exception], words: str) -> None:
    vm = make_vm("web", disk(0), disk(1, format="vhd-fixed"))
    owner = Owner(host="host1", epoch=1, state=OwnerState.RUNNING)
    with pytest.raises(kind, match=words):
        admit(snapshot(vm, owners={"web": owner}), request_)


@pytest.mark.parametrize("target", ["/etc/cron.d/x", "x", f"{SHARED}/../../etc/x", SHARED])
def test_copies_stay_in_volumes(target: str) -> None:
    vm = make_vm("web", disk())
    with pytest.raises(InvalidRequest, match="is not a file in a volume"):
        admit(snapshot(vm), ask.ExportDisk(name="web", disk="disk0", target=target))


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("/etc/shadow", InvalidRequest),
        (f"{SHARED}/../../etc/shadow", InvalidRequest),
        ("file:///etc/shadow", InvalidRequest),
        ("ftp://example.org/x", InvalidRequest),
        ("https://", InvalidRequest),
        ("http://[", InvalidRequest),
        ("https://example.org/a\nb", InvalidRequest),
        ("json:{}", InvalidRequest),
        ("", InvalidRequest),
        ("/clusterstorage/nope/x", NotFound),
        (f"{SHARED}/web/disk0.qcow2", Refused),
    ],
)
def test_imports_come_from_volumes_and_the_web_only(source: str, kind: type[Exception]) -> None:
    request = ask.ImportDisk(volume="shared", name="debian", source=source)
    with pytest.raises(kind):
        admit(snapshot(make_vm("web", disk())), request)
    good = request.but(source="https://example.org/debian.qcow2")
    assert admit(snapshot(), good) == "image/shared/debian"


def test_volumes_promise_what_hosts_see() -> None:
    world = snapshot(hosts={"host1": host_info("host1", volumes=("shared", "own"))})
    assert admit(world, ask.CreateVolume(name="shared")) == "volume/shared"
    assert admit(world, ask.CreateVolume(name="own", type="local")) == "volume/own"
    assert admit(world, ask.CreateVolume(name="later", type="local")) == "volume/later"
    with pytest.raises(Refused, match="no host sees /clusterstorage/nfs"):
        admit(world, ask.CreateVolume(name="nfs"))
    assert admit(snapshot(), ask.CreateVolume(name="shared", type="local")) == "volume/shared"
    with pytest.raises(InvalidRequest, match="no whole path"):
        admit(world, ask.CreateVolume(name="shared", path="srv"))
    defined = dataclasses.replace(world, volumes={"shared": Volume(name="shared")})
    with pytest.raises(Conflict, match="there is a volume shared already"):
        admit(defined, ask.CreateVolume(name="shared"))
    with pytest.raises(NotFound):
        admit(world, ask.DeleteVolume(name="shared"))
    assert admit(defined, ask.DeleteVolume(name="shared")) == "volume/shared"


NFS = Volume(name="far", kind="nfs", server="10.94.0.1", export="/srv")
LUNS = Volume(name="luns", kind="iscsi", portal="10.94.0.1", target="iqn.2026-11.example:a")


def test_served_volumes_need_no_directory() -> None:
    request = ask.CreateVolume(name="far", type="nfs", server="10.94.0.1", export="/srv")
    assert admit(snapshot(), request) == "volume/far"
    made = define_volume(snapshot(), request, now=0.0)
    assert made.but(coordinator=None) == NFS
    for wrong in (
        {"type": "nfs", "server": "h"},
        {"type": "nfs", "server": "h", "export": "srv"},
        {"type": "nfs", "server": "h", "export": "/a/../b"},
        {"type": "nfs", "server": "h;x", "export": "/srv"},
        {"type": "dir", "server": "h"},
        {"type": "iscsi", "portal": "h"},
        {"type": "iscsi", "portal": "h", "target": "iqn x"},
        {"type": "nfs", "server": "h", "export": "/srv", "path": "/x"},
    ):
        with pytest.raises(ValidationError):
            ask.CreateVolume.model_validate({"name": "far", **wrong})


def test_a_volume_of_luns_has_luns_only() -> None:
    world = snapshot(make_vm("web"), volumes={"luns": LUNS, "far": NFS})
    lun = ask.AddDisk(name="web", volume="luns", lun=2)
    assert admit(world, lun) == "vm/web"
    disk2 = define_disk(world.vms["web"], lun, size_bytes=512, mark="x")
    assert (disk2.path, disk2.source) == ("/clusterstorage/luns/lun-2", "lun")
    assert disk2.passthrough
    brokered = define_disk(world.vms["web"], lun.but(tier="brokered"), size_bytes=512, mark="x")
    assert not brokered.passthrough
    for wrong in (
        ask.AddDisk(name="web", volume="luns", size_bytes=1 << 20),
        ask.AddDisk(name="web", volume="far", lun=1),
        ask.ImportDisk(volume="luns", name="d", source="https://example.org/d"),
    ):
        with pytest.raises(Refused):
            admit(world, wrong)
    taken = snapshot(make_vm("web"), make_vm("db", disk2), volumes={"luns": LUNS})
    with pytest.raises(Refused, match="lun-2 is"):
        admit(taken, lun)


def test_of_a_ceph_pool_only_what_is_there_becomes_a_disk() -> None:
    request = ask.CreateVolume(name="ceph", type="rbd", pool="vms/mine", client="godwit")
    volume = define_volume(snapshot(), request, now=0.0)
    assert (volume.kind, volume.pool, volume.client) == ("rbd", "vms/mine", "godwit")
    for wrong in (
        {"pool": "vms"},
        {"pool": "a/b/c", "client": "x"},
        {"pool": "a", "client": "x y"},
    ):
        with pytest.raises(ValidationError):
            ask.CreateVolume.model_validate({"name": "ceph", "type": "rbd", **wrong})
    world = snapshot(make_vm("web", disk(0)), volumes={"ceph": volume})
    there = ask.AddDisk(name="web", volume="ceph", path="old-web", format="raw")
    assert admit(world, there) == "vm/web"
    made = define_disk(world.vms["web"], there, size_bytes=512, mark="x", rbd=world.rbd_volumes)
    assert (made.path, made.source) == ("/clusterstorage/ceph/old-web", "lun")
    assert not made.passthrough, "no guest commands Ceph"
    for refused_one in (
        ask.AddDisk(name="web", volume="ceph", size_bytes=1 << 20),
        ask.AddDisk(name="web", volume="ceph", path="old-web", format="qcow2"),
        ask.AddDisk(name="web", volume="ceph", lun=1),
        ask.MoveDisk(name="web", disk="disk0", to="ceph"),
        ask.ImportDisk(volume="ceph", name="d", source="https://example.org/d"),
    ):
        with pytest.raises(Refused):
            admit(world, refused_one)


USERS: list[dict[str, Any]] = [
    {"vms": {"web": make_vm("web", disk())}},
    {"vms": {"web": make_vm("web", boot=Boot(kernel=f"{SHARED}/.godwit/boot/aa"))}},
    {"vms": {"web": make_vm("web")}, "owners": {"web": Owner(saved=SAVED)}},
]


@pytest.mark.parametrize("fields", USERS)
def test_a_volume_in_use_is_not_forgotten(fields: dict[str, Any]) -> None:
    world = snapshot(volumes={"shared": Volume(name="shared")}, **fields)
    with pytest.raises(Refused, match="is used by web"):
        admit(world, ask.DeleteVolume(name="shared"))


def test_of_a_local_volume_each_host_has_its_own() -> None:
    hosts = {name: host_info(name, volumes=("shared", "own")) for name in ("host1", "host2")}
    volumes = {"own": Volume(name="own", kind="local"), "shared": Volume(name="shared")}
    one = disk(volume="own", path="/clusterstorage/own/web/disk0.qcow2", local=True)
    vm = make_vm("web", one)
    world = snapshot(vm, hosts=hosts, volumes=volumes, owners={"web": Owner(host="host2")})

    def names(*given: Any, **more: Any) -> list[str]:
        return [info.name for info in helpers(world, *given, **more)]

    assert names(vm) == ["host2"], "its disks are nowhere else"
    assert names(None, prefer="host1", volumes={"own"}) == ["host1"]
    assert names(None, volumes={"own"}) == []
    assert names(None, volumes={"shared"}) == ["host1", "host2"]
    request = ask.CreateVm(
        name="db", memory_bytes=1 << 28, disks=[{"volume": "own", "size_bytes": 1}]
    )
    with pytest.raises(InvalidRequest, match="its own volume own"):
        admit(world, request)
    assert admit(world, request.but(host="host1")) == "vm/db"
    added = ask.AddDisk(name="web", volume="own", size_bytes=1)
    local = world.local_volumes
    assert define_disk(vm, added, size_bytes=1, mark="m", local=local).local
    moved = ask.MoveDisk(name="web", disk="disk0", to="shared")
    assert not moved_disk(vm, moved, mark="m", local=local).local
    back = vm.but(disks=(disk(),))
    assert moved_disk(back, moved.but(to="own"), mark="m", local=local).local


def test_a_volume_under_an_import_is_not_forgotten() -> None:
    request = ask.ImportDisk(volume="shared", name="d", source="https://example.org/d")
    task = Task(id="t-1", request={}, subject=ask.subject_of(request), created_at=0)
    world = snapshot(volumes={"shared": Volume(name="shared")}, tasks={"t-1": task})
    with pytest.raises(Conflict, match="t-1 writes to it"):
        admit(world, ask.DeleteVolume(name="shared"))


# Views.


def test_a_volume_tells_how_each_host_reaches_it() -> None:
    def seen(state: VolumeState, reason: str = "", **more: Any) -> VolumeOnHost:
        return VolumeOnHost(state=state, reason=reason, **more)

    world = snapshot(
        volumes={"shared": Volume(name="shared", coordinator="host1")},
        volume_states={
            "shared/host1": seen(VolumeState.DIRECT, capacity_bytes=100, used_bytes=10, since=1),
            "shared/host2": seen(
                VolumeState.REDIRECTED,
                "lost path to LUN 3",
                capacity_bytes=100,
                used_bytes=11,
                since=2,
            ),
            "other/host1": seen(VolumeState.PAUSED, capacity_bytes=1, used_bytes=1, since=9),
        },
    )
    (view,) = [one for one in all_volumes(world) if one.name == "shared"]
    assert view.health == "degraded"
    assert (view.capacity_bytes, view.used_bytes, view.coordinator) == (100, 11, "host1")
    assert {host: (one.state.value, one.reason) for host, one in view.hosts.items()} == {
        "host1": ("direct", ""),
        "host2": ("redirected", "lost path to LUN 3"),
    }
    one_down = dataclasses.replace(world, leases=frozenset({"host2"}))
    (view,) = [one for one in all_volumes(one_down) if one.name == "shared"]
    assert view.hosts["host1"].state is VolumeState.UNAVAILABLE
    assert "host1 is down" in view.hosts["host1"].reason
    none = dataclasses.replace(world, leases=frozenset())
    assert {one.health for one in all_volumes(none)} == {"unavailable"}
    plain = snapshot()
    (view,) = all_volumes(plain)
    assert (view.health, view.capacity_bytes, view.path) == ("ok", None, SHARED)


def test_disks_are_listed_by_place_with_their_tier() -> None:
    vm = make_vm("web", disk(1, format="vhdx"), disk(0))
    found = [(one.id, one.effective_tier) for one in view_disks(vm)]
    assert found == [("disk0", "direct"), ("disk1", "brokered")]


# Acting, on real routes and fake agents.


async def test_a_stopped_vm_gets_grows_and_loses_a_disk(api: Any) -> None:
    await api.make_vm("web")
    made = await add(api, size_bytes=GIB, format="vhdx", tier="auto")
    (found,) = (await spec(api)).disks
    assert (found.id, found.format, found.path) == ("disk0", "vhdx", made["path"])
    assert api.agents["host1"].disks == {found.path}
    (row,) = await api.api.get("/v1/vms/web/disks")
    assert (row["effective_tier"], row["tier"]) == ("brokered", "auto")
    body = {"size_bytes": 2 * GIB - 1}
    task = await api.act("POST", "/v1/vms/web/disks/disk0/actions/resize", body)
    assert task["result"]["size_bytes"] == 2 * GIB, "what the host says counts"
    assert (await spec(api)).disks[0].size_bytes == 2 * GIB
    task = await api.act("POST", "/v1/vms/web/disks/disk0/actions/remove")
    assert task["state"] == "completed", task
    assert (await spec(api)).disks == ()
    assert api.agents["host1"].disks == set()
    assert verbs(api) == ["create-disks", "disks/grow", "delete-disks"]
    kinds = [event.value.kind for event in (await _events(api)).values()]
    for kind in ("vm.disk-added", "vm.disk-resized", "vm.disk-removed"):
        assert kind in kinds


async def _events(api: Any) -> Any:
    from godwit.model.event import Event

    return await api.records.list(keys.EVENTS, Event)


async def test_a_vm_starts_where_its_own_disks_are(api: Any) -> None:
    await api.records.cas(keys.volume("shared"), Volume(name="shared", kind="local"), 0)
    disks = [{"volume": "shared", "size_bytes": GIB}]
    await api.make_vm("web", disks=disks, host="host2")
    (found,) = (await spec(api)).disks
    assert found.local
    assert verbs(api, "host2") == ["create-disks"]
    assert verbs(api, "host1") == []
    task = await api.act("POST", "/v1/vms/web/actions/start", {"host": "host1"})
    assert (task["state"], "own storage of host2" in task["reason"]) == ("failed", True)
    task = await api.act("POST", "/v1/vms/web/actions/start", {})
    assert task["result"]["host"] == "host2"


async def test_a_running_vm_gets_grows_and_loses_a_disk(api: Any) -> None:
    await api.make_vm("web", start="host2")
    await add(api, size_bytes=GIB)
    agent = api.agents["host2"]
    assert agent.plugged == {"web": {"disk0"}}
    body = {"size_bytes": 3 * GIB}
    task = await api.act("POST", "/v1/vms/web/disks/disk0/actions/resize", body)
    assert task["state"] == "completed", task
    assert (await spec(api)).disks[0].size_bytes == 3 * GIB
    body = {"force": True, "keep": True}
    task = await api.act("POST", "/v1/vms/web/disks/disk0/actions/remove", body)
    assert task["state"] == "completed", task
    assert agent.asked("disks/remove") == [{"disk": "disk0", "force": True}]
    assert (await spec(api)).disks == ()
    (kept,) = agent.disks
    # The place is free again; the image that was kept is not in the way and not touched.
    await add(api, size_bytes=GIB)
    assert kept in agent.disks
    assert len(agent.disks) == 2
    assert verbs(api, "host2") == [
        *("create-disks", "disks/add", "disks/resize", "disks/remove"),
        *("create-disks", "disks/add"),
    ]
    assert verbs(api, "host1") == []


async def test_the_machine_says_no_and_nothing_is_left(api: Any) -> None:
    await api.make_vm("web", start="host1")
    agent = api.agents["host1"]
    agent.refuse["disks/add"] = OperationFailed("QEMU says no", hint="ask it why")
    task = await api.act("POST", "/v1/vms/web/disks", {"volume": "shared", "size_bytes": GIB})
    assert (task["state"], task["error"]["detail"]) == ("failed", "QEMU says no")
    assert (await spec(api)).disks == ()
    assert agent.disks == set()


async def test_the_machine_does_not_answer_and_the_record_keeps_the_disk(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host1"].drop_after.add("disks/add")
    posted = await api.api.post("/v1/vms/web/disks", {"volume": "shared", "size_bytes": GIB})
    await api.agents["host1"].was_asked("disks/add")
    await asyncio.sleep(0.05)
    await api.lose("host1")
    task = await api.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
    assert (task["state"], task["error"]["code"]) == ("unknown", "outcome-unknown")
    assert [one.id for one in (await spec(api)).disks] == ["disk0"]
    assert len(api.agents["host1"].disks) == 1


async def test_an_image_that_cannot_be_made_leaves_no_disk(api: Any) -> None:
    await api.make_vm("web")
    api.agents["host1"].refuse["create-disks"] = OperationFailed("no space left", hint="make room")
    task = await api.act("POST", "/v1/vms/web/disks", {"volume": "shared", "size_bytes": GIB})
    assert task["error"]["detail"] == "no space left"
    assert (await spec(api)).disks == ()


async def test_an_image_that_was_there_is_measured_and_left_alone_on_failure(api: Any) -> None:
    await api.make_vm("web", start="host1")
    agent, path = api.agents["host1"], f"{SHARED}/old.vhd"
    agent.disks.add(path)
    agent.refuse["disks/add"] = refused("no")
    body = {"volume": "shared", "path": "old.vhd", "format": "vhd"}
    assert (await api.act("POST", "/v1/vms/web/disks", body))["state"] == "failed"
    assert agent.disks == {path}
    agent.refuse.clear()
    await add(api, path="old.vhd", format="vhd")
    (found,) = (await spec(api)).disks
    assert (found.path, found.size_bytes) == (path, agent.device_bytes)
    await api.make_vm("db")
    with pytest.raises(PeerRefused) as caught:
        await api.api.post("/v1/vms/db/disks", body)
    assert "is disk0 of web" in caught.value.problem.detail
    assert "create-disks" not in verbs(api)


async def test_a_device_says_its_size_and_is_never_deleted(api: Any) -> None:
    await api.make_vm("web", start="host1")
    task = await api.act("POST", "/v1/vms/web/disks", {"device": "/dev/sdb"})
    assert task["state"] == "completed", task
    (found,) = (await spec(api)).disks
    assert (found.source, found.size_bytes) == ("device", api.agents["host1"].device_bytes)
    assert "5 GiB" in task["reason"]
    task = await api.act("POST", "/v1/vms/web/disks/disk0/actions/remove")
    assert task["reason"] == "disk0 removed, /dev/sdb stays"
    assert verbs(api) == ["disks/add", "disks/remove"]
    await api.act("POST", "/v1/vms/web/actions/stop", {"force": True})
    task = await api.act("POST", "/v1/vms/web/disks", {"device": "/dev/sdb"})
    assert task["state"] == "completed", task
    assert (await spec(api)).disks[0].size_bytes == api.agents["host1"].device_bytes


async def test_a_guest_that_writes_keeps_its_disk(api: Any) -> None:
    await api.make_vm("web", start="host1")
    await add(api, size_bytes=GIB)
    api.agents["host1"].refuse["disks/remove"] = refused("the guest of web writes to disk0")
    task = await api.act("POST", "/v1/vms/web/disks/disk0/actions/remove")
    assert (task["state"], task["error"]["code"]) == ("failed", "refused")
    assert len((await spec(api)).disks) == 1
    assert len(api.agents["host1"].disks) == 1


async def test_a_disk_that_the_machine_has_lost_is_removed_all_the_same(api: Any) -> None:
    await api.make_vm("web", start="host1", disks=[{"volume": "shared", "size_bytes": GIB}])
    task = await api.act("POST", "/v1/vms/web/disks/disk0/actions/remove")
    assert task["state"] == "completed", task
    assert (await spec(api)).disks == ()


async def test_a_file_that_stays_is_said_so(api: Any) -> None:
    await api.make_vm("web", disks=[{"volume": "shared", "size_bytes": GIB}])
    for agent in api.agents.values():
        agent.refuse["delete-disks"] = OperationFailed("read-only file system", hint="look")
    task = await api.act("POST", "/v1/vms/web/disks/disk0/actions/remove")
    assert task["state"] == "failed"
    assert f"{SHARED}/web/disk0.qcow2 could not be deleted" in task["error"]["detail"]
    assert (await spec(api)).disks == ()


async def test_a_kept_image_survives_a_new_vm_of_the_same_name(api: Any) -> None:
    await api.make_vm("web", disks=[{"volume": "shared", "size_bytes": GIB}])
    await api.act("POST", "/v1/vms/web/disks/disk0/actions/remove", {"keep": True})
    await api.act("DELETE", "/v1/vms/web")
    body = {
        "name": "web",
        "memory_bytes": 1 << 28,
        "disks": [{"volume": "shared", "size_bytes": GIB}],
    }
    task = await api.act("POST", "/v1/vms", body)
    assert (task["state"], task["error"]["code"]) == ("failed", "conflict")
    assert api.agents["host1"].disks == {f"{SHARED}/web/disk0.qcow2"}
    assert (await api.store.range(keys.VMS)).kvs == ()


async def test_a_vm_that_starts_meanwhile_does_not_get_the_disk(api: Any) -> None:
    await api.make_vm("web")
    agent = api.agents["host1"]
    real = agent.do_create_disks

    async def made_while_it_starts(vm: str, body: Any) -> Any:
        await agent.do_start(vm, {})
        return await real(vm, body)

    agent.do_create_disks = made_while_it_starts
    task = await api.act("POST", "/v1/vms/web/disks", {"volume": "shared", "size_bytes": GIB})
    assert (task["state"], task["error"]["code"]) == ("failed", "conflict")
    assert (await spec(api)).disks == ()
    assert agent.disks == set()


def _together(barrier: asyncio.Barrier, real: Any) -> Any:
    async def wait_and_do(vm: str, body: Any) -> Any:
        await barrier.wait()
        return await real(vm, body)

    return wait_and_do


async def test_two_vms_that_want_one_image_at_once(api: Any) -> None:
    for name in ("web", "db"):
        await api.make_vm(name)
    # Both are admitted, both have measured the image: neither has seen the other's record.
    both = asyncio.Barrier(2)
    for agent in api.agents.values():
        agent.disks.add(f"{SHARED}/one.raw")
        agent.do_disks_inspect = _together(both, agent.do_disks_inspect)
    body = {"volume": "shared", "path": "one.raw", "format": "raw"}
    done = await asyncio.gather(
        *(api.act("POST", f"/v1/vms/{name}/disks", body) for name in ("web", "db"))
    )
    assert sorted(one["state"] for one in done) == ["completed", "failed"]
    (no,) = [one["error"] for one in done if one["error"]]
    assert (no["code"], "is disk0 of" in no["detail"]) == ("refused", True)
    disks = (await spec(api, "web")).disks + (await spec(api, "db")).disks
    assert len(disks) == 1


@pytest.mark.parametrize("lost_at", ["create-disks", "disks/add"])
async def test_an_add_is_adopted_and_done_once(cluster: Any, lost_at: str) -> None:
    agent = cluster.agents["host1"]
    async with cluster.serve():
        await cluster.make_vm("web", start="host1")
        agent.drop_after.add(lost_at)
        body = {"volume": "shared", "size_bytes": GIB}
        posted = await cluster.api.post("/v1/vms/web/disks", body)
        await agent.was_asked(lost_at)
    agent.drop_after.clear()
    async with cluster.serve():
        task = await cluster.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
    assert task["state"] == "completed", task
    (found,) = (await spec(cluster)).disks
    assert agent.disks == {found.path}
    assert agent.plugged == {"web": {found.id}}


@pytest.mark.parametrize("lost_at", ["disks/remove", "delete-disks"])
async def test_a_removal_is_adopted_and_finished(cluster: Any, lost_at: str) -> None:
    agent = cluster.agents["host1"]
    async with cluster.serve():
        await cluster.make_vm("web", start="host1")
        task = await cluster.act(
            "POST", "/v1/vms/web/disks", {"volume": "shared", "size_bytes": GIB}
        )
        assert task["state"] == "completed", task
        agent.drop_after.add(lost_at)
        posted = await cluster.api.post("/v1/vms/web/disks/disk0/actions/remove", {})
        await agent.was_asked(lost_at)
    agent.drop_after.clear()
    async with cluster.serve():
        task = await cluster.api.get(f"/v1/tasks/{posted['id']}", query={"wait": 10})
    assert task["state"] == "completed", task
    assert (await spec(cluster)).disks == ()
    assert agent.disks == set()


async def test_volumes_are_defined_shown_and_forgotten(api: Any) -> None:
    task = await api.act("POST", "/v1/volumes", {"name": "shared", "path": "/srv/nfs"})
    assert task["state"] == "completed", task
    view = await api.api.get("/v1/volumes/shared")
    assert (view["kind"], view["path"], view["coordinator"]) == ("dir", "/srv/nfs", "host1")
    assert view["hosts"]["host2"] == {"state": "direct", "reason": ""}
    seen = VolumeOnHost(state=VolumeState.PAUSED, reason="no path answers", used_bytes=1)
    await api.store.put(keys.volume_state("shared", "host2"), encode(seen))
    await api.manager.world.cache.until(lambda s: s.volume_states.get("shared/host2"))
    view = await api.api.get("/v1/volumes/shared")
    assert (view["health"], view["hosts"]["host2"]["reason"]) == ("degraded", "no path answers")
    assert [item.kind for item in api.manager.feed.history(0)].count("volume.state") == 1
    await api.make_vm("web", disks=[{"volume": "shared", "size_bytes": GIB}])
    with pytest.raises(PeerRefused) as caught:
        await api.api.request("DELETE", "/v1/volumes/shared")
    assert "is used by web" in caught.value.problem.detail
    await api.act("DELETE", "/v1/vms/web")
    task = await api.act("DELETE", "/v1/volumes/shared")
    assert task["reason"] == "volume shared is forgotten; its files stay"
    assert (await api.store.get(keys.volume("shared"))) is None


async def test_images_come_in_and_go_out(api: Any) -> None:
    body = {"name": "debian", "source": "https://example.org/d.vmdk", "format": "vmdk"}
    task = await api.act("POST", "/v1/volumes/shared/actions/import", body)
    assert task["state"] == "completed", task
    path = f"{SHARED}/.godwit/images/debian.qcow2"
    assert task["result"] == {"path": path, "format": "qcow2", "size_bytes": GIB}
    task = await api.act("POST", "/v1/volumes/shared/actions/import", body)
    assert task["error"]["code"] == "conflict"
    await api.make_vm("web")
    api.agents["host1"].device_bytes = GIB
    await add(api, path=path, format="qcow2")
    body = {"target": f"{SHARED}/copy.vhdx", "format": "vhdx"}
    task = await api.act("POST", "/v1/vms/web/disks/disk0/actions/export", body)
    assert task["state"] == "completed", task
    (asked,) = api.agents["host1"].asked("disks/export")
    assert (asked["disk"]["path"], asked["format"]) == (path, "vhdx")
    assert f"{SHARED}/copy.vhdx" in api.agents["host1"].disks


# Lost paths.


def _lost(host: str = "host1", state: VolumeState = VolumeState.REDIRECTED) -> dict[str, Any]:
    seen = VolumeOnHost(state=state, reason="lost path: no answer")
    return {f"shared/{host}": seen}


def test_who_may_be_redirected() -> None:
    world = snapshot()
    request = ask.RedirectVolume(name="shared", host="host1")
    assert admit(world, request) == "volume/shared"
    assert admit(world, ask.RestoreVolume(name="shared", host="host2")) == "volume/shared"
    with pytest.raises(NotFound, match="no volume other"):
        admit(world, request.model_copy(update={"name": "other"}))
    with pytest.raises(NotFound, match="no host host9"):
        admit(world, request.model_copy(update={"host": "host9"}))
    with pytest.raises(Refused, match="host1 is down"):
        admit(dataclasses.replace(world, agents=frozenset(), leases=frozenset()), request)


def test_a_host_without_its_own_path_neither_helps_nor_takes_vms() -> None:
    from godwit.manager.rooms import rooms_of
    from godwit.manager.work.define_acts import helpers
    from godwit.planner.placement import Need, reasons_against

    vm = make_vm("web", disk())
    world = snapshot(vm, volume_states=_lost())
    assert [info.name for info in helpers(world, vm, prefer="host1")] == ["host2"]
    first, second = rooms_of(world, {"host1": 64 * GIB, "host2": 64 * GIB})
    words = "shared is redirected (lost path: no answer) on host1"
    assert words in reasons_against(first, Need.of(vm))
    assert not any("shared" in why for why in reasons_against(second, Need.of(vm)))


def test_what_was_said_before_a_volume_was_defined_does_not_count() -> None:
    from godwit.manager.rooms import rooms_of
    from godwit.planner.placement import Need, reasons_against

    vm = make_vm("web", disk())
    world = snapshot(vm, volume_states=_lost())
    since = next(iter(_lost().values())).since
    anew = dataclasses.replace(
        world, volumes={"shared": Volume(name="shared", created_at=since + 1)}
    )
    assert [info.name for info in helpers(anew, vm, prefer="host1")] == ["host1", "host2"]
    first, _ = rooms_of(anew, {"host1": 64 * GIB, "host2": 64 * GIB})
    assert not any("shared" in why for why in reasons_against(first, Need.of(vm)))
    # Said after it, by the clock, but of what lay there before: the host had not heard of it yet.
    seen = VolumeOnHost(state=VolumeState.UNAVAILABLE, since=since + 2, defined_at=0.0)
    late = dataclasses.replace(anew, volume_states={"shared/host1": seen})
    assert late.seen_volume("shared", "host1") is None
    told = seen.but(defined_at=since + 1)
    looked = dataclasses.replace(anew, volume_states={"shared/host1": told})
    assert looked.seen_volume("shared", "host1") == told


def test_metrics_show_how_hosts_reach_a_volume() -> None:
    from types import SimpleNamespace

    from godwit.manager.metrics import Metrics

    world = snapshot(volume_states=_lost())
    cache: Any = SimpleNamespace(snapshot=world, revision=1)
    text = Metrics().render(cache).decode()
    assert 'godwit_volume_state{host="host1",state="redirected",volume="shared"} 1.0' in text
    assert 'godwit_volume_state{host="host2",state="direct",volume="shared"} 1.0' in text
