"""``godwit-manager``: the daemon's entry point."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import resource
import secrets
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from godwit.host.clock import RealClock
from godwit.host.sockets import inherited_listeners, notify, watchdog_interval
from godwit.manager.agents import HttpAgents
from godwit.manager.api.app import Rooms, make_app
from godwit.manager.authority import Authority
from godwit.manager.cache import Cache
from godwit.manager.config import ManagerConfig
from godwit.manager.cutting import HttpDaemons
from godwit.manager.failover.acting import Actor
from godwit.manager.failover.controller import Failover
from godwit.manager.failover.members import StoreMembers
from godwit.manager.failover.reading import Known, Reader
from godwit.manager.failover.switch import PowerSwitch
from godwit.manager.feed import Feed
from godwit.manager.issuing import Issuer
from godwit.manager.leadership import Leadership
from godwit.manager.metrics import Metrics
from godwit.manager.tokens import Tokens
from godwit.manager.work.actions import act
from godwit.manager.work.tasks import Tasks
from godwit.manager.world import World
from godwit.model.errors import GodwitError
from godwit.model.host import HostInfo
from godwit.model.vm import Pins
from godwit.power.vault import FILE as SECRETS_FILE
from godwit.power.vault import Vault
from godwit.qemu.pins import choose_pins
from godwit.store.client import StoreClient
from godwit.store.records import Records
from godwit.store.whole import until_whole
from godwit.wire.follow import follow
from godwit.wire.identity import STORE, Identity
from godwit.wire.keeper import Keeper, Place
from godwit.wire.server import Listener, ServerTls, WireServer
from godwit.wire.tls import ClientTls, Expect

_LOG = logging.getLogger("godwit.manager")
_BEAT_S = 0.5
_READY_S = 1.5
_GRACE_S = 2.0


class Manager:
    """All parts of one manager process, begun and ended together.

    ``store`` and ``agents`` come from outside, so that tests run the same parts elsewhere.
    """

    def __init__(self, world: World, *, tokens: Tokens, state: Path) -> None:
        cache = world.cache
        self.world = world
        self.tasks = Tasks(world, act)
        self.feed = Feed(now=world.clock.realtime)
        self.metrics = Metrics()
        self.leadership = Leadership(world, self.tasks, young=lambda: self.failover.young)
        actor = Actor(
            world, proof=self.leadership.proof, switch=PowerSwitch(world), cut=world.cutter
        )
        standing = StoreMembers(
            world.records.store, world.clock, hosts=lambda: world.cache.snapshot.hosts
        )
        known = Known(
            attempts=actor.attempts,
            refused=actor.refused,
            uncuttable=world.cutter.uncuttable,
            unbound=world.cutter.unbound,
        )
        self.failover = Failover(
            world,
            Reader(world, standing, known),
            actor,
            leads=lambda: self.leadership.leads,
        )
        # The feed first: who waits for a revision finds its events there.
        for listener in (
            self.feed.take,
            self.metrics.take,
            self.leadership.take,
            self.failover.take,
        ):
            cache.listen(listener)
        self.app = make_app(
            Rooms(
                world=world,
                tasks=self.tasks,
                feed=self.feed,
                metrics=self.metrics,
                tokens=tokens,
                uploads=state / "uploads",
                leads=lambda: self.leadership.leads,
                standings=lambda: self.failover.standings,
            )
        )
        self._background: list[asyncio.Task[None]] = []
        self._settling: asyncio.Task[None] | None = None
        self.broken = asyncio.Event()  # a part that must not end has ended

    def start(self) -> None:
        """Follow the store and take part in the election."""
        self._spawn("cache", self._once_whole(self.world.cache.run))
        self._spawn("leadership", self.leadership.run())
        self._spawn("failover", self._once_whole(self.failover.run))
        self._spawn("fencing daemons", self.world.cutter.run())
        self._settling = asyncio.create_task(self._settle(), name="settle")
        if self.world.authority is not None:
            self._spawn("authority", self._once_whole(self.world.authority.run))

    async def _once_whole(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await until_whole(self.world.records.store)
        await work()

    def keep(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run one more part that must not end."""
        self._spawn(name, work)

    async def stop(self) -> None:
        """Let go of everything; unfinished tasks stay in the store for the next manager."""
        self.feed.close()
        await self.tasks.stop()
        if self._settling is not None:
            self._settling.cancel()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.leadership.resign()
        await self.world.free.stop()
        await self.world.agents.aclose()
        await self.world.cutter.aclose()

    async def _settle(self) -> None:
        """Leave the records out of garbage collections: they are most of our memory and have no
        cycles, and looking through those of 20,000 VMs holds everything up for half a second."""
        await self.world.cache.ready.wait()
        gc.freeze()

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._background.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            _LOG.error("%s ended", task.get_name(), exc_info=task.exception())
            self.broken.set()


