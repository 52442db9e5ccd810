"""Random histories: the daemon answers every step as the twin does, and as a plain dict would."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from godwit.store import errors
from godwit.store.api import (
    Compare,
    CompareResult,
    CompareTarget,
    Op,
    Store,
    WatchBatch,
    delete,
    delete_prefix,
    get,
    get_prefix,
    put,
)
from godwit.store.client import StoreClient
from godwit.store.daemon.database import Database
from godwit.store.daemon.gateway import Gateway
from godwit.store.daemon.listen import open_listener
from godwit.store.daemon.server import Server
from godwit.store.daemon.service import Service
from godwit.store.memory import MemoryStore


@dataclass(frozen=True)
class Txn:
    compare: tuple[Compare, ...]
    then: tuple[Op, ...]
    orelse: tuple[Op, ...]


@dataclass(frozen=True)
class Grant:
    lease: int


@dataclass(frozen=True)
class Revoke:
    lease: int


@dataclass(frozen=True)
class Restart:
    """Only the daemon has one; the twin must not notice."""


KEYS = st.sampled_from(["a", "a/1", "b", "ü"])
VALUES = st.sampled_from([b"", b"x", b"y", bytes(300)])
LEASES = st.integers(1, 3)
OPS = st.one_of(
    st.builds(put, KEYS, VALUES),
    st.builds(lambda key, value, lease: put(key, value, lease=lease), KEYS, VALUES, LEASES),
    st.builds(delete, KEYS),
    st.builds(delete_prefix, KEYS),
    st.builds(get, KEYS),
    st.builds(get_prefix, KEYS),
)
NUMBERS = st.builds(
    Compare,
    KEYS,
    st.sampled_from([t for t in CompareTarget if t is not CompareTarget.VALUE]),
    st.integers(0, 6),
    st.sampled_from(CompareResult),
)
CONTENTS = st.builds(
    Compare, KEYS, st.just(CompareTarget.VALUE), VALUES, st.sampled_from(CompareResult)
)
BRANCH = st.lists(OPS, max_size=3).map(tuple)
PLAIN = st.builds(lambda op: Txn((), (op,), ()), st.one_of(st.builds(put, KEYS, VALUES), OPS))
STEPS = st.one_of(
    # Mostly steps that succeed, or there is little history to compare.
    PLAIN,
    PLAIN,
    st.builds(Txn, st.lists(st.one_of(NUMBERS, CONTENTS), max_size=2).map(tuple), BRANCH, BRANCH),
    st.builds(Grant, LEASES),
    st.builds(Revoke, LEASES),
    st.just(Restart()),
)
WRITTEN_TWICE = [Txn((), (put("a", value),), ()) for value in (b"x", b"y")]


class InProcess:
    """The daemon's parts in this very process, restartable."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.endpoint = f"unix:{directory}/s.sock"

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        database = Database(self._directory / "data")
        service = Service(database, database.load(), on_failure=_raise)
        server = Server(Gateway(service))
        await server.start([open_listener(self.endpoint, None)])
        yield
        await server.close(grace_s=1)
        service.close()
        database.close()


def _raise(error: Exception) -> None:
    raise error


async def apply(store: Store, step: Txn | Grant | Revoke | Restart) -> object:
    """What the store answers; refusals as their kind."""
    try:
        match step:
            case Txn():
                return await store.txn(step.compare, step.then, step.orelse)
            case Grant():
                return await store.lease_grant(600, lease_id=step.lease)
            case Revoke():
                return await store.lease_revoke(step.lease)
    except errors.StoreError as error:
        return type(error)
    return None


async def history(store: Store) -> list[WatchBatch]:
    end = (await store.status()).revision
    batches: list[WatchBatch] = []
    if end == 1:
        return batches
    async with asyncio.timeout(5), store.watch("", start_revision=1) as watch:
        async for batch in watch:
            batches.append(batch)
            if batch.revision == end:
                break
    return batches


async def run(directory: Path, steps: list[Txn | Grant | Revoke | Restart]) -> None:
    twin, daemon = MemoryStore(clock=lambda: 0.0), InProcess(directory)
    pending = list(steps)
    while True:
        async with daemon.up():
            client = StoreClient([daemon.endpoint])
            while pending and not isinstance(pending[0], Restart):
                step = pending.pop(0)
                assert await apply(client, step) == await apply(twin, step), step
            assert await client.range("") == await twin.range("")
            assert await history(client) == await history(twin)
            await client.aclose()
        if not pending:
            break
        pending.pop(0)
    plain: dict[str, bytes] = {}
    for batch in await history(twin):
        for event in batch.events:
            before = plain.pop(event.kv.key, None)
            assert before == (event.prev.value if event.prev else None)
            if event.kind == "put":
                plain[event.kv.key] = event.kv.value
    assert plain == {kv.key: kv.value for kv in (await twin.range("")).kvs}
    await twin.aclose()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, min_size=4, max_size=20))
@example([*WRITTEN_TWICE, Restart(), Restart(), *WRITTEN_TWICE])
def test_daemon_and_twin_tell_the_same_story(steps: list[Txn | Grant | Revoke | Restart]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(Path(directory), steps))
