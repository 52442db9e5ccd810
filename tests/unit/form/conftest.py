"""A cluster as `cluster init` makes it, below a root of its own, with its manager on real TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from godwit.form.init import init
from godwit.form.join import Joined, join
from godwit.form.places import HostFacts, Places
from godwit.host.clock import RealClock
from godwit.manager.agents import HttpAgents
from godwit.manager.authority import Authority
from godwit.manager.cache import Cache
from godwit.manager.issuing import Issuer
from godwit.manager.main import Manager, pin
from godwit.manager.tokens import Tokens
from godwit.manager.world import World
from godwit.store.memory import MemoryStore
from godwit.store.records import Records
from godwit.wire.http import PeerClient
from godwit.wire.identity import Identity
from godwit.wire.server import Listener, ServerTls, WireServer
from godwit.wire.tls import ClientTls


@dataclass
class Formed:
    """The first host's files, the store, and (while ``serve`` runs) its manager."""

    root: Path
    store: MemoryStore = field(default_factory=MemoryStore)
    manager: Manager = None  # type: ignore[assignment]
    api: PeerClient = None  # type: ignore[assignment]
    url: str = ""

    @property
    def places(self) -> Places:
        return Places(self.root / "host1")

    @property
    def records(self) -> Records:
        return Records(self.store)

    @property
    def authority(self) -> Authority:
        assert self.manager.world.authority is not None
        return self.manager.world.authority

    def form(self) -> None:
        init(self.places, HostFacts(name="host1", address="127.0.0.1"), cluster="test")

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[PeerClient]:
        identity = Identity.load(self.places.manager_tls)
        clock, cache = RealClock(), Cache(self.store)
        endpoints = ("https://127.0.0.1:7379",)
        authority = Authority(Issuer(self.places.ca), self.records, clock, endpoints=endpoints)
        world = World(
            records=self.records,
            cache=cache,
            agents=HttpAgents(identity),
            clock=clock,
            pin=pin,
            worker="manager1/1",
            authority=authority,
            ca=identity.ca.read_bytes(),
        )
        tokens = Tokens(self.places.tokens)
        self.manager = Manager(world, tokens=tokens, state=self.root)
        tls = ServerTls(identity, roles=None)
        server = WireServer(self.manager.app, [Listener.tcp("127.0.0.1", 0, tls=tls)])
        self.manager.start()
        await server.start()
        self.url = f"https://127.0.0.1:{server.ports[0]}"
        try:
            await cache.ready.wait()
            await self.published()
            token = self.places.admin_token.read_text().strip()
            tls_of_people = ClientTls.for_api(self.places.tls / "ca.pem")
            async with PeerClient(self.url, tls=tls_of_people, token=token) as self.api:
                yield self.api
        finally:
            await server.stop(grace_s=0.2)
            await self.manager.stop()

    async def published(self) -> None:
        from godwit.model import keys

        async with asyncio.timeout(10), self.store.watch(keys.TRUST) as watch:
            async for _ in watch:
                issued = await self.store.range(keys.TRUST_ISSUED)
                if len(issued.kvs) >= 4 and await self.store.get(keys.TRUST_CRL):
                    return

    async def token(self, **fields: object) -> str:
        return str((await self.api.post("/v1/cluster/tokens", fields))["token"])

    async def join(self, name: str, token: str, *, url: str = "") -> Joined:
        facts = HostFacts(name=name, address="127.0.0.1")
        return await join(Places(self.root / name), facts, url=url or self.url, token=token)


@pytest.fixture
async def formed(tmp_path: Path) -> AsyncIterator[Formed]:
    found = Formed(tmp_path)
    found.form()
    yield found
    await found.store.aclose()


@pytest.fixture
async def cluster(formed: Formed) -> AsyncIterator[Formed]:
    async with formed.serve():
        yield formed
