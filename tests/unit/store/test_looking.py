"""When a record is looked at again: at changes, and in any case now and then."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from godwit.store.errors import Compacted
from godwit.store.looking import looks
from godwit.store.memory import MemoryStore, MemoryWatch


async def test_it_is_told_at_once_at_changes_and_when_the_watch_stands() -> None:
    store = MemoryStore()
    async with contextlib.aclosing(looks(store, "a/", resync_s=60)) as times:
        async with asyncio.timeout(2):
            await anext(times)
        waiting = asyncio.ensure_future(anext(times))
        await store.put("b/elsewhere", b"")
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await store.put("a/here", b"")
        async with asyncio.timeout(2):
            await waiting


async def test_it_looks_by_itself_however_silent_the_watch_is() -> None:
    store = MemoryStore()
    async with contextlib.aclosing(looks(store, "a/", resync_s=0.02)) as times:
        async with asyncio.timeout(2):
            for _ in range(4):
                await anext(times)


async def test_a_history_that_is_gone_is_for_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(self: MemoryWatch) -> object:
        raise Compacted("too old")

    monkeypatch.setattr(MemoryWatch, "__anext__", gone)
    with pytest.raises(Compacted):
        await anext(looks(MemoryStore(), "a/"))
