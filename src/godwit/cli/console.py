"""``godwit vm console``: the VM's serial port on this terminal, or through pipes.

On a terminal every key goes to the VM; Ctrl-] leaves. Otherwise standard input is sent as it is,
and after its end the output is followed until the VM has been silent for ``linger_s``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from godwit.cli.session import NAME, note
from godwit.client.api import AsyncClient
from godwit.client.console import Console

ESCAPE = b"\x1d"


def attach(name: str, *, url: str | None, context: str | None, linger_s: float) -> int:
    """Attach until the person leaves, the input ends or the VM's console does; the exit code."""
    terminal = sys.stdin.isatty()

    async def attached() -> None:
        async with (
            AsyncClient(url, context=context, name=NAME) as client,
            await client.console(name) as console,
        ):
            if terminal:
                note(f"attached to {name}; Ctrl-] leaves")
            with _raw(sys.stdin.fileno()) if terminal else contextlib.nullcontext():
                await _both_ways(console, terminal=terminal, linger_s=linger_s)

    asyncio.run(attached())
    if terminal:
        note(f"\nleft {name}; it runs on")
    return 0


async def _both_ways(console: Console, *, terminal: bool, linger_s: float) -> None:
    heard = asyncio.Event()
    typing = asyncio.create_task(_type(console, terminal=terminal), name="console: keys")
    printing = asyncio.create_task(_print(console, heard), name="console: output")
    try:
        await asyncio.wait({typing, printing}, return_when=asyncio.FIRST_COMPLETED)
        if typing.done() and not printing.done() and not terminal:
            await _silence(heard, printing, linger_s)
    finally:
        for task in (typing, printing):
            task.cancel()
        ended = await asyncio.gather(typing, printing, return_exceptions=True)
    for result in ended:
        if isinstance(result, Exception):
            raise result


async def _type(console: Console, *, terminal: bool) -> None:
    keys = _standard_input()
    while data := await keys.get():
        before, escape, _ = data.partition(ESCAPE) if terminal else (data, b"", b"")
        if before:
            await console.send(before)
        if escape:
            return


async def _print(console: Console, heard: asyncio.Event) -> None:
    while (data := await console.receive()) is not None:
        heard.set()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


async def _silence(heard: asyncio.Event, printing: asyncio.Task[None], linger_s: float) -> None:
    while True:
        heard.clear()
        ended, _ = await asyncio.wait({printing}, timeout=linger_s)
        if ended or not heard.is_set():
            return


def _standard_input() -> asyncio.Queue[bytes]:
    """What comes in, piece by piece; empty at its end. A thread reads: files, pipes and
    terminals alike, of which an event loop can watch only some."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[bytes]()

    def reading() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody listens any more
            while True:
                try:
                    data = os.read(sys.stdin.fileno(), 4096)
                except OSError:
                    data = b""
                loop.call_soon_threadsafe(queue.put_nowait, data)
                if not data:
                    return

    threading.Thread(target=reading, name="console keys", daemon=True).start()
    return queue


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    import termios
    import tty

    before = termios.tcgetattr(terminal)
    tty.setraw(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
