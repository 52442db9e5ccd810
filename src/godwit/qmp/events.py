"""QMP events as ordered streams, one queue per subscriber."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from godwit.qmp.errors import MonitorLost


@dataclass(frozen=True, slots=True)
class Event:
    """One event as QEMU sent it.

    `timestamp` is QEMU's wall clock when it happened, `arrived` our wall clock when it was
    read; both in seconds since the epoch (NaN when QEMU could not tell the time).
    """

    name: str
    data: Mapping[str, Any]
    timestamp: float
    arrived: float


class EventStream:
    """One subscriber's view of a monitor's events: in order, from the moment of subscription.

    An async iterator that ends with `MonitorLost`, after all events that came before the loss.
    It belongs to one task at a time. A dropped stream unsubscribes itself; `close()` (or
    leaving `with`) does so at once.
    """

    def __init__(self, names: frozenset[str], *, on_close: Callable[[EventStream], None]) -> None:
        self._names = names
        self._on_close = on_close
        self._queue: deque[Event] = deque()
        self._lost: MonitorLost | None = None
        self._wake: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._lost is not None:
                raise _again(self._lost)
            self._wake = asyncio.get_running_loop().create_future()
            try:
                await self._wake
            finally:
                self._wake = None
        return self._queue.popleft()

    async def wait(
        self, predicate: Callable[[Event], bool] = lambda _event: True, *, timeout: float | None
    ) -> Event:
        """The next event that `predicate` accepts; the ones before it are dropped.

        Raises TimeoutError after `timeout` seconds, `MonitorLost` when the connection ends.
        """
        async with asyncio.timeout(timeout):
            async for event in self:
                if predicate(event):
                    return event
        raise AssertionError("an event stream ends only by an exception")  # pragma: no cover

    def take(self) -> list[Event]:
        """All events that wait in the queue, without waiting."""
        events = list(self._queue)
        self._queue.clear()
        return events

    def close(self) -> None:
        """Unsubscribe and drop what is queued; a waiting reader gets `MonitorLost`."""
        self._on_close(self)
        self._queue.clear()
        self.end(MonitorLost("events", "the stream was closed"))

    # The monitor's side.

    def offer(self, event: Event) -> None:
        """Queue `event` if the subscriber asked for its name."""
        if not self._names or event.name in self._names:
            self._queue.append(event)
            self._rouse()

    def end(self, lost: MonitorLost) -> None:
        """No more events will come; the reader learns why once the queue is empty."""
        if self._lost is None:
            self._lost = lost
        self._rouse()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


def _again(lost: MonitorLost) -> MonitorLost:
    # A fresh copy per raise: a shared exception would gather tracebacks of all its readers.
    return MonitorLost(lost.name, lost.reason, command=lost.command)
