"""Cuts against a tgtd and an NFS server that speak the real words, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_ganesha import FakeGanesha
from fake_tgt import TARGET, FakeTgt

from godwit.host.clock import RealClock
from godwit.host.process import Process
from godwit.iofence import servers
from godwit.iofence.cuts import CutBook
from godwit.iofence.fence import Fence
from godwit.iofence.ganesha import Ganesha
from godwit.iofence.settings import PlaceSettings, Settings
from godwit.iofence.tgt import Tgt
from godwit.model.errors import GodwitError, NotFound, OutcomeUnknown, Refused, Unavailable
from godwit.model.fencing import CutAsk

H1, H2 = "127.0.0.11", "127.0.0.12"
HOSTS = {"host1": (H1,), "host2": (H2,)}
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LUNS, SHARED = f"iscsi {TARGET}", "nfs /shared"


@pytest.fixture
async def tgt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeTgt]:
    made = FakeTgt(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def nfs(tmp_path: Path) -> AsyncIterator[FakeGanesha]:
    made = FakeGanesha(tmp_path / "export.conf", "/shared")
    await made.start()
    yield made
    await made.stop()


def fence(
    tmp_path: Path, *places: PlaceSettings, confirm_s: float = 10.0, kinds: Any = None
) -> Fence:
    settings = Settings(name="storage", address="127.0.0.1", hosts=HOSTS, places=places)
    kinds = kinds or {"iscsi": Tgt(tmp_path), "nfs": Ganesha()}
    return Fence(settings, kinds, CutBook(tmp_path), RealClock(), confirm_s=confirm_s)


def luns(tgt: FakeTgt) -> PlaceSettings:
    return PlaceSettings(kind="iscsi", name=TARGET, port=tgt.port)


def export(nfs: FakeGanesha) -> PlaceSettings:
    return PlaceSettings(
        kind="nfs", name="/shared", port=nfs.port, mount_port=nfs.mount_port, file=nfs.file,
        block="Export_Id = 1;\nPath = /srv/shared;",
    )  # fmt: skip


def ask(place: str = LUNS, host: str = "host1", vm: str = "web", revision: int = 5) -> CutAsk:
    return CutAsk(place=place, host=host, vm=vm, boot_id="b", revision=revision)


@contextlib.asynccontextmanager
async def kept(made: Fence) -> AsyncIterator[None]:
    task = asyncio.create_task(made.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def connected(port: int, address: str) -> AsyncIterator[Stream]:
    """A client that comes from there."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    yield reader, writer
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def initiator(tgt: FakeTgt, address: str) -> AsyncIterator[asyncio.StreamReader]:
    """One that logs in; it reads a + when it is let in, and nothing else."""
    async with connected(tgt.port, address) as (reader, writer):
        writer.write(b"l")
        yield reader


