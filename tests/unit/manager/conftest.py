"""A manager on the store's in-memory twin, two fake agents and a client, all over real TLS."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from godwit.agent.validation import Validation
from godwit.agent.validation_routes import validation_routes
from godwit.host.clock import RealClock
from godwit.manager.agents import HttpAgents
from godwit.manager.cache import Cache
from godwit.manager.main import Manager, pin
from godwit.manager.tokens import Tokens
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.network import Network
from godwit.model.volume import Volume
from godwit.power.vault import Vault
from godwit.store.memory import MemoryStore
from godwit.store.records import Records, encode
from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.http import PeerClient
from godwit.wire.identity import Identity
from godwit.wire.server import Listener, ServerTls, WireServer
from godwit.wire.tls import ClientTls


def _load(name: str, folder: Path = Path(__file__).parent) -> Any:
    """A helper module beside this file, or in another folder; tests import it by its plain name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec
        assert spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


fakes = _load("manager_fakes")
_load("manager_disks")
validation_desks = _load("validation_desks")
bmc_rig = _load("bmc_rig", Path(__file__).parents[1] / "power")
TOKEN = "a-token-of-many-letters"


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    root, ca = tmp_path_factory.mktemp("pki"), ClusterCa.create(cluster="test")
    found = {}
    for role, name in (("manager", "m1"), ("host", "host1"), ("host", "host2")):
        write_identity(root / name, issue(ca, role=role, name=name))
        found[name] = Identity.load(root / name)
    return found


@dataclass
class Cluster:
    """The store, the hosts and (while ``serve`` runs) a manager with a client."""

    identities: dict[str, Identity]
    root: Path
    store: MemoryStore = field(default_factory=MemoryStore)
    agents: dict[str, Any] = field(default_factory=dict)
    servers: dict[str, WireServer] = field(default_factory=dict)
    manager: Manager = None  # type: ignore[assignment]
    api: PeerClient = None  # type: ignore[assignment]
    lives: int = 0

    @property
    def records(self) -> Records:
        return Records(self.store)

    async def add_host(self, name: str) -> None:
        agent = fakes.FakeAgent(name, self.records)
        tls = ServerTls(self.identities[name], roles={"manager", "host"})
        server = WireServer(agent.app, [Listener.tcp("127.0.0.1", 0, tls=tls)])
        await server.start()
        self.agents[name], self.servers[name] = agent, server
        await agent.join(f"https://127.0.0.1:{server.ports[0]}")

    @asynccontextmanager
    async def serve(self, *, token: str = TOKEN) -> AsyncIterator[PeerClient]:
        """One life of the manager; a second one comes back under the same name."""
        self.lives += 1
        cache = Cache(self.store)
        world = World(
            records=self.records,
            cache=cache,
            agents=HttpAgents(self.identities["m1"]),
            clock=RealClock(),
            pin=pin,
            worker=f"m1/{self.lives}",
            settle_s=0.5,
            look_s=0.2,
            lost_s=1.0,
            vault=Vault(self.root / "secrets.key"),
        )
        tokens = fakes.store_file(self.root / "tokens", f"# people\nadmin:{TOKEN}\n")
        self.manager = Manager(world, tokens=Tokens(tokens), state=self.root)
        tls = ServerTls(self.identities["m1"], roles=None)
        server = WireServer(self.manager.app, [Listener.tcp("127.0.0.1", 0, tls=tls)])
        self.manager.start()
        await server.start()
        try:
            await cache.ready.wait()
            async with PeerClient(
                f"https://127.0.0.1:{server.ports[0]}",
                tls=ClientTls.for_api(self.identities["m1"].ca),
                token=token,
                headers={"x-godwit-client": "tests/1"},
            ) as self.api:
                yield self.api
        finally:
            await server.stop(grace_s=0.2)
            await self.manager.stop()

    async def lose(self, host: str) -> None:
        """Cut a host's agent off in the middle of whatever it is doing."""
        server = self.servers[host]
        for connection in list(server._state.connections):
            connection.transport.abort()
        await server.stop(grace_s=0)

    async def act(self, method: str, path: str, body: Any = None, *, wait: int = 10) -> Any:
        """An action, held until its task is final; what a test wrote before is seen by it."""
        written = await self.store.range(keys.LEADER, limit=1)
        await self.manager.world.cache.reached(written.revision)
        answer = await self.api.request(method, path, json=body, query={"wait": wait})
        assert answer.status == 202
        assert answer.headers["location"] == f"/v1/tasks/{answer.json()['id']}"
        return answer.json()

    async def make_vm(self, name: str, *, start: str | None = None, **fields: Any) -> None:
        body = {"name": name, "memory_bytes": 256 << 20, "image": "demo", "networks": ["lan"]}
        task = await self.act("POST", "/v1/vms", {**body, **fields})
        assert task["state"] == "completed", task
        if start:
            task = await self.act("POST", f"/v1/vms/{name}/actions/start", {"host": start})
            assert task["state"] == "completed", task

    async def close(self) -> None:
        for agent in self.agents.values():
            agent.hold.set()
            for move in list(agent.moves):
                move.cancel()
        for server in self.servers.values():
            await server.stop(grace_s=0)
        await self.store.aclose()


@pytest.fixture
async def cluster(identities: dict[str, Identity], tmp_path: Path) -> AsyncIterator[Cluster]:
    """Two hosts and the network ``lan``; the manager is started by the test."""
    found = Cluster(identities, tmp_path)
    await found.store.put(keys.network("lan"), encode(Network(name="lan", bridge="br-lan")))
    for name in ("host1", "host2"):
        await found.add_host(name)
    yield found
    await found.close()


@pytest.fixture
async def api(cluster: Cluster) -> AsyncIterator[Cluster]:
    """The cluster with its manager running."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(cluster.serve())
        yield cluster


@pytest.fixture
def make_host() -> Callable[..., Any]:
    """A host's facts, with changes."""
    return fakes.host_info  # type: ignore[no-any-return]


@pytest.fixture
async def desks(cluster: Cluster, tmp_path: Path, make_host: Any) -> Any:
    """The two fake agents with real validation routes, on one shared directory."""
    made: dict[str, Any] = {}
    for name, agent in cluster.agents.items():
        root = tmp_path / "volumes"
        (root / "shared").mkdir(parents=True, exist_ok=True)
        desk = made[name] = validation_desks.Desk(
            name, root, cluster.identities[name], make_host(name)
        )
        agent.app.router.routes.insert(0, validation_desks.clock_route(desk))
        agent.app.router.routes[:0] = validation_routes(Validation(desk))  # type: ignore[arg-type]
    await cluster.store.put(keys.volume("shared"), encode(Volume(name="shared")))
    yield made
    for desk in made.values():
        await desk.peers.close()
        for task in list(desk.tasks):
            task.cancel()
        await asyncio.gather(*desk.tasks, return_exceptions=True)


@pytest.fixture
def bmc(tmp_path: Path) -> Iterator[Any]:
    folder = tmp_path / "bmc"
    folder.mkdir()
    made = bmc_rig.Bmc(folder)
    yield made
    made.wake()
    made.stop()
