"""The VM's way to the world: its taps' place in their bridges, changed by ioctl in microseconds."""

from __future__ import annotations

import contextlib
import logging

from godwit.host.announce import gratuitous
from godwit.host.config import NetworkConfig
from godwit.host.ifctl import LinkControl
from godwit.model.vm import Vm
from godwit.qemu.runtime import Runtime

_log = logging.getLogger("agent")


class TapGate:
    """Implements ``godwit.migration.world.Gate`` for one QEMU."""

    def __init__(
        self, vm: Vm, runtime: Runtime, networks: dict[str, NetworkConfig], links: LinkControl
    ) -> None:
        self._links = links
        self._ports = [
            (networks[nic.network].bridge, runtime.taps[nic.id], nic.mac)
            for nic in vm.nics
            if nic.network in networks and nic.id in runtime.taps
        ]

    def close(self) -> None:
        """Take the taps out; a tap that vanished with its QEMU is closed already."""
        for bridge, tap, _ in self._ports:
            with contextlib.suppress(OSError):
                self._links.detach(bridge, tap)

    def open(self) -> None:
        """Put the taps in and up. OSError when a bridge or tap is missing."""
        for bridge, tap, _ in self._ports:
            self._links.attach(bridge, tap)
            self._links.up(tap)

    def announce(self) -> None:
        """One RARP per card out of its bridge: switches learn the new way before the guest runs."""
        for bridge, _, mac in self._ports:
            try:
                gratuitous(bridge, mac)
            except OSError as error:
                _log.warning("announcing %s on %s: %s", mac, bridge, error)
