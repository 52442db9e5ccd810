"""A live validation that cuts a host's power: what is refused, what is timed, what is given back.

The power device is one that speaks real Redfish. Who starts the canary elsewhere is the failover,
which has tests of its own; here the test writes what it would.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import bmc_rig
import pytest
from validation_desks import Desk, results, validated

from godwit.manager.work import canary_failover
from godwit.model import keys
from godwit.model.errors import InvalidRequest, NotFound, Refused
from godwit.model.ownership import Owner
from godwit.store.errors import StoreUnavailable
from godwit.wire.errors import PeerRefused

HOST = "host1"


async def give_devices(cluster: Any, bmc: Any) -> None:
    """Both hosts have one power device, so that either may keep a highly available VM."""
    for name in ("host1", "host2"):
        answer = await cluster.api.request("POST", "/v1/secrets", content=bmc_rig.PASSWORD.encode())
        device = {"type": "redfish", "address": bmc.url, "user": bmc_rig.USER}
        device |= {"fingerprint": bmc.fingerprint, "password_file": answer.json()["path"]}
        await cluster.act("POST", f"/v1/hosts/{name}/power", device)


@pytest.fixture
async def powered(api: Any, bmc: Any, desks: dict[str, Desk]) -> Any:
    """The power device of hosts whose manager runs."""
    await give_devices(api, bmc)
    return bmc


async def refused(api: Any, **body: Any) -> Exception:
    with pytest.raises(PeerRefused) as caught:
        await api.act("POST", "/v1/cluster/actions/validate", body)
    assert caught.value.error is not None
    return caught.value.error


async def taken_over(api: Any, bmc: Any, *, fenced: bool = True) -> None:
    """What the failover does, once the host has no power; it may have its proof without a fence."""
    await asyncio.to_thread(bmc.machine.told.wait, 30)
    (vm,) = [row["name"] for row in await api.api.get("/v1/vms")]
    sign = ("host.fencing", f"host/{HOST}") if fenced else ("vm.failover", f"vm/{vm}")
    await api.records.append_event(*sign, "it is lost", at=time.time())

    def elsewhere(owner: Owner) -> Owner:
        return owner.but(host="host2", epoch=owner.epoch + 1)

    await api.records.update(keys.vm_owner(vm), Owner, elsewhere)


@pytest.mark.parametrize("fenced", [True, False])
async def test_it_is_timed_and_the_power_is_given_back(
    api: Any, powered: Any, fenced: bool
) -> None:
    failover = asyncio.create_task(taken_over(api, powered, fenced=fenced), name="failover")
    _, report = await validated(api, live=True, failover=HOST)
    await failover
    canary = report.canary
    assert canary is not None
    assert canary.failure == ""
    assert canary.not_done == ()
    assert [step.name for step in canary.steps][-2:] == [
        "cutting the power of host1",
        f"waiting until {canary.vm} runs elsewhere",
    ]
    assert canary.steps[-1].message == "it runs on host2"
    assert canary.detection_s is not None
    assert canary.restart_s is not None
    assert 0 < canary.detection_s <= canary.restart_s
    assert powered.machine.seen == ["ForceOff", "On"]
    assert results(report, "canary") == ["pass"]
    assert await api.api.get("/v1/vms") == []


async def test_a_canary_that_nobody_starts_is_told_and_the_power_is_given_back(
    api: Any, powered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary_failover, "TAKEN_S", 0.3)
    _, report = await validated(api, live=True, failover=HOST)
    assert report.canary is not None
    assert "did not start elsewhere within" in report.canary.failure
    assert report.canary.blackout_ms == 42  # what was seen before is kept
    assert results(report, "canary") == ["fail"]
    assert powered.machine.seen == ["ForceOff", "On"]


async def test_a_store_that_misses_the_host_does_not_keep_the_power_from_it(
    api: Any, powered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member of the store may have been there; what is read and written then may fail."""

    async def away(*_: Any) -> float | None:
        raise StoreUnavailable("no leader")

    monkeypatch.setattr(canary_failover, "_noticed_s", away)
    failover = asyncio.create_task(taken_over(api, powered), name="failover")
    _, report = await validated(api, live=True, failover=HOST)
    await failover
    assert report.canary is not None
    assert report.canary.failure == "the store: no leader"
    assert powered.machine.seen == ["ForceOff", "On"]


async def test_a_device_that_does_not_switch_fails_it(
    api: Any, powered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary_failover, "SWITCH_S", 0.5)
    powered.machine.deaf = True
    _, report = await validated(api, live=True, failover=HOST)
    assert report.canary is not None
    assert report.canary.restart_s is None
    assert results(report, "canary") == ["fail"]
    assert powered.machine.seen[0] == "ForceOff"


async def test_whoever_takes_the_task_over_switches_on_and_not_off_again(
    cluster: Any, desks: dict[str, Desk], bmc: Any
) -> None:
    """The manager that cut the power ran on that host."""
    async with cluster.serve():
        await give_devices(cluster, bmc)
        body = {"live": True, "failover": HOST}
        task = await cluster.api.post("/v1/cluster/actions/validate", body)
        assert await asyncio.to_thread(bmc.machine.told.wait, 60)
    assert bmc.machine.seen == ["ForceOff"]
    async with cluster.serve():
        done = await cluster.api.get(f"/v1/tasks/{task['id']}", query={"wait": 60})
        report = await cluster.api.get("/v1/cluster/validation")
    assert done["state"] == "completed", done
    assert bmc.machine.seen == ["ForceOff", "On"]
    assert "was not tried again" in report["canary"]["not_done"][-1]


async def test_what_it_does_not_begin(api: Any, powered: Any) -> None:
    said = await refused(api, failover=HOST)
    assert isinstance(said, InvalidRequest)
    assert "--live" in str(said.hint)
    assert isinstance(await refused(api, live=True, failover="host9"), NotFound)
    await api.make_vm("web", start=HOST)
    said = await refused(api, live=True, failover=HOST)
    assert isinstance(said, Refused)
    assert "host1 runs web" in said.message
    await api.act("POST", "/v1/hosts/host2/actions/drain", {})
    said = await refused(api, live=True, failover="host2")
    assert "takes no VMs now" in str(said)
    assert powered.machine.seen == []


async def test_a_host_without_a_power_device_is_not_one_to_lose(
    api: Any, desks: dict[str, Desk]
) -> None:
    said = await refused(api, live=True, failover=HOST)
    assert isinstance(said, NotFound)
    assert "host1 has no power device" in said.message
