"""An NFS server for tests: it reads its export's file at SIGHUP, and says at the mount protocol's
EXPORT whom it lets in. Its answers are made by hand (RFC 1813), its file read by a pattern."""

from __future__ import annotations

import asyncio
import re
import signal
import struct
from pathlib import Path


class FakeGanesha:
    """``deaf``: signals to this many do nothing. ``busy``: requests that are not over yet."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name
        self.clients: tuple[str, ...] = ()
        self.exported = False
        self.deaf = 0
        self.hups = 0
        self.busy = asyncio.Event()
        self.busy.set()
        self.port = self.mount_port = 0
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hup)
        for serve in (self._nfs, self._mount):
            self._servers.append(await asyncio.start_server(serve, "127.0.0.1", 0))
        self.port, self.mount_port = (s.sockets[0].getsockname()[1] for s in self._servers)

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        for server in self._servers:
            server.close()

    def _hup(self) -> None:
        self.hups += 1
        if self.hups > self.deaf:
            self.read()

    def read(self) -> None:
        """As at a start, too."""
        text = self.file.read_text()
        assert "Access_Type = None;" in text
        lists = re.findall(r"CLIENT \{ Clients = ([^;]*);", text)
        self.clients = tuple(one.strip() for given in lists for one in given.split(","))
        self.exported = True

    async def _nfs(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await self.busy.wait()
        writer.close()

    async def _mount(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            (head,) = struct.unpack(">I", await reader.readexactly(4))
        except EOFError:  # who asked has no time left
            writer.close()
            return
        call = await reader.readexactly(head & 0x7FFFFFFF)
        assert struct.unpack(">6I", call[4:28]) == (0, 2, 100005, 3, 5, 0)
        body = call[:4] + struct.pack(">5I", 1, 0, 0, 0, 0)
        if self.exported:
            groups = b"".join(_one(f"{client}/32") for client in self.clients)
            body += _one(self.name) + groups + bytes(4)
        body += bytes(4)
        half = len(body) // 2
        writer.write(struct.pack(">I", half) + body[:half])  # in two fragments
        writer.write(struct.pack(">I", 0x80000000 | (len(body) - half)) + body[half:])
        await writer.drain()
        writer.close()


def _one(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">II", 1, len(raw)) + raw + bytes(-len(raw) % 4)
