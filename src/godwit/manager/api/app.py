"""The application under ``/v1``: actions made from the table of requests, lists from the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from godwit.cluster.membership import Standing
from godwit.manager.api import (
    actions,
    boot_files,
    cluster,
    console,
    errors,
    events,
    power,
    resources,
    validation,
)
from godwit.manager.api.gate import TokenGate
from godwit.manager.cache import Cache
from godwit.manager.feed import Feed
from godwit.manager.metrics import Metrics
from godwit.manager.tokens import Tokens
from godwit.manager.work.tasks import Tasks
from godwit.manager.world import World


@dataclass(frozen=True, kw_only=True)
class Rooms:
    """What the routes need."""

    world: World
    tasks: Tasks
    feed: Feed
    metrics: Metrics
    tokens: Tokens
    uploads: Path  # where an upload lies until a host has it
    leads: Callable[[], bool]
    standings: Callable[[], Mapping[str, Standing]]

    @property
    def cache(self) -> Cache:
        """The records in memory."""
        return self.world.cache


def version() -> str:
    """The installed version of Godwit."""
    try:
        return metadata.version("godwit")
    except metadata.PackageNotFoundError:
        return "0"


def make_app(rooms: Rooms) -> TokenGate:
    """The whole API as an ASGI application."""
    app = FastAPI(
        title="Godwit",
        version=version(),
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.add_handlers(app)
    modules = (resources, actions, events, boot_files, power, console, validation, cluster)
    for module in modules:
        module.add_routes(app, rooms)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return TokenGate(app, tokens=rooms.tokens, cache=rooms.cache, metrics=rooms.metrics)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """OpenAPI 3.1 with the bodies of the actions, the token and the one shape of errors."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version="3.1.0",
        summary="Virtual machines that move between hosts and never stop.",
        routes=app.routes,
    )
    parts = schema.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    schemas.update(actions.body_schemas())
    schemas["Problem"] = PROBLEM
    for left in ("HTTPValidationError", "ValidationError"):
        schemas.pop(left, None)
    parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"token": []}]
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {
                "description": "What failed, and what to do",
                "content": {
                    "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
                },
            }
            if path in ("/v1/health",):
                operation["security"] = []
    app.openapi_schema = schema
    return schema


PROBLEM: dict[str, Any] = {
    "title": "Problem",
    "description": "RFC 9457. `code` is stable; `detail` says what failed, `hint` what to do.",
    "type": "object",
    "required": ["type", "title", "status", "code", "detail", "hint"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string"},
        "detail": {"type": "string"},
        "hint": {"type": "string"},
        "context": {"type": "object"},
    },
}
