"""What managers ask a fencing daemon: a small ASGI application, for roles that its listener let in.

GET    /v1/status       everything it knows
POST   /v1/cuts         shut a host out; answers when the server has confirmed it
DELETE /v1/cuts/{id}    lift that cut, and no later one
"""

from __future__ import annotations

import logging
from typing import Any

from pydantic import BaseModel, ValidationError

from godwit.iofence.fence import Fence
from godwit.model.errors import GodwitError, InvalidRequest, NotFound, OperationFailed
from godwit.model.fencing import CutAsk
from godwit.wire.problem import Problem, send_problem
from godwit.wire.server import peer_of

_MOST_BYTES = 64 << 10
_log = logging.getLogger("godwit.iofence")


class App:
    """One per daemon."""

    def __init__(self, fence: Fence) -> None:
        self._fence = fence

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request. Whoever goes away while a cut is carried out changes nothing about it."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            found = await self._answer(scope, receive)
        except GodwitError as error:
            await send_problem(send, Problem.from_error(error))
        except Exception as error:
            _log.exception("%s %s", scope["method"], scope["path"])
            failed = OperationFailed(f"the fencing daemon failed: {error}", hint="see its log")
            await send_problem(send, Problem.from_error(failed))
        else:
            body = found.model_dump_json().encode()
            length = (b"content-length", str(len(body)).encode())
            headers = [(b"content-type", b"application/json"), length]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Any, receive: Any) -> BaseModel:
        method, path = scope["method"], scope["path"]
        by = str(peer_of(scope) or "somebody")
        if (method, path) == ("GET", "/v1/status"):
            return await self._fence.status()
        if (method, path) == ("POST", "/v1/cuts"):
            return await self._fence.cut(await _asked(receive), by=by)
        number = path.removeprefix("/v1/cuts/")
        if method == "DELETE" and number != path and number.isdecimal():
            return await self._fence.lift(int(number), by=by)
        raise NotFound(f"nothing here is called {method} {path}", hint="see the API reference")


async def _asked(receive: Any) -> CutAsk:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the request ended early", hint="ask again")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > _MOST_BYTES:
            raise InvalidRequest("the request is too long", hint="send one JSON object")
    try:
        return CutAsk.model_validate_json(body)
    except ValidationError as error:
        raise InvalidRequest(
            f"this asks for no cut: {error}", hint="send place, host, vm"
        ) from None
