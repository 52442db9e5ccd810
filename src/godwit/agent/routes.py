"""How a route of the agent is made, and what is read out of a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from godwit.model.base import Record, check_name
from godwit.model.errors import (
    GodwitError,
    InvalidRequest,
    NotAllowed,
    OperationFailed,
    OutcomeUnknown,
    Unavailable,
)
from godwit.model.requests import explain
from godwit.model.vm import Disk
from godwit.qmp import MonitorError, QmpError
from godwit.store.errors import StoreError, StoreOutcomeUnknown
from godwit.wire.problem import Problem, problem_response
from godwit.wire.server import peer_of

Body = dict[str, Any]
Handler = Callable[[Request], Awaitable[Any]]


def route(path: str, method: str, handler: Handler, *, roles: tuple[str, ...]) -> Route:
    """A route for peers of these roles; every error is answered as a problem."""

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


async def body_of(request: Request) -> Body:
    """The JSON object of a request; empty when it has no body."""
    raw = await request.body()
    try:
        body = await request.json() if raw else {}
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}", hint="send an object") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body is not an object", hint="send an object")
    return body


def name_of(request: Request) -> str:
    """The VM that the path names."""
    return check_name(request.path_params["vm"])


async def disks_of(request: Request) -> list[Disk]:
    """The disks in the body."""
    return [Disk.model_validate(disk) for disk in (await body_of(request)).get("disks", [])]
