"""A watch that survives lost connections and lost members.

::

    connect -> created -> events … -> connection lost -> catch up, connect from there on -> …
                                   -> member leaderless or silent -> the same, elsewhere
                                   -> canceled, compacted -> raise Compacted

What was handed out decides where to resume, so nothing is lost and nothing comes twice. A member
that is behind the others is first asked a linearizable question, which it answers when it has
caught up. A frozen process keeps its connections: one that has been silent is asked whether it
lives, where there is another to go to.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from godwit.store import codec, errors
from godwit.store.api import WatchBatch
from godwit.store.codec import Json
from godwit.store.high import High, Mark
from godwit.store.http import ChunkedLines, Connection, Endpoint, HttpError
from godwit.store.transport import ANSWER_S, HAS_LEADER, Transport, alive, connect

_BACKOFF_FIRST_S = 0.02
_BACKOFF_MAX_S = 1.0
_SILENT_S = 1.5  # after which a member is asked whether it lives
# A key that is cheap to read; nothing is kept there.
_PROBE = codec.dump(codec.span("/", prefix=False))


def _message(line: bytes) -> Json:
    """One message of the stream; HttpError when it is none, so that the watch starts anew."""
    try:
        found: Json = json.loads(line)
    except ValueError as error:
        raise HttpError(f"the watch brought what is no message: {error}") from None
    return found


class ClientWatch:
    """Implements :class:`godwit.store.api.Watch` over the network."""

    def __init__(
        self,
        transport: Transport,
        prefix: str,
        *,
        start_revision: int | None,
        timeout: float,
        high: High,
        on_close: Callable[[ClientWatch], None],
    ) -> None:
        self._transport = transport
        self._span = codec.span(prefix, prefix=True)
        self._next = start_revision
        self._timeout = timeout
        self._high = high
        self._on_close = on_close
        self._endpoint: Endpoint = transport.current
        self._connection: Connection | None = None
        self._lines = ChunkedLines()
        self._ready: deque[WatchBatch] = deque()
        self._announced = False
        self._failures = 0
        self._closed = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        while not self._closed.is_set():
            if self._ready:
                return self._ready.popleft()
            try:
                if self._connection is None:
                    await self._connect()
                else:
                    await self._read(self._connection)
            except (errors.StoreUnavailable, OSError, EOFError, asyncio.LimitOverrunError):
                if self._closed.is_set():
                    break
                self._drop()
                self._transport.move_on(self._endpoint)
                await self._back_off()
            except errors.StoreMemberRolledBack:
                if len(self._transport.endpoints) == 1:
                    await self.aclose()
                    raise
                self._drop()
                self._transport.move_on(self._endpoint)
                await self._back_off()
            except errors.StoreError:
                await self.aclose()
                raise
        raise StopAsyncIteration

    async def _connect(self) -> None:
        endpoint = self._endpoint = self._transport.current
        deadline = asyncio.get_running_loop().time() + self._timeout / len(
            self._transport.endpoints
        )
        if self._announced or (self._next is None and len(self._transport.endpoints) > 1):
            await self._catch_up(endpoint, deadline)
        create: Json = self._span | {"progress_notify": True, "prev_kv": True}
        if self._next is not None:
            create["start_revision"] = str(self._next)
        connection = await connect(endpoint, fresh=True, deadline=deadline)
        try:
            async with asyncio.timeout_at(deadline):
                answer, length = await connection.begin(
                    "/v3/watch",
                    codec.dump({"create_request": create}),
                    extra=HAS_LEADER,  # etcd then ends the watch when its member loses the cluster
                )
            if answer.status != 200 or length is not None:
                raise HttpError(f"{endpoint.url} answered {answer.status} to a watch")
        except BaseException:
            connection.close()
            raise
        endpoint.heard()
        self._lines = ChunkedLines()
        self._connection = connection

    async def _catch_up(self, endpoint: Endpoint, deadline: float) -> None:
        """Return when the member has everything that this client has seen."""
        floor = self._high.mark()
        await self._transport.call_at(
            endpoint,
            "/v3/kv/range",
            _PROBE,
            timeout=deadline - asyncio.get_running_loop().time(),
            judge=lambda answer: self._high.check(answer, floor, ordered=True),
            extra=HAS_LEADER,
        )

    async def _read(self, connection: Connection) -> None:
        data = await self._next_data(connection)
        if not data or self._connection is not connection:
            raise HttpError("the watch was cut off")
        for line in self._lines.feed(data):
            self._take(_message(line))
        if self._lines.ended and not self._ready:
            raise HttpError("the watch was ended")

    async def _next_data(self, connection: Connection) -> bytes:
        """What comes next; HttpError when the member has been silent and does not live."""
        if len(self._transport.endpoints) == 1:
            return await connection.read_some()  # there is nobody else to go to
        while True:
            try:
                async with asyncio.timeout(_SILENT_S):
                    data = await connection.read_some()
            except TimeoutError:
                if self._endpoint.silent_s() >= _SILENT_S:
                    now = asyncio.get_running_loop().time()
                    await alive(self._endpoint, deadline=now + ANSWER_S)
            else:
                self._endpoint.heard()
                return data

    def _take(self, message: Json) -> None:
        if "error" in message:
            error = message["error"]
            code = int(error.get("grpc_code", error.get("code", errors.UNKNOWN)))
            raise errors.from_status(code, str(error.get("message", "watch refused")), write=False)
        result = message["result"]
        revision = codec.header(result)
        if result.get("canceled"):
            self._canceled(result)
        elif result.get("created"):
            self._created(result, revision)
        elif "events" in result:
            self._failures = 0
            for batch in codec.decode_events(result):
                self._hand_out(batch)
        elif self._next is not None and revision >= self._next - 1:
            self._hand_out(WatchBatch(revision))

    def _created(self, result: Json, revision: int) -> None:
        # Everything handed out so far is known to exist; a store without it went back in time.
        known = 0 if self._next is None or not self._announced else self._next - 1
        self._high.check(result, Mark(known, {}), ordered=True)
        if self._next is None:
            self._next = revision + 1
        if not self._announced:
            self._announced = True
            self._ready.append(WatchBatch(self._next - 1))

    def _hand_out(self, batch: WatchBatch) -> None:
        if self._next is not None and batch.events and batch.revision < self._next:
            return
        self._next = batch.revision + 1
        self._ready.append(batch)

    def _canceled(self, result: Json) -> None:
        reason = str(result.get("cancel_reason", ""))
        if compacted := codec.number(result, "compact_revision"):
            raise errors.Compacted(
                f"the history from revision {self._next} on is compacted",
                compact_revision=compacted,
            )
        if "permission" in reason:
            raise errors.StoreDenied(f"the watch was refused: {reason}")
        raise HttpError(f"the watch was canceled: {reason or 'no reason given'}")

    async def _back_off(self) -> None:
        """Wait a little longer each time, but not once the watch is closed."""
        ceiling = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        delay = ceiling * random.uniform(0.5, 1.0)  # noqa: S311 - spread, not a secret
        try:
            async with asyncio.timeout(delay):
                await self._closed.wait()
        except TimeoutError:
            return

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def aclose(self) -> None:
        self._closed.set()
        self._drop()
        self._on_close(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()
