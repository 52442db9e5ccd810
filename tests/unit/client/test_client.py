"""The SDK against a cluster that speaks TLS, SSE and WebSocket as the manager does."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from godwit.client import AsyncClient, Client, nouns, sync, waiting
from godwit.client.api import _not_uploaded
from godwit.client.waiting import Told
from godwit.model.errors import (
    Cancelled,
    Conflict,
    GodwitError,
    InvalidRequest,
    NotFound,
    OperationFailed,
    OutcomeUnknown,
    Unauthenticated,
    Unavailable,
)
from godwit.model.migration import STAGES, Migration, MoveState, Progress, Stage
from godwit.model.requests import CreateVm, parse_request
from godwit.model.task import TaskState
from godwit.wire.ca import ClusterCa

ROOT = Path(__file__).resolve().parents[3]


async def test_reading(api: Any) -> None:
    async with AsyncClient() as client:
        assert [vm.name for vm in await client.vms.list()] == ["web"]
        assert (await client.vms.get("web")).memory_bytes == 512 << 20
        assert [host.name for host in await client.hosts.list()] == ["host1", "host2"]
        assert (await client.networks.get("lan")).bridge == "br-lan"
        assert (await client.volumes.list())[0].kind == "dir"
        assert await client.migrations.list() == []
        with pytest.raises(NotFound, match="no vm nope"):
            await client.vms.get("nope")
    assert api.asked[0].headers["x-godwit-client"] == "sdk/0.1"


async def test_a_move_is_sent_followed_and_reported(api: Any) -> None:
    seen: list[Migration] = []
    async with AsyncClient() as client:
        task = await client.vms.migrate("web", to="host2", max_blackout_ms=200)
        assert not task.state.final
        done = await client.wait(
            task,
            on_progress=lambda news: seen.append(news) if isinstance(news, Migration) else None,
        )
        report = await client.result(done)
    assert api.actions()[0].json == {"to": "host2", "max_blackout_ms": 200.0}
    assert isinstance(report, Migration)
    assert report.blackout_ms == 47.0
    stages = [STAGES.index(move.progress.stage) for move in seen if not move.state.final]
    assert stages == sorted(stages)
    assert len(set(stages)) >= 3


async def test_who_listens_first_misses_nothing_and_reads_nothing(api: Any) -> None:
    seen: list[Migration] = []
    request = parse_request({"kind": "vm.migrate", "name": "web", "to": "host2"})
    async with AsyncClient() as client:
        listening = await client.listen(request)
        task = await client.send(request)
        done = await client.wait(
            task,
            on_progress=lambda news: seen.append(news) if isinstance(news, Migration) else None,
            listening=listening,
        )
    assert done.state is TaskState.COMPLETED
    stages = [move.progress.stage for move in seen if not move.state.final]
    assert list(dict.fromkeys(stages)) == list(STAGES)
    # Neither the task nor the move had to be read beside the stream.
    read = [one.path for one in api.asked if one.method == "GET" and "wait" not in one.query]
    assert [path for path in read if path != "/v1/events"] == []


async def test_listening_to_something_else_is_no_use_and_no_harm(api: Any) -> None:
    other = parse_request({"kind": "vm.migrate", "name": "db", "to": "host2"})
    seen: list[object] = []
    async with AsyncClient() as client:
        listening = await client.listen(other)
        task = await client.vms.migrate("web", to="host2")
        await client.wait(task, on_progress=seen.append, listening=listening)
    assert any(isinstance(news, Migration) and news.vm == "web" for news in seen)


async def test_a_manager_that_is_away_is_listened_to_for_half_a_second(api: Any) -> None:
    await asyncio.to_thread(api.stop)
    request = parse_request({"kind": "vm.migrate", "name": "web", "to": "host2"})
    async with AsyncClient() as client:
        began = time.monotonic()
        await client.listen(request)
        assert time.monotonic() - began < 3
        with pytest.raises(Unavailable):
            await client.send(request)
    await asyncio.to_thread(api.start)


def test_progress_never_runs_backwards() -> None:
    """What stands after a connection is read beside the stream, which may be behind it."""

    def move(stage: Stage, percent: float, state: str = "running") -> Migration:
        return Migration(
            id="m-1",
            vm="web",
            source="host1",
            destination="host2",
            state=MoveState(state),
            progress=Progress(stage=stage, percent=percent),
        )

    told = Told()
    assert told.is_news(move(Stage.PRECOPY, 40.0))
    assert not told.is_news(move(Stage.SETUP, 1.0))
    assert not told.is_news(move(Stage.PRECOPY, 30.0))
    assert told.is_news(move(Stage.SWITCHOVER, 30.0))
    assert told.is_news(move(Stage.SWITCHOVER, 30.0, "failed"))
    assert not told.is_news(move(Stage.ANNOUNCE, 100.0))


async def test_disks_and_volumes(api: Any) -> None:
    async with AsyncClient() as client:
        (disk,) = await client.vms.disks("web")
        assert (disk.format, disk.effective_tier, disk.tier) == ("vhdx", "brokered", "auto")
        volume = await client.volumes.get("shared")
        assert volume.hosts["host2"].reason == "lost path to LUN 3"
        task = await client.vms.add_disk("web", volume="shared", size_bytes=1 << 30, format="raw")
        assert getattr(await client.result(await client.wait(task)), "name", "") == "web"
        await client.vms.remove_disk("web", "disk0", force=True)
        await client.vms.resize_disk("web", "disk0", 4 << 30)
        await client.vms.move_disk("web", "disk0", to="fast", keep=True)
        await client.vms.export_disk("web", "disk0", "/clusterstorage/shared/copy.qcow2")
        await client.vms.clone("web", "two", linked=True)
        assert await client.vms.checkpoints("web") == []
        await client.vms.create_checkpoint("web", "one")
        await client.vms.revert_checkpoint("web", "one")
        await client.vms.delete_checkpoint("web", "one")
        task = await client.volumes.create("fast", type="local")
        made = await client.result(await client.wait(task))
        assert getattr(made, "health", "") == "degraded"
        await client.volumes.import_disk("shared", "debian", "https://example.org/d", format="raw")
        await client.volumes.delete("fast")
    sent = [(asked.method, asked.path, asked.json) for asked in api.actions()]
    assert sent == [
        (
            "POST",
            "/v1/vms/web/disks",
            {"volume": "shared", "size_bytes": 1 << 30, "format": "raw"},
        ),
        ("POST", "/v1/vms/web/disks/disk0/actions/remove", {"force": True}),
        ("POST", "/v1/vms/web/disks/disk0/actions/resize", {"size_bytes": 4 << 30}),
        ("POST", "/v1/vms/web/disks/disk0/actions/move", {"to": "fast", "keep": True}),
        (
            "POST",
            "/v1/vms/web/disks/disk0/actions/export",
            {"target": "/clusterstorage/shared/copy.qcow2"},
        ),
        ("POST", "/v1/vms/web/actions/clone", {"target": "two", "linked": True}),
        ("POST", "/v1/vms/web/checkpoints", {"checkpoint": "one"}),
        ("POST", "/v1/vms/web/checkpoints/one/actions/revert", {}),
        ("DELETE", "/v1/vms/web/checkpoints/one", None),
        ("POST", "/v1/volumes", {"name": "fast", "type": "local"}),
        (
            "POST",
            "/v1/volumes/shared/actions/import",
            {"name": "debian", "source": "https://example.org/d", "format": "raw"},
        ),
        ("DELETE", "/v1/volumes/fast", None),
    ]


async def test_a_plan_sends_no_task(api: Any) -> None:
    async with AsyncClient() as client:
        plan = await client.vms.migrate("web", dry_run=True)
    assert plan.destination == "host2"
    assert api.rows["tasks"] == {}


async def test_wrong_words_are_not_sent(api: Any) -> None:
    async with AsyncClient() as client:
        with pytest.raises(InvalidRequest):
            await client.vms.migrate("web", max_blackout_ms=-1)
        with pytest.raises(InvalidRequest, match="no plan"):
            await client.plan("vm.start", name="web")
    assert api.asked == []


@pytest.mark.parametrize(
    ("fate", "error", "expected"),
    [
        ("failed", Conflict("web is moving", hint="wait"), Conflict),
        ("failed", None, OperationFailed),
        ("cancelled", None, Cancelled),
        ("cancelled", OperationFailed("called off"), Cancelled),
        ("unknown", OutcomeUnknown("who knows", hint="look"), OutcomeUnknown),
    ],
)
async def test_a_task_ends_in_its_typed_error(
    api: Any, fate: str, error: GodwitError | None, expected: type[GodwitError]
) -> None:
    api.fate, api.error = fate, error
    async with AsyncClient() as client:
        task = await client.vms.start("web")
        with pytest.raises(expected) as caught:
            await client.wait(task)
    assert type(caught.value) is expected
    assert caught.value.hint


async def test_a_refusal_comes_out_as_it_was_raised(api: Any) -> None:
    api.refusal = Conflict("web is moving", hint="wait for it", move="m-1")
    async with AsyncClient() as client:
        with pytest.raises(Conflict) as caught:
            await client.vms.stop("web")
    assert (caught.value.hint, caught.value.context) == ("wait for it", {"move": "m-1"})


async def test_waiting_survives_a_manager_that_goes_and_comes(api: Any) -> None:
    api.hold_at = "precopy"
    async with AsyncClient() as client:
        task = await client.vms.migrate("web", to="host2")
        seen: list[object] = []
        waiting_ = asyncio.ensure_future(client.wait(task, on_progress=seen.append))
        await asyncio.to_thread(api.stage_reached.wait, 10)
        await asyncio.to_thread(api.stop)
        await asyncio.sleep(0.2)
        assert not waiting_.done()
        await asyncio.to_thread(api.start)
        api.let_go.set()
        done = await asyncio.wait_for(waiting_, 10)
    assert done.state is TaskState.COMPLETED
    assert len(api.actions()) == 1


async def test_waiting_gives_up_when_the_manager_stays_away(api: Any) -> None:
    api.hold_at = "precopy"
    async with AsyncClient() as client:
        task = await client.vms.migrate("web")
        await asyncio.to_thread(api.stop)
        began = time.monotonic()
        with pytest.raises(OutcomeUnknown, match=task.id) as caught:
            await waiting.wait(client._link, task, on_progress=None, give_up_s=0.5)
    assert 0.4 < time.monotonic() - began < 3
    assert f"godwit task wait {task.id}" in caught.value.hint
    await asyncio.to_thread(api.start)


async def test_waiting_on_a_manager_that_holds_nothing(api: Any) -> None:
    api.holds_requests = False
    async with AsyncClient() as client:
        done = await client.wait(await client.vms.migrate("web"))
    assert done.state is TaskState.COMPLETED
    asked = [one for one in api.asked if one.path == f"/v1/tasks/{done.id}"]
    assert len(asked) < 20


async def test_boot_files_that_are_here_are_uploaded(api: Any, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"\x7fkernel" * 1000)
    digest = hashlib.sha256(kernel.read_bytes()).hexdigest()
    there = "/clusterstorage/shared/.godwit/boot/abc"
    async with AsyncClient() as client:
        task = await client.vms.create(
            "new", memory_bytes=64 << 20, kernel=str(kernel), initrd=there, disks=["shared:1G:raw"]
        )
        await client.wait(task)
    upload, create = api.actions()
    assert (upload.path, upload.body) == ("/v1/boot-files", kernel.read_bytes())
    assert upload.headers["x-godwit-sha256"] == digest
    assert create.json["kernel"] == f"/clusterstorage/shared/.godwit/boot/{digest}"
    assert create.json["initrd"] == there
    assert create.json["disks"] == [{"volume": "shared", "size_bytes": 1 << 30, "format": "raw"}]


async def test_events_are_followed_across_a_break(api: Any) -> None:
    async with AsyncClient() as client:
        stream = client.events(since="0")
        api.publish("first")  # id 0 of the fake's log: skipped
        api.publish("second")
        assert (await anext(stream)).message == "second"
        await asyncio.to_thread(api.stop)
        await asyncio.to_thread(api.start)
        await asyncio.to_thread(api.publish, "third")
        assert (await asyncio.wait_for(anext(stream), 10)).message == "third"
        await stream.aclose()
        found = [event.message async for event in client.events(since="0", follow=False)]
    assert found == ["second", "third"]


async def test_the_console_goes_both_ways(api: Any) -> None:
    async with AsyncClient() as client, await client.console("web") as console:
        assert await console.receive() == b"login: "
        await console.send(b"root\n")
        assert await console.receive() == b"ROOT\n"
        await console.send(b"poweroff\n")
        assert await console.receive() is None


async def test_who_is_not_trusted(api: Any, tmp_path: Path) -> None:
    api.token_file.write_text("wrong")
    async with AsyncClient() as client:
        with pytest.raises(Unauthenticated):
            await client.vms.list()
    stranger = tmp_path / "stranger"
    ClusterCa.create(cluster="other").save(stranger)
    async with AsyncClient(api.url, ca_file=stranger / "ca.pem") as client:
        with pytest.raises(Unavailable) as caught:
            await client.vms.list()
    assert "certificate" in caught.value.message
    assert caught.value.exit_code == 1


def _threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name == "godwit-client"}


def test_the_synchronous_face(api: Any) -> None:
    before = _threads()  # another test's may still be on its way out
    with Client() as client:
        assert client.vms.get("web").host == "host1"
        report = client.result(client.wait(client.vms.migrate("web", to="host2")))
        assert isinstance(report, Migration)
        events = client.events(since="0")
        assert next(events).kind
        events.close()  # type: ignore[attr-defined]
        with client.console("web") as console:
            assert console.receive() == b"login: "
    assert not _threads() - before


async def test_the_synchronous_face_inside_a_loop(api: Any) -> None:
    with Client() as client:
        assert client.vms.list()


def test_the_mirror_is_complete() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "client-sync", "--check"], check=True)
    for name in ("Vms", "Hosts", "Networks", "Volumes", "Migrations", "Tasks"):
        mirrored, original = getattr(sync, name), getattr(nouns, name)
        for method, function in inspect.getmembers(original, inspect.iscoroutinefunction):
            there = inspect.signature(getattr(mirrored, method))
            assert there.parameters == inspect.signature(function).parameters


def test_importing_the_client_stays_light() -> None:
    heavy = "('pydantic', 'fastapi', 'uvicorn', 'cryptography', 'rich', 'websockets', 'httpx2')"
    code = f"import sys, godwit.client.sync; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_plan_of_a_new_vm_uploads_nothing(tmp_path: Path) -> None:
    kernel, data = tmp_path / "vmlinuz", tmp_path / "user-data"
    for path in (kernel, data):
        path.write_text("x")
    request = CreateVm(
        name="web", memory_bytes=1 << 28, kernel=str(kernel), cloud_init=str(data), initrd="/c/i"
    )
    assert _not_uploaded(request) == {"kernel": "/clusterstorage/vmlinuz", "cloud_init": None}
