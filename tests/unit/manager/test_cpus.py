"""Which CPU a new VM gets: the cluster's baseline, a named model, its host's own; and why."""

from __future__ import annotations

from typing import Any

import pytest

from godwit.manager.work.cpus import choose_cpu
from godwit.model import keys
from godwit.model.errors import InvalidRequest, Refused
from godwit.model.event import Event
from godwit.model.host import HostInfo
from godwit.model.requests import SetCluster, parse_request
from godwit.model.settings import ClusterSettings
from godwit.model.vm import OWN_CPU
from godwit.store.records import encode
from godwit.wire.errors import PeerRefused

from .manager_fakes import host_info

AUTO = ClusterSettings()
OLD, MID, NEW = "Nehalem-v1", "Westmere-v1", "Haswell-v4"


def hosts(accelerator: str = "tcg", **models: str) -> dict[str, HostInfo]:
    made = {}
    for name, given in models.items():
        info = host_info(name)
        facts = info.qemu.but(cpu_models=tuple(given.split()), accelerator=accelerator)
        made[name] = info.but(qemu=facts)
    return made


def test_the_best_that_all_can_give_and_who_holds_it_back() -> None:
    found = choose_cpu(hosts(a=f"{OLD} {NEW} {MID}", b=f"{OLD} {MID}"), AUTO, "baseline")
    assert found.model == MID
    assert found.reason == f"{MID} is the best that all hosts can give: b cannot give {NEW}"
    assert found.cannot == {}


def test_nothing_in_common_is_refused_with_a_way_out() -> None:
    with pytest.raises(Refused, match="no CPU model in common") as caught:
        choose_cpu(hosts(a=OLD, b=NEW), AUTO, "baseline")
    assert "--cpu MODEL" in caught.value.hint
    with pytest.raises(Refused, match="no host has said"):
        choose_cpu({}, AUTO, "baseline")


def test_a_baseline_that_was_set_holds_and_says_who_is_below() -> None:
    both = hosts(a=f"{OLD} {NEW}", b=OLD)
    kept = choose_cpu(both, ClusterSettings(cpu_baseline=NEW), "baseline")
    assert kept.model == NEW
    assert kept.reason == f"{NEW} is the cluster's baseline, as it was set; b cannot give it"
    assert kept.cannot == {"b": f"b cannot give {NEW}"}
    low = choose_cpu(both, ClusterSettings(cpu_baseline=OLD), "baseline")
    assert (low.model, low.cannot) == (OLD, {})
    with pytest.raises(Refused, match=f"no host can give the CPU model {MID}") as caught:
        choose_cpu(both, ClusterSettings(cpu_baseline=MID), "baseline")
    assert caught.value.hint == f"there are: {NEW}, {OLD}"


def test_a_named_model_and_the_hosts_own() -> None:
    both = hosts(a=f"{OLD} {NEW}", b=OLD)
    named = choose_cpu(both, ClusterSettings(cpu_baseline=OLD), NEW)
    assert named.reason == f"{NEW} was asked for; b cannot give it"
    for accelerator, model in (("tcg", "max"), ("kvm", "host")):
        own = choose_cpu(hosts(accelerator, a=OLD), AUTO, "host")
        assert (own.model, own.cannot) == (model, {})
        assert "while it runs it cannot move" in own.reason
        assert model in OWN_CPU


