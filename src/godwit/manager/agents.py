"""Calls to agents, as the manager needs them, with every failure turned into a Godwit error.

One client per agent, kept open: a call costs a millisecond. What was not sent is ``Unavailable``,
what was sent without an answer ``OutcomeUnknown``, and an agent's own refusal arrives as it was
meant.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from godwit.manager.upload import upload
from godwit.model.errors import (
    GodwitError,
    InvalidRequest,
    OutcomeUnknown,
    TooOld,
    Unavailable,
)
from godwit.model.host import HostInfo
from godwit.model.skew import Speaks, behind, our_own, unknown_verb
from godwit.wire.errors import PeerOutcomeUnknown, PeerRefused, PeerUnreachable
from godwit.wire.http import PeerClient
from godwit.wire.identity import HOST, STORE, Identity
from godwit.wire.tls import ClientTls, Expect

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection


class Agents(Protocol):
    """How the manager reaches hosts; the tests put real agents on loopback behind it."""

    async def call(
        self,
        host: HostInfo,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        deadline_s: float = 10.0,
    ) -> Any:
        """The JSON an agent answers. Raises only Godwit errors."""
        ...

    async def put_file(self, host: HostInfo, path: str, source: Path) -> Any:
        """Stream a local file to an agent; the JSON it answers."""
        ...

    def console(
        self, host: HostInfo, vm: str
    ) -> contextlib.AbstractAsyncContextManager[ClientConnection]:
        """The serial console of a VM as an open WebSocket."""
        ...

    async def store_metrics(self, endpoint: str, *, deadline_s: float) -> str:
        """What a member of etcd counts of itself, as text for Prometheus. Godwit errors only."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...


class HttpAgents:
    """Implements :class:`Agents` over mutual TLS; ``identity`` None only for plain-HTTP tests."""

    def __init__(self, identity: Identity | None) -> None:
        self._identity = identity
        self._clients: dict[tuple[str, str], PeerClient] = {}
        self._shared: ClientTls | None = None

    def _tls(self, host: HostInfo) -> ClientTls | None:
        if self._identity is None:
            return None
        if self._shared is None:
            self._shared = ClientTls.for_daemon(self._identity, Expect(HOST))
        return self._shared.towards(Expect(HOST, host.name))

    def _client(self, host: HostInfo) -> PeerClient:
        place = (host.name, host.agent_url)
        client = self._clients.get(place)
        if client is None:
            client = PeerClient(host.agent_url, tls=self._tls(host))
            self._clients[place] = client
        return client

    async def call(
        self,
        host: HostInfo,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        deadline_s: float = 10.0,
    ) -> Any:
        with translated(host.name, asked=host.speaks, verb=f"{method} {path}"):
            answer = await self._client(host).request(
                method, path, json=None if body is None else dict(body), deadline_s=deadline_s
            )
            return answer.json()

    async def put_file(self, host: HostInfo, path: str, source: Path) -> Any:
        with translated(host.name, asked=host.speaks, verb=f"PUT {path}"):
            return await upload(host.agent_url + path, source, tls=self._tls(host))

    @contextlib.asynccontextmanager
    async def console(self, host: HostInfo, vm: str) -> AsyncIterator[ClientConnection]:
        # Only opening is translated: what happens on the open line is the caller's.
        async with contextlib.AsyncExitStack() as stack:
            with translated(host.name):
                opened = await stack.enter_async_context(
                    self._client(host).websocket(f"/v1/vms/{vm}/console")
                )
            yield opened

    async def store_metrics(self, endpoint: str, *, deadline_s: float) -> str:
        tls = None
        if self._identity is not None:
            tls = ClientTls.for_daemon(self._identity, Expect(STORE))
        try:
            client = PeerClient(endpoint, tls=tls)
        except ValueError as error:
            raise Unavailable(f"{endpoint} is no address of etcd", hint=str(error)) from None
        try:
            with translated(endpoint):
                answer = await client.request("GET", "/metrics", deadline_s=deadline_s)
        finally:
            await client.close()
        return answer.body.decode(errors="replace")

    async def aclose(self) -> None:
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.close()


@contextlib.contextmanager
def translated(
    host: str, *, who: str = "", asked: Speaks | None = None, verb: str = ""
) -> Iterator[None]:
    """Name the host in what went wrong, and let an agent's own refusal through as it was meant.

    ``who``: what answers there, when it is no agent. ``asked``: what its agent says of itself; it
    may be of another version than ours.
    """
    peer = who or f"the agent of {host}"
    try:
        yield
    except PeerRefused as error:
        raise _refusal(host, peer, error, asked=asked, verb=verb) from error
    except PeerOutcomeUnknown as error:
        raise OutcomeUnknown(
            f"{peer} was asked and did not answer: {error.message}",
            hint="look at the object's state before trying again",
            host=host,
        ) from error
    except PeerUnreachable as error:
        raise Unavailable(
            f"{peer} cannot be reached: {error.message}",
            hint=f"{'' if who else f'look with: godwit host show {host}; '}nothing was changed",
            host=host,
        ) from error


_NO_SUCH_VERB = ("http-404", "http-405")


def _refusal(
    host: str, peer: str, error: PeerRefused, *, asked: Speaks | None = None, verb: str = ""
) -> GodwitError:
    """An agent's own refusals are problems; what it does not know at all its server answers."""
    code = error.problem.code
    if asked is not None and code in _NO_SUCH_VERB:
        return unknown_verb(host, verb, its=asked, ours=our_own())
    if code.startswith("http-"):
        # Not one of our problems: something else answers there, or an agent of another version.
        return Unavailable(
            f"{peer} does not understand the request: {error.problem.detail}",
            hint="check which version runs there",
            host=host,
        )
    if asked is not None and code == InvalidRequest.code and (why := behind(asked, our_own())):
        return TooOld(
            f"the agent of {host} does not take this ({verb}): {error.error.message}; {why}",
            hint=f"leave out what is new, or upgrade Godwit on {host}",
            host=host,
        )
    return error.error
