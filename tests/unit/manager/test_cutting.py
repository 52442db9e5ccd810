"""The first rung as the manager has it: daemons asked, cut by cut, and taken back by their list."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from godwit.cluster.facts import Attempt, Rung
from godwit.cluster.steps import Fence, Restore
from godwit.host.clock import RealClock
from godwit.manager.cache import Cache
from godwit.manager.cutting import ASK_S, FRESH_S, Cutter
from godwit.manager.failover.acting import Actor
from godwit.manager.snapshot import Snapshot
from godwit.manager.work.disk_rules import changed_volume, define_volume
from godwit.manager.work.validation_rungs import storage_rungs
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import GodwitError, NotFound, OutcomeUnknown, Refused, Unavailable
from godwit.model.ownership import Owner, OwnerState
from godwit.model.requests import CreateVolume, SetVolume
from godwit.model.validation_facts import HostSeen
from godwit.model.vm import Disk, Pins, Vm
from godwit.model.volume import Volume
from godwit.store.api import value_is
from godwit.store.memory import MemoryStore
from godwit.store.records import CasFailed, Records, encode
from godwit.wire.errors import PeerRefused

from .manager_fakes import GIB, host_info

SAN, NAS = "https://10.0.0.8:7102", "https://10.0.0.9:7102"
LUNS = Volume(name="luns", kind="iscsi", portal="10.0.0.8", target="iqn.x.y:l", fence_url=SAN)
FILES = Volume(name="files", kind="nfs", server="10.0.0.9", export="/f/", fence_url=NAS)
PLACES = {SAN: "iscsi iqn.x.y:l", NAS: "nfs /f"}
STEP = Fence(
    host="host1", rung=Rung.STORAGE, vm="web", disks=("a", "b"), heard=("boot", 7), owner_revision=3
)


def disk(name: str, volume: str) -> Disk:
    return Disk(
        id=name, volume=volume, path=f"/{name}", size_bytes=1, format="raw", serial=name, lun=0
    )


def web() -> Vm:
    return Vm(
        name="web", cpus=1, memory_bytes=GIB, created_at=0.0,
        pins=Pins(uuid="u", machine="pc", cpu_model="x", accelerator="tcg"),
        disks=(disk("a", "luns"), disk("b", "files")),
    )  # fmt: skip


class Clock(RealClock):
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Daemons:
    """Both servers: what they were asked, and whom they have shut out."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.cuts: dict[str, list[dict[str, Any]]] = {SAN: [], NAS: []}
        self.hosts = ["host1", "host2"]
        self.why = ""
        self.fails: dict[tuple[str, str], GodwitError] = {}
        self.last = 0

    async def call(
        self, url: str, method: str, path: str, body: Mapping[str, Any] | None, *, deadline_s: float
    ) -> Any:
        self.asked.append((url, method, path))
        if error := self.fails.get((url, method)):
            raise error
        if method == "GET":
            place = {"place": PLACES[url], "hosts": self.hosts, "why": self.why}
            return {"name": "x", "places": [place], "cuts": self.cuts[url]}
        if method == "POST":
            self.last += 1
            cut = {"id": self.last, **(body or {})}
            self.cuts[url].append(cut)
            return {"cut": cut}
        number = int(path.rpartition("/")[2])
        if number not in [cut["id"] for cut in self.cuts[url]]:
            raise NotFound("it stands no more", hint="")
        self.cuts[url] = [cut for cut in self.cuts[url] if cut["id"] != number]
        return {}

    async def aclose(self) -> None:
        return


def seen(*volumes: Volume) -> Snapshot:
    return Snapshot(
        hosts={name: host_info(name) for name in ("host1", "host2")},
        volumes={volume.name: volume for volume in volumes},
        vms={"web": web()},
    )


def cutter(daemons: Daemons | None, snapshot: Snapshot, clock: Clock | None = None) -> Cutter:
    cache: Any = SimpleNamespace(snapshot=snapshot)
    return Cutter(cache, daemons, clock or Clock())


async def test_why_nobody_can_be_cut_off() -> None:
    daemons, clock = Daemons(), Clock()
    records = seen(LUNS, FILES.but(fence_url=""), Volume(name="shared"))
    made = cutter(daemons, records, clock)
    assert made.uncuttable(records) == {
        "luns": "the fencing daemon of luns was not heard yet: not asked yet",
        "files": "files names no fencing daemon",
    }
    await made.ask(SAN)
    assert "luns" not in made.uncuttable(records)
    daemons.fails[SAN, "GET"] = Unavailable("no route", hint="")
    await made.ask(SAN)
    assert "luns" not in made.uncuttable(records), "one answer that is missing is none"
    clock.now += 2 * ASK_S + 1
    assert made.problem(LUNS) == "the fencing daemon of luns does not answer: no route"
    daemons.fails.clear()
    daemons.why = "luns is also open to ALL"
    await made.ask(SAN)
    assert made.problem(LUNS) == "luns: luns is also open to ALL"
    clock.now += FRESH_S + 1
    assert "is silent for 21 s" in made.problem(LUNS)
    await made.ask(SAN)
    other = LUNS.but(target="iqn.x.y:other")
    assert "guards no iscsi iqn.x.y:other" in made.problem(other)
    rbd = Volume(name="ceph", kind="rbd", pool="p", client="c")
    assert made.problem(rbd) == "nothing is known that cuts a host off ceph"
    assert "reaches no fencing daemons" in await _said_without_daemons(records)


