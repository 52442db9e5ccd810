"""One ordered stream of everything that happens, which any replica can resume.

The stream is the order of the store's revisions: each new record of the event log is an item, and
so is each change of a task or a migration (kinds ``task.updated``, ``migration.stage``,
``migration.progress``), which is not stored a second time. The SSE id of an item is the revision
up to which everything has been delivered; of several items of one revision only the last one
carries it. Resuming from an id therefore repeats at most the items of one revision and never
leaves one out; ``Event.id`` is the same on every replica and tells repeats.

What a reader missed is answered from memory: the recent changes one by one, older ones as the
last state of each record. A record that was deleted meanwhile is not mentioned.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection
from dataclasses import dataclass
from functools import cached_property

from godwit.manager.cache import Change
from godwit.model.event import Event
from godwit.model.migration import Migration
from godwit.model.task import Task
from godwit.model.volume import VolumeOnHost, VolumeState
from godwit.wire.sse import HELLO, KEEPALIVE, SseEvent

AT_ONCE = 64  # items in one write to a reader
_BULKY = {"log", "passes", "stages", "checks"}  # left out of progress items: read the record


@dataclass(frozen=True)
class Item:
    """One item of the stream; ``subjects`` are what a filter may name."""

    revision: int
    key: str
    kind: str
    subjects: frozenset[str]
    data: str  # an Event as JSON
    ends: bool = True  # the last item of its revision

    @cached_property
    def encoded(self) -> bytes:
        """The item as server-sent event, the same bytes for every reader."""
        resume_at = str(self.revision) if self.ends else ""
        return SseEvent(data=self.data, event=self.kind, id=resume_at).encode()


class Feed:
    """Listens to the cache; serves any number of readers, each only a position in one ring."""

    def __init__(
        self, *, now: Callable[[], float], capacity: int = 2048, keepalive_s: float = 10.0
    ) -> None:
        self._now = now
        self._keepalive_s = keepalive_s
        self._latest: dict[str, Item] = {}
        self._ring: deque[Item] = deque(maxlen=capacity)
        self._appended = 0  # items ever put into the ring
        self._revision = 0
        self._news = asyncio.Event()
        self._closed = False

    def take(self, changes: tuple[Change, ...]) -> None:
        """The cache's listener: all changes of one revision."""
        items = [item for change in changes if (item := self._item(change)) is not None]
        for index, item in enumerate(items):
            self._latest[item.key] = item
            # What was there before we came is history; it must not push news out of the ring.
            if not changes[0].first:
                last = index == len(items) - 1
                self._ring.append(item if last else _open_ended(item))
                self._appended += 1
        for change in changes:
            if change.new is None:
                self._latest.pop(change.key, None)
        self._revision = max(self._revision, changes[-1].revision)
        if items:
            self._wake()

    def close(self) -> None:
        """End every stream, before the server stops."""
        self._closed = True
        self._wake()

    def history(self, since: int) -> list[Item]:
        """Everything after revision ``since``, in order, as far as it is still known."""
        found = {(item.revision, item.key): item for item in self._latest.values()}
        found |= {(item.revision, item.key): item for item in self._ring}
        kept = [found[place] for place in sorted(found) if place[0] > since]
        return [
            item
            if index == len(kept) - 1 or kept[index + 1].revision != item.revision
            else _open_ended(item)
            for index, item in enumerate(kept)
        ]

    async def stream(
        self,
        *,
        since: int | None = None,
        subjects: Collection[str] = (),
        kinds: Collection[str] = (),
    ) -> AsyncGenerator[bytes, None]:
        """The body of an event stream: from ``since`` on (None: from now on)."""
        # No await between reading the history and taking the position: nothing falls between.
        backlog = [] if since is None else self.history(since)
        position = self._appended
        yield HELLO + f"id: {max(since or 0, 0) if backlog else self._revision}\n\n".encode()
        for item in backlog:
            if _wanted(item, subjects, kinds):
                yield item.encoded
        while not self._closed:
            oldest = self._appended - len(self._ring)
            if position < oldest:
                return  # too slow: the reader comes back with its last id and gets the rest
            if position < self._appended:
                # What has come together goes out together: one write instead of many.
                until = min(self._appended, position + AT_ONCE)
                together = [self._ring[place - oldest] for place in range(position, until)]
                position = until
                if found := [one.encoded for one in together if _wanted(one, subjects, kinds)]:
                    yield b"".join(found)
                continue
            news = self._news
            try:
                async with asyncio.timeout(self._keepalive_s):
                    await news.wait()
            except TimeoutError:
                yield KEEPALIVE

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _item(self, change: Change) -> Item | None:
        value = change.new
        if isinstance(value, Event):
            return _of_event(change, value)
        if isinstance(value, Task):
            return _of_task(change, value, self._now())
        if isinstance(value, Migration):
            return _of_migration(change, value, self._now())
        if isinstance(value, VolumeOnHost):
            return _of_volume(change, value)
        return None


