"""``WS /v1/vms/{name}/console``: the serial port, passed through from the owner's agent.

When the VM moves, the line is taken up again on its new host; the caller notices a short pause.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState
from websockets.exceptions import ConnectionClosed

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.admit import known
from godwit.manager.work.vms import host_of
from godwit.model.errors import GodwitError, Refused
from godwit.model.host import HostInfo
from godwit.model.ownership import OwnerState
from godwit.wire.problem import Problem, problem_response

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

    from godwit.manager.api.app import Rooms

_MOVED_S = 3.0  # how long after the end of a line the VM may turn up elsewhere


def add_routes(app: FastAPI, rooms: Rooms) -> None:
    """The one socket."""

    @app.websocket("/v1/vms/{name}/console")
    async def console(socket: WebSocket, name: str) -> None:
        try:
            host: HostInfo | None = _host(rooms.cache.snapshot, name)
            while host is not None:
                async with rooms.world.agents.console(host, name) as far:
                    if socket.application_state is WebSocketState.CONNECTING:
                        await socket.accept()
                    if not await _join(socket, far):
                        return
                host = await _moved_to(rooms, name, host.name)
        except GodwitError as error:
            if socket.application_state is WebSocketState.CONNECTING:
                await socket.send_denial_response(problem_response(Problem.from_error(error)))
                return
        if socket.application_state is WebSocketState.CONNECTED:
            await socket.close()


def _host(snapshot: Snapshot, name: str) -> HostInfo:
    known(snapshot.vms.get(name), "vm", name)
    owner = snapshot.owner(name)
    if owner.state not in (OwnerState.RUNNING, OwnerState.STARTING):
        raise Refused(
            f"{name} is {owner.state.value}: there is no console",
            hint=f"first: godwit vm start {name}",
        )
    return host_of(snapshot, owner)


async def _moved_to(rooms: Rooms, name: str, before: str) -> HostInfo | None:
    """The VM's new host when the line ended because it moved; None when it just ended."""

    def look(snapshot: Snapshot) -> HostInfo | None:
        owner = snapshot.owner(name)
        if owner.state is not OwnerState.RUNNING or owner.host in (before, None):
            return None
        return snapshot.hosts.get(str(owner.host))

    owner = rooms.cache.snapshot.owner(name)
    if owner.state is not OwnerState.RUNNING:
        return None
    return await rooms.cache.until(look, timeout=_MOVED_S)


async def _join(socket: WebSocket, far: ClientConnection) -> bool:
    """Pass bytes both ways; False when the caller went, True when the far end did."""
    typed = asyncio.create_task(_typed(socket, far), name="console: caller to guest")
    shown = asyncio.create_task(_shown(socket, far), name="console: guest to caller")
    try:
        await asyncio.wait({typed, shown}, return_when=asyncio.FIRST_COMPLETED)
        return not typed.done()
    finally:
        for task in (typed, shown):
            task.cancel()
        await asyncio.gather(typed, shown, return_exceptions=True)


async def _typed(socket: WebSocket, far: ClientConnection) -> None:
    try:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            await far.send(data if data is not None else str(message.get("text", "")).encode())
    except ConnectionClosed:
        # The guest's end went; let the other direction say so.
        await asyncio.Event().wait()


async def _shown(socket: WebSocket, far: ClientConnection) -> None:
    try:
        async for message in far:
            await socket.send_bytes(message.encode() if isinstance(message, str) else message)
    except (ConnectionClosed, WebSocketDisconnect):
        return
