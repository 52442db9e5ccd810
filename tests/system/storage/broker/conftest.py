"""A broker and its clients; whatever a test leaves is ended, and must have left nothing."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.system.storage.broker.rig import NOBODY, PROGRAM, Client, Connect, Start, make_image

from godwit.qemu.launch import Binary
from godwit.storage import nodes
from godwit.storage.broker import Broker, Opening, listen
from godwit.storage.broker_daemon import DaemonPlace
from godwit.storage.nodes import BrokerDisk

SIZE = 64 << 20


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gwb-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


@pytest.fixture
def place(root: Path) -> DaemonPlace:
    binary = Binary(path=str(PROGRAM), user=NOBODY)
    return DaemonPlace(host="h1", run=root / "r", state=root / "s", binary=binary)


@pytest.fixture
def disk(root: Path) -> BrokerDisk:
    return make_image(root, "vhdx", size=SIZE, owner=NOBODY)


@pytest.fixture
async def start(root: Path, place: DaemonPlace) -> AsyncIterator[Start]:
    """Starts brokers behind ``<root>/<host>.sock``; ends them and sees that they left nothing."""
    made: list[Broker] = []
    with contextlib.ExitStack() as sockets:

        async def one(*disks: BrokerDisk, place: DaemonPlace = place, **opening: Opening) -> Broker:
            socket = root / f"{place.host}.sock"
            listener = sockets.enter_context(listen(socket))
            broker = await Broker.start(
                place, "web", socket=socket, listener=listener, disks=disks, opening=opening
            )
            made.append(broker)
            return broker

        yield one
        for broker in made:
            await broker.kill()
            await broker.close()
            broker.discard()
            left = {p.name for p in broker.place.run.iterdir()} if broker.place.run.exists() else {}
            assert not left


@pytest.fixture
async def connect(root: Path) -> AsyncIterator[Connect]:
    """Opens disks as QEMU would."""
    made: list[Client] = []

    async def one(disk: BrokerDisk, host: str = "h1", **more: int) -> Client:
        name = nodes.export_name("web", disk.id)
        client = await Client.open(root / f"{host}.sock", name, **more)
        made.append(client)
        return client

    yield one
    for client in made:
        await client.close()
