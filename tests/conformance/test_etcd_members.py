"""Three real etcd members: killed, frozen, cut off; what a client sees, and how long it waits.

The bounds are those of the reference (docs/reference/store.md): they hold on a slow machine too.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest

from godwit.store import errors
from godwit.store.api import Store, mod_is, put
from godwit.store.client import StoreClient
from godwit.store.members import majority_without_leader, members_without_leader
from godwit.wire.ca import ClusterCa, issue, write_identity

from .etcd_rig import CLIENTS, PEERS, EtcdProcess, Trio, daemon_context, one_member

if TYPE_CHECKING:
    from pathlib import Path

    from godwit.store.api import Watch

pytestmark = pytest.mark.system

SHARE_S = 5.0 / 3  # of a call's 5 s, what one member of three gets to answer in
FOUND_OUT_S = 1.0 + 1.5 + 1.0  # silence, a question, and a slow machine
ELECTED_S = 8.0  # until a write is possible again after the leader is gone


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with Trio.up(tmp_path_factory.mktemp("trio")) as trio:
        yield trio


@pytest.fixture
async def trio(members: Trio) -> AsyncIterator[Trio]:
    yield members
    await members.heal()


@pytest.fixture
def base(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}/"


async def written(store: Store, key: str, within: float) -> float:
    """Seconds until a write is acknowledged; what was not known is read, as every caller must."""
    began, number = time.monotonic(), 0
    while True:
        number += 1
        value = b"%d" % number
        try:
            await store.put(key, value)
            return time.monotonic() - began
        except errors.StoreError:
            assert time.monotonic() - began < within, "no write in time"
            await asyncio.sleep(0.05)


async def follow(watch: Watch, until: bytes) -> list[int]:
    """The numbers written under a watch, in the order it told them, up to one."""
    seen: list[int] = []
    async for batch in watch:
        for event in batch.events:
            seen.append(int(event.kv.value))
            if event.kv.value == until:
                return seen
    raise AssertionError("the watch ended")


async def standing(store: Store, prefix: str) -> Watch:
    watch = store.watch(prefix)
    async with asyncio.timeout(5):
        await anext(watch)
    return watch


async def count_up(store: Store, key: str, numbers: range) -> list[float]:
    """Write each number once, by compare-and-swap, whatever breaks meanwhile; seconds each took."""
    waits: list[float] = []
    for number in numbers:
        began = time.monotonic()
        while True:
            try:
                found = await store.get(key)
                if found is not None and int(found.value) >= number:
                    break  # the one whose outcome was not known had happened
                swap = mod_is(key, found.mod_revision if found else 0)
                if (await store.txn([swap], [put(key, b"%d" % number)])).succeeded:
                    break
            except errors.StoreError:
                assert time.monotonic() - began < 30
                await asyncio.sleep(0.02)
        waits.append(time.monotonic() - began)
    return waits


@pytest.mark.parametrize("fault", ["killed", "frozen", "cut off"])
async def test_a_leader_that_goes_costs_no_write_and_no_event(
    trio: Trio, base: str, fault: str
) -> None:
    leader = await trio.agreed(3)
    store, watcher, calm = trio.client(leader), trio.client(leader), trio.client(timeout=10)
    watch = await standing(watcher, base)
    following = asyncio.ensure_future(follow(watch, b"60"))
    before = await count_up(store, base + "n", range(1, 21))
    if fault == "killed":
        trio.members[leader].end()
    elif fault == "frozen":
        trio.members[leader].freeze()
    else:
        trio.cut(leader)
    during = await count_up(store, base + "n", range(21, 61))
    print(f"{fault}: longest wait {max(during):.2f} s, before {max(before):.3f} s")
    async with asyncio.timeout(20):
        assert await following == list(range(1, 61))
    found = await calm.get(base + "n")
    assert found is not None
    assert (found.value, found.version) == (b"60", 60)
    assert max(during) < ELECTED_S + 5.0  # a write that was under way keeps its whole 5 s
    await watch.aclose()


async def test_a_member_that_is_away_is_left_for_another(trio: Trio, base: str) -> None:
    leader = await trio.agreed(3)
    killed, frozen = trio.others(leader)
    await trio.client(leader).put(base + "k", b"1")
    trio.members[killed].end()
    began = time.monotonic()
    store = trio.client(killed)
    await store.put(base + "k", b"2")
    assert time.monotonic() - began < 1.0  # refused at once
    trio.members[killed].start()
    await trio.serving()

    store, hasty = trio.client(frozen), trio.client(frozen)
    await store.put(base + "k", b"3")
    await hasty.put(base + "other", b"1")
    trio.members[frozen].freeze()
    began = time.monotonic()
    with pytest.raises(errors.StoreOutcomeUnknown):
        await hasty.put(base + "other", b"2")  # it was heard of just now, so this one is sent
    assert time.monotonic() - began < FOUND_OUT_S
    await hasty.put(base + "other", b"3")
    await asyncio.sleep(1.1)  # silent for longer than a write trusts
    began = time.monotonic()
    await store.put(base + "k", b"4")  # known, although its connection stands
    assert time.monotonic() - began < SHARE_S + 1.0
    began = time.monotonic()
    assert await store.get(base + "k") is not None
    assert time.monotonic() - began < 1.0  # the one that worked is kept


async def test_a_member_cut_off_from_its_peers_says_so_at_once(trio: Trio, base: str) -> None:
    leader = await trio.agreed(3)
    lonely = trio.others(leader)[0]
    store = trio.client(lonely)
    watch = await standing(store, base)
    following = asyncio.ensure_future(follow(watch, b"2"))
    await store.put(base + "k", b"1")
    trio.cut(lonely, PEERS)
    await _until_leaderless(trio, 1)
    began = time.monotonic()
    await store.put(base + "k", b"2")
    assert time.monotonic() - began < 1.0
    async with asyncio.timeout(10):  # the member ended the watch; it stands elsewhere now
        assert await following == [1, 2]
    views = await trio.views()
    assert members_without_leader(views) == 1
    assert not majority_without_leader(views)
    alone = trio.client(lonely, place=lonely, timeout=1.5)  # the others are beyond its reach
    trio.cut(lonely)
    for attempt in (alone.get(base + "k"), alone.put(base + "k", b"3")):
        began = time.monotonic()
        with pytest.raises(errors.StoreNoLeader):
            await attempt
        assert time.monotonic() - began < 2.5
    seen = await alone.members(timeout=1.0)
    assert [view.leaderless for view in seen] == [True, False, False]
    assert not majority_without_leader(seen)  # the other two may well go on
    assert await alone.get(base + "k", linearizable=False) is not None
    await watch.aclose()


async def _until_leaderless(trio: Trio, count: int) -> None:
    async with asyncio.timeout(10):
        while True:
            if members_without_leader(await trio.views()) >= count:
                return
            await asyncio.sleep(0.05)  # nothing announces that a member gave its leader up


async def test_a_majority_without_a_leader_is_told_apart_from_silence(
    trio: Trio, base: str
) -> None:
    await trio.agreed(3)
    store = trio.client()
    await store.put(base + "k", b"1")
    for name in trio.members:
        trio.cut(name, PEERS)
    await _until_leaderless(trio, 3)
    assert majority_without_leader(await trio.views())
    for attempt in (store.get(base + "k"), store.put(base + "k", b"2")):
        began = time.monotonic()
        with pytest.raises(errors.StoreNoLeader):
            await attempt
        assert time.monotonic() - began < 1.0
    trio.cut(trio.others()[0], CLIENTS)
    assert majority_without_leader(await trio.views())  # two of three say so
    trio.cut(trio.others()[1], CLIENTS)
    assert not majority_without_leader(await trio.views())  # one says so, two are silent
    await trio.heal()
    found = await trio.client().get(base + "k")
    assert found is not None
    assert found.value == b"1"


async def test_a_lease_is_kept_while_its_leader_goes(trio: Trio, base: str) -> None:
    """Its time is a lower bound; a new leader gives every lease its whole time again."""
    leader = await trio.agreed(3)
    store = trio.client(leader, timeout=3.0)
    kept, left = await store.lease_grant(3), await store.lease_grant(3)
    for lease in (kept, left):
        await store.put(f"{base}{lease.id}", b"", lease=lease.id)
    granted = time.monotonic()
    trio.members[leader].freeze()
    gone = False
    async with asyncio.timeout(20):
        while not gone:
            try:
                await store.lease_keepalive(kept.id)
                gone = await store.get(f"{base}{left.id}") is None
            except errors.LeaseNotFound:
                raise
            except errors.StoreError:
                pass
            await asyncio.sleep(0.25)  # as its holder would
    print(f"a lease of 3 s whose leader froze stood {time.monotonic() - granted:.1f} s")
    assert time.monotonic() - granted >= 3.0
    assert await store.get(f"{base}{kept.id}") is not None


async def test_writers_and_readers_of_all_members_agree(trio: Trio, base: str) -> None:
    """Every member is asked in turn; what one acknowledged, the next one knows."""
    clients = [trio.client(name) for name in trio.members]
    for number in range(60):
        await clients[number % 3].put(base + "k", b"%d" % number)
        found = await clients[(number + 1) % 3].get(base + "k")
        assert found is not None
        assert int(found.value) == number


async def test_only_certificates_of_the_cluster_enter_and_only_by_tls_1_3(
    trio: Trio, tmp_path: Path, base: str
) -> None:
    write_identity(
        tmp_path / "strange", issue(ClusterCa.create(cluster="other"), role="host", name="h")
    )
    ours = daemon_context(trio.directory / "host")
    none = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    none.check_hostname = False
    none.load_verify_locations(trio.directory / "host" / "ca.pem")
    assert ours.minimum_version is ssl.TLSVersion.TLSv1_3
    for context in (daemon_context(tmp_path / "strange"), none):
        store = trio.client()
        for endpoint in store._transport.endpoints:
            endpoint.tls = context
        with pytest.raises(errors.StoreDenied):
            await store.put(base + "k", b"evil")
    store = trio.client()
    await store.put(base + "k", b"good")
    connection = await store._transport.current.acquire()
    assert connection._writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    connection.close()


async def test_a_member_with_an_older_disk_is_refused_by_its_term_alone(
    tmp_path: Path, base: str
) -> None:
    """The copy has every write, so that no revision tells; it has forgotten what came after."""
    etcd = one_member(tmp_path)
    store = StoreClient(
        [etcd.member.client_url], ssl_context=daemon_context(tmp_path / "host"), timeout=3.0
    )
    try:
        await _started(etcd, store)
        await store.put(base + "k", b"1")
        etcd.end()
        shutil.copytree(tmp_path / "one.data", tmp_path / "copy")
        for _ in range(2):  # each start is an election, each election a term
            etcd.end()
            await _started(etcd, store)
        assert await store.get(base + "k") is not None
        etcd.end()
        shutil.rmtree(tmp_path / "one.data")
        shutil.copytree(tmp_path / "copy", tmp_path / "one.data")
        fresh = StoreClient(
            [etcd.member.client_url], ssl_context=daemon_context(tmp_path / "host"), timeout=3.0
        )
        await _started(etcd, fresh)
        assert await fresh.get(base + "k") is not None  # whoever did not know better is content
        await fresh.aclose()
        for attempt in (store.get(base + "k"), store.put(base + "k", b"2")):
            with pytest.raises(errors.StoreMemberRolledBack):
                await attempt
    finally:
        await store.aclose()
        etcd.end()


async def _started(etcd: EtcdProcess, store: StoreClient) -> None:
    etcd.start()
    async with asyncio.timeout(15):
        while True:
            try:
                await store.status()
                return
            except errors.StoreUnavailable:
                await asyncio.sleep(0.05)  # it tells nobody but systemd