async def _said_without_daemons(records: Snapshot) -> str:
    made = cutter(None, records)
    await made.ask(SAN)
    return made.problem(LUNS)


async def test_a_host_that_the_daemon_does_not_know() -> None:
    daemons, records = Daemons(), seen(LUNS)
    made = cutter(daemons, records)
    assert made.unbound(records) == {}
    daemons.hosts = ["host2"]
    await made.ask(SAN)
    assert list(made.unbound(records)) == [("luns", "host1")]


async def test_a_validation_asks_each_daemon_about_each_host() -> None:
    daemons, records = Daemons(), seen(LUNS, FILES, Volume(name="shared"))
    daemons.hosts = ["host1"]
    daemons.fails[NAS, "GET"] = Unavailable("no route", hint="")
    world: Any = SimpleNamespace(
        cache=SimpleNamespace(snapshot=records), cutter=cutter(daemons, records)
    )
    hosts = tuple(HostSeen(name=name, state="up") for name in ("host1", "host2"))
    rungs = await storage_rungs(world, hosts)
    assert [(one.host, one.rung, one.answers) for one in rungs] == [
        ("host1", "storage", False),
        ("host2", "storage", False),
        ("host1", "storage", True),
        ("host2", "storage", False),
    ]
    assert rungs[0].device == f"the fencing daemon of files at {NAS}"
    assert "no route" in rungs[0].reason
    assert "does not know from where host2 comes" in rungs[3].reason


async def test_every_volume_of_the_vm_is_asked_and_all_have_to_confirm() -> None:
    daemons = Daemons()
    made = cutter(daemons, seen(LUNS, FILES))
    assert await made.cut(STEP) == {"a", "b"}
    assert {cut["place"] for cuts in daemons.cuts.values() for cut in cuts} == set(PLACES.values())
    for cuts in daemons.cuts.values():
        ((host, vm, boot, revision),) = [
            (one["host"], one["vm"], one["boot_id"], one["revision"]) for one in cuts
        ]
        assert (host, vm, boot, revision) == ("host1", "web", "boot", 7)
    daemons.fails[NAS, "POST"] = OutcomeUnknown("did not confirm", hint="")
    with pytest.raises(OutcomeUnknown):
        await made.cut(STEP)


async def test_what_is_not_asked_of_anybody() -> None:
    made = cutter(Daemons(), seen(LUNS, FILES.but(fence_url="")))
    with pytest.raises(Refused, match="cuts a host off files"):
        await made.cut(STEP)
    with pytest.raises(Refused, match="other disks by now"):
        await made.cut(Fence(host="host1", rung=Rung.STORAGE, vm="web", disks=("a", "c")))
    with pytest.raises(Refused, match="other disks by now"):
        await made.cut(Fence(host="host1", rung=Rung.STORAGE, vm="gone", disks=("a",)))


# --- taken back


class Rig:
    """An actor on a real store, whose predecessor has cut host1 off."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.daemons = Daemons()
        self.world = World(
            records=Records(self.store),
            cache=Cache(self.store),
            agents=SimpleNamespace(),  # type: ignore[arg-type]
            clock=RealClock(),
            pin=lambda _hosts: web().pins,
            worker="m1/a",
            daemons=self.daemons,
        )
        self.actor = Actor(
            self.world, proof=lambda: value_is(keys.LEADER, b"m1/a"), cut=self.world.cutter
        )

    async def begin(self) -> int:
        """The revision of the VM's record."""
        for number, url in ((4, SAN), (9, NAS)):
            self.daemons.cuts[url] = [
                {"id": number, "place": PLACES[url], "host": "host1", "vm": "web",
                 "boot_id": "boot", "revision": 7}
            ]  # fmt: skip
            await self.world.cutter.ask(url)
        owner = Owner(host="host2", epoch=5, state=OwnerState.RUNNING)
        return await self.store.put(keys.vm_owner("web"), encode(owner))


async def test_a_new_leader_sees_the_cuts_of_the_old_one_and_lifts_them() -> None:
    rig = Rig()
    revision = await rig.begin()
    told = rig.actor.attempts()
    assert told[0] == Attempt(
        host="host1", rung=Rung.STORAGE, vm="web", heard=("boot", 7), outcome="confirmed",
        cut=f"{SAN} 4",
    )  # fmt: skip
    cuts = tuple(one.cut for one in told)
    await rig.actor.act(Restore(host="host1", vm="web", owner_revision=revision, cuts=cuts))
    assert rig.daemons.cuts == {SAN: [], NAS: []}
    assert rig.actor.attempts() == ()
    await rig.store.aclose()


