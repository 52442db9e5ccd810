"""Fetching over HTTP from a server on loopback, honest and not."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from godwit.model.errors import InvalidRequest, OperationFailed, Refused
from godwit.storage.fetch import fetch, is_url, shown

BODY = bytes(range(256)) * 10000


class Answers(BaseHTTPRequestHandler):
    """One path per kind of server."""

    protocol_version = "HTTP/1.0"
    stuck = threading.Event()

    def do_GET(self) -> None:
        """Answer as the path says."""
        match self.path.partition("?")[0]:
            case "/whole":
                self.say(200, BODY, len(BODY))
            case "/short":
                self.say(200, BODY[:1000], len(BODY))
            case "/unannounced":
                self.say(200, BODY, None)
            case "/liar":
                self.say(200, BODY[:10], 1 << 60)
            case "/away":
                self.say(302, b"", 0, location="/whole")
            case "/secrets":
                self.say(302, b"", 0, location="file:///etc/passwd")
            case "/round":
                self.say(301, b"", 0, location="/round")
            case "/stuck":
                self.say(200, BODY[:5], len(BODY))
                self.stuck.wait(20)
            case _:
                self.say(404, b"<html>", 6)

    def say(self, status: int, body: bytes, length: int | None, *, location: str = "") -> None:
        """Send an answer, true or not."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Answers.stuck = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        Answers.stuck.set()
        listening.shutdown()
        thread.join()


async def get(url: str, *, largest: int = 1 << 30) -> tuple[bytes, list[float]]:
    heard: list[float] = []
    with tempfile.TemporaryFile() as file:
        got = await fetch(url, file, largest_bytes=largest, progress=heard.append, timeout=5)
        file.seek(0)
        data = file.read()
    assert got == len(data)
    return data, heard


async def test_a_whole_file_with_progress(server: str) -> None:
    data, heard = await get(f"{server}/whole")
    assert data == BODY
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


async def test_redirections_are_followed(server: str) -> None:
    assert (await get(f"{server}/away"))[0] == BODY


async def test_a_server_need_not_announce(server: str) -> None:
    assert (await get(f"{server}/unannounced"))[0] == BODY


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("/short", OperationFailed, "1000 of 2560000 bytes came"),
        ("/nothing", OperationFailed, "the server says 404 Not Found"),
        ("/secrets", InvalidRequest, "file://.*is not fetched"),
        ("/round", Refused, "leads in circles"),
        ("/liar", Refused, "at most .* are taken"),
    ],
)
async def test_what_goes_wrong_is_said(
    server: str, path: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        await get(server + path)


async def test_more_than_is_wanted_is_refused(server: str) -> None:
    for path in ("/whole", "/unannounced"):
        with pytest.raises(Refused, match="1000"):
            await get(server + path, largest=1000)


async def test_more_than_there_is_room_for_is_refused(server: str) -> None:
    with pytest.raises(Refused, match="the volume has room for"):
        await get(f"{server}/liar", largest=1 << 62)


async def test_a_silent_server_is_given_up(server: str) -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(OperationFailed, match="timed out"):
        await fetch(f"{server}/stuck", file, largest_bytes=1 << 30, timeout=0.2)


async def test_cancelling_ends_the_fetch(server: str) -> None:
    with tempfile.TemporaryFile() as file:
        task = asyncio.ensure_future(
            fetch(f"{server}/stuck", file, largest_bytes=1 << 30, timeout=0.5)
        )
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_nobody_there() -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(OperationFailed, match="cannot fetch"):
        await fetch("http://127.0.0.1:1/x", file, largest_bytes=1)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a/b", "nbd://a", "https+x://a"])
async def test_only_two_schemes(url: str) -> None:
    assert is_url(url)
    with tempfile.TemporaryFile() as file, pytest.raises(InvalidRequest, match="is not fetched"):
        await fetch(url, file, largest_bytes=1)


def test_secrets_in_an_address_are_not_shown() -> None:
    assert shown("https://me:word@host:8/a/b?token=1#x") == "https://host:8/a/b"
    assert not is_url("/a/b.qcow2")
