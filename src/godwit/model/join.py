"""A join token as text, and whether one may still be used; pure.

    godwit1.ID.SECRET.FINGERPRINT

``FINGERPRINT`` is the SHA-256 of the cluster CA's certificate in hex: the host that joins knows by
it whom it speaks to before it shows the secret. ``ID`` is no secret: it names the token in logs.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from godwit.model.errors import InvalidRequest
from godwit.model.trust import JoinToken

_FORM = re.compile(r"godwit1\.([0-9a-f]{8})\.([A-Za-z0-9_-]{43})\.([0-9a-f]{64})")
UNKNOWN = "the join token is not valid"


@dataclass(frozen=True, slots=True)
class Token:
    """The parts of a token. Its text is a secret: ``repr`` does not show it."""

    id: str
    secret: str
    fingerprint: str

    def __repr__(self) -> str:
        return f"Token({self.id})"

    @property
    def text(self) -> str:
        """As people pass it on."""
        return f"godwit1.{self.id}.{self.secret}.{self.fingerprint}"

    @property
    def hash(self) -> str:
        """What may be kept of the secret."""
        return hashlib.sha256(self.secret.encode()).hexdigest()


def new_token(fingerprint: str) -> Token:
    """A token with 256 random bits."""
    return Token(secrets.token_hex(4), secrets.token_urlsafe(32), fingerprint)


def parse_token(text: str) -> Token:
    """The parts; InvalidRequest (which does not repeat the text) when it is no token."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise InvalidRequest(
            "this is not a join token", hint="make one with: godwit cluster token create"
        )
    return Token(found[1], found[2], found[3])


def objection(token: Token, record: JoinToken | None, *, host: str, now: float) -> str:
    """Why this token lets this host not in, in a few words; empty when it does.

    Who does not know the secret learns nothing about the token.
    """
    if record is None or not hmac.compare_digest(token.hash, record.hash):
        return UNKNOWN
    if record.used_at is not None:
        return f"the join token has been used, by {record.used_by}"
    if now >= record.expires_at:
        return f"the join token expired {now - record.expires_at:.0f} s ago"
    if record.host is not None and record.host != host:
        return f"the join token is for {record.host}, not for {host}"
    return ""
