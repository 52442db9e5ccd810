"""A VM's serial port over a WebSocket: bytes both ways."""

from __future__ import annotations

import contextlib
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

from godwit.model.errors import Unavailable

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

    from godwit.client.link import Link


class Console:
    """An open console. Several may be open on one VM; each sees what the guest writes."""

    def __init__(self, socket: ClientConnection, stack: AsyncExitStack) -> None:
        self._socket = socket
        self._stack = stack

    async def receive(self) -> bytes | None:
        """What the guest wrote next; None when the console has ended (the VM stopped).

        Errors: Unavailable when the connection broke.
        """
        from websockets.exceptions import ConnectionClosed, ConnectionClosedOK

        try:
            data = await self._socket.recv()
        except ConnectionClosedOK:
            return None
        except ConnectionClosed as error:
            raise Unavailable(
                f"the console broke off: {error}", hint="attach again: godwit vm console NAME"
            ) from None
        return data.encode() if isinstance(data, str) else data

    async def send(self, data: bytes) -> None:
        """Type these bytes; what is sent to an ended console is lost."""
        from websockets.exceptions import ConnectionClosed

        with contextlib.suppress(ConnectionClosed):  # receive() tells the reason
            await self._socket.send(data)

    async def close(self) -> None:
        """Detach; the guest does not notice."""
        await self._stack.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


async def open_console(link: Link, name: str) -> Console:
    """Attach to a VM's serial port. Errors: NotFound, Refused (it does not run), Unavailable."""
    async with AsyncExitStack() as stack:
        path = f"/v1/vms/{quote(name, safe='')}/console"
        socket = await stack.enter_async_context(link.websocket(path))
        return Console(socket, stack.pop_all())
    raise AssertionError("unreachable")