def pin(hosts: Sequence[HostInfo], cpu_model: str) -> Pins:
    """What a new VM with that CPU is pinned to: the best machine that every one of them has."""
    facts = {info.name: info.qemu for info in hosts}
    return choose_pins(facts, uuid=str(uuid4()), cpu_model=cpu_model)


def _open_files() -> None:
    """As many as the kernel lets us: each host, each person and each stream takes one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def serve(config: ManagerConfig) -> int:
    """Run until SIGTERM or SIGINT (0), or until a part breaks (1)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    identity = Identity.load(config.tls_dir)
    tls = ClientTls.for_daemon(identity, Expect(STORE))
    store = _store(config.store_endpoints, tls)
    records, clock = Records(store), RealClock()
    world = World(
        records=records,
        cache=Cache(store),
        agents=HttpAgents(identity),
        daemons=HttpDaemons(identity),
        clock=clock,
        pin=pin,
        vault=Vault(config.state / SECRETS_FILE),
        worker=f"{identity.peer.name}/{secrets.token_hex(4)}",
        authority=_authority(config, records, clock),
        ca=identity.ca.read_bytes(),
    )
    manager = Manager(world, tokens=Tokens(config.tokens_file), state=config.state)
    api_tls = ServerTls(Identity.load(config.api_tls_dir), roles=None)
    server = WireServer(manager.app, _listeners(config, api_tls))
    manager.start()
    for name, work in _keeping(config, world, server):
        manager.keep(name, work)
    await server.start()
    # Ready is when lists can be answered; a store that is away must not hold us up for ever.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_READY_S):
            await world.cache.ready.wait()
    _LOG.info("serving on port %s", ", ".join(map(str, server.ports)))
    try:
        await _beat_until(stop, manager.broken)
    finally:
        notify("STOPPING=1")
        await server.stop(grace_s=_GRACE_S)
        await manager.stop()
        await store.aclose()
    return 0 if stop.is_set() else 1


def _store(endpoints: Sequence[str], tls: ClientTls) -> StoreClient:
    return StoreClient(
        endpoints,
        ssl_context=tls.context,
        verify_peer=lambda ssl_object: tls.verify(ssl_object, where="the store"),
    )


def _authority(config: ManagerConfig, records: Records, clock: RealClock) -> Authority | None:
    if config.ca_dir is None:
        return None
    return Authority(Issuer(config.ca_dir), records, clock, endpoints=tuple(config.store_endpoints))


def _keeping(
    config: ManagerConfig, world: World, server: WireServer
) -> list[tuple[str, Coroutine[Any, Any, None]]]:
    """Certificates are renewed, and new ones are noticed."""
    places = [Place(where) for where in dict.fromkeys((config.tls_dir, *config.keeps))]
    keeper = Keeper(world.records.store, places, world.clock)
    return [
        ("revoked certificates", keeper.follow_list()),
        ("renewal", keeper.renew()),
        ("certificate files", follow(config.tls_dir, changed=server.expel)),
        *(
            [("API certificate files", follow(config.api_tls_dir))]
            if config.api_tls_dir != config.tls_dir
            else []
        ),
    ]


def _listeners(config: ManagerConfig, tls: ServerTls) -> list[Listener]:
    given = [Listener(sock=sock, tls=tls) for sock in inherited_listeners().values()]
    found = given or [Listener.tcp(config.host, config.port, tls=tls)]
    return [*found, *(Listener.tcp(host, port, tls=tls) for host, port in config.also)]


async def _beat_until(stop: asyncio.Event, broken: asyncio.Event) -> None:
    """Feed the watchdog from the event loop, so that a loop that hangs is found out."""
    notify("READY=1")
    interval = watchdog_interval()
    beat_s = min(_BEAT_S, interval / 3) if interval else None
    ends = [asyncio.ensure_future(event.wait()) for event in (stop, broken)]
    try:
        while not (stop.is_set() or broken.is_set()):
            await asyncio.wait(ends, timeout=beat_s, return_when=asyncio.FIRST_COMPLETED)
            if beat_s:
                notify("WATCHDOG=1")
    finally:
        for end in ends:
            end.cancel()


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the configuration and serve. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="godwit-manager", description="Serve the cluster's API and carry out requests."
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    given = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(levelname)s manager: %(message)s"
    )
    try:
        config = ManagerConfig.load(given.config)
        _open_files()
        with contextlib.suppress(KeyboardInterrupt):
            return asyncio.run(serve(config))
    except GodwitError as error:
        sys.stderr.write(f"godwit-manager: {error.message}\n  {error.hint}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
