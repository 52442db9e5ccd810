"""Say what went wrong in one JSON shape (RFC 9457 `application/problem+json`).

A `Problem` is what crosses the wire; the error tree is `godwit.model.errors`. Reading is lenient
(any answer becomes a problem, unknown members are kept in `extra`), writing is exact.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from godwit.model.errors import GodwitError, from_problem

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"
_KNOWN = frozenset({"type", "title", "status", "code", "detail", "hint"})
_DETAIL_LIMIT = 2000


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


@dataclass(frozen=True, slots=True)
class Problem:
    """One refusal or failure: HTTP status, stable code, what failed, what to do."""

    status: int
    code: str
    detail: str
    hint: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            key: value for key, value in self.extra.items() if key not in _KNOWN
        }
        body |= {
            "type": f"urn:godwit:error:{self.code}",
            "title": _title(self.status),
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "hint": self.hint,
        }
        return body

    @classmethod
    def from_error(cls, error: GodwitError) -> Problem:
        """What an error looks like on the wire; an error a peer sent passes unchanged."""
        body = error.to_problem()
        return cls(
            status=int(body["status"]),
            code=str(body["code"]),
            detail=str(body["detail"]),
            hint=str(body.get("hint") or ""),
            extra={key: value for key, value in body.items() if key not in _KNOWN},
        )

    def to_error(self) -> GodwitError:
        """The error behind it; a code this version does not know becomes a plain failure."""
        return from_problem(self.to_dict())

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict(), separators=(",", ":")).encode()

    @classmethod
    def from_answer(cls, *, status: int, content_type: str, body: bytes) -> Problem:
        """Read any error answer; never raises. A body that is not a problem becomes the detail."""
        data: Any = None
        if "json" in content_type:
            try:
                data = json.loads(body)
            except ValueError:
                data = None
        if not isinstance(data, dict):
            text = body[:_DETAIL_LIMIT].decode(errors="replace").strip()
            return cls(status=status, code=f"http-{status}", detail=text or _title(status))
        code, detail, hint = data.get("code"), data.get("detail"), data.get("hint")
        return cls(
            status=status,
            code=code if isinstance(code, str) and code else f"http-{status}",
            detail=detail if isinstance(detail, str) else _plain(detail, _title(status)),
            hint=hint if isinstance(hint, str) else "",
            extra={key: value for key, value in data.items() if key not in _KNOWN},
        )


def _plain(value: Any, otherwise: str) -> str:
    return otherwise if value is None else json.dumps(value)[:_DETAIL_LIMIT]


async def send_problem(
    send: Callable[[dict[str, Any]], Awaitable[None]], problem: Problem, *, close: bool = False
) -> None:
    """Answer a plain ASGI request with a problem; `close` also ends the connection."""
    body = problem.to_json()
    headers = [
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
    ]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def problem_response(problem: Problem) -> Response:
    """The Starlette (and FastAPI) response for a problem."""
    from starlette.responses import Response  # only servers have it installed

    return Response(problem.to_json(), status_code=problem.status, media_type=MEDIA_TYPE)


def problem_handler(
    describe: Callable[[Exception], Problem],
) -> Callable[[Request, Exception], Awaitable[Response]]:
    """An exception handler for `app.add_exception_handler(SomeError, problem_handler(describe))`.

    `describe` maps an exception to its problem; it decides what is shown to the caller.
    """

    async def handle(_request: Request, error: Exception) -> Response:
        return problem_response(describe(error))

    return handle