@pytest.mark.parametrize("cpu", ["max", "Nehalem", "qemu64,+aes", "x-v1 -S", "", "Nehalem-v1234"])
def test_only_models_with_their_version_can_be_named(cpu: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_request({"kind": "vm.create", "name": "web", "memory_bytes": 1 << 28, "cpu": cpu})
    with pytest.raises(InvalidRequest):
        parse_request({"kind": "cluster.set", "cpu_baseline": cpu})


def test_auto_takes_the_setting_away() -> None:
    assert SetCluster(cpu_baseline="auto").changes == {"cpu_baseline": ""}
    assert SetCluster(cpu_baseline=OLD).changes == {"cpu_baseline": OLD}
    assert SetCluster(moves_per_host=2).changes == {"moves_per_host": 2}


async def created(api: Any, vm: str) -> Event:
    found = [Event.model_validate_json(kv.value) for kv in (await api.store.range(keys.EVENTS)).kvs]
    (event,) = [one for one in found if one.kind == "vm.created" and one.subject == f"vm/{vm}"]
    return event


async def test_a_new_vm_has_the_baseline_and_its_event_says_why(api: Any) -> None:
    await api.make_vm("web")
    assert (await api.records.vm("web")).value.pins.cpu_model == OLD
    message = (await created(api, "web")).message
    assert f"its CPU: {OLD} is the best that all hosts can give" in message
    assert (await api.api.get("/v1/vms/web"))["cpu_model"] == OLD


async def test_a_plan_says_what_it_would_be_and_makes_nothing(api: Any) -> None:
    body = {"name": "web", "memory_bytes": 256 << 20, "image": "demo", "networks": ["lan"]}
    plan = await api.api.post("/v1/vms", body, query={"dry_run": True})
    assert plan == {
        "vm": "web",
        "machine": "pc-q35-10.0",
        "cpu_model": OLD,
        "accelerator": "tcg",
        "reason": f"{OLD} is the best that all hosts can give",
        "cannot": {},
    }
    assert await api.records.vm("web") is None
    assert (await api.store.range(keys.TASKS)).kvs == ()
    with pytest.raises(PeerRefused) as caught:
        await api.api.post("/v1/vms", {**body, "cpu": NEW}, query={"dry_run": True})
    assert caught.value.problem.code == "refused"
    with pytest.raises(PeerRefused, match="no network"):
        await api.api.post("/v1/vms", {**body, "networks": ["none"]}, query={"dry_run": True})


async def test_the_setting_is_checked_kept_and_obeyed(api: Any) -> None:
    path = "/v1/cluster/actions/set"
    refused = await api.act("POST", path, {"cpu_baseline": NEW})
    assert refused["state"] == "failed"
    assert f"no host can give the CPU model {NEW}" in refused["reason"]
    done = await api.act("POST", path, {"cpu_baseline": "qemu64-v1"})
    assert done["reason"] == "from now on: cpu_baseline=qemu64-v1"
    await api.make_vm("web")
    assert (await api.records.vm("web")).value.pins.cpu_model == "qemu64-v1"
    assert "as it was set" in (await created(api, "web")).message
    assert "auto" in (await api.act("POST", path, {"cpu_baseline": "auto"}))["reason"]
    assert (await api.api.get("/v1/cluster/settings"))["cpu_baseline"] == ""


async def test_a_vm_with_its_hosts_own_cpu_starts_and_stays(api: Any) -> None:
    await api.make_vm("web", start="host1", cpu="host")
    assert (await api.records.vm("web")).value.pins.cpu_model == "max"
    moved = await api.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2"})
    assert moved["state"] == "failed"
    assert "web has the CPU of host1 (--cpu host)" in moved["reason"]
    await api.act("POST", "/v1/vms/web/actions/stop", {"force": True})
    again = await api.act("POST", "/v1/vms/web/actions/start", {"host": "host2"})
    assert again["state"] == "completed", again


async def test_a_host_below_the_baseline_is_not_chosen(api: Any) -> None:
    """It joins after the VM was made: nothing places the VM there, and it is said why."""
    await api.make_vm("web", start="host1")
    poor = api.manager.world.cache.snapshot.hosts["host2"]
    poor = poor.but(qemu=poor.qemu.but(cpu_models=("qemu64-v1",)))
    await api.store.put(keys.host_info("host2"), encode(poor))
    moved = await api.act("POST", "/v1/vms/web/actions/migrate", {})
    assert moved["state"] == "failed"
    assert f"host2 cannot give the CPU model {OLD}" in moved["reason"]
    await api.make_vm("next")
    assert (await api.records.vm("next")).value.pins.cpu_model == "qemu64-v1"
    assert f"host2 cannot give {OLD}" in (await created(api, "next")).message
