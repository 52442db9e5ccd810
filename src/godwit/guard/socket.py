"""The guard's unix socket: one agent, JSON lines, one answer per request, in order.

hello | beat    it lives
register        a QEMU: vm, pid, start_time, monitor, epoch; ha, deadline and cgroup say whether
                and how the deadline is kept for it
forget          it is gone
look            the agent froze it while the guard was silent
arm | disarm    it is being moved, or no more
every answer    {renewed_at, ttl, counts_from, frozen: {vm: why}} or {error}
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from pathlib import Path
from typing import Any

from godwit.guard.decide import AGENT_SILENCE_S
from godwit.guard.keeper import Keeper
from godwit.guard.lease import TTL_S, HostLease
from godwit.guard.vms import Vms
from godwit.host.process import Process
from godwit.model.world import Clock

_log = logging.getLogger("guard")
LOOK_S = 0.25


class AgentLine:
    """Knows whether the agent lives, and passes its requests on."""

    def __init__(
        self, vms: Vms, lease: HostLease, clock: Clock, *, keeper: Keeper | None = None
    ) -> None:
        self._vms = vms
        self._keeper = keeper
        self._lease = lease
        self._clock = clock
        self._heard_at: float | None = None
        self._connected = False
        self.look = asyncio.Event()
        self._current: asyncio.StreamWriter | None = None

    def gone_for(self) -> float:
        """Seconds the agent has been gone; 0 while it lives, or before it was ever heard."""
        if self._heard_at is None:
            return 0.0
        silent = self._clock.monotonic() - self._heard_at
        if not self._connected:
            return max(silent, 0.001)
        return silent - AGENT_SILENCE_S if silent > AGENT_SILENCE_S else 0.0

    async def serve(self, listener: socket.socket) -> None:
        """Accept agents, for ever; a new connection takes the place of the old one."""
        server = await asyncio.start_unix_server(self._agent, sock=listener)
        async with server:
            await server.serve_forever()

    async def act(self) -> None:
        """While the agent is gone do what must be done, for ever."""
        while True:
            self.look.clear()
            gone = self.gone_for()
            if gone > 0:
                await self._vms.act(agent_gone_for=gone)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.look.wait()

    async def _agent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._current is not None:
            self._current.close()
        self._current, self._connected = writer, True
        try:
            while line := await reader.readline():
                self._heard_at = self._clock.monotonic()
                writer.write(json.dumps(self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError) as error:
            _log.warning("agent: %s", error)
        except asyncio.CancelledError:
            return  # the guard ends; the stream server would log it as a fault
        finally:
            writer.close()
            if self._current is writer:
                self._current, self._connected = None, False
                self.look.set()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            return self._do(request)
        except (KeyError, TypeError, ValueError) as error:
            return {"error": f"cannot do that: {error!r}"}

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        op = request["op"]
        if op == "register":
            self._vms.register(
                vm=request["vm"],
                process=Process(int(request["pid"]), int(request["start_time"])),
                monitor=Path(request["monitor"]),
                epoch=int(request["epoch"]),
                ha=bool(request.get("ha", False)),
                deadline=bool(request.get("deadline", True)),
                cgroup=str(request.get("cgroup", "")),
            )
        elif op == "forget":
            self._vms.forget(request["vm"])
        elif op == "look":
            if self._keeper is not None:
                self._keeper.look(request["vm"])
        elif op == "arm":
            self._vms.arm(vm=request["vm"], migration=request["migration"], role=request["role"])
        elif op == "disarm":
            self._vms.disarm(request["vm"])
        elif op not in ("hello", "beat"):
            return {"error": f"unknown request {op!r}"}
        if self._keeper is not None and op in ("register", "forget"):
            self._keeper.registered()
        return {
            "renewed_at": self._lease.renewed_at,
            "ttl": TTL_S,
            "counts_from": self._lease.counts_from,
            "frozen": self._keeper.frozen() if self._keeper is not None else {},
        }
