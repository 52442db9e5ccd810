"""The API through a real client over TLS: routes, errors, actions, read-your-writes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from typing import Any

import pytest

from godwit.model import keys
from godwit.model.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    Refused,
    Unauthenticated,
)
from godwit.model.vm import VmState
from godwit.wire.errors import PeerRefused
from godwit.wire.http import PeerClient
from godwit.wire.tls import ClientTls


async def refusal(call: Any) -> PeerRefused:
    with pytest.raises(PeerRefused) as caught:
        await call
    return caught.value


async def test_health_and_openapi_need_no_token(api: Any) -> None:
    async with PeerClient(api.api.url, tls=ClientTls.for_api(api.identities["m1"].ca)) as nobody:
        health = await nobody.get("/v1/health")
        assert health["status"] == "ok"
        schema = await nobody.get("/v1/openapi.json")
        for path in ("/v1/vms", "/v1/nonsense", "/metrics"):
            no = await refusal(nobody.get(path))
            assert (no.status, no.problem.code) == (401, "unauthenticated")
            assert isinstance(no.error, Unauthenticated)
            assert no.error.exit_code == 4
    assert schema["openapi"] == "3.1.0"


async def test_a_wrong_token_is_refused(cluster: Any) -> None:
    async with cluster.serve(token="a-token-of-many-lettert") as api:
        assert (await refusal(api.get("/v1/vms"))).status == 401


def _references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(_references(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(_references(value) for value in node))
    return set()


async def test_openapi_is_whole(api: Any) -> None:
    from godwit.model.requests import ROUTES

    schema = await api.api.get("/v1/openapi.json")
    parts = schema["components"]["schemas"]
    for reference in _references(schema):
        assert reference.removeprefix("#/components/schemas/") in parts, reference
    for kind, (method, template) in ROUTES.items():
        operation = schema["paths"][template][method.lower()]
        assert operation["operationId"] == kind
        named = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
        assert [name for name in named if "{" + name + "}" in template] == named
        assert len(set(named)) == template.count("{")
        assert "application/problem+json" in operation["responses"]["default"]["content"]
    body = parts["CreateVmBody"]
    assert set(body["required"]) == {"name", "memory_bytes"}
    assert "kind" not in body["properties"]
    assert "name" not in parts["MigrateVmBody"]["properties"]
    ids = [op["operationId"] for path in schema["paths"].values() for op in path.values()]
    assert len(ids) == len(set(ids))


PROBLEMS = [
    ("GET", "/v1/vms/nope", None, NotFound, 404, "not-found"),
    ("GET", "/v1/nope", None, NotFound, 404, "not-found"),
    ("GET", "/v1/tasks/t-0?wait=soon", None, InvalidRequest, 400, "invalid"),
    ("PUT", "/v1/vms", None, InvalidRequest, 405, "invalid"),
    ("POST", "/v1/vms", b"{", InvalidRequest, 400, "invalid"),
    ("POST", "/v1/vms", b"[]", InvalidRequest, 400, "invalid"),
    ("POST", "/v1/vms", {"name": "UP", "memory_bytes": 1 << 28}, InvalidRequest, 400, "invalid"),
    ("POST", "/v1/vms", {"name": "a", "memory_bytes": "lots"}, InvalidRequest, 400, "invalid"),
    ("POST", "/v1/vms", {"name": "a", "memory_bytes": 1 << 28}, InvalidRequest, 400, "invalid"),
    ("POST", "/v1/vms/web/actions/start", {"colour": "red"}, InvalidRequest, 400, "invalid"),
    ("POST", "/v1/vms/web/actions/start", {"name": "db"}, InvalidRequest, 400, "invalid"),
    ("POST", "/v1/vms/nope/actions/start", {}, NotFound, 404, "not-found"),
    ("POST", "/v1/vms/web/actions/migrate", {}, Refused, 409, "refused"),
    ("POST", "/v1/vms/web/actions/pause", {}, Refused, 409, "refused"),
    ("POST", "/v1/vms/web/actions/restore", {}, Refused, 409, "refused"),
    ("POST", "/v1/vms/web/actions/start", {"host": "nope"}, NotFound, 404, "not-found"),
    ("DELETE", "/v1/networks/lan", None, Refused, 409, "refused"),
    ("POST", "/v1/networks", {"name": "lan"}, Conflict, 409, "conflict"),
    ("POST", "/v1/migrations/m-0/actions/cancel", {}, NotFound, 404, "not-found"),
    ("GET", "/v1/events?since=yesterday", None, InvalidRequest, 400, "invalid"),
]


async def test_every_mistake_is_one_problem_and_changes_nothing(api: Any) -> None:
    await api.make_vm("web")
    before = api.manager.world.cache.snapshot.tasks
    for method, path, body, kind, status, code in PROBLEMS:
        path, _, query = path.partition("?")
        raw = body if isinstance(body, bytes) else None
        no = await refusal(
            api.api.request(
                method,
                path,
                json=None if raw else body,
                content=raw,
                query=dict([query.split("=")]) if query else None,
            )
        )
        where = (method, path, body)
        assert (no.status, no.problem.code) == (status, code), where
        assert no.problem.detail, where
        assert no.problem.hint, where
        assert "\n" not in no.problem.detail, where
        assert isinstance(no.error, kind), where
    assert api.manager.world.cache.snapshot.tasks == before
    answer = await api.api.get("/v1/networks")
    assert [(row["name"], row["vms"], row["hosts"]) for row in answer] == [
        ("lan", 1, ["host1", "host2"])
    ]


async def test_the_golden_problem(api: Any) -> None:
    await api.make_vm("web")
    no = await refusal(
        api.api.post("/v1/vms", {"name": "web", "memory_bytes": 1 << 28, "image": "demo"})
    )
    assert no.problem.to_dict() == {
        "type": "urn:godwit:error:conflict",
        "title": "Conflict",
        "status": 409,
        "code": "conflict",
        "detail": "there is a VM web already",
        "hint": "choose another name, or look at it: godwit vm show web",
    }
    assert no.error.exit_code == 4


async def test_create_pins_and_places_and_lists(api: Any) -> None:
    await api.make_vm("web", disks=[{"volume": "shared", "size_bytes": 1 << 30}], append="quiet")
    vm = await api.api.get("/v1/vms/web")
    assert vm["state"] == "stopped"
    assert vm["host"] is None
    assert vm["boot"]["append"] == "console=ttyS0 quiet"
    assert vm["disks"][0]["path"] == "/clusterstorage/shared/web/disk0.qcow2"
    assert api.agents["host1"].disks == {"/clusterstorage/shared/web/disk0.qcow2"}
    assert len(vm["nics"]) == 1
    spec = await api.records.vm("web")
    assert spec.value.pins.machine == "pc-q35-10.0"
    task = await api.act("POST", "/v1/vms/web/actions/start")
    assert task["state"] == "completed"
    assert task["by"] == "admin through tests/1"
    # Read-your-writes: the list shows what the finished task did.
    (row,) = await api.api.get("/v1/vms")
    assert (row["state"], row["host"], row["epoch"]) == ("running", "host1", 1)
    hosts = {row["name"]: row for row in await api.api.get("/v1/hosts")}
    assert hosts["host1"]["vms"] == 1
    assert hosts["host1"]["state"] == "up"
    assert hosts["host2"]["memory_free_bytes"] == api.agents["host2"].free
    await api.make_vm("db")
    task = await api.act("POST", "/v1/vms/db/actions/start")
    assert (await api.api.get("/v1/vms/db"))["host"] == "host2", "the emptier host is chosen"


async def test_the_whole_life_of_a_vm(api: Any) -> None:
    await api.make_vm("web", start="host2")
    states = []
    for verb in ("pause", "resume", "save", "restore", "stop", "start", "stop"):
        task = await api.act("POST", f"/v1/vms/web/actions/{verb}")
        assert task["state"] == "completed", task
        states.append((await api.api.get("/v1/vms/web"))["state"])
    assert states == ["paused", "running", "saved", "running", "stopped", "running", "stopped"]
    task = await api.act("POST", "/v1/vms/web/actions/stop")
    assert task["reason"] == "web does not run: it is stopped"
    task = await api.act("DELETE", "/v1/vms/web")
    assert task["state"] == "completed"
    assert await api.api.get("/v1/vms") == []
    assert (await api.store.range(keys.VMS)).kvs == ()
    await api.make_vm("web")


async def test_create_that_fails_leaves_nothing(api: Any) -> None:
    from godwit.model.errors import OperationFailed

    for agent in api.agents.values():
        agent.refuse["create-disks"] = OperationFailed("no space left", hint="make room")
    body = {
        "name": "web",
        "memory_bytes": 1 << 28,
        "disks": [{"volume": "shared", "size_bytes": 1 << 20}],
    }
    task = await api.act("POST", "/v1/vms", body)
    assert task["state"] == "failed"
    assert task["error"]["detail"] == "no space left"
    assert (await api.store.range(keys.VMS)).kvs == ()


async def test_an_agent_that_is_away_is_said_so(api: Any) -> None:
    await api.make_vm("web", start="host1")
    await api.servers["host1"].stop(grace_s=0)
    task = await api.act("POST", "/v1/vms/web/actions/pause")
    assert (task["state"], task["error"]["code"]) == ("failed", "unavailable")
    assert "host1" in task["error"]["detail"]
    await api.store.delete(keys.host_agent("host1"))
    task = await api.act("POST", "/v1/vms/web/actions/pause")
    assert "agent of host1 is away" in task["error"]["detail"]
    host = await api.api.get("/v1/hosts/host1")
    assert host["state"] == "unmanaged"
    await api.store.delete(keys.host_lease("host1"))
    await api.manager.world.cache.until(lambda s: True if not s.leases - {"host2"} else None)
    vm = await api.api.get("/v1/vms/web")
    assert vm["state"] == VmState.UNKNOWN
    assert "host1" in vm["reason"]


async def test_forced_stop_may_join_and_others_may_not(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host1"].drop_before.add("stop")
    first = (await api.api.post("/v1/vms/web/actions/stop", {"timeout_s": 60}))["id"]
    no = await refusal(api.api.post("/v1/vms/web/actions/pause", {}))
    assert no.problem.code == "conflict"
    assert first in no.problem.detail
    api.agents["host1"].drop_before.clear()
    task = await api.act("POST", "/v1/vms/web/actions/stop", {"force": True})
    assert task["state"] == "completed"


async def test_boot_files_go_through_to_a_host(api: Any) -> None:
    data = b"kernel" * 500_000
    digest = hashlib.sha256(data).hexdigest()
    answer = await api.api.request(
        "POST", "/v1/boot-files", content=data, headers={"x-content-sha256": digest}
    )
    assert answer.json() == {
        "sha256": digest,
        "path": f"/clusterstorage/shared/.godwit/boot/{digest}",
    }
    assert api.agents["host1"].files == {digest: data}
    no = await refusal(
        api.api.request("POST", "/v1/boot-files", content=b"x", headers={"x-content-sha256": "00"})
    )
    assert no.problem.code == "invalid"
    assert list((api.root / "uploads").iterdir()) == []
    await api.servers["host1"].stop(grace_s=0)
    await api.api.request("POST", "/v1/boot-files", content=b"initrd")
    assert list(api.agents["host2"].files.values()) == [b"initrd"]
    await api.make_vm("web", image=None, kernel=answer.json()["path"])
    no = await refusal(
        api.api.post("/v1/vms", {"name": "w2", "memory_bytes": 1 << 28, "kernel": "/boot/vmlinuz"})
    )
    assert "/v1/boot-files" in no.problem.hint


async def test_console_passes_bytes_both_ways(api: Any) -> None:
    await api.make_vm("web", start="host1")
    async with api.api.websocket("/v1/vms/web/console") as line:
        assert await line.recv() == b"web on host1: "
        await line.send(b"hello")
        assert await line.recv() == b"HELLO"
    await api.act("POST", "/v1/vms/web/actions/stop")
    for path in ("/v1/vms/web/console", "/v1/vms/nope/console"):
        with pytest.raises(PeerRefused) as caught:
            async with api.api.websocket(path):
                pass
        assert caught.value.status in (404, 409)
        assert caught.value.problem.hint


async def test_metrics_tell_of_moves_and_states(api: Any) -> None:
    await api.make_vm("web", start="host1")
    await api.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2"})
    text = (await api.api.request("GET", "/metrics")).body.decode()
    assert 'godwit_vms{state="running"} 1.0' in text
    assert 'godwit_hosts{state="up"} 2.0' in text
    assert 'godwit_migration_blackout_seconds_bucket{le="0.05",method="live"} 1.0' in text
    assert 'godwit_tasks_ended_total{kind="vm.migrate",state="completed"} 1.0' in text


async def test_lists_are_quick(api: Any) -> None:
    for index in range(3):
        await api.make_vm(f"vm{index}")
    times = []
    for _ in range(20):
        began = time.perf_counter()
        await api.api.get("/v1/vms")
        times.append(time.perf_counter() - began)
    assert sorted(times)[10] < 0.05


async def test_the_store_away_is_unavailable_and_lists_go_on(api: Any) -> None:
    await api.make_vm("web")
    api.store.faults.unavailable = True
    no = await refusal(api.api.post("/v1/vms/web/actions/start", {}))
    assert no.problem.code == "unavailable"
    assert [row["name"] for row in await api.api.get("/v1/vms")] == ["web"]
    api.store.faults.unavailable = False
    task = await api.act("POST", "/v1/vms/web/actions/start")
    assert task["state"] == "completed"


async def test_networks_come_and_go(api: Any) -> None:
    task = await api.act("POST", "/v1/networks", {"name": "a-network-with-a-long-name"})
    assert task["state"] == "completed"
    found = await api.api.get("/v1/networks/a-network-with-a-long-name")
    assert len(found["bridge"]) <= 15
    assert (await api.act("DELETE", "/v1/networks/a-network-with-a-long-name"))["state"] == (
        "completed"
    )
    assert [row["name"] for row in await api.api.get("/v1/networks")] == ["lan"]
    assert [row["name"] for row in await api.api.get("/v1/volumes")] == ["shared"]


async def test_a_wait_that_is_too_short_answers_the_running_task(api: Any) -> None:
    await api.make_vm("web", start="host1")
    api.agents["host1"].drop_before.add("pause")
    began = asyncio.get_running_loop().time()
    task = await api.api.request("POST", "/v1/vms/web/actions/pause", json={}, query={"wait": 0.2})
    assert json.loads(task.body)["state"] == "running"
    assert 0.15 < asyncio.get_running_loop().time() - began < 2
