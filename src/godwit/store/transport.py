"""One request to whichever member answers, with an honest account of what may have happened.

For each attempt it is known whether the request was *sent*. Before that every failure means
"nothing was done" and the next member is tried. After it a read may be tried elsewhere, but a
write may not: its outcome is unknown.

::

    member refuses the connection       -> the next one, at once
    member is cut off or frozen         -> the next one, after its share of the time
    member answers "no leader"          -> the next one, at once; nothing was done
    member's term went backwards        -> a read: the next one; a write: StoreRolledBack
    a write was sent, no answer         -> StoreOutcomeUnknown, when the member is found to be away
                                           or to have lost its leader, or the time is over; later
                                           calls go elsewhere first

A frozen process keeps its connections, so with several members a write goes out on a connection
only if its member was heard of within the last second; else a harmless question goes first.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Sequence
from typing import Final

from godwit.store import codec, errors
from godwit.store.codec import Json
from godwit.store.http import (
    HARMLESS,
    Answer,
    Connection,
    Endpoint,
    MakeSocket,
    VerifyPeer,
    parse_endpoint,
)

# Looks at an answer before it counts; raises StoreRolledBack when it must not be used.
Judge = Callable[[Json], None]

# etcd refuses a request with this at once while its member follows no leader.
HAS_LEADER: Final = "Grpc-Metadata-Hasleader: true\r\n"
STATUS: Final = "/v3/maintenance/status"
_ASK_FIRST_S: Final = 1.0
ANSWER_S: Final = 1.5  # which a member has to say that it lives


class Transport:
    """Pooled connections to the members of one store; sticks to the member that works."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str = "",
        verify_peer: VerifyPeer | None = None,
        make_socket: MakeSocket | None = None,
    ) -> None:
        if not endpoints:
            raise errors.StoreRefused("the store has no address", hint="Give an endpoint.")
        self._endpoints = [
            parse_endpoint(
                url,
                tls=ssl_context,
                server_hostname=server_hostname,
                verify_peer=verify_peer,
                make_socket=make_socket,
            )
            for url in endpoints
        ]
        self._current = 0
        self._closed = False

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Every member, in the order given."""
        return tuple(self._endpoints)

    @property
    def current(self) -> Endpoint:
        """The member to ask first."""
        return self._endpoints[self._current]

    def move_on(self, failed: Endpoint) -> None:
        """Ask another member first from now on, unless somebody moved already."""
        if failed is self.current:
            self._current = (self._current + 1) % len(self._endpoints)

    async def call(
        self,
        path: str,
        body: bytes | None,
        *,
        write: bool,
        timeout: float,
        judge: Judge | None = None,
        extra: str = "",
    ) -> Json:
        """The JSON answer of the first member that gives one. Raises StoreError.

        ``timeout`` seconds cover everything. Each member gets an equal share of what is left to
        answer in, but a write once sent keeps all of it. ``extra``: more header lines.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + timeout
        first, total = self._current, len(self._endpoints)
        last: errors.StoreError | None = None
        for tried in range(total):
            endpoint = self._endpoints[(first + tried) % total]
            share = now() + (deadline - now()) / (total - tried)
            try:
                answer = await self._attempt(
                    endpoint, path, body, write=write, share=share, deadline=deadline, extra=extra
                )
                if judge is not None:
                    judge(answer)
                return answer
            except errors.StoreUnavailable as error:
                # "No leader" says more than that the last one tried was away.
                last = last if isinstance(last, errors.StoreNoLeader) else error
            except errors.StoreMemberRolledBack as error:
                if write:
                    raise
                last = error
            except errors.StoreOutcomeUnknown:
                self.move_on(endpoint)
                raise
            self.move_on(endpoint)
        assert last is not None  # noqa: S101 - there is at least one endpoint
        raise last

    async def call_at(
        self,
        endpoint: Endpoint,
        path: str,
        body: bytes | None,
        *,
        timeout: float,
        judge: Judge | None = None,
        extra: str = "",
    ) -> Json:
        """What one member answers to a read within ``timeout`` seconds. Raises StoreError."""
        until = asyncio.get_running_loop().time() + timeout
        answer = await self._attempt(
            endpoint, path, body, write=False, share=until, deadline=until, extra=extra
        )
        if judge is not None:
            judge(answer)
        return answer

    async def _attempt(
        self,
        endpoint: Endpoint,
        path: str,
        body: bytes | None,
        *,
        write: bool,
        share: float,
        deadline: float,
        extra: str,
    ) -> Json:
        if self._closed:
            raise errors.StoreUnavailable("the store client is closed")
        fresh = False
        while True:
            connection = await connect(endpoint, fresh=fresh, deadline=share)
            reused = connection.reused
            if write and reused and self._doubtful(endpoint):
                await _ask_first(endpoint, connection, deadline=share)
            try:
                async with asyncio.timeout_at(deadline if write else share):
                    answer = await self._answer(endpoint, connection, path, body, write, extra)
            except TimeoutError as error:
                connection.close()
                raise _unanswered(endpoint, write=write, timed_out=True) from error
            except ssl.SSLError as error:
                connection.close()
                raise _tls_error(endpoint, error, write=write) from error
            except (OSError, EOFError, asyncio.LimitOverrunError) as error:
                connection.close()
                if reused and not write:
                    fresh = True  # the member had closed it while it lay idle
                    continue
                raise _unanswered(endpoint, write=write, timed_out=False) from error
            except BaseException:
                connection.close()
                raise
            endpoint.heard()
            endpoint.release(connection)
            body_found = _decode(endpoint, answer, write=write)
            endpoint.term = max(endpoint.term, codec.header(body_found, "raft_term"))
            return body_found

    async def _answer(
        self,
        endpoint: Endpoint,
        connection: Connection,
        path: str,
        body: bytes | None,
        write: bool,
        extra: str,
    ) -> Answer:
        """The member's answer. Who waits for that to a write asks meanwhile how the member is.

        Raises TimeoutError when it does not live, or has lost the leader to whom it handed the
        write: the outcome is unknown then, and waiting longer would not make it known.
        """
        term = max(one.term for one in self._endpoints)
        exchange = connection.exchange(path, body, extra=extra)
        if not write or len(self._endpoints) == 1:
            return await exchange
        waiting = asyncio.ensure_future(exchange)
        now = asyncio.get_running_loop().time
        try:
            while not (await asyncio.wait({waiting}, timeout=_ASK_FIRST_S))[0]:
                lost = await self._has_lost(endpoint, term, deadline=now() + ANSWER_S)
                if lost and not waiting.done():
                    raise TimeoutError
            return await waiting
        finally:
            waiting.cancel()

    async def _has_lost(self, endpoint: Endpoint, term: int, *, deadline: float) -> bool:
        """Whether what a member of a term was given is not to be answered any more."""
        try:
            body = await self._attempt(
                endpoint, STATUS, b"{}", write=False, share=deadline, deadline=deadline, extra=""
            )
        except errors.StoreError:
            return True
        return not codec.number(body, "leader") or codec.number(body, "raftTerm") > term > 0

    def _doubtful(self, endpoint: Endpoint) -> bool:
        """Whether it is worth a question before a write is sent: there is another member to take,
        and this one has been silent."""
        return len(self._endpoints) > 1 and endpoint.silent_s() > _ASK_FIRST_S

    def close(self) -> None:
        """Drop every idle connection and refuse further calls."""
        self._closed = True
        for endpoint in self._endpoints:
            endpoint.close()


