"""Start and end of the agent: survey, connect, adopt, serve; VMs outlive all of it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys
from pathlib import Path

from godwit.agent.adopt import adopt_all
from godwit.agent.alone import Alone
from godwit.agent.app import Rooms, build
from godwit.agent.arrivals import Arrivals
from godwit.agent.checkpoints import Checkpoints
from godwit.agent.departures import Departures
from godwit.agent.desk import Desk
from godwit.agent.disk_moves import DiskMoves
from godwit.agent.disks import Disks
from godwit.agent.facts import survey
from godwit.agent.failover import Failover
from godwit.agent.files import Files
from godwit.agent.guardlink import GuardLink
from godwit.agent.holds import LabHolds
from godwit.agent.images import Images
from godwit.agent.networks import Networks
from godwit.agent.peering import Peers
from godwit.agent.power import Power
from godwit.agent.seeds import Seeds
from godwit.agent.upkeep import Upkeep
from godwit.host.clock import RealClock
from godwit.host.config import AgentConfig
from godwit.host.errors import HostError
from godwit.host.sockets import notify, watchdog_interval
from godwit.model import keys
from godwit.model.errors import GodwitError
from godwit.model.world import Clock
from godwit.qemu.tls import ensure_dh_params
from godwit.store.api import Store
from godwit.store.client import StoreClient
from godwit.store.errors import LeaseNotFound, StoreError
from godwit.store.records import Records
from godwit.store.whole import until_whole
from godwit.wire.follow import follow
from godwit.wire.identity import HOST, MANAGER, STORE, Identity
from godwit.wire.keeper import CRL_FILE, Keeper, Place
from godwit.wire.server import Listener, ServerTls, WireServer
from godwit.wire.tls import ClientTls, Expect

AGENT_TTL_S = 6
_log = logging.getLogger("agent")


def store_client(config: AgentConfig, identity: Identity) -> StoreClient:
    """The store as this host may use it: TLS with the host's certificate."""
    tls = ClientTls.for_daemon(identity, Expect(STORE))
    return StoreClient(
        config.store.endpoints,
        ssl_context=tls.context,
        verify_peer=lambda ssl_object: tls.verify(ssl_object, where="the store"),
    )


async def run(config: AgentConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    for folder in (config.paths.run / "vms", config.paths.state / "vms"):
        folder.mkdir(parents=True, exist_ok=True)
    clock = RealClock()
    identity = Identity.load(config.tls.dir)
    if config.migration.tls:
        ensure_dh_params(config.tls.migration_dir)
    equipment = await survey(config, now=clock.realtime())
    for warning in equipment.warnings:
        _log.warning("%s", warning)
    records = Records(store_client(config, identity))
    desk = Desk(
        config,
        equipment,
        records=records,
        clock=clock,
        guard=GuardLink(config.paths.guard_socket, clock),
        holds=LabHolds(enabled=config.lab.enabled),
        peers=Peers(identity),
    )
    departures = Departures(desk)
    arrivals = Arrivals(desk)
    power = Power(desk)
    departures.ended = power.ended
    files = Files(desk)
    rooms = Rooms(
        desk=desk,
        power=power,
        departures=departures,
        arrivals=arrivals,
        files=files,
        disks=Disks(desk, power, files),
        disk_moves=DiskMoves(desk, power, files),
        images=Images(desk, files),
        checkpoints=Checkpoints(desk, power, files),
        seeds=Seeds(desk),
        upkeep=Upkeep(config),
        failover=Failover(power, arrivals, departures),
    )
    app = build(rooms)
    tls = ServerTls(identity, roles={HOST, MANAGER})
    server = WireServer(app, [Listener.tcp(config.agent.address, config.agent.port, tls=tls)])
    desk.background(desk.guard.serve(), "guard link")
    desk.background(_watchdog(clock), "watchdog")
    _keep_certificates(desk, server, ending)
    notify("READY=1")
    await until_whole(desk.records.store, reached=False)
    with contextlib.suppress(StoreError):  # it is told to look again as soon as the store is there
        await desk.catalog.sync()
    await desk.exports.adopt()
    desk.background(desk.volumes.serve(), "volumes")
    desk.background(desk.exports.serve(), "exports")
    await adopt_all(desk, departures, arrivals)
    desk.background(desk.redirects.serve(), "redirects")
    alone = Alone(desk)
    desk.background(alone.serve(), "guard's guard")
    desk.background(alone.tell(), "frozen VMs")
    desk.background(Networks(desk).serve(), "networks")
    desk.background(desk.catalog.serve(), "volumes")
    desk.background(_be_seen(desk), "presence")
    try:
        await server.serve(ending)
    finally:
        arrivals.close()
        await desk.close()
        await records.store.aclose()


def _keep_certificates(desk: Desk, server: WireServer, ending: asyncio.Event) -> None:
    """Renew this machine's certificates, follow the list of revoked ones, notice both."""
    config = desk.config
    places = [Place(config.tls.dir), *(Place(Path(one)) for one in config.tls.keeps)]
    if config.migration.tls:
        places.append(Place.of_qemu(config.tls.migration_dir))
    copy = config.paths.state / CRL_FILE
    keeper = Keeper(desk.records.store, places, desk.clock, copy=copy)
    desk.background(keeper.follow_list(), "revoked certificates")
    desk.background(keeper.renew(), "renewal of certificates")
    files = follow(config.tls.dir, changed=server.expel, revoked=ending.set)
    desk.background(files, "certificate files")


async def _watchdog(clock: Clock) -> None:
    """Tell the service manager that the event loop turns."""
    interval = watchdog_interval()
    while interval:
        notify("WATCHDOG=1")
        await clock.sleep(interval / 4)


async def _be_seen(desk: Desk) -> None:
    """Publish the host's facts and keep the key that says its agent lives."""
    store, clock = desk.records.store, desk.clock
    presence = json.dumps({"boot_id": desk.equipment.info.boot_id}).encode()
    while True:
        try:
            await desk.publish_host()
            uefi = desk.firmware.uefi()
            lease = await store.lease_grant(AGENT_TTL_S)
            await store.put(keys.host_agent(desk.host), presence, lease=lease.id)
            while True:
                await clock.sleep(AGENT_TTL_S / 4)
                await _keep(store, lease.id, clock)
                if desk.firmware.uefi() != uefi:  # a package was installed or upgraded
                    await desk.publish_host()
                    uefi = desk.firmware.uefi()
        except LeaseNotFound:
            continue
        except StoreError as error:
            _log.warning("presence: %s", error)
            await clock.sleep(0.5)


async def _keep(store: Store, lease: int, clock: Clock) -> None:
    """Renew; while the store is away it is tried often, for the lease may still hold."""
    while True:
        try:
            await store.lease_keepalive(lease, timeout=AGENT_TTL_S / 4)
            return
        except LeaseNotFound:
            raise
        except StoreError as error:
            _log.warning("presence: %s", error)
            await clock.sleep(0.2)


def main() -> None:
    """``godwit-agent --config FILE``."""
    parser = argparse.ArgumentParser(prog="godwit-agent", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="TOML file of this host")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        asyncio.run(run(AgentConfig.load(options.config)))
    except (GodwitError, HostError) as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)  # noqa: T201
        raise SystemExit(getattr(error, "exit_code", 1)) from None


if __name__ == "__main__":
    main()
