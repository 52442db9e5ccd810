"""One cluster's API as this client sees it: JSON calls, the event stream, the console's socket.

Every error leaves here as one of ``godwit.model.errors``: a refusal of the manager comes out as
the manager raised it. The connection is opened by the first call.

With several managers the one to speak to is chosen by asking each how it is: one that leads before
one that serves. When it goes away, another is chosen; a read is then repeated there, and so is a
request that was certainly not carried out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
)
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from godwit.model.errors import (
    GodwitError,
    InvalidRequest,
    OutcomeUnknown,
    Unauthenticated,
    Unavailable,
)
from godwit.wire.errors import PeerRefused
from godwit.wire.http import PeerClient
from godwit.wire.sse import SseEvent, SseParser

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

    from godwit.client.settings import Target
    from godwit.wire.answer import Answer

DEADLINE_S = 30.0
_IDLE_S = 45.0  # servers send comments more often than that

PAGE_ROWS = 2000
# With several managers: how long one may take to say how it is before another is looked for, and
# how long one is taken to be well without asking.
_NEXT_S, _WELL_S = 2.0, 1.0

Query = Mapping[str, str | int | float | bool | None]
_T = TypeVar("_T")


def next_page(link: str) -> Query | None:
    """The query of the page that follows, from an answer's ``Link`` header; None: it was the last.

    A list that does not come in pages has no such header.
    """
    target, _, more = link.partition(";")
    if 'rel="next"' not in more:
        return None
    return dict(parse_qsl(urlsplit(target.strip(" <>")).query))


class Link:
    """Calls to one cluster on connections that stay open. One event loop only."""

    def __init__(self, target: Target, *, name: str) -> None:
        self.target = target
        self._name = name
        self._peers: list[PeerClient] = []
        self._chosen: PeerClient | None = None
        self._heard_at = 0.0  # the loop's time when the chosen one last answered

    def _open(self) -> list[PeerClient]:
        if not self._peers:
            token = self.target.token()
            self._peers = [self._peer(url, token) for url in self.target.urls]
        return self._peers

    def _peer(self, url: str, token: str | None) -> PeerClient:
        tls = None
        if url.startswith("https://"):
            from godwit.wire.tls import ClientTls

            tls = ClientTls.for_api(self.target.ca_file)
        return PeerClient(
            url,
            tls=tls,
            token=token,
            headers={"x-godwit-client": self._name, "accept": "application/json"},
            deadline_s=DEADLINE_S,
        )

    async def _manager(self) -> PeerClient:
        """The manager to speak to. A dead one's socket may live on: it is asked after a while."""
        now = asyncio.get_running_loop().time
        if self._chosen is not None and now() - self._heard_at > _WELL_S:
            if not await _rank(self._chosen):
                self._chosen = None
            self._heard_at = now()
        if self._chosen is None:
            peers = self._open()
            if len(peers) == 1:
                return peers[0]
            ranks = await asyncio.gather(*(_rank(peer) for peer in peers))
            self._chosen = peers[max(range(len(peers)), key=lambda index: ranks[index])]
            self._heard_at = now()
        return self._chosen

    async def _ask(self, work: Callable[[PeerClient], Awaitable[_T]], *, safe: bool) -> _T:
        """Do it with the manager chosen; once more with another one where that does no harm."""
        for _ in range(len(self._open())):
            peer = await self._manager()
            try:
                found = await (self._while_well(peer, work) if safe else work(peer))
                self._heard_at = asyncio.get_running_loop().time()
                return found
            except (Unavailable, OutcomeUnknown, PeerRefused) as error:
                harmless = isinstance(_meant(error), Unavailable) or (
                    safe and isinstance(error, OutcomeUnknown)
                )
                if not harmless or self._chosen is None:
                    raise
                self._chosen = None
                last = error
        raise last

    async def _while_well(
        self, peer: PeerClient, work: Callable[[PeerClient], Awaitable[_T]]
    ) -> _T:
        """A read's answer; OutcomeUnknown when the manager does not even say how it is."""
        if self._chosen is None:
            return await work(peer)  # there is no other
        waiting = asyncio.ensure_future(work(peer))
        try:
            while not (await asyncio.wait({waiting}, timeout=_WELL_S))[0]:
                if not await _rank(peer) and not waiting.done():
                    raise OutcomeUnknown(f"{peer.url} has gone silent", hint="ask another manager")
            return await waiting
        finally:
            waiting.cancel()

    async def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        peers, self._peers, self._chosen = self._peers, [], None
        for peer in peers:
            idle = list(peer._idle)
            await peer.close()
            # A polite TLS close takes the server's answer, and our loop may end right after this:
            # drop them, and give the loop the two rounds that dropping takes.
            for connection in idle:
                connection.abort()
        for _ in range(2 if peers else 0):
            await asyncio.sleep(0)

    async def get(
        self, path: str, *, query: Query | None = None, deadline_s: float | None = None
    ) -> Any:
        """The JSON found there."""
        answer = await self._read(path, query, deadline_s)
        with self._plain_errors():
            return answer.json()

    async def _read(
        self, path: str, query: Query | None = None, deadline_s: float | None = None
    ) -> Answer:
        with self._plain_errors():
            return await self._ask(
                lambda peer: peer.request("GET", path, query=query, deadline_s=deadline_s),
                safe=True,
            )

    async def rows(self, path: str, *, query: Query | None = None) -> list[dict[str, Any]]:
        """The JSON objects of a list, which comes in pages when it is long.

        Two pages may come from two managers: the next one begins behind a name.
        """
        found: list[dict[str, Any]] = []
        asked: Query | None = {"limit": PAGE_ROWS, **(query or {})}
        while asked is not None:
            answer = await self._read(path, asked)
            with self._plain_errors():
                found += answer.json()
            asked = next_page(answer.headers.get("link", ""))
        return found

    async def call(
        self, method: str, path: str, body: Any = None, *, query: Query | None = None
    ) -> Any:
        """Send a request that changes something, once; the JSON answered."""
        with self._plain_errors():
            answer = await self._ask(
                lambda peer: peer.request(method, path, json=body, query=query), safe=False
            )
            return answer.json()

    async def upload(self, path: str, content: bytes, *, headers: dict[str, str]) -> Any:
        """Send a file's bytes; the JSON answered."""
        # A floor of 1 MB/s: a slower link would rather fail than hold a command for ever.
        deadline_s = DEADLINE_S + len(content) / 1e6
        with self._plain_errors():
            answer = await self._ask(
                lambda peer: peer.request(
                    "POST", path, content=content, headers=headers, deadline_s=deadline_s
                ),
                safe=False,
            )
            return answer.json()

    async def events(
        self, *, query: Query | None = None, since: str | None = None, give_up_s: float = 60.0
    ) -> AsyncGenerator[SseEvent, None]:
        """Follow the event stream for ever, across breaks; close it with ``aclosing``."""
        several = len(self._open()) > 1
        now = asyncio.get_running_loop().time
        heard_at = now()
        with self._plain_errors():
            while True:
                peer = await self._manager()
                stream = peer.events(
                    "/v1/events",
                    query=query,
                    last_event_id=since,
                    give_up_s=_NEXT_S if several else give_up_s,
                )
                try:
                    async with contextlib.aclosing(stream):
                        async for event in stream:
                            since, heard_at = event.id or since, now()
                            yield event
                except (Unavailable, OutcomeUnknown):
                    if not several or now() - heard_at > give_up_s:
                        raise
                    self._chosen = None

    async def news(self, *, query: Query | None = None) -> AsyncGenerator[SseEvent | None, None]:
        """Follow the event stream for ever; None says that it has just (again) been connected,
        the moment to read the present state without missing anything after it."""
        pause_s = 0.05
        while True:
            with contextlib.suppress(Unavailable, OutcomeUnknown), self._plain_errors():
                async with contextlib.AsyncExitStack() as stack:
                    chunks = await self._event_chunks(stack, query=query)
                    parser, connected = SseParser(), False
                    async for chunk in chunks:
                        if not connected:
                            connected, pause_s = True, 0.05
                            yield None
                        for event in parser.feed(chunk):
                            yield event
            self._chosen = None
            # Nothing tells us when the server is back: try, ever less often.
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 2.0)

    async def _event_chunks(
        self, stack: contextlib.AsyncExitStack, *, query: Query | None, since: str | None = None
    ) -> AsyncGenerator[bytes, None]:
        headers = {"accept": "text/event-stream"} | ({"last-event-id": since} if since else {})
        peer = await self._manager()
        opened = peer.stream("GET", "/v1/events", query=query, headers=headers)
        answer = await stack.enter_async_context(opened)
        return await stack.enter_async_context(contextlib.aclosing(answer.chunks(idle_s=_IDLE_S)))

    async def events_so_far(
        self, *, query: Query | None = None, since: str | None = None, quiet_s: float = 1.0
    ) -> AsyncGenerator[SseEvent, None]:
        """The events that the server has: until the stream ends or is quiet for ``quiet_s``."""
        loop, parser = asyncio.get_running_loop(), SseParser()
        with self._plain_errors():
            async with contextlib.AsyncExitStack() as stack:
                chunks = await self._event_chunks(stack, query=query, since=since)
                until = loop.time() + quiet_s
                while True:
                    try:
                        async with asyncio.timeout_at(until):
                            chunk = await anext(chunks, None)
                    except TimeoutError:
                        return
                    if chunk is None:
                        return
                    for event in parser.feed(chunk):  # a comment is no news
                        until = loop.time() + quiet_s
                        yield event

    @contextlib.asynccontextmanager
    async def websocket(self, path: str) -> AsyncIterator[ClientConnection]:
        """An open WebSocket with this client's token."""
        async with contextlib.AsyncExitStack() as stack:
            with self._plain_errors():
                peer = await self._manager()
                socket = await stack.enter_async_context(peer.websocket(path))
            yield socket

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except PeerRefused as refused:
            error = refused.error
            if isinstance(error, Unauthenticated) and self.target.token_file is None:
                error.hint = "set GODWIT_TOKEN_FILE to a file with the cluster's token"
            raise error from None
        except ValueError as error:  # an address or a body that makes no sense
            raise InvalidRequest(
                f"{self.target.url} does not speak as a cluster does: {error}",
                hint="check the address, and that it is the manager's",
            ) from error


async def _rank(peer: PeerClient) -> int:
    """How good a manager is to speak to: 0 is silent, 1 knows too little, 2 serves, 3 leads."""
    try:
        health = await peer.get("/v1/health", deadline_s=_NEXT_S)
    except (GodwitError, PeerRefused, ValueError):
        return 0
    if health.get("status") != "ok":
        return 1
    return 3 if health.get("leads") else 2


def _meant(error: Exception) -> Exception:
    """What a manager refused with, or the error itself."""
    return error.error if isinstance(error, PeerRefused) else error
