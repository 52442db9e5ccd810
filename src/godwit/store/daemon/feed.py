"""Durable changes on their way to the watches.

A watch only remembers the next revision it owes its client. It reads from the recent changes in
memory, and from the database when it has fallen behind: a slow client costs no memory here.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterator

from godwit.store.codec import text64
from godwit.store.engine import Change, Record, in_range

_RECENT_REVISIONS = 512
_RECENT_BYTES = 8 << 20
_PAGE = 64


class Event:
    """A change and its JSON, encoded once for all watches."""

    __slots__ = ("_plain", "_with_prev", "change")

    def __init__(self, change: Change) -> None:
        self.change = change
        self._plain = ""
        self._with_prev = ""

    def text(self, *, prev: bool) -> str:
        """The Event message."""
        if prev and self.change.prev is not None:
            if not self._with_prev:
                self._with_prev = (
                    f'{self.text(prev=False)[:-1]},"prev_kv":{record_json(self.change.prev)}}}'
                )
            return self._with_prev
        if not self._plain:
            kind = '"type":"DELETE",' if self.change.deleted else ""
            self._plain = f'{{{kind}"kv":{record_json(self.change.record)}}}'
        return self._plain


def record_fields(record: Record, *, value: bool = True) -> dict[str, str]:
    """A KeyValue message as a dict; zero fields are left out."""
    fields = {"key": text64(record.key)}
    for name in ("create_revision", "mod_revision", "version", "lease"):
        if number := getattr(record, name):
            fields[name] = str(number)
    if value and record.value:
        fields["value"] = text64(record.value)
    return fields


def record_json(record: Record) -> str:
    """A KeyValue message as text."""
    return json.dumps(record_fields(record), separators=(",", ":"))


class Subscription:
    """One watch's place in the feed: a key range, and the next revision owed."""

    def __init__(self, key: bytes, end: bytes, first: int) -> None:
        self.key = key
        self.end = end
        self.next = first
        self.wake = asyncio.Event()

    def wants(self, event: Event) -> bool:
        """Whether the change is in this watch's range."""
        return in_range(event.change.record.key, self.key, self.end)


class Feed:
    """The tail of the change log, in memory, and who waits for its continuation."""

    def __init__(
        self, *, revision: int, history: Callable[[int, int], dict[int, list[Change]]]
    ) -> None:
        self.revision = revision
        self._history = history
        self._recent: deque[tuple[int, list[Event], int]] = deque()
        self._bytes = 0
        self._subscriptions: set[Subscription] = set()

    def add(self, subscription: Subscription) -> None:
        """Begin to wake a watch."""
        self._subscriptions.add(subscription)

    def remove(self, subscription: Subscription) -> None:
        """Forget a watch."""
        self._subscriptions.discard(subscription)

    def wake_all(self) -> None:
        """Let every watch look around (history was compacted, or the daemon ends)."""
        for subscription in self._subscriptions:
            subscription.wake.set()

    def publish(self, revision: int, changes: tuple[Change, ...]) -> None:
        """A revision became durable."""
        events = [Event(change) for change in changes]
        size = sum(len(change.record.value) for change in changes) + 200 * len(changes)
        self._recent.append((revision, events, size))
        self._bytes += size
        while len(self._recent) > _RECENT_REVISIONS or (
            self._bytes > _RECENT_BYTES and len(self._recent) > 1
        ):
            self._bytes -= self._recent.popleft()[2]
        for subscription in self._subscriptions:
            if any(subscription.wants(event) for event in events):
                subscription.wake.set()
            elif subscription.next == revision:
                # Nothing for it: stay abreast, so that it never has to search the log.
                subscription.next = revision + 1
        self.revision = revision

    def take(self, subscription: Subscription) -> Iterator[tuple[int, list[Event]]]:
        """What a watch is owed, at most one page of it; the place moves on with each one."""
        if subscription.next > self.revision:
            return
        if self._recent and self._recent[0][0] <= subscription.next:
            first = subscription.next - self._recent[0][0]
            last = min(first + _PAGE, len(self._recent))
            page = [self._recent[index][:2] for index in range(first, last)]
            end = page[-1][0]
        else:
            end = min(subscription.next + _PAGE - 1, self.revision)
            found = self._history(subscription.next, end)
            page = [(rev, [Event(change) for change in found[rev]]) for rev in sorted(found)]
        subscription.next = end + 1
        for revision, events in page:
            if wanted := [event for event in events if subscription.wants(event)]:
                yield revision, wanted
