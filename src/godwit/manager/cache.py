"""The cluster's records in memory, fed by one list and one watch, for lists in microseconds.

The watch is a hint: every ``resync_s``, however much it told meanwhile, everything is listed again
and what differs is taken as news. One watch over all keys keeps the store's order, so whoever has
seen a revision here has seen every earlier one: that is what read-your-writes rests on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from godwit.manager.keyspace import Place, place_of
from godwit.manager.snapshot import Snapshot
from godwit.model import keys
from godwit.model.base import Record
from godwit.model.errors import Unavailable
from godwit.store.api import KeyValue, Store, Watch, WatchEvent, WatchKind
from godwit.store.errors import Compacted, StoreError

_LOG = logging.getLogger("godwit.manager")
_T = TypeVar("_T")
_LONGEST_PAUSE_S = 2.0

Value = Record | bytes


@dataclass(frozen=True)
class Change:
    """One record's step. ``new`` None = deleted; ``first``: from the first listing, not news."""

    revision: int
    key: str
    place: Place
    old: Value | None
    new: Value | None
    first: bool = False


Listener = Callable[[tuple[Change, ...]], None]


class Cache:
    """Use :meth:`run` as a background task; wait for :attr:`ready` before reading.

    Listeners are called with all changes of one revision, in key order, before anybody who waits
    for that revision; they must not raise and not take long.
    """

    def __init__(self, store: Store, *, resync_s: float = 45.0) -> None:
        self._store = store
        self._resync_s = resync_s
        self._values: dict[str, tuple[int, Place, Value]] = {}
        self._snapshot: Snapshot | None = None
        self._revision = 0
        self._news = asyncio.Event()
        self._listeners: list[Listener] = []
        self.ready = asyncio.Event()
        self.problem = ""  # why the cache may be stale now; empty when it follows the store

    @property
    def revision(self) -> int:
        """All changes up to this revision are in the snapshot."""
        return self._revision

    @property
    def snapshot(self) -> Snapshot:
        """The cluster as of :attr:`revision`; the same value until something changes."""
        if self._snapshot is None:
            self._snapshot = self._build()
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
        """The first answer of ``look`` that is not None; None when the time is up."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    found = look(self.snapshot)
                    if found is not None:
                        return found
                    await self._news.wait()
        except TimeoutError:
            return None

    async def run(self) -> None:
        """Follow the store until cancelled; an unreachable store is waited for."""
        pause_s = 0.1
        while True:
            try:
                await self._list()
                pause_s = 0.1
                async with self._store.watch(keys.ROOT, start_revision=self._revision + 1) as watch:
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
        now = asyncio.get_running_loop().time
        due = now() + self._resync_s
        while True:
            if now() >= due:
                if await self._list():
                    _LOG.info("listed again: the watch had not told everything yet")
                due = now() + self._resync_s
            try:
                async with asyncio.timeout_at(due):
                    batch = await anext(watch)
            except StopAsyncIteration:
                return
            except TimeoutError:
                continue
            if batch.revision > self._revision:
                self._apply(batch.revision, [_step(event) for event in batch.events])

    async def _list(self) -> int:
        """Take the store's word for everything; how many records differed from what we knew."""
        listing = await self._store.range(keys.ROOT)
        fresh = {kv.key: kv for kv in listing.kvs}
        gone = [key for key in self._values if key not in fresh]
        steps: list[tuple[int, str, KeyValue | None]] = [
            (kv.mod_revision, key, kv)
            for key, kv in fresh.items()
            if key not in self._values or self._values[key][0] != kv.mod_revision
        ]
        steps += [(listing.revision, key, None) for key in gone]
        first = not self.ready.is_set()
        changes = [
            change
            for revision, key, kv in sorted(steps, key=lambda step: step[:2])
            if (change := self._take(revision, key, kv, first=first)) is not None
        ]
        self._revision = max(self._revision, listing.revision)
        self.problem = ""
        self._publish(changes)
        self.ready.set()
        return len(changes)

    def _apply(self, revision: int, steps: list[tuple[str, KeyValue | None]]) -> None:
        found = [self._take(revision, key, kv) for key, kv in sorted(steps, key=lambda s: s[0])]
        self._revision = revision
        self._publish([change for change in found if change is not None])

    def _take(
        self, revision: int, key: str, kv: KeyValue | None, *, first: bool = False
    ) -> Change | None:
        place = place_of(key)
        if place is None:
            return None
        before = self._values.get(key)
        old = before[2] if before else None
        new: Value | None = None
        if kv is None:
            self._values.pop(key, None)
        else:
            try:
                new = place.kind.model_validate_json(kv.value) if place.kind else kv.value
            except ValidationError as error:
                _LOG.error("%s does not hold what it should: %s", key, error)
                return None
            # The event log is read through the feed; here only its revisions are needed.
            self._values[key] = (revision, place, b"" if place.room == "events" else new)
        return Change(revision, key, place, old, new, first)

    def _publish(self, changes: list[Change]) -> None:
        if changes:
            self._snapshot = None
            start = 0
            for index in range(1, len(changes) + 1):
                if index == len(changes) or changes[index].revision != changes[start].revision:
                    for listener in self._listeners:
                        listener(tuple(changes[start:index]))
                    start = index
        else:
            self._snapshot = None  # the revision moved on
        self._news.set()
        self._news = asyncio.Event()

    def _build(self) -> Snapshot:
        rooms: dict[str, dict[str, Value]] = {}
        for _, place, value in self._values.values():
            if place.room != "events":
                rooms.setdefault(place.room, {})[place.name] = value
        typed: dict[str, object] = {
            name: rooms.get(name, {})
            for name in (
                *("vms", "owners", "statuses", "hosts", "powers", "marks", "validated"),
                *("networks", "volumes", "volume_states", "migrations", "tasks"),
            )
        }
        settings = rooms.get("settings", {}).get("cluster")
        if settings is not None:
            typed["settings"] = settings
        alive = {name: frozenset(rooms.get(name, {})) for name in ("leases", "agents", "members")}
        return Snapshot(revision=self._revision, **typed, **alive)  # type: ignore[arg-type]


def _step(event: WatchEvent) -> tuple[str, KeyValue | None]:
    return event.kv.key, None if event.kind is WatchKind.DELETE else event.kv
