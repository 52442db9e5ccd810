"""How a list answers: which rows and fields a reader asked for, and where the next page begins.

Without any of these parameters a list is whole, as ever. With ``limit`` an answer that is not the
last one names the next in its ``Link`` header (RFC 8288, ``rel="next"``). Rows are in the order of
their names (or ids), and ``after`` is such a name: rows that come and go between two pages move
nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Final
from urllib.parse import urlencode

from fastapi import Query, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from godwit.manager.rows import Page

PIECE_BYTES: Final = 256 * 1024
LONGEST_PAGE: Final = 10_000

FieldsAsked = Annotated[
    str, Query(description="only these fields of each row, comma-separated; default: all")
]
Limit = Annotated[
    int | None,
    Query(ge=1, le=LONGEST_PAGE, description="at most so many rows; the next page is in Link"),
]
After = Annotated[str, Query(description="only rows whose name or id sorts behind this one")]


class RowsAnswer(Response):
    """Rows that are JSON already, sent piece by piece: others have their turn in between."""

    media_type = "application/json"

    def __init__(self, rows: Sequence[bytes], *, link: str = "") -> None:
        size = 2 + sum(map(len, rows)) + max(0, len(rows) - 1)
        headers = {"content-length": str(size)} | ({"link": link} if link else {})
        super().__init__(headers=headers)
        self._rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        for piece in pieces(self._rows):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def pieces(rows: Sequence[bytes]) -> Iterator[bytes]:
    """The rows as one JSON array, in parts of some size."""
    part = bytearray(b"[")
    for number, row in enumerate(rows):
        if number:
            part += b","
        part += row
        if len(part) >= PIECE_BYTES:
            yield bytes(part)
            part.clear()
    yield bytes(part + b"]")


def next_page(request: Request, page: Page) -> str:
    """The ``Link`` header's value; empty when nothing follows."""
    if not page.more_after:
        return ""
    query = [(name, value) for name, value in request.query_params.multi_items() if name != "after"]
    return f'<{request.url.path}?{urlencode([*query, ("after", page.more_after)])}>; rel="next"'
