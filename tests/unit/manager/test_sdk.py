"""The SDK and the API agree: the people's client against the real routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from godwit.client.api import AsyncClient
from godwit.model.errors import Conflict, NotFound, Refused
from godwit.model.migration import Migration
from godwit.model.task import Task, TaskState

TOKEN = "a-token-of-many-letters"


@pytest.fixture
async def sdk(api: Any, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    client = AsyncClient(api.api.url, token_file=token, ca_file=api.identities["m1"].ca)
    yield client
    await client.close()
    await asyncio.sleep(0.05)


async def test_a_vm_is_made_moved_and_watched(api: Any, sdk: AsyncClient, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    made = await sdk.wait(
        await sdk.act("vm.create", name="web", memory_bytes=1 << 28, kernel=str(kernel))
    )
    assert made.by.startswith("admin through ")
    await sdk.wait(await sdk.act("vm.start", name="web", host="host1"))
    plan = await sdk.plan("vm.migrate", name="web")
    assert plan.destination == "host2"
    api.agents["host1"].hold.clear()
    seen: list[Task | Migration] = []
    first_news = asyncio.Event()

    def progress(news: Task | Migration) -> None:
        seen.append(news)
        first_news.set()

    task = await sdk.act("vm.migrate", name="web", to="host2")
    waiting = asyncio.create_task(sdk.wait(task, on_progress=progress))
    with pytest.raises(Conflict):
        await sdk.act("vm.migrate", name="web", to="host2")
    await asyncio.sleep(0.2)  # the stream of progress must stand before the move goes on
    api.agents["host1"].hold.set()
    done = await waiting
    assert done.state is TaskState.COMPLETED
    move = await sdk.result(done)
    assert isinstance(move, Migration)
    assert (move.blackout_ms, move.destination) == (42.0, "host2")
    assert any(isinstance(news, Migration) for news in seen)
    (row,) = await sdk.rows("vms")
    assert row["host"] == "host2"


async def test_errors_arrive_as_they_were_raised(api: Any, sdk: AsyncClient) -> None:
    with pytest.raises(NotFound, match="no vm nope"):
        await sdk.act("vm.start", name="nope")
    await api.make_vm("web")
    with pytest.raises(Refused, match="not running") as caught:
        await sdk.act("vm.migrate", name="web", to="host2")
    assert caught.value.exit_code == 4
    await api.make_vm("db", start="host1")
    api.agents["host1"].checks = [{"name": "cpu", "result": "fail", "message": "no", "hint": "h"}]
    with pytest.raises(Refused, match="db cannot move to host2: no"):
        await sdk.wait(await sdk.act("vm.migrate", name="db", to="host2"))


async def test_the_console_and_the_log(api: Any, sdk: AsyncClient) -> None:
    await api.make_vm("web", start="host1")
    async with await sdk.console("web") as console:
        assert await console.receive() == b"web on host1: "
        await console.send(b"hi")
        assert await console.receive() == b"HI"
    found = []
    async for event in sdk.events(since="0", subject="vm/web", follow=False):
        found.append(event.kind)
    assert "vm.created" in found


async def test_the_console_follows_a_move(api: Any, sdk: AsyncClient) -> None:
    await api.make_vm("web", start="host1")
    async with await sdk.console("web") as console:
        assert await console.receive() == b"web on host1: "
        await sdk.wait(await sdk.act("vm.migrate", name="web", to="host2"))
        await console.send(b"q")  # the source's end goes, as it does after a move
        assert await console.receive() == b"web on host2: "
        await sdk.wait(await sdk.act("vm.stop", name="web"))
        await console.send(b"q")
        assert await console.receive() is None
