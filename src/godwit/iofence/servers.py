"""What every kind of storage server has to be able to do, so that a cut of it can be proof.

Shutting a client out is three things, in this order: no new request of it is taken (`allow`, and
`seen` reads back that the server acts on it), its connections are ended, and what the server had
taken before has come to an end (`evict`). Only all three together are proof.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Protocol

from godwit.host import tcpserved
from godwit.host.process import Process
from godwit.iofence.settings import LOOPBACK, PlaceSettings
from godwit.model.errors import NotAllowed, OutcomeUnknown, Unavailable

ANSWERS_S: Final = 1.0
"""Seconds a server has to send the answers it owes a client that is shut out."""
POLL_S: Final = 0.02
"""Servers announce neither that they have read anything nor that a request is over."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Whom a server lets in by one line of its list: a network, or a word that is none."""

    text: str

    def covers(self, addresses: Collection[str]) -> bool:
        """Whether it lets one of them in; a name, or a word for all, may let in everybody."""
        try:
            network = ipaddress.ip_network(self.text, strict=False)
        except ValueError:
            return True
        found = (ipaddress.ip_address(address) for address in addresses)
        return any(one in network for one in found if one.version == network.version)

    @property
    def address(self) -> str:
        """The single address that it is; empty when it is more."""
        try:
            network = ipaddress.ip_network(self.text, strict=False)
        except ValueError:
            return ""
        single = network.prefixlen == network.max_prefixlen
        return str(network.network_address) if single else ""


def strangers(entries: Collection[Entry], known: Collection[str]) -> tuple[str, ...]:
    """Entries that are no host's: whom else the place is open to, in the server's own words."""
    fine = {*known, *LOOPBACK}
    return tuple(sorted(one.text for one in entries if one.address not in fine))


class Server(Protocol):
    """A kind of server. ``place`` is always one of its own kind; addresses are single ones."""

    async def seen(self, place: PlaceSettings) -> tuple[Entry, ...]:
        """Whom it lets in now, as the server itself says. Unavailable when it does not run."""
        ...

    async def allow(
        self, place: PlaceSettings, clients: Collection[str], *, known: Collection[str]
    ) -> None:
        """Let in ``clients``, and no other of ``known``, also where another entry covers it. What
        is written down for the server's next start is durable, even when it does not run now and
        this ends in Unavailable."""
        ...

    async def evict(self, place: PlaceSettings, clients: Collection[str]) -> None:
        """Return when nothing of these clients is open or under way in the server. They were shut
        out before. Unavailable, NotAllowed; waits for ever while requests do not end."""
        ...

    async def changed(self) -> None:
        """Return when it may have been started anew: a hint."""
        ...


def running(place: PlaceSettings) -> tuple[Process, ...]:
    """The processes that serve the place; Unavailable when there are none."""
    found = tcpserved.servers(place.port)
    if not found:
        raise Unavailable(f"nothing serves {place.name} at port {place.port}")
    return found


def check_rights(place: PlaceSettings) -> None:
    """Unavailable or NotAllowed when its connections could not be ended if they had to be."""
    for process in running(place):
        try:
            tcpserved.held(process, place.port, ())
        except PermissionError as error:
            raise _no_right(error) from error


async def end_connections(place: PlaceSettings, clients: Collection[str]) -> None:
    """End all connections of the clients to what serves the place; return when they are closed.

    New ones may come meanwhile: their requests are taken by rules that have changed before.
    NotAllowed when the kernel does not let us.

    At first the server may still send its answers: what nfs-ganesha finds broken while it writes is
    what it may forget to close (`godwit.iofence.ganesha`).
    """
    try:
        left = {}
        for process in running(place):
            inodes = frozenset(one.inode for one in tcpserved.held(process, place.port, clients))
            tcpserved.hang_up(process, inodes)
            left[process] = inodes
        clock = asyncio.get_running_loop().time
        until = clock() + ANSWERS_S
        while any(tcpserved.still_held(one, inodes) for one, inodes in left.items()):
            if clock() >= until:
                until = float("inf")
                for process, inodes in left.items():
                    tcpserved.hang_up(process, inodes, answers=False)
            await asyncio.sleep(POLL_S)
    except PermissionError as error:
        raise _no_right(error) from error


def _no_right(error: PermissionError) -> NotAllowed:
    return NotAllowed(
        f"connections to the server cannot be ended: {error}",
        hint="the daemon needs the capability to trace processes (CAP_SYS_PTRACE)",
    )


def not_in_time(place: PlaceSettings, host: str, within_s: float) -> OutcomeUnknown:
    """It is shut out as far as we can tell, and nobody confirmed it."""
    hint = "the cut stands and is tried again"
    if place.kind == "nfs" and not place.supervised:
        hint += "; if that is all, start nfs-ganesha anew: it may have forgotten a connection"
    return OutcomeUnknown(
        f"{place.name} did not confirm within {within_s:g} s that {host} is cut off", hint=hint
    )
