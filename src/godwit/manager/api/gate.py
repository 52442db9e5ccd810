"""Who may enter, in front of every route: bearer tokens, readiness, and the count of answers."""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from godwit.manager.cache import Cache
from godwit.manager.metrics import Metrics
from godwit.manager.tokens import Tokens
from godwit.model.errors import GodwitError, Unauthenticated, Unavailable
from godwit.wire.problem import Problem, problem_response

# The last two are for hosts that are no members yet; a join brings a token of its own.
OPEN_PATHS = frozenset({"/v1/health", "/v1/openapi.json", "/v1/cluster/ca", "/v1/cluster/join"})
CALLER = "godwit.caller"
_LONGEST_CLIENT = 80


class TokenGate:
    """ASGI middleware; refuses before a route or a body is looked at."""

    def __init__(self, app: ASGIApp, *, tokens: Tokens, cache: Cache, metrics: Metrics) -> None:
        self._app = app
        self._tokens = tokens
        self._cache = cache
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, self._counted(scope, send))
            return
        try:
            scope[CALLER] = self._enter(scope)
        except GodwitError as error:
            await self._refuse(error, scope, receive, self._counted(scope, send))
            return
        await self._app(scope, receive, self._counted(scope, send))

    def _enter(self, scope: Scope) -> str:
        headers = dict(scope["headers"])
        kind, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        name = self._tokens.caller(token.strip()) if kind.lower() == "bearer" else None
        if name is None:
            raise Unauthenticated(
                "this needs a valid token" if token else "this needs a token",
                hint="send the header: Authorization: Bearer TOKEN",
            )
        if not self._cache.ready.is_set():
            raise Unavailable(
                "the manager is still reading the store"
                + (f": {self._cache.problem}" if self._cache.problem else ""),
                hint="try again in a moment",
            )
        said = headers.get(b"x-godwit-client", b"").decode("latin-1")
        client = "".join(c for c in said if c.isprintable())[:_LONGEST_CLIENT]
        return f"{name} through {client or 'the API'}"

    async def _refuse(self, error: GodwitError, scope: Scope, receive: Receive, send: Send) -> None:
        answer = problem_response(Problem.from_error(error))
        if isinstance(error, Unauthenticated):
            answer.headers["www-authenticate"] = "Bearer"
        if scope["type"] == "websocket":
            await WebSocket(scope, receive, send).send_denial_response(answer)
        else:
            await answer(scope, receive, send)

    def _counted(self, scope: Scope, send: Send) -> Send:
        method = scope.get("method", "WS")

        async def counting(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                self._metrics.requests.labels(method, str(message["status"])).inc()
            await send(message)

        return counting


def caller_of(scope: Any) -> str:
    """Who asks, and through what: kept with every task."""
    return str(scope.get(CALLER, "unknown"))
