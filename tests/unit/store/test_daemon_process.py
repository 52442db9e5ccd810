"""What the daemon promises when it is killed, frozen, starved, damaged or started twice."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from godwit.store import errors
from godwit.store.api import put
from godwit.store.client import StoreClient

if TYPE_CHECKING:
    from conftest import Daemon


async def replay(store: StoreClient, start: int) -> tuple[dict[str, bytes], list[int]]:
    """The keys that the history from ``start`` on leads to, and its revisions."""
    end = (await store.status()).revision
    keys: dict[str, bytes] = {}
    revisions: list[int] = []
    async with asyncio.timeout(10), store.watch("", start_revision=start) as watch:
        async for batch in watch:
            if batch.events:
                revisions.append(batch.revision)
            for event in batch.events:
                keys[event.kv.key] = event.kv.value
                if event.kind == "delete":
                    del keys[event.kv.key]
            if batch.revision >= end:
                return keys, revisions
    raise AssertionError("the watch ended")


async def test_every_acknowledged_write_survives_kill_9(daemon: Daemon) -> None:
    acknowledged: dict[str, tuple[int, int]] = {}
    attempted: dict[str, int] = {}

    async def hammer(name: str, store: StoreClient) -> None:
        number = attempted.get(name, 0)
        with contextlib.suppress(errors.StoreOutcomeUnknown, errors.StoreUnavailable):
            while True:
                number += 1
                attempted[name] = number
                value = b"%d" % number
                steps = [put(f"{name}/left", value), put(f"{name}/right", value)]
                done = await store.txn([], steps)
                acknowledged[name] = (number, done.revision)
        await store.aclose()

    last_revision, last_term = 0, 0
    for killed_after in (0.15, 0.3, 0.22):
        daemon.start()
        writers = asyncio.gather(*(hammer(f"w{n}", daemon.client()) for n in range(6)))
        await asyncio.sleep(killed_after)
        daemon.kill()
        await writers
        assert acknowledged
        daemon.start()
        store = daemon.client()
        found = {kv.key: kv for kv in (await store.range("")).kvs}
        for name, (number, revision) in acknowledged.items():
            left, right = found[f"{name}/left"], found[f"{name}/right"]
            assert number <= int(left.value) <= attempted[name]
            assert (left.value, left.mod_revision) == (right.value, right.mod_revision)
            assert left.mod_revision >= revision
            attempted[name] = int(left.value)
        status = await store.status()
        assert status.revision >= max(revision for _, revision in acknowledged.values())
        assert status.revision > last_revision
        assert status.raft_term > last_term
        last_revision, last_term = status.revision, status.raft_term
        keys, revisions = await replay(store, 1)
        assert keys == {key: kv.value for key, kv in found.items()}
        assert revisions == list(range(2, status.revision + 1))
        await store.aclose()
        assert daemon.stop() == 0


async def test_a_watch_and_a_client_outlive_a_restart(daemon: Daemon) -> None:
    store = daemon.start().client()
    async with store.watch("k/") as watch:
        await anext(watch)
        first = await store.put("k/1", b"")
        assert (await anext(watch)).revision == first
        daemon.kill()
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.05)
        with pytest.raises(errors.StoreUnavailable):
            await store.put("k/2", b"")
        daemon.start()
        second = await store.put("k/3", b"")
        assert second == first + 1
        async with asyncio.timeout(5):
            assert (await waiting).revision == second
    await store.aclose()


async def test_leases_have_their_full_time_again_after_a_restart(daemon: Daemon) -> None:
    store = daemon.start().client()
    lease = await store.lease_grant(2)
    revoked = await store.lease_grant(60)
    await store.put("leased", b"", lease=lease.id)
    await store.lease_revoke(revoked.id)
    await asyncio.sleep(1.2)
    assert await store.lease_time_to_live(lease.id) == 1
    daemon.kill()
    daemon.start()
    assert await store.lease_time_to_live(lease.id) == 2
    with pytest.raises(errors.LeaseNotFound):
        await store.lease_keepalive(revoked.id)
    async with asyncio.timeout(4), store.watch("leased", start_revision=2) as watch:
        async for batch in watch:
            if batch.events and batch.events[0].kind == "delete":
                break
    assert await store.get("leased") is None
    await store.aclose()


async def test_a_frozen_daemon_does_not_revoke_what_nobody_could_renew(daemon: Daemon) -> None:
    store = daemon.start().client()
    lease = await store.lease_grant(1)
    await store.put("leased", b"", lease=lease.id)
    daemon.signal(signal.SIGSTOP)
    await asyncio.sleep(2.5)
    daemon.signal(signal.SIGCONT)
    await asyncio.sleep(0.3)
    assert await store.lease_keepalive(lease.id) == 1
    assert await store.get("leased") is not None
    await store.aclose()


async def test_a_disk_that_takes_no_more_ends_the_daemon_and_loses_nothing(daemon: Daemon) -> None:
    daemon.start()
    assert daemon.process is not None
    store = daemon.client()
    limit = 2 << 20
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    acknowledged = -1

    async def fill() -> None:
        nonlocal acknowledged
        while True:
            await store.put(f"big/{acknowledged + 1:03}", bytes(200_000))
            acknowledged += 1

    with pytest.raises(errors.StoreOutcomeUnknown):
        await fill()
    assert daemon.wait() == 1
    assert "cannot write any more" in daemon.text()
    daemon.start()
    kept = [kv.key for kv in (await store.range("big/")).kvs]
    assert kept[: acknowledged + 1] == [f"big/{number:03}" for number in range(acknowledged + 1)]
    assert len(kept) <= acknowledged + 2
    await store.aclose()


async def test_a_store_restored_from_a_copy_is_noticed(daemon: Daemon) -> None:
    store = daemon.start().client()
    await store.put("a", b"1")
    assert daemon.stop() == 0
    shutil.copytree(daemon.data, daemon.data.with_name("copy"))
    daemon.start()
    await store.put("a", b"2")
    await store.put("a", b"3")
    assert daemon.stop() == 0
    shutil.rmtree(daemon.data)
    daemon.data.with_name("copy").rename(daemon.data)
    daemon.start()
    with pytest.raises(errors.StoreRolledBack):
        await store.get("a")
    await store.aclose()


async def test_history_is_trimmed_and_the_keys_stay(daemon: Daemon) -> None:
    store = daemon.start("--history", "50").client()
    for number in range(620):
        last = await store.put(f"k/{number % 10}", b"%d" % number)
    async with asyncio.timeout(5), store.watch("k/", start_revision=last - 40) as watch:
        await anext(watch)
        assert (await anext(watch)).revision == last - 40
    with pytest.raises(errors.Compacted) as caught:
        await replay(store, 2)
    assert last - 600 <= caught.value.compact_revision <= last - 49
    daemon.kill()
    daemon.start("--history", "50")
    assert len((await store.range("k/")).kvs) == 10
    with pytest.raises(errors.Compacted):
        await replay(store, 2)
    await store.aclose()


async def test_a_slow_watch_is_served_from_the_database(daemon: Daemon) -> None:
    """Its client stops reading, far more happens than memory keeps, and nothing is missing."""
    store = daemon.start().client()
    async with store.watch("k/") as watch:
        await anext(watch)
        written = []
        for start in range(0, 1600, 32):
            written += await asyncio.gather(
                *(store.put(f"k/{start + n}", bytes(5000)) for n in range(32))
            )
        seen = []
        async with asyncio.timeout(20):
            while len(seen) < len(written):
                if (batch := await anext(watch)).events:
                    seen.append(batch.revision)
    assert seen == sorted(written)
    await store.aclose()


def test_sigterm_ends_cleanly_and_takes_the_socket_along(daemon: Daemon) -> None:
    daemon.start()
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE((daemon.data / "store.db").stat().st_mode) == 0o600
    assert daemon.stop() == 0
    assert not daemon.socket.exists()


async def test_sigterm_lets_a_write_under_way_finish(daemon: Daemon) -> None:
    store = daemon.start().client()
    await store.put("warm", b"")
    writing = [asyncio.ensure_future(store.put(f"k/{number}", b"")) for number in range(8)]
    await asyncio.sleep(0.05)
    assert await asyncio.to_thread(daemon.stop) == 0
    results = await asyncio.gather(*writing)
    daemon.start()
    assert (await store.status()).revision == max(results)
    await store.aclose()


def fails(daemon: Daemon, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        daemon.argv(*arguments), capture_output=True, text=True, timeout=10, check=False
    )
    return done.returncode, done.stderr


def test_a_second_daemon_on_the_same_data_is_refused(daemon: Daemon) -> None:
    daemon.start()
    code, text = fails(daemon)
    assert code == 1
    assert f"another store daemon already uses {daemon.data}" in text


def test_a_socket_that_somebody_answers_on_is_not_taken(daemon: Daemon) -> None:
    daemon.start()
    daemon.data = daemon.data.with_name("other")
    code, text = fails(daemon)
    assert code == 1
    assert "somebody already answers" in text


@pytest.mark.parametrize("damage", ["header", "middle", "foreign", "revision"])
def test_a_damaged_database_is_reported_and_left_alone(daemon: Daemon, damage: str) -> None:
    daemon.start()

    async def fill() -> None:
        store = daemon.client()
        for number in range(300):
            await store.put(f"k/{number}", bytes(300))
        await store.aclose()

    asyncio.run(fill())
    assert daemon.stop() == 0
    file = daemon.data / "store.db"
    content = bytearray(file.read_bytes())
    if damage == "header":
        content[:100] = b"x" * 100
    if damage == "middle":
        content[8192:60000] = bytes(60000 - 8192)
    file.write_bytes(content)
    with contextlib.closing(sqlite3.connect(file)) as connection:
        if damage == "foreign":
            connection.execute("PRAGMA application_id=7")
        if damage == "revision":
            connection.execute("UPDATE meta SET value = 5 WHERE name = 'revision'")
            connection.commit()
    before = file.read_bytes()
    code, text = fails(daemon)
    assert code == 1
    assert "Traceback" not in text
    assert str(file) in text
    assert ("not a store" if damage == "foreign" else "is damaged") in text
    assert file.read_bytes()[:200_000] == before[:200_000]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "tcp:127.0.0.1:0"], "TLS only"),
        (["--listen", "carrier-pigeon"], "neither unix"),
        (["--listen", "tcp:127.0.0.1:0", "--cert", "c"], "go together"),
        (["--config", "/nonexistent.toml"], "cannot be read"),
        (["--fd", "77"], "not a socket"),
    ],
)
def test_wrong_usage_is_explained(daemon: Daemon, arguments: list[str], words: str) -> None:
    code, text = fails(daemon, *arguments)
    assert code in (1, 2)
    assert words in text
    assert "Traceback" not in text
