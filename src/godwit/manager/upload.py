"""Send one large file to an agent without holding it in memory: PUT over its own connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h11

from godwit.wire.errors import PeerOutcomeUnknown, PeerRefused, PeerUnreachable
from godwit.wire.problem import Problem
from godwit.wire.tls import ClientTls

_CHUNK = 256 * 1024
_CONNECT_S = 5.0
_STALL_S = 30.0
_ANSWER_LIMIT = 1024 * 1024


async def upload(url: str, source: Path, *, tls: ClientTls | None) -> Any:
    """PUT ``source`` to ``url``; the JSON answered. The peer is proven before a byte is sent.

    ``_STALL_S`` bounds each step, not the whole: a slow link may take its time.
    Errors: PeerUnreachable, PeerNotTrusted, PeerOutcomeUnknown, PeerRefused.
    """
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_CONNECT_S):
            reader, writer = await asyncio.open_connection(
                parts.hostname, parts.port, ssl=tls.context if tls else None
            )
    except (OSError, TimeoutError) as error:
        raise PeerUnreachable(f"{url} cannot be reached: {error}") from error
    try:
        if tls is not None:
            tls.verify(writer.get_extra_info("ssl_object"), where=url)
        return await _exchange(reader, writer, parts.path, parts.netloc, source)
    except (OSError, TimeoutError, h11.RemoteProtocolError, EOFError) as error:
        raise PeerOutcomeUnknown(f"the upload to {url} broke off: {error}") from error
    finally:
        with contextlib.suppress(AttributeError):  # Python 3.11.2: a lost TLS transport
            writer.transport.abort()


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    path: str,
    authority: str,
    source: Path,
) -> Any:
    http = h11.Connection(h11.CLIENT)
    with source.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        head = h11.Request(
            method="PUT",
            target=path,
            headers=[
                ("host", authority),
                ("content-length", str(size)),
                ("content-type", "application/octet-stream"),
                ("connection", "close"),
            ],
        )
        writer.write(http.send(head) or b"")
        while data := stream.read(_CHUNK):
            writer.write(http.send(h11.Data(data=data)) or b"")
            async with asyncio.timeout(_STALL_S):
                await writer.drain()
        writer.write(http.send(h11.EndOfMessage()) or b"")
    return await _answer(http, reader)


async def _answer(http: h11.Connection, reader: asyncio.StreamReader) -> Any:
    response: h11.Response | None = None
    body = b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            async with asyncio.timeout(_STALL_S):
                http.receive_data(await reader.read(_CHUNK))
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
            if len(body) > _ANSWER_LIMIT:
                raise EOFError("the answer is too large")
        elif isinstance(event, h11.EndOfMessage):
            break
        elif isinstance(event, h11.ConnectionClosed):
            raise EOFError("the connection was closed without an answer")
    if response is None:
        raise EOFError("no answer")
    kind = dict(response.headers).get(b"content-type", b"").decode("latin-1")
    if response.status_code >= 400:
        raise PeerRefused(
            Problem.from_answer(status=response.status_code, content_type=kind, body=body)
        )
    return json.loads(body) if body else None
