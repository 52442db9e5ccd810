"""Everything that can go wrong, as one tree grouped by what the reader does next.

Each class fixes three things that scripts rely on: ``code`` (the word in problem+json), the
command line's ``exit_code`` and the HTTP ``http_status``. ``message`` is one line that says what
failed, ``hint`` one line that says what to do.
"""

from __future__ import annotations

from typing import Any, ClassVar


class GodwitError(Exception):
    """Base of all errors a person may see: one line what failed, one line what to do."""

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "", **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.context = context

    def to_problem(self) -> dict[str, Any]:
        """The fields of an ``application/problem+json`` body (RFC 9457)."""
        return {
            "type": f"urn:godwit:error:{self.code}",
            "title": type(self).__name__,
            "status": self.http_status,
            "code": self.code,
            "detail": self.message,
            "hint": self.hint,
            **({"context": self.context} if self.context else {}),
        }


class OperationFailed(GodwitError):
    """It was tried and failed; what was there before is still there."""


class InvalidRequest(GodwitError):
    """The words of the request are off: correct them and ask again."""

    code = "invalid"
    exit_code = 2
    http_status = 400


class NotFound(GodwitError):
    """No object of that name."""

    code = "not-found"
    exit_code = 3
    http_status = 404


class Refused(GodwitError):
    """A check or a policy says no; nothing was changed."""

    code = "refused"
    exit_code = 4
    http_status = 409


class Conflict(Refused):
    """Something else holds the object, or the name is taken: wait or choose another."""

    code = "conflict"


class ChecksFailed(Refused):
    """The plan's checks failed; ``context["checks"]`` lists every one of them."""

    code = "checks-failed"


class TooOld(Refused):
    """A daemon is of a version that does not know this, or a record is of one that we are not."""

    code = "too-old"


class NotAllowed(Refused):
    """The caller may not do this."""

    code = "not-allowed"
    http_status = 403


class Unauthenticated(Refused):
    """No valid token or certificate came along."""

    code = "unauthenticated"
    http_status = 401


class Cancelled(GodwitError):
    """Somebody cancelled it; the state before stands."""

    code = "cancelled"
    exit_code = 5
    http_status = 409


class OutcomeUnknown(GodwitError):
    """It may or may not have happened: look before trying again."""

    code = "outcome-unknown"
    exit_code = 6
    http_status = 504


class Unavailable(GodwitError):
    """Something needed does not answer; nothing was done, trying again later is safe."""

    code = "unavailable"
    http_status = 503


ALL: tuple[type[GodwitError], ...] = (
    OperationFailed,
    InvalidRequest,
    NotFound,
    Refused,
    Conflict,
    ChecksFailed,
    TooOld,
    NotAllowed,
    Unauthenticated,
    Cancelled,
    OutcomeUnknown,
    Unavailable,
)
_BY_CODE = {kind.code: kind for kind in ALL}


def from_problem(body: dict[str, Any]) -> GodwitError:
    """The error behind a problem+json body; unknown codes become ``OperationFailed``."""
    kind = _BY_CODE.get(str(body.get("code", "")), OperationFailed)
    context = body.get("context")
    return kind(
        str(body.get("detail") or body.get("title") or "the server refused without a reason"),
        hint=str(body.get("hint") or ""),
        **(context if isinstance(context, dict) else {}),
    )
