"""Every error leaves the API as problem+json, whatever raised it."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from godwit.manager.world import as_godwit_error
from godwit.model.errors import (
    GodwitError,
    InvalidRequest,
    NotFound,
    OperationFailed,
)
from godwit.store.errors import StoreError
from godwit.store.records import CasFailed
from godwit.wire.problem import Problem, problem_response

_LOG = logging.getLogger("godwit.manager")


def add_handlers(app: FastAPI) -> None:
    """Answer with problems for our own errors, the framework's, and what should not happen."""
    for kind in (GodwitError, StoreError, CasFailed, Exception):
        app.add_exception_handler(kind, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)


async def _ours(request: Request, error: Exception) -> Response:
    meant = as_godwit_error(error)
    if meant is None:
        _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        meant = OperationFailed(
            f"the manager failed on this request: {type(error).__name__}",
            hint="its log says more",
        )
    return problem_response(Problem.from_error(meant))


async def _http(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    path = request.url.path
    if status == 404:
        return problem_response(
            Problem.from_error(NotFound(f"there is no {path}", hint="see /v1/openapi.json"))
        )
    detail = str(getattr(error, "detail", "")) or "this cannot be done"
    if status == 405:
        detail = f"{path} does not know {request.method}"
    answer = problem_response(Problem(status, "invalid", detail, "see /v1/openapi.json"))
    for name, value in (getattr(error, "headers", None) or {}).items():
        answer.headers[name] = value
    return answer


async def _invalid(_request: Request, error: Exception) -> Response:
    faults: list[dict[str, Any]] = (
        list(error.errors()) if isinstance(error, RequestValidationError) else []
    )
    detail = "the request makes no sense"
    if faults:
        where = ".".join(str(part) for part in faults[0]["loc"][1:]) or "request"
        detail = f"{where}: {faults[0]['msg']}"
    refused = InvalidRequest(detail, hint="correct the value and ask again")
    return problem_response(Problem.from_error(refused))
