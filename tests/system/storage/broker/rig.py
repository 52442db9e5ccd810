"""Real storage daemons, and a client that does I/O as QEMU would: qemu-io over the NBD driver."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from godwit.storage import nodes
from godwit.storage.broker import Broker
from godwit.storage.nodes import BrokerDisk

PROMPT = b"qemu-io> "
CREATE = {
    "raw": ["-f", "raw"],
    "qcow2": ["-f", "qcow2"],
    "vhd-fixed": ["-f", "vpc", "-o", "subformat=fixed,force_size=on"],
    "vhd": ["-f", "vpc", "-o", "subformat=dynamic,force_size=on"],
    "vhdx": ["-f", "vhdx", "-o", "subformat=dynamic"],
}
DRIVER = {"raw": "raw", "qcow2": "qcow2", "vhd-fixed": "vpc", "vhd": "vpc", "vhdx": "vhdx"}


PROGRAM = shutil.which("qemu-storage-daemon")
NOBODY = (65534, 65534)
Start = Callable[..., Awaitable[Broker]]
Connect = Callable[..., Awaitable["Client"]]


class IoFailed(Exception):
    """The device said no; the text is qemu-io's."""


class Client:
    """A disk of a broker, opened by a process of its own, one command at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = b""

    @staticmethod
    async def open(socket: Path, export: str, *, reconnect_delay_s: int = 60) -> Client:
        """Connect; the process is in no session of ours and dies with `close`."""
        node = nodes.client_node(
            "disk", socket=socket, export=export, reconnect_delay_s=reconnect_delay_s
        )
        process = await asyncio.create_subprocess_exec(
            "qemu-io",
            # Its default is to flush every write, which no guest does.
            *("-t", "none"),
            f"json:{json.dumps(node)}",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        client = Client(process)
        await client._prompt()
        return client

    async def do(self, command: str, *, timeout: float = 60.0) -> str:
        """One command of qemu-io; IoFailed unless it did what it was told."""
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(command.encode() + b"\n")
        async with asyncio.timeout(timeout):
            text = (await self._prompt()).decode(errors="replace").strip()
        if "failed" in text or "error" in text.lower():
            raise IoFailed(text)
        return text

    async def write(self, pattern: int, offset: int, size: int = 4096) -> None:
        """Write a pattern; acknowledged when this returns, not flushed."""
        await self.do(f"write -P {pattern} {offset} {size}")

    async def check(self, pattern: int, offset: int, size: int = 4096) -> None:
        """IoFailed unless the pattern is there."""
        await self.do(f"read -P {pattern} {offset} {size}")

    async def _prompt(self) -> bytes:
        stdout = self.process.stdout
        assert stdout is not None
        out = b""
        while not out.endswith(PROMPT):
            piece = await stdout.read(4096)
            if not piece:
                raise IoFailed(out.decode(errors="replace") or "qemu-io ended")
            out += piece
        return out.removesuffix(PROMPT)

    async def close(self) -> None:
        """End the process, whatever it is doing."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


def make_image(folder: Path, image: str, *, size: int, owner: tuple[int, int]) -> BrokerDisk:
    """An empty image that the daemon's user may write."""
    path = folder / f"disk0.{image}"
    argv = ["qemu-img", "create", "-q", *CREATE[image], str(path), str(size)]
    subprocess.run(argv, check=True)
    os.chown(path, *owner)
    return BrokerDisk(id="disk0", path=str(path), format=image, size_bytes=size)  # type: ignore[arg-type]


def is_clean(disk: BrokerDisk, *, leaks: bool = False) -> bool:
    """What qemu-img says of the closed image; VHD has no check of its own.

    ``leaks``: clusters that nobody refers to are fine. A daemon that was killed leaves some in a
    qcow2; they cost space and no data.
    """
    if disk.format not in ("qcow2", "vhdx"):
        return True
    argv = ["qemu-img", "check", "-q", "-f", disk.format, disk.path]
    done = subprocess.run(argv, capture_output=True, check=False)
    return done.returncode == 0 or (leaks and done.returncode == 3)


def verify(disk: BrokerDisk, patterns: dict[int, int], size: int = 4096) -> None:
    """Read the closed image from outside: this pattern at each of these offsets."""
    argv = ["qemu-io", "-r", "-f", DRIVER[disk.format], disk.path]
    for offset, pattern in patterns.items():
        argv += ["-c", f"read -P {pattern} {offset} {size}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


class Load:
    """Writes one record after the other, remembers what was acknowledged and the longest wait."""

    def __init__(self, client: Client, *, spread: int) -> None:
        self.client = client
        self.spread = spread
        self.written: dict[int, int] = {}
        self.longest_s = 0.0
        self._stop = False
        self._another = asyncio.Event()

    async def more(self, records: int) -> None:
        """Return after so many more records."""
        for _ in range(records):
            self._another.clear()
            await self._another.wait()

    async def run(self) -> None:
        chosen = random.Random(7)
        while not self._stop:
            offset = chosen.randrange(self.spread) * 4096
            pattern = chosen.randrange(1, 255)
            begun = time.monotonic()
            await self.client.write(pattern, offset)
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
            self.written[offset] = pattern
            self._another.set()

    async def during(self, doing: Awaitable[None]) -> None:
        task = asyncio.create_task(self.run(), name="load")
        striking = asyncio.ensure_future(doing)
        try:
            await asyncio.sleep(0.1)
            # A load that has ended waits for nobody: what ended it is the news.
            await asyncio.wait({striking, task}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await striking
                await asyncio.sleep(0.1)
        finally:
            self._stop = True
            striking.cancel()
            await asyncio.wait_for(task, 60)
