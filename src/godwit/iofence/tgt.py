"""iSCSI targets of tgtd: initiators are bound to a target one by one, by address.

    unbind             no login of the address any more (tgtd looks at its list with each login)
    end connections    also those that are logging in: tgtd does not show them
    I_T nexus gone     tgtd keeps one until the last command that came in on it is done

tgtd knows nothing after a start. A target must not open itself then: with no initiator-address in
targets.conf it is open to ALL, so it is given the server's own, ``initiator-address 127.0.0.1``,
and the hosts are bound by us.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from godwit.host.errors import HostError, ProgramFailed, ProgramTimedOut
from godwit.host.inotify import PathWatch
from godwit.host.run import run_async
from godwit.iofence.servers import POLL_S, Entry, end_connections
from godwit.iofence.settings import PlaceSettings
from godwit.model.errors import NotFound, Unavailable

SOCKETS: Final = Path("/run/tgtd")
_ADM: Final = ("tgtadm", "--lld", "iscsi")
_ANSWER_S: Final = 5.0
_TARGET: Final = re.compile(r"^Target (\d+): (\S+)$")
_NEXUS: Final = re.compile(r"^ {8}I_T nexus: (\d+)$")
_CONNECTION: Final = re.compile(r"^ {12}Connection: (\d+)$")
_ADDRESS: Final = re.compile(r"^ {16}IP Address: (\S+)$")
_GONE: Final = ("can't find the session", "can't find the connection", "can't find the binding")


@dataclass(frozen=True, slots=True)
class Nexus:
    """A session of an initiator: its number, its connections, where they came from."""

    number: int
    connections: tuple[int, ...] = ()
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """A target as ``--op show`` prints it; ``acl`` has addresses, networks, ALL, and names."""

    number: int
    name: str
    nexuses: tuple[Nexus, ...] = ()
    acl: tuple[str, ...] = ()


def targets(text: str) -> tuple[Target, ...]:
    """All targets in what ``tgtadm --mode target --op show`` printed. ValueError: not its words."""
    parts = re.split(r"^(?=Target \d+: )", text, flags=re.MULTILINE)
    if parts[0].strip():
        raise ValueError(f"tgtadm says {parts[0].strip().splitlines()[0]!r}")
    return tuple(_target(part.splitlines()) for part in parts[1:])


def _target(lines: list[str]) -> Target:
    head = _TARGET.match(lines[0])
    if head is None:
        raise ValueError(f"tgtadm says {lines[0]!r}")
    sections: dict[str, list[str]] = {}
    section: list[str] = []
    for line in lines[1:]:
        if line.startswith("    ") and not line.startswith("     "):
            section = sections.setdefault(line.strip().rstrip(":"), [])
        elif line.strip():
            section.append(line)
    for needed in ("I_T nexus information", "ACL information"):
        if needed not in sections:
            raise ValueError(f"tgtadm shows no {needed} of {head[2]}")
    return Target(
        number=int(head[1]),
        name=head[2],
        nexuses=_nexuses(sections["I_T nexus information"]),
        acl=tuple(line.strip() for line in sections["ACL information"]),
    )


def _nexuses(lines: list[str]) -> tuple[Nexus, ...]:
    found: list[tuple[int, list[int], list[str]]] = []
    for line in lines:
        if nexus := _NEXUS.match(line):
            found.append((int(nexus[1]), [], []))
        elif connection := _CONNECTION.match(line):
            found[-1][1].append(int(connection[1]))
        elif address := _ADDRESS.match(line):
            found[-1][2].append(address[1])
    return tuple(Nexus(number, tuple(cids), tuple(where)) for number, cids, where in found)


def of_clients(target: Target, clients: Collection[str]) -> tuple[Nexus, ...]:
    """Sessions of these addresses, and those that do not say where they came from."""
    return tuple(
        nexus
        for nexus in target.nexuses
        if not nexus.addresses or any(Entry(one).covers(clients) for one in nexus.addresses)
    )


def is_name(entry: str) -> bool:
    """Whether an entry of the ACL is an initiator's name: both kinds are in one list.

    tgtd lets in who is bound by address, and of those, where names are bound too, only these. So a
    name lets in nobody by itself; without the last one, everybody who is bound by address.
    """
    return entry.startswith(("iqn.", "eui.", "naa."))


class Tgt:
    """See `godwit.iofence.servers.Server`."""

    def __init__(self, sockets: Path = SOCKETS) -> None:
        self._sockets = sockets

    async def seen(self, place: PlaceSettings) -> tuple[Entry, ...]:
        """Its ACL by address. NotFound when tgtd has no such target."""
        return tuple(Entry(text) for text in (await self._target(place)).acl if not is_name(text))

    async def allow(
        self, place: PlaceSettings, clients: Collection[str], *, known: Collection[str]
    ) -> None:
        """Bind who is missing and unbind who is too much; nobody else's entry is touched."""
        target = await self._target(place)
        tid = ("--mode", "target", "--tid", str(target.number))
        out = set(known) - set(clients)
        for entry in target.acl:
            if out and not is_name(entry) and Entry(entry).covers(out):
                await self._adm("--op", "unbind", *tid, "--initiator-address", entry)
        bound = {Entry(entry).address for entry in target.acl}
        for client in sorted(set(clients) - bound):
            await self._adm("--op", "bind", *tid, "--initiator-address", client)

    async def evict(self, place: PlaceSettings, clients: Collection[str]) -> None:
        """By tgtadm, and at the sockets; then commands that tgtd works on are waited for."""
        target = await self._target(place)
        for nexus in of_clients(target, clients):
            for connection in nexus.connections:
                session = ("--sid", str(nexus.number), "--cid", str(connection))
                tid = ("--tid", str(target.number))
                await self._adm("--op", "delete", "--mode", "conn", *tid, *session)
        await end_connections(place, clients)
        while of_clients(await self._target(place), clients):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)

    async def changed(self) -> None:
        """tgtd makes its socket anew with each start."""
        while not self._sockets.is_dir():  # noqa: ASYNC110 - until its first start of all
            await asyncio.sleep(1.0)
        with PathWatch(self._sockets) as watch:
            await watch.changed()

    async def _target(self, place: PlaceSettings) -> Target:
        try:
            shown = await run_async([*_ADM, "--op", "show", "--mode", "target"], timeout=_ANSWER_S)
            found = targets(shown.decode(errors="replace"))
        except (HostError, ValueError) as error:
            raise Unavailable(f"tgtd does not answer: {error}") from error
        for target in found:
            if target.name == place.name:
                return target
        raise NotFound(f"tgtd has no target {place.name}", hint="define it in /etc/tgt")

    async def _adm(self, *words: str) -> None:
        with contextlib.suppress(_AlreadyGone):
            try:
                await run_async([*_ADM, *words], timeout=_ANSWER_S)
            except ProgramFailed as error:
                if any(said in error.stderr for said in _GONE):
                    raise _AlreadyGone from error
                raise Unavailable(f"tgtd refused: {error.message}") from error
            except ProgramTimedOut as error:
                raise Unavailable(f"tgtd does not answer: {error.message}") from error


class _AlreadyGone(Exception):
    """What was to be taken away is not there."""
