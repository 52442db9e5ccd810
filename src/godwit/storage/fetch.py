"""Fetches a file over HTTP or HTTPS into one that has no name yet.

Redirections are followed within these two schemes. A server that sends less than it announced, or
more than is wanted, is refused; nothing of what it sends is looked at here.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import shutil
import ssl
import urllib.error
import urllib.request
from typing import IO, Final
from urllib.parse import urljoin, urlsplit

from godwit.model.errors import InvalidRequest, OperationFailed, Refused
from godwit.storage.qemu_img import Progress

READ_TIMEOUT: Final = 60.0
_CHUNK: Final = 1 << 20
_MOST_REDIRECTIONS: Final = 8
_REDIRECTIONS: Final = frozenset({301, 302, 303, 307, 308})

Response = http.client.HTTPResponse


def is_url(source: str) -> bool:
    """Whether an import's source is an address and not a path."""
    return "://" in source


def shown(url: str) -> str:
    """The address without a user's name, password or query: these may be secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the address"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


async def fetch(
    url: str,
    into: IO[bytes],
    *,
    largest_bytes: int,
    progress: Progress | None = None,
    timeout: float = READ_TIMEOUT,
) -> int:
    """Write what lies at ``url`` into a file and return how many bytes that was.

    ``timeout`` seconds may pass without a byte. InvalidRequest for another scheme, Refused for
    more than ``largest_bytes`` or than the file system has room for, OperationFailed when the
    server fails or ends early.
    """
    try:
        _check_scheme(url)
        response = await _opened(url, timeout)
        with contextlib.closing(response):
            return await _copy(response, into, shown(url), largest_bytes, progress)
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            raise OperationFailed(
                f"cannot fetch {shown(url)}: the server says {error.code} {error.reason}",
                hint="is the address right?",
            ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise OperationFailed(
            f"cannot fetch {shown(url)}: {reason}", hint="does this host reach it?"
        ) from error


async def _opened(url: str, timeout: float) -> Response:
    """The answer at the end of all redirections, its headers read."""
    # Followed here: the library's own follower reads the whole body of a redirection.
    for _ in range(_MOST_REDIRECTIONS):
        try:
            return await _ask(url, timeout)
        except urllib.error.HTTPError as error:
            location = error.headers.get("Location", "")
            if error.code not in _REDIRECTIONS or not location:
                raise
            error.close()
        before, url = url, urljoin(url, location)
        if urlsplit(before).scheme == "https" != urlsplit(url).scheme:
            raise Refused(
                f"{shown(before)} leads away from https", hint="name the address it leads to"
            )
        _check_scheme(url)
    raise Refused(f"{shown(url)} leads in circles", hint="is the address right?")


async def _ask(url: str, timeout: float) -> Response:
    """One request. A cancelled caller leaves no connection open."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})  # noqa: S310
    opening = asyncio.create_task(
        asyncio.to_thread(opener.open, request, timeout=timeout), name=f"fetch {shown(url)}"
    )
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_late)
        raise


def _check_scheme(url: str) -> None:
    if urlsplit(url).scheme not in ("http", "https"):
        raise InvalidRequest(f"{shown(url)} is not fetched", hint="http:// or https://, or a path")


def _close_late(opening: asyncio.Task[Response]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


async def _copy(
    response: Response,
    into: IO[bytes],
    name: str,
    largest_bytes: int,
    progress: Progress | None,
) -> int:
    announced = _announced(response)
    if announced is not None:
        _check_room(into, announced, largest_bytes, name)
    got = 0
    while chunk := await _next(response):
        got += len(chunk)
        if got > largest_bytes:
            raise Refused(f"{name} is larger than {largest_bytes} bytes", hint="allow more")
        await asyncio.to_thread(into.write, chunk)
        if progress is not None and announced:
            progress(min(1.0, got / announced))
    if announced is not None and got != announced:
        raise OperationFailed(
            f"cannot fetch {name}: {got} of {announced} bytes came", hint="try again"
        )
    await asyncio.to_thread(into.flush)
    return got


async def _next(response: Response) -> bytes:
    # Waited for even when cancelled: the connection may be closed only when no thread reads it.
    reading = asyncio.create_task(asyncio.to_thread(response.read, _CHUNK), name="fetch: read")
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        await asyncio.gather(reading, return_exceptions=True)
        raise


def _announced(response: Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _check_room(into: IO[bytes], announced: int, largest_bytes: int, name: str) -> None:
    if announced > largest_bytes:
        raise Refused(
            f"{name} is {announced} bytes, at most {largest_bytes} are taken", hint="allow more"
        )
    free = shutil.disk_usage(into.fileno()).free
    if announced > free:
        raise Refused(
            f"{name} is {announced} bytes, the volume has room for {free}", hint="make room"
        )
