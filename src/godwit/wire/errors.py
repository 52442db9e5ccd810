"""What can go wrong between daemons, grouped by what the caller may do next.

    IdentityUnusable        our own certificate, key or CA cannot be used
    PeerUnreachable         the request was not sent: nothing happened, trying again is safe
    └── PeerNotTrusted      a side did not accept the other's certificate or name
    PeerOutcomeUnknown      sent, no whole answer: look before trying again
    PeerRefused             the peer answered with an error, and says why

All are `GodwitError`s and may be shown as they are. A face (the SDK, the manager) that wants
the peer's own error raises `refused.error`.
"""

from __future__ import annotations

from godwit.model.errors import GodwitError, OperationFailed, OutcomeUnknown, Unavailable
from godwit.wire.problem import Problem


class IdentityUnusable(OperationFailed):
    """Our own certificate, key or CA is missing, unreadable or does not fit together."""

    code = "identity-unusable"


class PeerUnreachable(Unavailable):
    """The request was not sent; nothing happened on the peer."""


class PeerNotTrusted(PeerUnreachable):
    """One side did not accept the other's certificate or identity; nothing was sent."""

    code = "peer-not-trusted"


class PeerOutcomeUnknown(OutcomeUnknown):
    """The request was sent and no whole answer came: it may or may not have been done."""


class PeerRefused(GodwitError):
    """The peer answered with an error status; `problem` is what it said, `error` its own class."""

    code = "peer-refused"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail, hint=problem.hint)
        self.problem = problem

    @property
    def status(self) -> int:
        return self.problem.status

    @property
    def error(self) -> GodwitError:
        """The error as the peer raised it, with its code, hint, context and exit code."""
        return self.problem.to_error()

    def to_problem(self) -> dict[str, object]:
        """Passed on as the peer said it."""
        return self.problem.to_dict()
