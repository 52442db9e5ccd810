"""The agent's end of the guard's socket: liveness both ways, registrations, the host's lease.

    agent                                guard
    | hello {pid}  ----------------------> |  the open connection is the agent's life
    | register {vm, pid, start_time, ...}  |  -> opens its spare monitor
    | beat, every 0.5 s  ----------------> |
    | <----- {renewed_at, ttl, ...}        |  CLOCK_BOOTTIME of the last answered renewal
    |                     frozen {vm: why} |  what stands still because it could not renew
    | arm / disarm / forget {vm}           |
    | look {vm}                            |  the agent froze it while the guard was silent

One JSON object per line, one answer per request, in order. A guard that is away is reconnected
to; registrations and arms are sent again. Without a guard the lease simply runs out here too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from godwit.model.world import Clock
from godwit.qemu.runtime import Runtime

BEAT_S = 0.5
_ANSWER_S = 1.0
_FIRST_S = 2.0
_TAKE_OVER_S = 2.0
_log = logging.getLogger("agent")


class GuardLink:
    """Implements ``godwit.migration.world.GuardLink``; run ``serve`` as a task."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._turn = asyncio.Lock()
        self._registered: dict[str, dict[str, Any]] = {}
        self._armed: dict[str, dict[str, Any]] = {}
        self._lease_until = 0.0
        self._born = clock.monotonic()
        self.answered_at: float | None = None
        self.counts_from: float | None = None
        self.frozen: dict[str, str] = {}
        self.frozen_alone: dict[str, str] = {}
        self.frozen_changed = asyncio.Event()
        self._by_guard: dict[str, str] = {}
        self._handed_over: float | None = None
        self._not_known: set[str] = set()  # what the guard has said that it does not know

    @property
    def connected(self) -> bool:
        """True while the guard answers."""
        return self._streams is not None

    def lease_left(self) -> float:
        """Seconds this host's lease still lasts, by the last renewal the guard told of."""
        return max(0.0, self._lease_until - self._clock.monotonic())

    async def serve(self) -> None:
        """Stay connected and beat, for ever."""
        while True:
            try:
                await self._connect()
                while True:
                    self._note(await self._ask({"op": "beat"}))
                    await self._clock.sleep(BEAT_S)
            except (OSError, TimeoutError, ValueError, ConnectionError) as error:
                _log.warning("guard: %s", str(error) or type(error).__name__)
                self._drop()
                # The guard's socket appears when it is back; nothing announces that.
                await self._clock.sleep(BEAT_S / 2)

    async def register(self, runtime: Runtime, *, ha: bool, deadline: bool = True) -> None:
        """Put a QEMU under the guard's eyes.

        ``ha``: it is started elsewhere when this host is lost, so the guard stops it in time;
        ``deadline`` False: what fences it does not count on that, so it does not.
        """
        entry = {
            "op": "register",
            "vm": runtime.vm,
            "pid": runtime.pid,
            "start_time": runtime.start_time,
            "monitor": str(runtime.guard_monitor),
            "epoch": runtime.epoch,
            "ha": ha,
            "deadline": deadline,
            "cgroup": runtime.cgroup,
        }
        self._registered[runtime.vm] = entry
        await self._tell(entry)

    async def change(self, vm: str, *, ha: bool) -> None:
        """A VM that runs here is highly available from now on, or no more."""
        entry = self._registered.get(vm)
        if entry is not None and entry["ha"] != ha:
            self._registered[vm] = {**entry, "ha": ha}
            await self._tell(self._registered[vm])

    async def until_it_moves(self, vm: str, *, timeout: float) -> None:
        """Return when a VM is not frozen by the guard, as far as it tells within ``timeout``."""
        until = self._clock.monotonic() + timeout
        while self._clock.monotonic() < (
            self._born + _FIRST_S if self.answered_at is None else until
        ):
            if self.answered_at is not None and vm not in self.frozen:
                return
            await self._clock.sleep(BEAT_S / 2)  # it tells with its next answer

    def froze(self, vm: str, why: str) -> None:
        """The agent itself froze a VM: shown until a guard has taken it over."""
        self.frozen_alone[vm] = why
        self._handed_over = None
        self._merge()

    async def forget(self, vm: str) -> None:
        """The QEMU is gone."""
        self._registered.pop(vm, None)
        self._armed.pop(vm, None)
        self.frozen_alone.pop(vm, None)
        await self._tell({"op": "forget", "vm": vm})

    async def arm(self, vm: str, migration: str, role: str) -> None:
        """A move began: from now on the guard acts if this agent dies or hangs."""
        entry = {"op": "arm", "vm": vm, "migration": migration, "role": role}
        self._armed[vm] = entry
        await self._tell(entry)

    async def disarm(self, vm: str) -> None:
        """The move is over."""
        if self._armed.pop(vm, None) is not None:
            await self._tell({"op": "disarm", "vm": vm})

    async def _tell(self, entry: dict[str, Any]) -> None:
        # What cannot be told now is told on the next connect.
        if self._streams is None:
            return
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            await self._ask(entry)

    async def _connect(self) -> None:
        self._streams = await asyncio.open_unix_connection(str(self._path))
        await self._ask({"op": "hello", "pid": os.getpid()})
        for entry in list(self._registered.values()):
            await self._ask(entry)
        for vm in self.frozen_alone:
            await self._ask({"op": "look", "vm": vm})
        self._handed_over = self._clock.monotonic()
        for vm in list(self._registered):
            # Asked one by one from the present state: a disarm may come between, or may have
            # been lost with the old connection.
            entry = self._armed.get(vm, {"op": "disarm", "vm": vm})
            await self._ask(entry)

    def _note(self, answer: dict[str, Any]) -> None:
        renewed, ttl = answer.get("renewed_at"), answer.get("ttl")
        if renewed is not None and ttl is not None:
            self._lease_until = float(renewed) + float(ttl)
        now = self._clock.monotonic()
        self.answered_at = now
        if answer.get("counts_from") is not None:
            self.counts_from = float(answer["counts_from"])
        self._by_guard = dict(answer.get("frozen", {}))
        if self._handed_over is not None and now - self._handed_over > _TAKE_OVER_S:
            self.frozen_alone.clear()  # what still stands still is the guard's to tell
        self._merge()

    def _merge(self) -> None:
        frozen = {**self.frozen_alone, **self._by_guard}
        if frozen != self.frozen:
            self.frozen = frozen
            self.frozen_changed.set()

    async def _ask(self, entry: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            if self._streams is None:
                raise ConnectionError("the guard is away")
            reader, writer = self._streams
            try:
                async with asyncio.timeout(_ANSWER_S):
                    writer.write(json.dumps(entry).encode() + b"\n")
                    await writer.drain()
                    line = await reader.readline()
            except BaseException:
                self._drop()  # an answer that comes late would be taken for the next one's
                raise
            if not line:
                self._drop()
                raise ConnectionError("the guard closed the connection")
            answer: dict[str, Any] = json.loads(line)
            self._complain(str(entry["op"]), answer)
            return answer

    def _complain(self, op: str, answer: dict[str, Any]) -> None:
        """A guard of another version is left with what it can do; it is told once."""
        if "error" in answer and op not in self._not_known:
            self._not_known.add(op)
            _log.warning("the guard cannot %r: %s; restart it if it is older", op, answer["error"])

    def _drop(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
