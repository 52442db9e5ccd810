"""Asks an NFS server whom it lets in: procedure EXPORT of the mount protocol (RFC 1813, 5.2.5).

The answer is made from the list by which the server judges requests, not from its files. Sun RPC
(RFC 5531) over TCP by hand: one call without arguments, with no credentials.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Mapping
from typing import Final

from godwit.model.errors import Unavailable

_CALL, _REPLY, _ACCEPTED = 0, 1, 0
_RPC_VERSION, _MOUNT, _MOUNT_V3, _EXPORT = 2, 100005, 3, 5
_LAST: Final = 0x80000000
_MOST_BYTES: Final = 4 << 20
_MOST_TEXT: Final = 4096


async def exports(
    address: str, port: int, *, timeout: float = 5.0
) -> Mapping[str, tuple[str, ...]]:
    """Export -> whom it is open to, as the server says it to us. Unavailable: no usable answer."""
    call = os.urandom(4)
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(question(call))
                await writer.drain()
                body = await _record(reader)
            finally:
                writer.close()
        return answer(call, body)
    except (TimeoutError, OSError, EOFError, ValueError) as error:
        why = str(error) or f"no answer within {timeout:g} s"
        raise Unavailable(f"the mount daemon at port {port} says nothing usable: {why}") from error


def question(call: bytes) -> bytes:
    """The call as one record of its stream."""
    head = struct.pack(">6I", _CALL, _RPC_VERSION, _MOUNT, _MOUNT_V3, _EXPORT, 0)
    body = call + head + struct.pack(">3I", 0, 0, 0)
    return struct.pack(">I", _LAST | len(body)) + body


def answer(call: bytes, body: bytes) -> Mapping[str, tuple[str, ...]]:
    """What a reply says. ValueError: it is none to this call, or a refusal."""
    given = _Xdr(body)
    if given.take(4) != call or given.number() != _REPLY or given.number() != _ACCEPTED:
        raise ValueError("it refuses, or answers something else")
    given.number()  # flavour of the verifier
    given.opaque()
    if status := given.number():
        raise ValueError(f"RPC status {status}")
    found: dict[str, tuple[str, ...]] = {}
    while given.number():
        path, groups = given.opaque().decode(errors="replace"), []
        while given.number():
            groups.append(given.opaque().decode(errors="replace"))
        found[path] = tuple(groups)
    return found


async def _record(reader: asyncio.StreamReader) -> bytes:
    """One record: its fragments, put together."""
    body = b""
    while True:
        (head,) = struct.unpack(">I", await reader.readexactly(4))
        length = head & ~_LAST
        if len(body) + length > _MOST_BYTES:
            raise ValueError("the answer has no end")
        body += await reader.readexactly(length)
        if head & _LAST:
            return body


class _Xdr:
    """Reads XDR (RFC 4506) from the start of some bytes. ValueError when they end early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int) -> bytes:
        found = self._data[self._at : self._at + length]
        if len(found) != length:
            raise ValueError("the answer ends early")
        self._at += length
        return found

    def number(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def opaque(self) -> bytes:
        length = self.number()
        if length > _MOST_TEXT:
            raise ValueError("a text in the answer has no end")
        found = self.take(length)
        self.take(-length % 4)
        return found