async def test_what_was_confirmed_in_an_earlier_lead_proves_nothing() -> None:
    """Another leader may have taken it back in between, and its number is not told from ours."""
    rig = Rig()
    rig.world.cache._snapshot = seen(LUNS, FILES)
    await rig.actor.act(STEP)
    assert [one.disks for one in rig.actor.attempts()] == [{"a", "b"}]
    rig.actor._proof = lambda: value_is(keys.LEADER, b"m1/b")
    assert rig.actor.attempts() == ()
    await rig.store.aclose()


async def test_a_cut_that_was_asked_for_since_stays() -> None:
    rig = Rig()
    revision = await rig.begin()
    rig.daemons.cuts[SAN][0]["id"] = 5
    step = Restore(host="host1", vm="web", owner_revision=revision, cuts=(f"{SAN} 4",))
    await rig.actor.act(step)
    assert [cut["id"] for cut in rig.daemons.cuts[SAN]] == [5]
    await rig.store.aclose()


@pytest.mark.parametrize("changed", [True, False])
async def test_a_record_that_moved_on_takes_nothing_back(changed: bool) -> None:
    rig = Rig()
    revision = await rig.begin()
    if changed:
        await rig.store.put(keys.vm_owner("web"), encode(Owner(host="host1", epoch=6)))
    else:
        revision = 0  # decided when there was none
    step = Restore(host="host1", vm="web", owner_revision=revision, cuts=(f"{SAN} 4",))
    with pytest.raises(CasFailed):
        await rig.actor.act(step)
    assert rig.daemons.cuts[SAN]
    await rig.store.aclose()


async def test_daemons_are_asked_again_and_again_and_forgotten_with_their_volumes() -> None:
    class Quick(Clock):
        async def sleep(self, seconds: float) -> None:
            assert seconds == ASK_S
            await asyncio.sleep(0.001)

    daemons = Daemons()
    ready = asyncio.Event()
    ready.set()
    cache: Any = SimpleNamespace(snapshot=seen(LUNS, FILES), ready=ready)
    made = Cutter(cache, daemons, Quick())
    task = asyncio.create_task(made.run())
    async with asyncio.timeout(5):
        while len(daemons.asked) < 6:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)
        cache.snapshot = seen(FILES)
        while SAN in made._heard:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert {url for url, _, _ in daemons.asked} == {SAN, NAS}


async def test_a_volume_says_where_its_daemon_answers(api: Any) -> None:
    daemons, cutter = Daemons(), api.manager.world.cutter
    cutter._daemons = daemons
    await api.store.put(keys.volume("files"), encode(FILES.but(fence_url="")))
    setting = "/v1/volumes/files/actions/set"
    task = await api.act("POST", setting, {"fence_url": SAN})
    assert (
        "cannot cut a host off yet: the fencing daemon of files guards no nfs /f" in task["reason"]
    )
    task = await api.act("POST", setting, {"fence_url": NAS})
    assert task["reason"] == f"files is fenced by {NAS}"
    await api.manager.world.cache.until(lambda seen: seen.volumes["files"].fence_url == NAS)
    assert (await api.api.get("/v1/volumes/files"))["fence_url"] == NAS
    daemons.cuts[NAS] = [{"id": 1, "place": "nfs /f", "host": "host1", "vm": "web"}]
    await cutter.ask(NAS)
    task = await api.act("POST", setting, {"fence_url": ""})
    assert task["error"]["code"] == "refused", task
    assert "keeps host1 out" in task["reason"]
    daemons.cuts[NAS] = []
    await cutter.ask(NAS)
    task = await api.act("POST", setting, {"fence_url": ""})
    assert task["reason"] == "files has no fencing daemon"
    for wrong in ({}, {"fence_url": "http://10.0.0.9"}):
        with pytest.raises(PeerRefused):
            await api.api.request("POST", setting, json=wrong)


def test_only_a_served_volume_has_a_daemon() -> None:
    made = define_volume(
        seen(),
        CreateVolume(name="f", type="nfs", server="nas", export="/f", fence_url=NAS),
        now=1.0,
    )
    assert made.fence_url == NAS
    with pytest.raises(Refused, match="of kind dir, and no fencing daemon guards that"):
        changed_volume(Volume(name="shared"), SetVolume(name="shared", fence_url=NAS))
    assert changed_volume(Volume(name="s"), SetVolume(name="s", fence_url="")).fence_url == ""
    with pytest.raises(NotFound):
        changed_volume(None, SetVolume(name="s", fence_url=NAS))
    with pytest.raises(ValidationError, match="only a volume of kind nfs or iscsi"):
        CreateVolume(name="f", fence_url=NAS)
