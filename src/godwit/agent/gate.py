"""The VM's way to the world: its taps' place in their bridges, changed by ioctl in microseconds."""

from __future__ import annotations

import contextlib
import logging

from godwit.host.announce import Announcer
from godwit.host.config import NetworkConfig
from godwit.host.ifctl import LinkControl, flush_learned
from godwit.model.vm import Vm
from godwit.qemu.runtime import Runtime

_log = logging.getLogger("agent")


class TapGate:
    """Implements ``godwit.migration.world.Gate`` for one QEMU."""

    def __init__(
        self,
        vm: Vm,
        runtime: Runtime,
        networks: dict[str, NetworkConfig],
        links: LinkControl,
        announcer: Announcer,
    ) -> None:
        self._links = links
        self._announcer = announcer
        self._ports = [
            (networks[nic.network], runtime.taps[nic.id], nic.mac)
            for nic in vm.nics
            if nic.network in networks and nic.id in runtime.taps
        ]

    def close(self) -> None:
        """Take the taps out; a tap that vanished with its QEMU is closed already."""
        for network, tap, _ in self._ports:
            with contextlib.suppress(OSError):
                self._links.detach(network.bridge, tap)

    def open(self) -> None:
        """Put the taps in and up. OSError when a bridge or tap is missing."""
        for network, tap, _ in self._ports:
            self._links.attach(network.bridge, tap)
            self._links.up(tap)

    def announce(self) -> None:
        """Switches, and our own bridge, learn the new way before the guest says a word.

        One RARP per card out of its bridge for the switches. Our bridge still believes that the
        address lies behind its uplink and would drop what comes in from there, so it forgets what
        it learned on that port.
        """
        for network, _, mac in self._ports:
            try:
                self._announcer.send(network.bridge, mac)
                if network.uplink:
                    flush_learned(network.uplink)
            except OSError as error:
                _log.warning("announcing %s on %s: %s", mac, network.bridge, error)