async def until(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - what servers do is no event
            await asyncio.sleep(0.01)


# --- iSCSI


async def test_hosts_are_bound_one_by_one_and_one_is_shut_out(tgt: FakeTgt, tmp_path: Path) -> None:
    made = fence(tmp_path, luns(tgt))
    async with kept(made):
        await until(lambda: set(tgt.acl) == {"127.0.0.1", H1, H2})
    async with initiator(tgt, H1) as reader, initiator(tgt, H2) as other:
        assert await reader.read(1) == await other.read(1) == b"+"
        done = await made.cut(ask(), by="manager/m1")
        assert (done.cut.id, done.cut.by, done.cut.revision) == (1, "manager/m1", 5)
        assert H1 not in tgt.acl
        assert H2 in tgt.acl
        assert [where for _, where in tgt.nexuses] == [H2], (
            "it was waited for what tgtd still worked on"
        )
        assert await asyncio.wait_for(reader.read(), 10) == b""
        async with initiator(tgt, H1) as again:
            assert await asyncio.wait_for(again.read(), 10) == b"", "no login any more"
        assert not other.at_eof()


async def test_a_login_that_was_under_way_is_ended_too(tgt: FakeTgt, tmp_path: Path) -> None:
    """tgtd looks at its list when one begins, and shows a session only when it is over."""
    made = fence(tmp_path, luns(tgt))
    async with connected(tgt.port, H1) as (reader, _):
        await made.cut(ask(), by="m")
        assert await asyncio.wait_for(reader.read(), 10) == b""


async def test_what_the_server_still_works_on_is_waited_for(tgt: FakeTgt, tmp_path: Path) -> None:
    made = fence(tmp_path, luns(tgt), confirm_s=0.5)
    tgt.nexuses = [(7, H1)]
    with pytest.raises(OutcomeUnknown, match=r"not confirm within 0\.5 s that host1"):
        await made.cut(ask(), by="m")
    assert (await made.status()).cuts[0].host == "host1", "it stands all the same"
    tgt.nexuses = [(7, H2)]
    await fence(tmp_path, luns(tgt)).cut(ask(), by="m")


@pytest.mark.parametrize("open_to", ["10.0.0.9", "10.0.0.0/24"])
async def test_who_is_no_host_keeps_it_from_being_proof(
    tgt: FakeTgt, tmp_path: Path, open_to: str
) -> None:
    tgt.acl = ["127.0.0.1", open_to]
    made = fence(tmp_path, luns(tgt))
    with pytest.raises(Refused, match=f"also open to {open_to}"):
        await made.cut(ask(), by="m")
    (seen,) = (await made.status()).places
    assert "also open to" in seen.why
    assert open_to in tgt.acl, "that is the administrator's"


async def test_an_entry_that_would_let_it_in_is_taken_away(tgt: FakeTgt, tmp_path: Path) -> None:
    tgt.acl = ["ALL", "127.0.0.0/24", "iqn.2026-11.io.godwit:host1"]
    made = fence(tmp_path, luns(tgt))
    (seen,) = (await made.status()).places
    assert seen.why == f"{TARGET} is also open to 127.0.0.0/24, ALL, which is no host's address"
    async with kept(made):
        await until(lambda: H2 in tgt.acl)
    assert "ALL" in tgt.acl, "as long as nobody is to be kept out"
    await made.cut(ask(), by="m")
    assert tgt.acl == ["iqn.2026-11.io.godwit:host1", H2]


async def test_a_server_that_starts_anew_lets_nobody_in_who_is_shut_out(
    tgt: FakeTgt, tmp_path: Path
) -> None:
    made = fence(tmp_path, luns(tgt))
    await made.cut(ask(), by="m")
    tgt.up, tgt.acl = False, ["127.0.0.1"]
    with pytest.raises(Unavailable, match="tgtd does not answer"):
        await made.cut(ask(vm="db"), by="m")
    later = fence(tmp_path, luns(tgt))  # the daemon starts anew as well
    async with kept(later):
        tgt.up = True
        (tmp_path / "socket.0").touch()
        await until(lambda: H2 in tgt.acl)
        assert H1 not in tgt.acl
    assert [cut.vm for cut in (await later.status()).cuts] == ["web", "db"]


async def test_no_target_and_no_host_of_that_name(tgt: FakeTgt, tmp_path: Path) -> None:
    made = fence(tmp_path, luns(tgt))
    for wrong in (ask(place="iscsi iqn.2026-11.org.example:no"), ask(host="host9")):
        with pytest.raises(NotFound):
            await made.cut(wrong, by="m")
    assert (await made.status()).cuts == ()
    tgt.name = "iqn.2026-11.org.example:renamed"
    assert (await made.status()).places[0].why == f"tgtd has no target {TARGET}"


# --- several who ask


async def test_two_that_ask_at_once_and_the_last_who_lifts(tgt: FakeTgt, tmp_path: Path) -> None:
    made = fence(tmp_path, luns(tgt))
    first, second = await asyncio.gather(
        made.cut(ask(vm="web"), by="m1"), made.cut(ask(vm="db"), by="m2")
    )
    await made.lift(first.cut.id, by="m1")
    assert H1 not in tgt.acl, "db's stands"
    await made.lift(second.cut.id, by="m1")
    assert H1 in tgt.acl
    with pytest.raises(NotFound):
        await made.lift(second.cut.id, by="m2")


async def test_whoever_lifts_an_earlier_cut_does_not_lift_a_later_one(
    tgt: FakeTgt, tmp_path: Path
) -> None:
    made = fence(tmp_path, luns(tgt))
    first = await made.cut(ask(revision=5), by="m1")
    second = await made.cut(ask(revision=8), by="m2")
    assert second.cut.id > first.cut.id
    with pytest.raises(NotFound):
        await made.lift(first.cut.id, by="m1")
    assert H1 not in tgt.acl
    await made.lift(second.cut.id, by="m2")
    third = await fence(tmp_path, luns(tgt)).cut(ask(), by="m1")
    assert third.cut.id > second.cut.id, "also over a restart"


async def test_one_place_does_not_wait_for_another_host(tgt: FakeTgt, tmp_path: Path) -> None:
    made = fence(tmp_path, luns(tgt))
    tgt.nexuses = [(7, H1)]
    hangs = asyncio.create_task(made.cut(ask(), by="m"))
    await until(lambda: H1 not in tgt.acl and tgt.said)
    await made.cut(ask(host="host2"), by="m")
    assert not hangs.done()
    tgt.nexuses = []
    await hangs


# --- NFS


async def test_an_export_is_closed_to_one_host_and_opened_again(
    nfs: FakeGanesha, tmp_path: Path
) -> None:
    made = fence(tmp_path, export(nfs))
    async with kept(made):
        await until(lambda: set(nfs.clients) == {"127.0.0.1", H1, H2})
    async with connected(nfs.port, H1) as (reader, _), connected(nfs.port, H2) as (other, _):
        done = await made.cut(ask(SHARED), by="m")
        assert set(nfs.clients) == {"127.0.0.1", H2}
        assert await asyncio.wait_for(reader.read(), 10) == b""
        assert not other.at_eof()
        assert "127.0.0.11" not in nfs.file.read_text()
        await made.lift(done.cut.id, by="m")
        assert set(nfs.clients) == {"127.0.0.1", H1, H2}


async def test_a_request_that_the_server_works_on_is_waited_for(
    nfs: FakeGanesha, tmp_path: Path
) -> None:
    made = fence(tmp_path, export(nfs), confirm_s=1.0)
    nfs.busy.clear()
    async with connected(nfs.port, H1):
        with pytest.raises(OutcomeUnknown):
            await made.cut(ask(SHARED), by="m")
        cut = asyncio.create_task(fence(tmp_path, export(nfs)).cut(ask(SHARED), by="m"))
        nfs.busy.set()
        await cut


async def test_a_server_that_forgets_a_connection_is_ended_where_it_comes_back(
    nfs: FakeGanesha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("godwit.iofence.ganesha.ENDS_S", 0.3)
    ended: list[int] = []

    async def end(process: Process) -> None:
        ended.append(process.pid)
        nfs.exported = False  # it is away for a moment
        asyncio.get_running_loop().call_later(0.2, nfs.read)

    nfs.busy.clear()
    supervised = replace(export(nfs), supervised=True)
    made = fence(tmp_path, supervised, kinds={"nfs": Ganesha(end)})
    async with connected(nfs.port, H1):
        await made.cut(ask(SHARED), by="m")
        assert ended == [os.getpid()]
        assert set(nfs.clients) == {"127.0.0.1", H2}
        nfs.busy.set()


async def test_a_server_that_nobody_starts_again_is_left_alone(
    nfs: FakeGanesha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("godwit.iofence.ganesha.ENDS_S", 0.1)
    ended: list[int] = []

    async def end(process: Process) -> None:
        ended.append(process.pid)

    nfs.busy.clear()
    made = fence(tmp_path, export(nfs), confirm_s=1.0, kinds={"nfs": Ganesha(end)})
    async with connected(nfs.port, H1):
        with pytest.raises(OutcomeUnknown) as error:
            await made.cut(ask(SHARED), by="m")
        assert "start nfs-ganesha anew" in error.value.hint
        assert ended == []
        nfs.busy.set()


async def test_a_signal_that_comes_too_early_is_given_again(
    nfs: FakeGanesha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("godwit.iofence.ganesha._AGAIN_S", 0.05)
    nfs.deaf = 2
    await fence(tmp_path, export(nfs)).cut(ask(SHARED), by="m")
    assert nfs.hups == 3


async def test_a_server_that_does_not_read_confirms_nothing(
    nfs: FakeGanesha, tmp_path: Path
) -> None:
    nfs.deaf = 1000
    made = fence(tmp_path, export(nfs), confirm_s=0.3)
    with pytest.raises(OutcomeUnknown):
        await made.cut(ask(SHARED), by="m")
    assert "shows no export /shared" in (await made.status()).places[0].why


async def test_the_file_is_there_before_the_server_is(tmp_path: Path) -> None:
    place = PlaceSettings(kind="nfs", name="/shared", port=1, file=tmp_path / "x", block="A = 1;")
    with pytest.raises(Unavailable, match="nothing serves /shared at port 1"):
        await fence(tmp_path, place).cut(ask(SHARED), by="m")
    text = (tmp_path / "x").read_text()
    assert f"Clients = {H2};" in text
    assert H1 not in text


async def test_datagrams_are_no_ground_for_proof(
    nfs: FakeGanesha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("godwit.iofence.ganesha.udp_ports", lambda: frozenset({nfs.port}))
    with pytest.raises(Unavailable, match="over UDP"):
        await fence(tmp_path, export(nfs)).cut(ask(SHARED), by="m")


async def test_a_daemon_that_may_not_look_says_so(
    nfs: FakeGanesha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(servers.tcpserved, "held", refuse)
    made = fence(tmp_path, export(nfs))
    assert "cannot be ended: no" in (await made.status()).places[0].why
    with pytest.raises(GodwitError, match="cannot be ended"):
        await made.cut(ask(SHARED), by="m")
