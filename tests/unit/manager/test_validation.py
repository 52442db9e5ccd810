"""A validation through the API: real measurements between two agents on loopback, over real TLS."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from validation_desks import Desk, results, validated

from godwit.agent.validation import Validation
from godwit.agent.validation_routes import validation_routes
from godwit.cluster.validation.fitness import fit_hosts
from godwit.manager.work import canary as canary_acts
from godwit.manager.work.validation import of_canary
from godwit.manager.work.validation_facts import ring
from godwit.model import keys
from godwit.model.errors import NotFound
from godwit.model.marks import HostMark
from godwit.model.requests import DrainHost
from godwit.model.validation import Canary, HostValidated, ValidationCheck, ValidationReport
from godwit.wire.errors import PeerRefused


async def test_there_is_no_report_before_the_first(api: Any) -> None:
    with pytest.raises(PeerRefused) as caught:
        await api.api.get("/v1/cluster/validation")
    assert isinstance(caught.value.error, NotFound)


async def test_two_good_hosts(api: Any, desks: dict[str, Desk]) -> None:
    task, report = await validated(api)
    good = ("hosts", "mtu", "reachable", "full-packets", "clock", "volumes", "image-locks")
    assert set(results(report, *good, "written-and-read", "store-write", "guards")) == {"pass"}
    assert task["result"] == {
        "result": report.result,
        **{result: report.count(result) for result in ("pass", "warn", "fail")},
    }
    assert {(link.source, link.destination) for link in report.links} == {
        ("host1", "host2"),
        ("host2", "host1"),
    }
    assert all(link.bits_per_s and link.bits_per_s > 1e7 for link in report.links)
    assert report.by == "admin through tests/1"
    assert [row.qemu for row in report.hosts] == ["10.0.2", "10.0.2"]
    # Nothing is left in the volume, and the store's trial record is gone.
    assert list((desks["host1"].root / "shared").iterdir()) == []
    assert await api.store.get(keys.VALIDATION_TRY) is None


async def test_a_clock_that_is_off(api: Any, desks: dict[str, Desk]) -> None:
    desks["host2"].clock.off_s = 5.0
    _, report = await validated(api)
    [check] = [check for check in report.checks if check.name == "clock"]
    assert check.result == "fail"
    assert "5.0" in check.message
    assert report.result == "fail"


async def test_a_volume_that_a_host_does_not_have(
    api: Any, desks: dict[str, Desk], tmp_path: Path
) -> None:
    desks["host2"].root = tmp_path / "elsewhere"
    api.agents["host2"].app.router.routes[:0] = validation_routes(
        Validation(desks["host2"])  # type: ignore[arg-type]
    )
    _, report = await validated(api)
    [check] = [check for check in report.checks if check.name == "volumes"]
    assert (check.result, check.hosts) == ("fail", ("host2",))
    (tmp_path / "elsewhere" / "shared").mkdir(parents=True)
    _, report = await validated(api)
    found = [check for check in report.checks if check.name == "written-and-read"]
    assert [check.result for check in found] == ["fail", "fail"]


async def test_a_host_that_does_not_answer(api: Any, desks: dict[str, Desk]) -> None:
    await api.lose("host2")
    _, report = await validated(api)
    [check] = [check for check in report.checks if check.name == "hosts"]
    assert (check.result, check.hosts) == ("fail", ("host2",))
    assert list((desks["host1"].root / "shared").iterdir()) == []


async def test_a_move_keeps_the_bandwidth_from_being_measured(
    api: Any, desks: dict[str, Desk]
) -> None:
    desks["host1"].moving.add("web")
    _, report = await validated(api)
    [check] = [check for check in report.checks if check.name == "bandwidth"]
    assert (check.result, "web is on the move" in check.message) == ("warn", True)


async def test_only_one_runs_at_a_time(api: Any, desks: dict[str, Desk]) -> None:
    first = await api.api.request("POST", "/v1/cluster/actions/validate", json={})
    with pytest.raises(PeerRefused, match="busy"):
        await api.api.request("POST", "/v1/cluster/actions/validate", json={})
    await api.api.get(f"/v1/tasks/{first.json()['id']}", query={"wait": 30})


# The first move


async def noted(api: Any) -> list[str]:
    found = await api.records.list(keys.HOSTS, HostValidated, suffix="/validated")
    return sorted(key.split("/")[3] for key in found)


async def test_the_first_move_validates_its_hosts_once(api: Any, desks: dict[str, Desk]) -> None:
    await api.make_vm("web", start="host1")
    assert await noted(api) == []
    for to in ("host2", "host1"):
        task = await api.act("POST", "/v1/vms/web/actions/migrate", {"to": to})
        assert task["state"] == "completed", task
        assert await noted(api) == ["host1", "host2"]
    assert await api.records.get(keys.VALIDATION, ValidationReport) is None


async def test_hosts_that_are_not_fit_are_refused_unless_told(
    api: Any, desks: dict[str, Desk]
) -> None:
    desks["host2"].clock.off_s = 5.0
    await api.make_vm("web", start="host1")
    task = await api.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2"})
    assert (task["state"], task["error"]["code"]) == ("failed", "checks-failed")
    assert "never validated" in task["reason"]
    assert "clocks of host1 and host2 differ" in task["reason"]
    [check] = task["error"]["context"]["checks"]
    assert (check["name"], check["result"]) == ("clock", "fail")
    assert await noted(api) == []
    body = {"to": "host2", "allow_unvalidated": True}
    task = await api.act("POST", "/v1/vms/web/actions/migrate", body)
    assert task["state"] == "completed", task


async def test_hosts_that_were_validated_are_not_looked_at_again(
    api: Any, desks: dict[str, Desk]
) -> None:
    await validated(api)
    assert await noted(api) == ["host1", "host2"]
    desks["host2"].clock.off_s = 5.0  # a look would find it
    await api.make_vm("web", start="host1")
    task = await api.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2"})
    assert task["state"] == "completed", task


async def test_an_agent_without_these_routes_is_no_reason_to_refuse(api: Any) -> None:
    await api.make_vm("web", start="host1")
    task = await api.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2"})
    assert task["state"] == "completed", task
    assert await noted(api) == []


# The canary


async def test_a_canary_is_made_moved_and_removed(api: Any, desks: dict[str, Desk]) -> None:
    _, report = await validated(api, live=True)
    canary = report.canary
    assert canary is not None
    assert canary.failure == ""
    assert (canary.blackout_ms, canary.source, canary.destination) == (42, "host1", "host2")
    assert [step.name for step in canary.steps] == [
        "making a small VM",
        "starting it on host1",
        "moving it live to host2",
        "draining host2",
    ]
    assert canary.not_done == ("a failover was not tried: --failover names a host",)
    assert [row["state"] for row in await api.api.get("/v1/hosts")] == ["up", "up"]
    assert results(report, "canary") == ["pass"]
    assert await api.api.get("/v1/vms") == []


async def test_a_host_with_vms_of_others_is_not_drained(api: Any, desks: dict[str, Desk]) -> None:
    await api.make_vm("web", start="host2")
    _, report = await validated(api, live=True)
    assert report.canary is not None
    assert "web would have moved" in report.canary.not_done[0]
    assert (await api.api.get("/v1/vms/web"))["host"] == "host2"


async def test_a_mark_of_somebody_elses_stays(
    api: Any, desks: dict[str, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def admin(stage: Any, canary: Canary) -> Canary:
        await stage.carry_out(DrainHost(name="host2", reason="new memory"))
        return canary

    start, move, *rest = canary_acts.STEPS
    monkeypatch.setattr(canary_acts, "STEPS", (start, move, admin, *rest))
    _, report = await validated(api, live=True)
    assert report.canary is not None
    assert "host2 is draining already: new memory" in report.canary.not_done[0]
    marks = await api.records.list(keys.HOSTS, HostMark, suffix="/mark")
    assert [record.value.reason for record in marks.values()] == ["new memory"]
    assert await api.api.get("/v1/vms") == []


async def test_a_canary_that_fails_is_told_and_removed(api: Any, desks: dict[str, Desk]) -> None:
    from manager_fakes import refused

    api.agents["host1"].refuse["start"] = refused("no room in the cage")
    _, report = await validated(api, live=True)
    assert report.canary is not None
    assert "no room in the cage" in report.canary.failure
    assert results(report, "canary") == ["fail"]
    assert await api.api.get("/v1/vms") == []


async def test_a_canary_that_is_busy_is_removed_when_it_is_not(
    api: Any, desks: dict[str, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    from manager_fakes import refused

    monkeypatch.setattr(canary_acts, "_AGAIN_S", 0.05)
    api.agents["host1"].refuse["stop"] = refused("its source is still at work")

    async def later() -> None:
        await api.agents["host1"].was_asked("stop")
        del api.agents["host1"].refuse["stop"]

    freed = asyncio.create_task(later(), name="freed")
    _, report = await validated(api, live=True)
    await freed
    assert results(report, "canary") == ["pass"]
    assert await api.api.get("/v1/vms") == []


async def test_a_canary_that_cannot_be_removed_is_told(
    api: Any, desks: dict[str, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    from manager_fakes import refused

    monkeypatch.setattr(canary_acts, "_AGAIN_S", 0.05)
    monkeypatch.setattr(canary_acts, "_REMOVE_S", 0.2)
    api.agents["host1"].refuse["stop"] = refused("its source is still at work")
    _, report = await validated(api, live=True)
    assert results(report, "canary") == ["fail"]
    assert report.canary is not None
    assert "could not be removed" in report.canary.failure
    del api.agents["host1"].refuse["stop"]


async def test_a_canary_without_its_image_says_what_it_needs(
    api: Any, desks: dict[str, Desk]
) -> None:
    no = NotFound("there is no image demo", hint="scripts/build-image makes it")
    for agent in api.agents.values():
        agent.refuse["publish"] = no
    _, report = await validated(api, live=True)
    assert results(report, "canary") == ["warn"]
    assert report.canary is not None
    assert "no image demo" in report.canary.not_done[0]


# Pure


def test_a_failure_counts_against_the_hosts_that_it_names() -> None:
    def check(category: Any, result: Any, *hosts: str) -> ValidationCheck:
        return ValidationCheck(category=category, name="x", result=result, message="", hosts=hosts)

    hosts = ["a", "b"]
    assert fit_hosts((check("system", "fail", "b"),), hosts) == ["a"]
    assert fit_hosts((check("network", "fail"),), hosts) == []
    assert fit_hosts((check("storage", "fail", "a"), check("system", "warn", "a")), hosts) == hosts


def test_a_move_that_nobody_timed_is_not_called_measured() -> None:
    canary = Canary(vm="canary", source="a", destination="b", migration="m-1", total_ms=900.0)
    check = of_canary(canary)
    assert (check.result, "nobody measured" in check.message) == ("warn", True)
    assert of_canary(canary.but(blackout_ms=50.0)).result == "pass"


def test_bandwidth_is_measured_round_the_hosts() -> None:
    assert ring([]) == ring(["a"]) == []  # type: ignore[list-item]
    assert ring(["a", "b"]) == [("a", "b"), ("b", "a")]  # type: ignore[comparison-overlap,list-item]
    assert len(ring(["a", "b", "c"])) == 3  # type: ignore[list-item]
