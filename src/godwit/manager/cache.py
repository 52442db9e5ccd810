"""The cluster's records in memory, fed by one list and one watch, for lists in microseconds.

The watch is a hint: every ``resync_s``, however much it told meanwhile, everything is listed again
and what differs is taken as news. One watch over all keys keeps the store's order, so whoever has
seen a revision here has seen every earlier one: that is what read-your-writes rests on.

The list comes in pages, so that neither the store nor we stand still over a large one. Pages are
of different revisions; the changes between the first and the last are taken from the watch before
anybody sees the list (`godwit.manager.listing`).

A change costs what it touches: a snapshot is made when somebody looks, and only the kinds of
records that changed since the last look are copied for it. Most revisions of a large cluster are
renewals, which are no part of a snapshot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from godwit.manager.keyspace import Place, place_of
from godwit.manager.listing import PAGE, SILENCE_S, Listed, catch_up, fill_in, read_pages
from godwit.manager.snapshot import Snapshot
from godwit.model import keys
from godwit.model.base import Record
from godwit.model.errors import Unavailable
from godwit.model.membership import Renewal
from godwit.store.api import KeyValue, Store, Watch, WatchBatch, WatchEvent, WatchKind
from godwit.store.errors import Compacted, StoreError
from godwit.store.records import Unreadable, decode

_LOG = logging.getLogger("godwit.manager")
_T = TypeVar("_T")
_LONGEST_PAUSE_S = 2.0

Value = Record | bytes
# The kinds of records in a snapshot; of those alive only the names count.
_KEPT: Final = (
    *("vms", "owners", "statuses", "hosts", "powers", "marks", "validated"),
    *("networks", "volumes", "volume_states", "migrations", "tasks"),
    *("confirmed_down", "restarts"),
)
_ALIVE: Final = ("leases", "agents", "members")


@dataclass(frozen=True)
class Change:
    """One record's step. ``new`` None = deleted; ``first``: from the first listing, not news."""

    revision: int
    key: str
    place: Place
    old: Value | None
    new: Value | None
    first: bool = False


@dataclass(frozen=True)
class Renewed:
    """A host's last renewal and the revision of the store at which it came."""

    revision: int
    renewal: Renewal


# Revision, key and place of a change, and the new value (None = deleted).
Step = tuple[int, str, Place, Value | None]
_TURN: Final = 250  # records of a list that are read before others have their turn

Listener = Callable[[tuple[Change, ...]], None]


