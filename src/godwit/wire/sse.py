"""Server-sent events: write them, read them, and keep a bounded log that readers can resume.

An `EventHub` is one ring of the last events; a reader is only a position in it, so a slow
reader costs nothing. One that fell out of the ring, or resumes from an id the ring does not
know, first gets an event named `reset`: it must read the present state anew and then follow.
Streams begin with a comment, so the reader knows at once that it is connected.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass

RESET = "reset"
KEEPALIVE = b": keepalive\n\n"
HELLO = b": connected\n\n"
MEDIA_TYPE = "text/event-stream"
_LINE_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event; `data` is usually JSON. Without an id it does not move the resume point."""

    data: str
    event: str = "message"
    id: str = ""

    def encode(self) -> bytes:
        for value in (self.event, self.id):
            if "\n" in value or "\r" in value or "\0" in value:
                raise ValueError(f"an event's name and id are single lines, not {value!r}")
        lines = [f"id: {self.id}"] if self.id else []
        if self.event != "message":
            lines.append(f"event: {self.event}")
        text = self.data.replace("\r\n", "\n").replace("\r", "\n")
        lines += [f"data: {line}" for line in text.split("\n")]
        return ("\n".join(lines) + "\n\n").encode()


class SseParser:
    """Bytes in, events out, in any cutting. Comments and unknown fields are skipped.

    Errors: ValueError when a line or an event grows beyond 4 MiB.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._size = 0
        self._event = ""
        self.last_id = ""

    def feed(self, chunk: bytes) -> Iterator[SseEvent]:
        self._rest += chunk
        # A trailing \r may be half of \r\n: it waits for the next chunk.
        *lines, self._rest = _split_lines(self._rest)
        if len(self._rest) > _LINE_LIMIT or self._size > _LINE_LIMIT:
            raise ValueError("an event is larger than 4 MiB")
        for line in lines:
            if line:
                self._take(line.decode(errors="replace"))
            elif self._data or self._event:
                event = self._finish()
                if event is not None:
                    yield event

    def _take(self, line: str) -> None:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
            self._size += len(value)
        elif field == "event":
            self._event = value
        elif field == "id" and "\0" not in value:
            self.last_id = value

    def _finish(self) -> SseEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._size = [], "", 0
        if not data:
            return None
        return SseEvent(data="\n".join(data), event=event or "message", id=self.last_id)


def _split_lines(buffer: bytes) -> list[bytes]:
    held = b""
    if buffer.endswith(b"\r"):
        buffer, held = buffer[:-1], b"\r"
    lines = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    lines[-1] += held
    return lines


class EventHub:
    """The last events of this process, in order, for any number of readers.

    One event loop only. Ids are the publisher's (unique; they should survive a restart) or
    a running number. `close` ends every stream; a server calls it before it stops.
    """

    def __init__(self, *, capacity: int = 1024) -> None:
        self._ring: deque[SseEvent] = deque(maxlen=capacity)
        self._positions: dict[str, int] = {}
        self._published = 0  # how many events there ever were: position of the next one
        self._news = asyncio.Event()
        self._closed = False

    @property
    def last_id(self) -> str:
        return self._ring[-1].id if self._ring else ""

    def publish(self, data: str, *, event: str = "message", event_id: str = "") -> str:
        """Append and wake the readers; the event's id."""
        event_id = event_id or str(self._published)
        if len(self._ring) == self._ring.maxlen:
            evicted = self._ring[0].id
            if self._positions.get(evicted) == self._oldest:
                del self._positions[evicted]
        self._ring.append(SseEvent(data=data, event=event, id=event_id))
        self._positions[event_id] = self._published
        self._published += 1
        self._wake()
        return event_id

    def close(self) -> None:
        """End every stream, now and from now on."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    @property
    def _oldest(self) -> int:
        return self._published - len(self._ring)

    async def follow(
        self, *, last_event_id: str | None = None, idle_s: float | None = None
    ) -> AsyncGenerator[SseEvent | None, None]:
        """Events after `last_event_id` (None: from now on); None whenever `idle_s` passed."""
        position = self._published
        if last_event_id is not None:
            known = self._positions.get(last_event_id)
            if known is None:
                yield SseEvent(data="unknown id", event=RESET, id=self.last_id)
            else:
                position = known + 1
        while not self._closed:
            if position < self._oldest:
                position = self._published
                yield SseEvent(data="too slow", event=RESET, id=self.last_id)
            elif position < self._published:
                found = self._ring[position - self._oldest]
                position += 1
                yield found
            else:
                news = self._news
                try:
                    async with asyncio.timeout(idle_s):
                        await news.wait()
                except TimeoutError:
                    yield None

    async def stream(
        self,
        *,
        last_event_id: str | None = None,
        keepalive_s: float = 15.0,
        accept: Callable[[SseEvent], bool] = lambda _event: True,
    ) -> AsyncGenerator[bytes, None]:
        """The body of a `text/event-stream` answer. `accept` filters; resets always pass."""
        yield HELLO
        events = self.follow(last_event_id=last_event_id, idle_s=keepalive_s)
        async with contextlib.aclosing(events):
            async for event in events:
                if event is None:
                    yield KEEPALIVE
                elif event.event == RESET or accept(event):
                    yield event.encode()
