"""Who belongs to the cluster: its state in words, join tokens, and the door for hosts that join.

Two paths need no API token: the CA's certificate, which is public, and the join itself, which
brings a token of its own. A join token is answered once and never stored, so it is no task.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from godwit.manager.api.gate import caller_of
from godwit.manager.api.resources import one
from godwit.manager.look import look
from godwit.manager.world import authority
from godwit.model.cluster_status import ClusterStatus
from godwit.model.errors import InvalidRequest
from godwit.model.requests import explain
from godwit.model.trust import JoinAnswer, JoinAsk, NewToken, TokenView

if TYPE_CHECKING:
    from godwit.manager.api.app import Rooms

_BODY_LIMIT = 64 * 1024
_Model = TypeVar("_Model", bound=BaseModel)


def add_routes(app: FastAPI, rooms: Rooms) -> None:
    """Below ``/v1/cluster``."""

    @app.get(
        "/v1/cluster",
        summary="How the cluster stands, in words",
        response_model=None,
        responses={200: {"model": ClusterStatus}},
    )
    async def status() -> Response:
        return one(await look(rooms.world, rooms.standings()))

    @app.get(
        "/v1/cluster/ca",
        summary="The cluster CA's certificate, as PEM; needs no token",
        response_class=Response,
        openapi_extra={"security": []},
    )
    async def ca() -> Response:
        return Response(rooms.world.ca, media_type="application/x-pem-file")

    @app.post(
        "/v1/cluster/tokens",
        summary="Make a join token; it is shown this once",
        status_code=201,
        response_model=None,
        responses={201: {"model": TokenView}},
        openapi_extra=_body(NewToken),
    )
    async def create_token(request: HttpRequest) -> Response:
        asked = await _read(request, NewToken)
        made = await authority(rooms.world).create_token(asked, by=caller_of(request.scope))
        return one(made, status=201, headers={"cache-control": "no-store"})

    @app.post(
        "/v1/cluster/join",
        summary="Join as a host; the join token stands for the API's token",
        response_model=None,
        responses={200: {"model": JoinAnswer}},
        openapi_extra={**_body(JoinAsk), "security": []},
    )
    async def join(request: HttpRequest) -> Response:
        asked = await _read(request, JoinAsk)
        where = request.client.host if request.client else "unknown"
        answer = await authority(rooms.world).join(asked, where=where)
        return one(answer, headers={"cache-control": "no-store"})


def _body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}


async def _read(request: HttpRequest, model: type[_Model]) -> _Model:
    """The body; InvalidRequest with the first fault, which never repeats what was sent."""
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > _BODY_LIMIT:
            raise InvalidRequest("the body is larger than 64 KiB", hint="send less")
    try:
        return model.model_validate(json.loads(raw) if raw.strip() else {})
    except ValidationError as error:
        raise explain(error) from None
    except ValueError:
        raise InvalidRequest("the body is not JSON", hint="send one JSON object") from None
