"""The serial console of a VM over a WebSocket: bytes both ways, one reader at a time."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from starlette.websockets import WebSocket, WebSocketDisconnect


async def bridge(websocket: WebSocket, serial: Path) -> None:
    """Connect an accepted WebSocket to the guest's serial socket until one side ends.

    Raises OSError when the socket does not answer, for example when it has a reader already.
    """
    reader, writer = await asyncio.open_unix_connection(str(serial))

    async def to_guest() -> None:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes") or (message.get("text") or "").encode()
            writer.write(data)
            await writer.drain()

    async def from_guest() -> None:
        while data := await reader.read(4096):
            await websocket.send_bytes(data)

    tasks = {
        asyncio.create_task(to_guest(), name="console: to guest"),
        asyncio.create_task(from_guest(), name="console: from guest"),
    }
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            with contextlib.suppress(WebSocketDisconnect, ConnectionError):
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        writer.close()
        with contextlib.suppress(RuntimeError):
            await websocket.close()