class Cache:
    """Use :meth:`run` as a background task; wait for :attr:`ready` before reading.

    Listeners are called with all changes of one revision, in key order, before anybody who waits
    for that revision; they must not raise and not take long.
    """

    def __init__(self, store: Store, *, resync_s: float = 45.0, page: int = PAGE) -> None:
        self._store = store
        self._resync_s = resync_s
        self._page = page
        self._values: dict[str, tuple[int, Place, Value]] = {}
        self._owned: dict[str, int] = {}  # VM -> when its ownership changed last
        self.renewals: dict[str, Renewed] = {}  # host -> its last; they come all the time
        self._rooms: dict[str, dict[str, Value]] = {}  # kind -> name -> value, without the events
        self._copies: dict[str, Any] = {}  # those of them that a snapshot has and that still hold
        self._snapshot = Snapshot()
        self._stale = False  # a record of the snapshot changed since it was made
        self.unreadable: dict[
            str, str
        ] = {}  # key -> why; what it was before is believed until then
        self._revision = 0
        self._news = asyncio.Event()  # a revision was reached
        self._changed = asyncio.Event()  # a record of the snapshot changed
        self._listeners: list[Listener] = []
        self.ready = asyncio.Event()
        self.problem = ""  # why the cache may be stale now; empty when it follows the store

    @property
    def revision(self) -> int:
        """All changes up to this revision are in the snapshot."""
        return self._revision

    @property
    def snapshot(self) -> Snapshot:
        """The cluster as of :attr:`revision`; the same value until something in it changes.

        Its own ``revision`` is that at which it was made: what came since is no part of it.
        """
        if self._stale:
            self._snapshot, self._stale = self._build(), False
        return self._snapshot

    def keys_in(self, room: str) -> list[str]:
        """The keys of one kind of record, sorted (for the event log: by time)."""
        return sorted(key for key, (_, place, _) in self._values.items() if place.room == room)

    def listen(self, listener: Listener) -> None:
        """Have ``listener`` called with every change, the first listing included."""
        self._listeners.append(listener)

    async def reached(self, revision: int, *, timeout: float = 5.0) -> None:
        """Return once everything up to ``revision`` is in the snapshot; Unavailable when late."""
        try:
            async with asyncio.timeout(timeout):
                while self._revision < revision:
                    await self._news.wait()
        except TimeoutError:
            raise Unavailable(
                f"the manager has not seen its own write yet ({self.problem or 'watch is slow'})",
                hint="it was done; look again in a moment",
            ) from None

    async def until(
        self, look: Callable[[Snapshot], _T | None], *, timeout: float | None = None
    ) -> _T | None:
        """The first answer of ``look`` that is not None; None when the time is up.

        It is asked again whenever a record of the snapshot has changed, and never otherwise.
        """
        try:
            async with asyncio.timeout(timeout):
                while True:
                    found = look(self.snapshot)
                    if found is not None:
                        return found
                    await self._changed.wait()
        except TimeoutError:
            return None

    async def run(self) -> None:
        """Follow the store until cancelled; an unreachable store is waited for."""
        pause_s = 0.1
        while True:
            try:
                listed = await self._read()
                async with self._store.watch(keys.ROOT, start_revision=listed.first + 1) as watch:
                    await self._settle(watch, listed)
                    pause_s = 0.1
                    await self._follow(watch)
            except Compacted:
                _LOG.warning("the watch fell behind the store's history; listing again")
            except StoreError as error:
                if not self.problem:
                    _LOG.warning("the store cannot be followed: %s", error)
                self.problem = str(error)
                # A store that is away sends no event when it is back.
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _follow(self, watch: Watch) -> None:
        """Take in what the watch tells, and list everything again beside it: a list of many pages
        must not hold up news."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._resync_s
        coming: asyncio.Task[WatchBatch | None] | None = None
        listing: asyncio.Task[Listed] | None = None
        try:
            while True:
                coming = coming or asyncio.create_task(_next(watch), name="cache: watch")
                if listing is None and loop.time() >= due:
                    listing = asyncio.create_task(self._read(), name="cache: list again")
                read = listing is not None and listing.done()
                behind = listing is not None and read and self._revision < listing.result().last
                left = None if listing else max(0.0, due - loop.time())
                if behind or not read:
                    some = {coming} if read or listing is None else {coming, listing}
                    await asyncio.wait(
                        some,
                        timeout=SILENCE_S if behind else left,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                if coming.done():
                    batch, coming = coming.result(), None
                    if batch is None:
                        return
                    # A list may hold some changes beyond its revision: those are known.
                    if batch.revision > self._revision:
                        self._apply(batch.revision, batch.events)
                elif listing is not None and read:
                    # The watch has told what it has to tell of the time up to the last page.
                    if await self._compare(listing.result()):
                        _LOG.info("listed again: the watch had not told everything yet")
                    listing, due = None, loop.time() + self._resync_s
        finally:
            left_over: list[asyncio.Task[Any]] = [one for one in (coming, listing) if one]
            for task in left_over:
                task.cancel()
            await asyncio.gather(*left_over, return_exceptions=True)

    async def _compare(self, listed: Listed) -> int:
        """Take what differs from what we know and is not newer; how many records did."""
        listed.revision = max(listed.first, self._revision)
        if listed.bare:
            known = {key: revision for key, (revision, _, _) in self._values.items()}
            await fill_in(self._store, listed, known)
        return await self._install(listed)

    async def _read(self) -> Listed:
        """Everything at first; later, when most of it is known, only what revision it has."""
        return await read_pages(self._store, page=self._page, bare=self.ready.is_set())

    async def _settle(self, watch: Watch, listed: Listed) -> int:
        """Take the store's word for everything; how many records differed from what we knew."""
        try:
            await catch_up(watch, listed)
        except StoreError:
            if not listed.bare:  # a list is better than none, however the watch is
                await self._install(listed)
            raise
        if listed.bare:
            known = {key: revision for key, (revision, _, _) in self._values.items()}
            await fill_in(self._store, listed, known)
        return await self._install(listed)

    async def _install(self, listed: Listed) -> int:
        first = not self.ready.is_set()
        steps: list[Step] = []
        for number, kv in enumerate(listed.records.values(), start=1):
            # What is newer than the list is told by the watch, in its order; at first nobody reads.
            if self._revision_of(kv.key) != kv.mod_revision and (
                first or kv.mod_revision <= listed.revision
            ):
                steps += self._steps(kv.mod_revision, kv.key, kv)
            if number % _TURN == 0:
                await asyncio.sleep(0)
        # From here on without a pause: nobody sees half of a list.
        for key in self._values.keys() - listed.records.keys():
            if self._values[key][0] <= listed.first:  # else it came after its page was read
                steps += self._steps(listed.revision, key, None)
        for key in self.unreadable.keys() - listed.records.keys():
            del self.unreadable[key]
            self._stale = True
        steps.sort(key=lambda step: step[:2])
        changes = [change for step in steps if (change := self._take(*step, first=first))]
        self._revision = max(self._revision, listed.revision)
        self.problem = ""
        self._publish(changes)
        self.ready.set()
        return len(changes)

    def _revision_of(self, key: str) -> int:
        return self._values[key][0] if key in self._values else 0

    def _apply(self, revision: int, events: Sequence[WatchEvent]) -> None:
        steps: list[Step] = []
        for event in sorted(events, key=lambda one: one.kv.key):
            gone = event.kind is WatchKind.DELETE
            steps += self._steps(revision, event.kv.key, None if gone else event.kv)
        changes = [change for step in steps if (change := self._take(*step))]
        self._revision = revision
        self._publish(changes)

    def _steps(self, revision: int, key: str, kv: KeyValue | None) -> Iterator[Step]:
        """What a key's new value means; nothing when it is none of ours or cannot be read."""
        place = place_of(key)
        if place is None:
            return
        if self.unreadable.pop(key, None) is not None:
            self._stale = True
        if kv is None or place.kind is None:
            yield revision, key, place, None if kv is None else kv.value
            return
        try:
            yield revision, key, place, decode(kv, place.kind).value
        except Unreadable as error:
            _LOG.error("%s", error.message)
            self.unreadable[key] = error.message
            self._stale = True

    def _take(
        self, revision: int, key: str, place: Place, new: Value | None, *, first: bool = False
    ) -> Change | None:
        before = self._values.get(key)
        if before is not None and before[0] >= revision:
            return None  # a list of several pages knew of it already
        if new is None:
            self._values.pop(key, None)
        elif place.room == "events":
            # The event log is read through the feed; here only its revisions are needed.
            self._values[key] = (revision, place, b"")
        else:
            self._values[key] = (revision, place, new)
        if place.room == "renewals":
            self._renewed(revision, place.name, new)
        elif place.room != "events":
            room = self._rooms.setdefault(place.room, {})
            if new is None:
                room.pop(place.name, None)
            else:
                room[place.name] = new
            self._copies.pop(place.room, None)
            if place.room == "owners":
                self._owned[place.name] = revision
            self._stale = True
        return Change(revision, key, place, before[2] if before else None, new, first)

    def _renewed(self, revision: int, host: str, new: Value | None) -> None:
        """Kept apart: a snapshot is not made anew for one, and nobody is woken."""
        if isinstance(new, Renewal):
            self.renewals[host] = Renewed(revision, new)
        else:
            self.renewals.pop(host, None)

    def _publish(self, changes: list[Change]) -> None:
        start = 0
        for index in range(1, len(changes) + 1):
            if index == len(changes) or changes[index].revision != changes[start].revision:
                for listener in self._listeners:
                    listener(tuple(changes[start:index]))
                start = index
        _wake(self._news)
        if self._stale:
            _wake(self._changed)

    def _build(self) -> Snapshot:
        """A snapshot of now; kinds of records without a change are the very same as before."""
        kept = {room: self._copy(room, dict) for room in _KEPT}
        kept["owner_revisions"] = dict(self._owned)
        kept["unreadable"] = dict(self.unreadable)
        alive = {room: self._copy(room, frozenset) for room in _ALIVE}
        settings = self._rooms.get("settings", {}).get("cluster")
        if settings is not None:
            kept["settings"] = settings
        made = Snapshot(revision=self._revision, **kept, **alive)
        made.inherit(self._snapshot)
        return made

    def _copy(self, room: str, kind: Callable[[Mapping[str, Value]], Any]) -> Any:
        if room not in self._copies:
            self._copies[room] = kind(self._rooms.get(room, {}))
        return self._copies[room]


async def _next(watch: Watch) -> WatchBatch | None:
    """The watch's next word; None when it has ended."""
    return await anext(watch, None)


def _wake(event: asyncio.Event) -> None:
    """Let all who wait now look once; who waits after this waits for the next time."""
    event.set()
    event.clear()
