"""What goes into a request and what comes out of an answer, apart from the connection."""

from __future__ import annotations

import asyncio
import json as jsonlib
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from godwit.wire.connection import ConnectionBroken, Headers, HttpConnection
from godwit.wire.errors import PeerNotTrusted, PeerOutcomeUnknown, PeerRefused
from godwit.wire.problem import Problem

if TYPE_CHECKING:
    import h11

Query = Mapping[str, str | int | float | bool | None]
_PATH_SAFE = "/:@!$&'()*+,;=-._~%"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer below 400."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON; None when it is empty."""
        return jsonlib.loads(self.body) if self.body else None


class StreamedAnswer:
    """An answer whose body comes in chunks; `idle_s` bounds the wait for each."""

    def __init__(self, response: h11.Response, connection: HttpConnection, where: str) -> None:
        self.status = response.status_code
        self.headers = decode_headers(response)
        self._connection = connection
        self._where = where

    async def chunks(self, *, idle_s: float | None = None) -> AsyncGenerator[bytes, None]:
        """Errors: PeerOutcomeUnknown when the body breaks off or stalls."""
        body = self._connection.chunks()
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    chunk = await anext(body, None)
            except TimeoutError:
                raise broken_off(self._where, f"nothing came for {idle_s:g} s") from None
            except ConnectionBroken as error:
                raise broken_off(self._where, str(error)) from error
            if chunk is None:
                return
            yield chunk


def encode_target(path: str, query: Query | None) -> bytes:
    """Path and query as they stand in the request line; None values are left out."""
    target = quote(path, safe=_PATH_SAFE)
    given = {k: _text(v) for k, v in (query or {}).items() if v is not None}
    return (f"{target}?{urlencode(given)}" if given else target).encode("ascii")


def untrusted(url: str, error: ssl.SSLError) -> PeerNotTrusted:
    reason = getattr(error, "verify_message", None) or error.reason or str(error)
    return PeerNotTrusted(
        f"The certificate of {url} is not accepted: {reason}.",
        hint="Check the CA file, the certificate's dates and this machine's clock.",
    )


def broken_off(where: str, reason: str) -> PeerOutcomeUnknown:
    return PeerOutcomeUnknown(f"The answer to {where} broke off: {reason}.", hint="Ask again.")


def encode_body(json: Any, content: bytes | None) -> tuple[bytes, Headers]:
    if content is not None:
        body, kind = content, b"application/octet-stream"
    elif json is not None:
        body, kind = jsonlib.dumps(json, separators=(",", ":")).encode(), b"application/json"
    else:
        return b"", [(b"content-length", b"0")]
    return body, [(b"content-type", kind), (b"content-length", str(len(body)).encode())]


def checked(response: h11.Response, body: bytes) -> Answer:
    if response.status_code >= 400:
        raise PeerRefused(refusal(response, body))
    headers = decode_headers(response)
    return Answer(status=response.status_code, headers=headers, body=body)


def refusal(response: h11.Response, body: bytes) -> Problem:
    kind = decode_headers(response).get("content-type", "")
    return Problem.from_answer(status=response.status_code, content_type=kind, body=body)


def decode_headers(response: h11.Response) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}


def encode_headers(headers: Mapping[str, str] | None) -> Headers:
    return [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