async def connect(endpoint: Endpoint, *, fresh: bool, deadline: float) -> Connection:
    """A connection to one member. Raises StoreUnavailable or StoreDenied."""
    try:
        async with asyncio.timeout_at(deadline):
            try:
                return await endpoint.acquire(fresh=fresh)
            except EOFError:
                # Somebody who ends may hang up on us, once.
                return await endpoint.acquire(fresh=True)
    except EOFError as error:
        raise errors.StoreDenied(
            f"{endpoint.url} hangs up right after the handshake; it does not seem to accept"
            " this host's certificate"
        ) from error
    except TimeoutError as error:
        raise errors.StoreTimeout(f"{endpoint.url} did not accept a connection in time") from error
    except ssl.SSLError as error:
        raise _tls_error(endpoint, error, write=False) from error
    except PermissionError as error:
        raise errors.StoreDenied(
            f"{endpoint.url} may not be opened", hint="Run as the user the store runs as."
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise errors.StoreUnavailable(f"{endpoint.url} does not answer: {reason}") from error


async def alive(endpoint: Endpoint, *, deadline: float) -> None:
    """Return when the member's process answers a harmless question. Raises StoreError."""
    connection = await connect(endpoint, fresh=False, deadline=deadline)
    await _ask_first(endpoint, connection, deadline=deadline)
    endpoint.release(connection)


async def _ask_first(endpoint: Endpoint, connection: Connection, *, deadline: float) -> None:
    """Hear from the member on this connection, or close it: StoreUnavailable, nothing was done."""
    try:
        async with asyncio.timeout_at(deadline):
            await connection.exchange(HARMLESS, None)
    except TimeoutError as error:
        connection.close()
        raise errors.StoreTimeout(f"{endpoint.url} did not answer in time") from error
    except (OSError, EOFError, asyncio.LimitOverrunError) as error:
        connection.close()
        raise errors.StoreUnavailable(f"{endpoint.url} broke the connection") from error
    except BaseException:
        connection.close()
        raise
    endpoint.heard()


def _unanswered(endpoint: Endpoint, *, write: bool, timed_out: bool) -> errors.StoreError:
    why = "did not answer in time" if timed_out else "broke the connection"
    if write:
        return errors.StoreOutcomeUnknown(f"{endpoint.url} {why}; the write may have happened")
    kind = errors.StoreTimeout if timed_out else errors.StoreUnavailable
    return kind(f"{endpoint.url} {why}")


def _tls_error(endpoint: Endpoint, error: ssl.SSLError, *, write: bool) -> errors.StoreError:
    """With TLS 1.3 the member judges our certificate only after we have sent the request."""
    reason = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError) or "ALERT" in reason.upper():
        return errors.StoreDenied(f"{endpoint.url} and this host do not trust each other: {reason}")
    if write:
        return _unanswered(endpoint, write=True, timed_out=False)
    return errors.StoreUnavailable(f"{endpoint.url} does not speak TLS as expected: {reason}")


def _decode(endpoint: Endpoint, answer: Answer, *, write: bool) -> Json:
    try:
        body = json.loads(answer.body)
    except ValueError:
        body = None
    if isinstance(body, dict):
        if answer.status == 200 and "error" not in body:
            return body
        # A stream that fails after its head was sent says so in its body.
        said = body["error"] if isinstance(body.get("error"), dict) else body
        code = said.get("code", said.get("grpc_code"))
        if code is not None:
            message = str(said.get("message") or said.get("error") or "refused")
            raise errors.from_status(int(code), message, write=write)
    raise errors.StoreRefused(
        f"{endpoint.url} answered {answer.status} to a store request",
        hint="Is this the address of a Godwit store or of etcd 3.4 or newer?",
    )
