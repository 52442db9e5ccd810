"""Holds a storage daemon back on its own command line, until it is told to go on. No file, no time.

    daemon: ... --blockdev nbd over a socket pair   <- waits here for the server's greeting
            --blockdev the image ...                <- begun when the latch is opened

QEMU works through its command line in order, and to open an NBD node is to wait for the other
side. So the daemon is loaded and linked, and has opened nothing. The other
side is this process: when it ends, the socket does, the daemon meets "end of file" before its
first image and ends too. Nothing is left that could open an image later.

What is said is the NBD protocol's plain handshake: greeting and flags of the server; flags and the
wanted export of the client, which show that the daemon stands here; size and flags of the export.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any, Final

NODE: Final = "latch"
_GREETING: Final = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 0)
_ASKED: Final = struct.calcsize(">I") + len(b"IHAVEOPT") + struct.calcsize(">II")
_SIZE_BYTES: Final = 512
_READ_ONLY: Final = 0b11  # the flags are meant, and nobody writes
_GRANTED: Final = struct.pack(">QH", _SIZE_BYTES, _READ_ONLY) + bytes(124)


class Latch:
    """One side of the socket pair; the daemon inherits ``theirs`` and has `node` first."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._ours.send(_GREETING)  # a fresh socket takes it

    def node(self) -> dict[str, Any]:
        """What the daemon's command line has before everything that must not be opened yet."""
        server = {"type": "fd", "str": str(self.theirs.fileno())}
        return {"driver": "nbd", "node-name": NODE, "read-only": True, "server": server}

    async def reached(self) -> None:
        """Return when the daemon stands at the latch; EOFError when it ended before."""
        loop = asyncio.get_running_loop()
        left = _ASKED
        while left > 0:
            said = await loop.sock_recv(self._ours, left)
            if not said:
                raise EOFError("it ended before it was ready")
            left -= len(said)

    def open(self) -> None:
        """Let the daemon go on; fine when it has ended."""
        with contextlib.suppress(OSError):
            self._ours.send(_GRANTED)

    def close(self) -> None:
        """Let go: a daemon that still waits ends by itself."""
        self._ours.close()
        self.theirs.close()
