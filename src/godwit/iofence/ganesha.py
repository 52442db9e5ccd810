"""NFS exports of nfs-ganesha: an export is open to its hosts by name of their address, else closed.

    its file rewritten, SIGHUP   ganesha reads it and swaps its list of clients, all at once
    mount protocol, EXPORT       read back: the list that ganesha judges each request by
    end connections              ganesha keeps one open until its last request is answered; one
                                 that breaks while it reads and writes it may keep for ever (4.3)

The file is whole and durable before the signal, and ganesha.conf includes it: a server that starts
anew starts with it. SIGHUP and not D-Bus: it needs no bus, and either way one has to ask what came
of it. Only TCP: requests over UDP have no connection whose end could be waited for.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from godwit.host.files import write_durable
from godwit.host.process import Process, kill, send_signal, wait_exit
from godwit.host.tcptable import udp_ports
from godwit.iofence import mountd
from godwit.iofence.servers import POLL_S, Entry, end_connections, running
from godwit.iofence.settings import PlaceSettings
from godwit.model.errors import GodwitError, NotFound, Unavailable

_HERE: Final = "127.0.0.1"
_AGAIN_S: Final = 1.0
ENDS_S: Final = 3.0
"""Seconds for the requests of a client that is shut out."""
_log = logging.getLogger("godwit.iofence")


def export_block(place: PlaceSettings, clients: Collection[str]) -> str:
    """The export's configuration: what the administrator says, and who may use it.

    We may only see it, for the server tells of no export to whom it is closed.
    """
    lines = [
        "# Written by godwit-iofence: what is changed here is lost.",
        "EXPORT {",
        *(f"    {line}" for line in place.block.strip().splitlines()),
        "    Access_Type = None;",
        f"    CLIENT {{ Clients = {_HERE}; Access_Type = MDONLY_RO; }}",
    ]
    if clients:
        listed = ", ".join(sorted(clients))
        lines.append(f"    CLIENT {{ Clients = {listed}; Access_Type = RW; }}")
    return "\n".join([*lines, "}"]) + "\n"


async def _end_process(process: Process) -> None:
    """Nothing of it is under way any more when this returns."""
    kill(process)
    await wait_exit(process)


class Ganesha:
    """See `godwit.iofence.servers.Server`. ``end``: how a server is ended."""

    def __init__(self, end: Callable[[Process], Awaitable[None]] = _end_process) -> None:
        self._end = end

    async def seen(self, place: PlaceSettings) -> tuple[Entry, ...]:
        """Its clients by the server's own word. NotFound when it shows no such export."""
        running(place)
        if place.port in udp_ports():
            raise Unavailable(
                f"the server of {place.name} also takes requests over UDP",
                hint="switch that off: NFS_CORE_PARAM { Enable_UDP = false; }",
            )
        found = await mountd.exports(_HERE, place.mount_port)
        names = sorted(place.shown & found.keys())
        if not names:
            raise NotFound(
                f"the server shows no export {place.name}",
                hint=f"let ganesha.conf include {place.file}",
            )
        return tuple(Entry(text) for name in names for text in found[name])

    async def allow(
        self, place: PlaceSettings, clients: Collection[str], *, known: Collection[str]
    ) -> None:
        """Write its block, and return when the server acts on it."""
        wanted = export_block(place, clients)
        if not place.file.exists() or place.file.read_text() != wanted:
            write_durable(place.file, wanted.encode(), mode=0o644)
        server = running(place)
        loop = asyncio.get_running_loop()
        told = float("-inf")
        while not await self._acts(place, clients, known):
            if loop.time() - told >= _AGAIN_S:
                for process in server:
                    send_signal(process, signal.SIGHUP)
                told = loop.time()
            await asyncio.sleep(POLL_S)

    async def _acts(
        self, place: PlaceSettings, clients: Collection[str], known: Collection[str]
    ) -> bool:
        try:
            found = {one.address for one in await self.seen(place)}
        except NotFound:  # it has not read the file yet
            return False
        return found & set(known) == set(clients)

    async def evict(self, place: PlaceSettings, clients: Collection[str]) -> None:
        """End its connections; each lasts until the requests that came in on it are answered.

        What lasts longer than `ENDS_S` may be a connection that the server has forgotten, and
        nobody can tell. Where something starts it again at once it is ended then: that is proof.
        """
        serving = running(place)  # not one that another cut has had started anew meanwhile
        try:
            async with asyncio.timeout(ENDS_S if place.supervised else None):
                await end_connections(place, clients)
        except TimeoutError:
            _log.warning("%s: what was under way does not end, its server is ended", place.name)
            for process in serving:
                await self._end(process)
            while not await self._is_back(place):  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(POLL_S)

    async def _is_back(self, place: PlaceSettings) -> bool:
        try:
            await self.seen(place)
        except GodwitError:
            return False
        return True

    async def changed(self) -> None:
        """It reads its file at each start: nothing is to be done then."""
        await asyncio.Event().wait()
