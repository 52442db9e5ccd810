"""The cuts of one storage server: written down, carried out, read back; and kept as they are.

A cut is confirmed when, after it was written down, in this order

1. the server's own word is that it lets in nobody whom the settings do not name, and not the host;
2. everything that the host had open there has ended, with the requests that came in on it;
3. the server still says so, and nobody has lifted the cut meanwhile.

What is written down is carried out again at our start, when the server is started anew, and every
few seconds. So a cut whose confirmation was lost stands all the same, and so does one that a crash
of ours interrupted. Several may ask at once: each place is changed by one at a time, towards the
same list.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from typing import Final

from godwit.iofence.cuts import CutBook
from godwit.iofence.servers import Entry, Server, check_rights, not_in_time, strangers
from godwit.iofence.settings import Kind, PlaceSettings, Settings
from godwit.model.errors import Conflict, GodwitError, NotFound, OperationFailed, Refused
from godwit.model.fencing import Cut, CutAsk, CutDone, FenceStatus, PlaceSeen
from godwit.model.world import Clock

CONFIRM_S: Final = 10.0
LOOK_S: Final = 5.0
SOON_S: Final = 0.1
STATUS_S: Final = 2.0
_log = logging.getLogger("godwit.iofence")


class Fence:
    """All places of this server. Belongs to the event loop of its daemon."""

    def __init__(
        self,
        settings: Settings,
        servers: Mapping[Kind, Server],
        book: CutBook,
        clock: Clock,
        *,
        confirm_s: float = CONFIRM_S,
    ) -> None:
        self._settings = settings
        self._servers = servers
        self._book = book
        self._clock = clock
        self._confirm_s = confirm_s
        self._places = {place.place: place for place in settings.places}
        self._locks = {name: asyncio.Lock() for name in self._places}
        self._problems: dict[str, str] = {}
        self.settled = asyncio.Event()
        """Everything was once as it is written down."""
        self._ended: set[int] = set()  # cuts whose host has nothing open since

    # What managers ask.

    async def cut(self, ask: CutAsk, *, by: str) -> CutDone:
        """Shut a host out, and return when the server has confirmed it.

        Errors: NotFound (nothing was done). Any other: it is not confirmed, and stands.
        """
        place, addresses = self._known(ask)
        cut = self._book.add(ask, by=by, at=self._clock.realtime())
        _log.warning("cut %d: %s out of %s, asked by %s", cut.id, cut.host, cut.place, by)
        try:
            async with asyncio.timeout(self._confirm_s):
                await self._settle(place)
                self._check(place, await self._server(place).seen(place), shut=addresses)
                await self._server(place).evict(place, addresses)
                self._check(place, await self._server(place).seen(place), shut=addresses)
        except TimeoutError:
            raise not_in_time(place, cut.host, self._confirm_s) from None
        if self._book.find(cut.id) is None:
            raise Conflict(f"cut {cut.id} was lifted or asked for anew meanwhile", hint="look")
        self._ended.add(cut.id)
        _log.warning("cut %d: confirmed", cut.id)
        return CutDone(cut=cut, said=f"{place.name} takes nothing from {cut.host} any more")

    async def lift(self, number: int, *, by: str) -> Cut:
        """Let a host in again, once no other cut of it stands. NotFound: it stands no more."""
        cut = self._book.find(number)
        if cut is None:
            raise NotFound(f"no cut {number} stands", hint="it was lifted, or asked for anew")
        self._book.remove(number)
        _log.warning("cut %d: lifted, asked by %s", number, by)
        place = self._places.get(cut.place)
        if place is not None:
            await self._again(place)  # what fails here is done within seconds
        return cut

    async def status(self) -> FenceStatus:
        """All places, looked at now, and all cuts."""
        seen = await asyncio.gather(*(self._seen(place) for place in self._settings.places))
        return FenceStatus(name=self._settings.name, places=tuple(seen), cuts=self._book.cuts)

    async def _seen(self, place: PlaceSettings) -> PlaceSeen:
        why = ""
        try:
            async with asyncio.timeout(STATUS_S):
                check_rights(place)
                self._check(place, await self._server(place).seen(place), shut=())
        except TimeoutError:
            why = f"{place.name} does not answer within {STATUS_S:g} s"
        except GodwitError as error:
            why = error.message
        return PlaceSeen(place=place.place, hosts=tuple(sorted(self._settings.hosts)), why=why)

    # What is kept as it is.

    async def run(self) -> None:
        """Carry out what is written down, for ever."""
        kinds = {place.kind for place in self._settings.places}
        async with asyncio.TaskGroup() as loops:
            for kind in sorted(kinds):
                loops.create_task(self._keep(kind), name=f"keeping {kind}")

    async def _keep(self, kind: Kind) -> None:
        changed = asyncio.ensure_future(self._servers[kind].changed())
        mine = [place for place in self._settings.places if place.kind == kind]
        pause_s = SOON_S
        try:
            while True:
                for place in mine:
                    await self._again(place)
                whole = not any(self._problems.values())
                if whole and len(self._problems) == len(self._places):
                    self.settled.set()
                # A server that has just been started is ready soon, one that is away is not.
                pause_s = LOOK_S if whole else min(2 * pause_s, LOOK_S)
                await asyncio.wait([changed], timeout=pause_s)
                if changed.done():
                    changed.result()
                    pause_s = SOON_S
                    changed = asyncio.ensure_future(self._servers[kind].changed())
        finally:
            changed.cancel()

    async def _again(self, place: PlaceSettings) -> None:
        """Once, also for hosts that were shut out and are still connected after a crash of ours."""
        problem = ""
        try:
            async with asyncio.timeout(self._confirm_s):
                await self._settle(place)
                await self._end_left_over(place)
        except TimeoutError:
            problem = f"nothing came of it within {self._confirm_s:g} s"
        except (GodwitError, OSError) as error:
            problem = str(error)
        if problem != self._problems.get(place.place, ""):
            _log.warning("%s: %s", place.place, problem or "as it is to be")
        self._problems[place.place] = problem

    async def _end_left_over(self, place: PlaceSettings) -> None:
        """Once for each cut: connections are the host's to other places of the server too."""
        hosts = self._settings.hosts
        mine = [cut for cut in self._book.cuts if cut.place == place.place and cut.host in hosts]
        if left := [cut for cut in mine if cut.id not in self._ended]:
            await self._server(place).evict(place, [a for cut in left for a in hosts[cut.host]])
            self._ended.update(cut.id for cut in left)

    async def _settle(self, place: PlaceSettings) -> None:
        """Have the server let in those hosts that are not shut out."""
        hosts = self._settings.hosts
        async with self._locks[place.place]:
            out = self._shut_out(place)
            known = {address for given in hosts.values() for address in given}
            let_in = {a for host, given in hosts.items() if host not in out for a in given}
            await self._server(place).allow(
                place, let_in | set(place.also), known=known | set(place.also)
            )

    def _shut_out(self, place: PlaceSettings) -> list[str]:
        """Hosts that the settings still name."""
        return sorted(self._book.hosts(place.place) & self._settings.hosts.keys())

    def _check(
        self, place: PlaceSettings, entries: tuple[Entry, ...], *, shut: Collection[str]
    ) -> None:
        """Refused while the server lets in somebody whom nobody could shut out; OperationFailed
        while it lets in one of the addresses that are to be ``shut`` out."""
        hosts = self._settings.hosts
        known = {address for given in hosts.values() for address in given} | set(place.also)
        if still := [entry.text for entry in entries if shut and entry.covers(shut)]:
            raise OperationFailed(f"{place.name} still lets in {', '.join(still)}")
        if others := strangers(entries, known):
            raise Refused(
                f"{place.name} is also open to {', '.join(others)}, which is no host's address",
                hint="bind its initiators or clients one by one, by address",
            )

    def _known(self, ask: CutAsk) -> tuple[PlaceSettings, tuple[str, ...]]:
        place = self._places.get(ask.place)
        if place is None:
            raise NotFound(
                f"nothing here is called {ask.place!r}", hint="see the daemon's settings"
            )
        addresses = self._settings.hosts.get(ask.host)
        if addresses is None:
            raise NotFound(
                f"the fencing daemon does not know from where {ask.host} comes",
                hint="name its addresses below [hosts], and start the daemon again",
            )
        return place, addresses

    def _server(self, place: PlaceSettings) -> Server:
        return self._servers[place.kind]
