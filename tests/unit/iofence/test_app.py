"""The daemon as managers meet it: over mutual TLS, and only managers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from godwit.host.clock import RealClock
from godwit.iofence.app import App
from godwit.iofence.cuts import CutBook
from godwit.iofence.fence import Fence
from godwit.iofence.servers import Entry
from godwit.iofence.settings import PlaceSettings, Settings
from godwit.manager.cutting import HttpDaemons
from godwit.model.errors import GodwitError, NotFound, Refused, Unavailable
from godwit.model.fencing import FenceStatus
from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.identity import HOST, MANAGER, STORAGE, Identity
from godwit.wire.server import Listener, ServerTls, WireServer

PLACE = "iscsi iqn.2026-11.org.example:luns"


class Plain:
    """A server that does at once what it is told."""

    def __init__(self) -> None:
        self.clients: set[str] = set()
        self.evicted: list[str] = []

    async def seen(self, place: PlaceSettings) -> tuple[Entry, ...]:
        return tuple(Entry(one) for one in self.clients)

    async def allow(self, place: PlaceSettings, clients: Any, *, known: Any) -> None:
        self.clients = set(clients)

    async def evict(self, place: PlaceSettings, clients: Any) -> None:
        self.evicted += clients

    async def changed(self) -> None:
        await asyncio.Event().wait()


def identity(ca: ClusterCa, role: str, folder: Path) -> Identity:
    write_identity(folder / role, issue(ca, role=role, name="x"))
    return Identity.load(folder / role)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[str, ClusterCa, Plain]]:
    ca, server = ClusterCa.create(cluster="x"), Plain()
    place = PlaceSettings(kind="iscsi", name=PLACE.partition(" ")[2], port=1)
    settings = Settings(
        name="san", address="127.0.0.1", hosts={"host1": ("10.0.0.1",)}, places=(place,)
    )
    fence = Fence(settings, {"iscsi": server}, CutBook(tmp_path), RealClock())
    tls = ServerTls(identity(ca, STORAGE, tmp_path), roles={MANAGER})
    wire = WireServer(App(fence), [Listener.tcp("127.0.0.1", 0, tls=tls)])
    await wire.start()
    yield f"https://127.0.0.1:{wire.ports[0]}", ca, server
    await wire.stop(grace_s=0)


async def test_a_manager_cuts_and_lifts(
    served: tuple[str, ClusterCa, Plain], tmp_path: Path
) -> None:
    url, ca, server = served
    daemons = HttpDaemons(identity(ca, MANAGER, tmp_path))

    async def call(method: str, path: str, body: Any = None) -> Any:
        return await daemons.call(url, method, path, body, deadline_s=5.0)

    ask = {"place": PLACE, "host": "host1", "vm": "web", "boot_id": "b", "revision": 3}
    done = await call("POST", "/v1/cuts", ask)
    assert done["cut"]["by"] == "manager/x"
    assert (server.clients, server.evicted) == (set(), ["10.0.0.1"])
    status = FenceStatus.model_validate(await call("GET", "/v1/status"))
    assert (status.name, status.places[0].hosts) == ("san", ("host1",))
    assert [(cut.id, cut.vm, cut.revision) for cut in status.cuts] == [(1, "web", 3)]
    await call("DELETE", "/v1/cuts/1")
    assert server.clients == {"10.0.0.1"}
    with pytest.raises(NotFound, match="no cut 1 stands"):
        await call("DELETE", "/v1/cuts/1")
    for method, path, body in (
        ("POST", "/v1/cuts", {**ask, "host": "host9"}),
        ("POST", "/v1/cuts", {**ask, "more": 1}),
        ("GET", "/v1/elsewhere", None),
        ("DELETE", "/v1/cuts/-1", None),
    ):
        with pytest.raises(GodwitError):
            await call(method, path, body)
    assert (await call("GET", "/v1/status"))["cuts"] == []
    await daemons.aclose()


async def test_nobody_else_is_let_in(served: tuple[str, ClusterCa, Plain], tmp_path: Path) -> None:
    url, ca, server = served
    host = HttpDaemons(identity(ca, HOST, tmp_path))
    with pytest.raises(Refused, match="may not use this"):
        await host.call(url, "GET", "/v1/status", None, deadline_s=5.0)
    await host.aclose()
    foreign = HttpDaemons(identity(ClusterCa.create(cluster="y"), MANAGER, tmp_path))
    with pytest.raises(GodwitError):
        await foreign.call(url, "GET", "/v1/status", None, deadline_s=5.0)
    await foreign.aclose()
    daemons = HttpDaemons(identity(ca, MANAGER, tmp_path))
    with pytest.raises(Unavailable, match="no address"):
        await daemons.call("ftp://x", "GET", "/v1/status", None, deadline_s=5.0)
    await daemons.aclose()
    assert server.evicted == []
