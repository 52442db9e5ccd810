"""Redirected I/O: a broker that reaches its image through another host's export, over TLS."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from tests.system.storage.broker.rig import (
    NOBODY,
    PROGRAM,
    Connect,
    IoFailed,
    Load,
    Start,
    is_clean,
    make_image,
    verify,
)

from godwit.host.errors import ProcessGone
from godwit.host.process import is_alive
from godwit.model.errors import OperationFailed, Refused
from godwit.model.vm import DiskFormat
from godwit.qemu import tls
from godwit.storage.broker import Opening
from godwit.storage.broker_daemon import DaemonPlace
from godwit.storage.broker_peer import PeerExport, listen_tcp
from godwit.storage.broker_record import load_peer
from godwit.storage.broker_verbs import export_ids
from godwit.storage.gate import GateState
from godwit.storage.nodes import BrokerDisk, PeerTarget
from godwit.wire.ca import ClusterCa, write_qemu_credentials
from godwit.wire.identity import migration_dns

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(PROGRAM is None, reason="qemu-storage-daemon is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
SIZE = 64 << 20
StartPeer = Callable[..., Awaitable[PeerExport]]


@pytest.fixture
def credentials(root: Path) -> Path:
    """Certificates of two hosts of one cluster, and of a stranger."""
    ours, other = ClusterCa.create(cluster="a"), ClusterCa.create(cluster="b")
    for host, ca in (("h1", ours), ("h2", ours), ("stranger", other)):
        write_qemu_credentials(root / "tls" / host, ca, host=host, gid=NOBODY[1])
        tls.ensure_dh_params(root / "tls" / host)
    (root / "tls").chmod(0o755)
    return root / "tls"


@pytest.fixture
async def start_peer(place: DaemonPlace, root: Path, credentials: Path) -> AsyncIterator[StartPeer]:
    """Starts the exporting daemon of host h2."""
    made: list[PeerExport] = []
    with contextlib.ExitStack() as sockets:

        async def one() -> PeerExport:
            there = replace(place, host="h2", run=root / "r2", state=root / "s2")
            listener = sockets.enter_context(listen_tcp("127.0.0.1"))
            peer = await PeerExport.start(
                there, "web", listener=listener, tls_dir=str(credentials / "h2")
            )
            made.append(peer)
            return peer

        yield one
        for peer in made:
            await peer.kill()
            peer.discard()
            assert not peer.place.run.exists()


def _with_tls(target: PeerTarget, credentials: Path, host: str = "h1") -> PeerTarget:
    return target.but(tls_dir=str(credentials / host), tls_hostname=migration_dns("h2"))


@pytest.mark.parametrize("image", get_args(DiskFormat))
async def test_there_and_back_under_load_without_an_error(
    image: str,
    root: Path,
    start: Start,
    connect: Connect,
    start_peer: StartPeer,
    credentials: Path,
) -> None:
    disk = make_image(root, image, size=SIZE, owner=NOBODY)
    broker = await start(disk, disk0=Opening(1))
    peer = await start_peer()
    load = Load(await connect(disk), spread=SIZE // 4096)
    gaps: list[float] = []

    async def there_and_back() -> None:
        begun = time.monotonic()
        await broker.kill()
        target = await peer.export_for_peer(disk, epoch=2, host="127.0.0.1")
        wish = Opening(2, _with_tls(target, credentials))
        await broker.restart({"disk0": wish})
        gaps.append(time.monotonic() - begun)
        assert broker.gate("disk0").via == "peer"
        await load.more(20)

        begun = time.monotonic()
        await broker.kill()
        await peer.withdraw("disk0", epoch=3)
        await broker.restart({"disk0": Opening(3)})
        gaps.append(time.monotonic() - begun)

    await load.during(there_and_back())
    for offset, pattern in load.written.items():
        await load.client.check(pattern, offset)
    await broker.release("disk0")
    verify(disk, load.written)
    assert is_clean(disk, leaks=True)
    print(
        f"\n{image}: redirected in {gaps[0] * 1000:.0f} ms, back in {gaps[1] * 1000:.0f} ms, "
        f"longest write {load.longest_s * 1000:.0f} ms, {len(load.written)} records"
    )


async def test_a_closed_gate_opens_to_a_peer_and_closes_again(
    disk: BrokerDisk,
    start: Start,
    connect: Connect,
    start_peer: StartPeer,
    credentials: Path,
) -> None:
    broker = await start(disk)
    peer = await start_peer()
    client = await connect(disk)
    target = await peer.export_for_peer(disk, epoch=5, host="127.0.0.1")
    stranger = _with_tls(target, credentials, "stranger")
    with pytest.raises(OperationFailed, match="cannot be opened"):
        await broker.attach_peer("disk0", epoch=5, peer=stranger)
    assert broker.gate("disk0").state is GateState.CLOSED
    for turn in (1, 2):
        await broker.attach_peer("disk0", epoch=5, peer=_with_tls(target, credentials))
        await client.write(turn, turn * 4096)
        await broker.release("disk0")
        with pytest.raises(IoFailed):
            await client.write(9, 0)
    await peer.withdraw("disk0", epoch=5)
    verify(disk, {0: 0, 4096: 1, 8192: 2})


async def test_what_a_peer_has_acknowledged_survives_its_end(
    root: Path, start: Start, connect: Connect, start_peer: StartPeer, credentials: Path
) -> None:
    disk = make_image(root, "qcow2", size=SIZE, owner=NOBODY)
    peer = await start_peer()
    target = await peer.export_for_peer(disk, epoch=1, host="127.0.0.1")
    broker = await start(disk, disk0=Opening(1, _with_tls(target, credentials)))
    client = await connect(disk)
    for n in range(8):
        await client.write(n + 1, n << 20)
    await peer.kill()
    await broker.kill()
    verify(disk, {n << 20: n + 1 for n in range(8)})
    assert is_clean(disk, leaks=True)


async def test_a_higher_epoch_ends_the_export_and_a_lower_one_is_refused(
    disk: BrokerDisk, start: Start, connect: Connect, start_peer: StartPeer, credentials: Path
) -> None:
    peer = await start_peer()
    old = await peer.export_for_peer(disk, epoch=4, host="127.0.0.1")
    assert old.export == "web-disk0@4"
    assert await peer.export_for_peer(disk, epoch=4, host="127.0.0.1") == old
    broker = await start(disk, disk0=Opening(4, _with_tls(old, credentials)))
    client = await connect(disk)
    await client.write(1, 0)

    new = await peer.export_for_peer(disk, epoch=5, host="127.0.0.1")
    assert new.export == "web-disk0@5"
    with pytest.raises(TimeoutError):  # the old owner's write waits: its export is gone
        await client.do("write -P 2 0 4096", timeout=1.5)
    await broker.kill()
    with pytest.raises(Refused, match="epoch 4 of disk disk0 is over"):
        await peer.export_for_peer(disk, epoch=4, host="127.0.0.1")
    with pytest.raises(Refused):
        await peer.withdraw("disk0", epoch=4)
    await peer.withdraw("disk0", epoch=5)
    verify(disk, {0: 1})


async def test_an_agent_that_restarts_knows_the_epochs(
    disk: BrokerDisk, start_peer: StartPeer
) -> None:
    before = await start_peer()
    await before.export_for_peer(disk, epoch=4, host="127.0.0.1")
    await before.close()
    record = load_peer(before.place.run)
    assert record is not None
    peer = await PeerExport.adopt(before.place, record)
    assert await export_ids(peer._daemon, timeout=3) == {"e-disk0"}
    with pytest.raises(Refused):
        await peer.export_for_peer(disk, epoch=3, host="127.0.0.1")
    process = record.process
    await peer.kill()
    assert not is_alive(process)
    assert peer.record.exports == {}
    with pytest.raises(ProcessGone):
        await PeerExport.adopt(before.place, record)
    verify(disk, {0: 0})


async def test_an_image_that_cannot_be_exported_says_why(
    disk: BrokerDisk, start_peer: StartPeer
) -> None:
    peer = await start_peer()
    with pytest.raises(OperationFailed, match=r"sync of .* failed"):
        await peer.export_for_peer(disk.but(path="/nowhere/x"), epoch=1, host="127.0.0.1")
    with pytest.raises(OperationFailed, match="the record says"):
        await peer.export_for_peer(disk.but(size_bytes=512), epoch=1, host="127.0.0.1")
    await peer.export_for_peer(disk, epoch=1, host="127.0.0.1")