def _open_ended(item: Item) -> Item:
    return Item(item.revision, item.key, item.kind, item.subjects, item.data, ends=False)


def _wanted(item: Item, subjects: Collection[str], kinds: Collection[str]) -> bool:
    if subjects and item.subjects.isdisjoint(subjects):
        return False
    return not kinds or item.kind in kinds


def _make(change: Change, event: Event, *also: str) -> Item:
    return Item(
        revision=change.revision,
        key=change.key,
        kind=event.kind,
        subjects=frozenset({event.subject, *also}),
        data=event.model_dump_json(),
    )


def _of_event(change: Change, event: Event) -> Item:
    return _make(change, event)


def _of_task(change: Change, task: Task, now: float) -> Item:
    event = Event(
        id=f"{task.id}@{change.revision}",
        time=task.ended_at or task.started_at or now,
        kind="task.updated",
        subject=f"task/{task.id}",
        message=f"{task.request.get('kind', 'task')} {task.state.value}"
        + (f": {task.reason}" if task.reason else ""),
        level="error" if task.error else "info",
        data={"task": task.model_dump(mode="json")},
    )
    return _make(change, event, task.subject)


def _of_migration(change: Change, move: Migration, now: float) -> Item:
    before = change.old if isinstance(change.old, Migration) else None
    step = (
        before is None
        or before.state is not move.state
        or before.progress.stage is not move.progress.stage
    )
    said = move.reason if move.state.final else move.progress.sentence
    event = Event(
        id=f"{move.id}@{change.revision}",
        time=move.ended_at or now,
        kind="migration.stage" if step else "migration.progress",
        subject=f"migration/{move.id}",
        message=f"{move.vm}: {move.progress.stage.value if not move.state.final else move.state}"
        + (f": {said}" if said else ""),
        level="error" if move.state.value in ("failed", "unknown") else "info",
        data={"migration": move.model_dump(mode="json", exclude=None if step else _BULKY)},
    )
    return _make(change, event, f"vm/{move.vm}")


def _of_volume(change: Change, seen: VolumeOnHost) -> Item | None:
    """News only when a host reaches its volume in another way; sizes change all the time."""
    before = change.old if isinstance(change.old, VolumeOnHost) else None
    if before is not None and (before.state, before.reason) == (seen.state, seen.reason):
        return None
    volume, _, host = change.place.name.partition("/")
    event = Event(
        id=f"{volume}-{host}@{change.revision}",
        time=seen.since,
        kind="volume.state",
        subject=f"volume/{volume}",
        message=f"{volume} on {host}: {seen.state.value}"
        + (f": {seen.reason}" if seen.reason else ""),
        level="info" if seen.state is VolumeState.DIRECT else "warning",
        data={"host": host, **seen.model_dump(mode="json")},
    )
    return _make(change, event, f"host/{host}")
