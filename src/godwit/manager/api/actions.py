"""Everything that changes something: one route per kind of request, made from ``ROUTES``.

Each answers 202 with its task and where to look for it; ``?wait=SECONDS`` holds the answer until
the task is final. A request that is refused at once answers the problem instead, with no task.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, get_args

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from pydantic import BaseModel, create_model
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from godwit.manager.api.gate import caller_of
from godwit.manager.api.resources import LONGEST_WAIT_S, one
from godwit.manager.work import moves
from godwit.manager.work.define_acts import plan_create
from godwit.manager.work.drain_plan import plan_drain
from godwit.model import requests as ask
from godwit.model.create import CreatePlan
from godwit.model.drain import DrainPlan
from godwit.model.errors import InvalidRequest
from godwit.model.migration import MovePlan
from godwit.model.plans import plan_of
from godwit.model.task import Task
from godwit.model.words import PLANNED

if TYPE_CHECKING:
    from godwit.manager.api.app import Rooms

_BODY_LIMIT = 1024 * 1024
_WAIT: dict[str, Any] = {
    "name": "wait",
    "in": "query",
    "description": "hold the answer until the task is final, in seconds",
    "schema": {"type": "number", "minimum": 0, "maximum": 3600, "default": 0},
}
_DRY_RUN: dict[str, Any] = {
    "name": "dry_run",
    "in": "query",
    "description": "answer 200 with the plan and change nothing",
    "schema": {"type": "boolean", "default": False},
}

KINDS: dict[str, type[BaseModel]] = {
    model.model_fields["kind"].default: model for model in get_args(get_args(ask.Request)[0])
}


def body_models() -> dict[str, type[BaseModel]]:
    """The JSON body of each POST: the request's fields that are not in the path."""
    found: dict[str, type[BaseModel]] = {}
    for kind, (method, template) in ask.ROUTES.items():
        if method != "POST":
            continue
        model = KINDS[kind]
        fields: dict[str, Any] = {
            name: (field.annotation, field)
            for name, field in model.model_fields.items()
            if name != "kind" and "{" + name + "}" not in template
        }
        found[kind] = create_model(
            f"{model.__name__}Body",
            __doc__=model.__doc__,
            __config__=model.model_config,
            **fields,
        )
    return found


def body_schemas() -> dict[str, Any]:
    """The bodies as OpenAPI components."""
    wanted = [(model, "validation") for model in body_models().values()]
    _, found = models_json_schema(
        wanted,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    return dict(found.get("$defs", {}))


def add_routes(app: FastAPI, rooms: Rooms) -> None:
    """One route per entry of ``ROUTES``."""
    bodies = body_models()
    for kind, (method, template) in ask.ROUTES.items():
        extra: dict[str, Any] = {"parameters": [_WAIT]}
        for name in KINDS[kind].model_fields:
            if "{" + name + "}" in template:
                path_parameter = {"name": name, "in": "path", "required": True}
                extra["parameters"].append({**path_parameter, "schema": {"type": "string"}})
        responses: dict[int | str, dict[str, Any]] = {
            202: {"model": Task, "description": "The task that carries it out"}
        }
        if kind in PLANNED:
            extra["parameters"].append(_DRY_RUN)
            responses[200] = {"model": plan_of(kind), "description": "The plan, with dry_run"}
        if kind in bodies:
            reference = {"$ref": f"#/components/schemas/{bodies[kind].__name__}"}
            extra["requestBody"] = {"content": {"application/json": {"schema": reference}}}
        app.add_api_route(
            template,
            _endpoint(rooms, kind),
            methods=[method],
            status_code=202,
            response_model=None,
            responses=responses,
            openapi_extra=extra,
            operation_id=kind,
            summary=(KINDS[kind].__doc__ or kind).splitlines()[0],
        )


def _endpoint(rooms: Rooms, kind: str) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def endpoint(request: HttpRequest) -> Response:
        wait_s = _number(request, "wait")
        parsed = await _parse(request, kind)
        if kind in PLANNED and _flag(request, "dry_run"):
            return one(await _plan(rooms, parsed))
        task = await rooms.tasks.submit(parsed, by=caller_of(request.scope))
        if wait_s:
            task = await rooms.tasks.ended(task.id, wait_s=min(wait_s, LONGEST_WAIT_S))
        return one(task, status=202, headers={"location": f"/v1/tasks/{task.id}"})

    return endpoint


async def _plan(rooms: Rooms, request: ask.Request) -> MovePlan | DrainPlan | CreatePlan:
    if isinstance(request, ask.CreateVm):
        return await plan_create(rooms.world, request)
    if isinstance(request, ask.DrainHost | ask.EnterMaintenance):
        return await plan_drain(rooms.world, request)
    if isinstance(request, ask.MigrateVm):
        return await moves.plan(rooms.world, request)
    raise InvalidRequest(f"{request.kind} has no plan to show", hint="leave dry_run out")


async def _parse(request: HttpRequest, kind: str) -> ask.Request:
    """The typed request from path and body; InvalidRequest with the first fault."""
    data: Any = {}
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > _BODY_LIMIT:
            raise InvalidRequest("the body is larger than 1 MiB", hint="send less")
    if raw.strip():
        try:
            data = json.loads(raw)
        except ValueError as error:
            raise InvalidRequest(
                f"the body is not JSON: {error}", hint="send one JSON object"
            ) from None
        if not isinstance(data, dict):
            raise InvalidRequest("the body is not a JSON object", hint="send one JSON object")
    for name in (*request.path_params, "kind"):
        wanted = kind if name == "kind" else request.path_params[name]
        if data.get(name, wanted) != wanted:
            raise InvalidRequest(
                f"{name}: the body says something else than the path", hint="leave it out"
            )
    return ask.parse_request({**data, **request.path_params, "kind": kind})


def _number(request: HttpRequest, name: str) -> float:
    text = request.query_params.get(name, "0")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise InvalidRequest(f"{name}: {text!r} is not usable", hint="give 0 to 3600 seconds")
    return value


def _flag(request: HttpRequest, name: str) -> bool:
    text = request.query_params.get(name, "false").lower()
    if text not in ("true", "false", "1", "0", ""):
        raise InvalidRequest(f"{name}: {text!r} is not usable", hint="give true or false")
    return text in ("true", "1")
