"""How a route of the agent is made: who may ask, and what becomes of errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from godwit.model.base import Record
from godwit.model.errors import (
    GodwitError,
    InvalidRequest,
    NotAllowed,
    OperationFailed,
    OutcomeUnknown,
    Unavailable,
)
from godwit.model.requests import explain
from godwit.qmp import MonitorError, QmpError
from godwit.store.errors import StoreError, StoreOutcomeUnknown
from godwit.wire.problem import Problem, problem_response
from godwit.wire.server import peer_of

Body = dict[str, Any]
Handler = Callable[[Request], Awaitable[Any]]


def route(path: str, method: str, handler: Handler, *, roles: tuple[str, ...]) -> Route:
    async def serve(request: Request) -> Response:
        try:
            peer = peer_of(request.scope)
            if peer is None or peer.role not in roles:
                raise NotAllowed(f"{peer or 'nobody'} may not ask for this", hint="wrong daemon")
            answer = await handler(request)
        except GodwitError as error:
            return problem_response(Problem.from_error(error))
        except MonitorError as error:
            refused = isinstance(error, QmpError) or not getattr(error, "sent", True)
            kind: type[GodwitError] = OperationFailed if refused else OutcomeUnknown
            text = f"the VM's QEMU: {error}"
            return problem_response(
                Problem.from_error(kind(text, hint="look: godwit vm list; then ask again"))
            )
        except ValidationError as error:
            return problem_response(Problem.from_error(explain(error)))
        except StoreError as error:
            unknown = isinstance(error, StoreOutcomeUnknown)
            kind = OutcomeUnknown if unknown else Unavailable
            return problem_response(
                Problem.from_error(kind(f"the store: {error.message}", hint=error.hint))
            )
        if isinstance(answer, Record):
            return Response(answer.model_dump_json(), media_type="application/json")
        return JSONResponse(answer if answer is not None else {})

    return Route(path, serve, methods=[method])


async def body(request: Request) -> Body:
    raw = await request.body()
    try:
        body = await request.json() if raw else {}
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}", hint="send an object") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body is not an object", hint="send an object")
    return body
