"""VM networks: each host makes the bridge of every network it can, and says which it has."""

from __future__ import annotations

import contextlib
import logging

from godwit.agent.desk import Desk
from godwit.host import links
from godwit.host.config import NetworkConfig
from godwit.host.errors import HostError
from godwit.model import keys
from godwit.model.network import Network
from godwit.store.errors import StoreError
from godwit.store.looking import looks

_log = logging.getLogger("agent")


def missing_links(network: Network, present: dict[str, links.Link]) -> list[str]:
    """The ``ip`` lines that make a network's bridge here; none when all is there. Pure."""
    lines: list[str] = []
    if network.bridge not in present:
        mac = links.stable_mac(f"{network.name}/{network.bridge}")
        lines += [links.bridge(network.bridge, mtu=network.mtu, mac=mac), links.up(network.bridge)]
    if network.uplink and network.uplink in present:
        lines += [links.attach(network.uplink, network.bridge), links.up(network.uplink)]
    return lines


class Networks:
    """Follows the network records and keeps the bridges of this host as they say."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._made: set[str] = set()

    async def serve(self) -> None:
        """Look once, then at every change, for ever."""
        while True:
            try:
                await self.sync()
                times = looks(self._desk.records.store, keys.NETWORKS)
                async with contextlib.aclosing(times):
                    async for _ in times:
                        await self.sync()
            except StoreError as error:
                _log.warning("networks: %s", error)
                await self._desk.clock.sleep(1.0)

    async def sync(self) -> None:
        """Make what is missing, remove bridges this agent made for networks that are gone."""
        desk = self._desk
        wanted = await desk.records.networks()
        present = links.show()
        for network in wanted.values():
            try:
                if lines := missing_links(network, present):
                    await links.apply_async(lines)
                    if network.bridge not in present:
                        self._made.add(network.name)
            except HostError as error:
                _log.warning("network %s: %s", network.name, error)
                continue
            desk.networks[network.name] = NetworkConfig(
                bridge=network.bridge, uplink=network.uplink, mtu=network.mtu
            )
        for name in [name for name in desk.networks if name not in wanted]:
            if name in desk.config.networks:
                continue
            port = desk.networks.pop(name)
            if name in self._made and port.bridge in present:
                self._made.discard(name)
                await links.apply_async([links.delete(port.bridge)])
        await desk.publish_host()
