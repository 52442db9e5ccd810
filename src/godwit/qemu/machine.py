"""One live QEMU on this host: found again, watched, and told what to do.

    spawn (see `godwit.qemu.start`) --> [prelaunch | inmigrate] --cont--> running --> ... --> exited
                         agent restart: adopt --^

A `Machine` is the agent's view; the process outlives it. `close` lets go of a QEMU without
touching it, `quit` and `kill` end it, `discard` removes what a dead one left. Commands raise
`QmpError` (QEMU said no), `MonitorTimeout` or `MonitorLost` (outcome unknown), as the engine has
to tell these apart; everything for people is an error of `godwit.model.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from godwit.host.cgroup import Cgroup, open_cgroup
from godwit.host.errors import CgroupError, ProcessGone
from godwit.host.process import is_alive, kill, rss_bytes, wait_exit
from godwit.model.errors import Conflict, OperationFailed
from godwit.qemu import intervals, tls
from godwit.qemu.runtime import Runtime
from godwit.qemu.tree import DeviceTree, read_device_tree
from godwit.qmp import Event, EventStream, Monitor, MonitorError, MonitorLost, QmpError

ADOPT_DEADLINE = 3.0
RUN_TIMEOUT = 5.0
"""Seconds in which `cont` and `stop` must show their event."""

_log = logging.getLogger("qemu")


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What QEMU says of itself: ``running``, ``paused``, ``prelaunch``, ``inmigrate``, ..."""

    status: str
    running: bool


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes: what the VM has, what the balloon leaves it, what QEMU takes on this host."""

    total_bytes: int
    balloon_bytes: int
    resident_bytes: int


class Machine:
    """A running QEMU process with its monitor; make one with `spawn` or `adopt`."""

    def __init__(
        self, runtime: Runtime, monitor: Monitor, *, joining: asyncio.Future[None] | None = None
    ) -> None:
        """Not for callers: the process must be alive and the monitor connected."""
        self._joining = joining
        self.runtime = runtime
        self.monitor = monitor
        self.exited = asyncio.Event()
        self.exit_status: int | None = None
        self.exited_at: float | None = None
        self._events = monitor.events(*intervals.WITNESSED_EVENTS)
        self._tasks = (
            asyncio.create_task(self._watch_exit(), name=f"qemu {self.vm}: exit"),
            asyncio.create_task(self._witness(self._events), name=f"qemu {self.vm}: events"),
        )
        for task in self._tasks:
            task.add_done_callback(_report)

    @classmethod
    async def adopt(cls, runtime: Runtime, *, deadline: float = ADOPT_DEADLINE) -> Self:
        """Take over a QEMU that another life of the agent started; the guest notices nothing.

        ProcessGone when that process has ended (its number may be in use again), MonitorLost when
        its monitor does not answer within ``deadline`` seconds: then it is frozen, or somebody
        else sits on the monitor.
        """
        if not runtime.pid or not is_alive(runtime.process):
            raise ProcessGone(f"the QEMU of {runtime.vm} (process {runtime.pid}) has ended")
        monitor = await Monitor.connect(
            runtime.monitor, name=f"{runtime.vm} on {runtime.host}", deadline=deadline
        )
        machine = cls(runtime, monitor)
        try:
            now = await machine.status()
        except BaseException:
            await machine.close()
            raise
        machine.witness("ADOPT", running=now.running, status=now.status)
        return machine

    async def joined(self) -> None:
        """Return once the process is in its control group; CgroupError or OSError if it is not."""
        if self._joining is not None:
            await asyncio.shield(self._joining)

    @property
    def vm(self) -> str:
        """The VM's name."""
        return self.runtime.vm

    @property
    def pid(self) -> int:
        """The QEMU process."""
        return self.runtime.pid

    @property
    def epoch(self) -> int:
        """The epoch this QEMU was made for."""
        return self.runtime.epoch

    @property
    def serial_path(self) -> Path:
        """Where the guest's serial port can be reached, by one reader at a time."""
        return self.runtime.serial

    @property
    def cgroup(self) -> Cgroup | None:
        """The VM's control group, None where none was given."""
        return open_cgroup(self.runtime.cgroup) if self.runtime.cgroup else None

    def amend(self, **changes: object) -> None:
        """Change the runtime record (epoch, migration, role, ...) and write it down."""
        self.runtime = self.runtime.but(**changes)
        self.runtime.save()

    def witness(self, event: str, *, at: float | None = None, **more: object) -> None:
        """Write a line of evidence; a full disk must not stop the engine, so it is only logged."""
        stamp = time.time() if at is None or math.isnan(at) else at
        try:
            intervals.append_line(
                self.runtime.state,
                event=event,
                at=stamp,
                host=self.runtime.host,
                vm=self.vm,
                pid=self.pid,
                epoch=self.epoch,
                **more,
            )
        except OSError as error:
            _log.warning("%s: evidence of %s is lost: %s", self.vm, event, error)

    # Run state

    async def status(self, *, timeout: float = RUN_TIMEOUT) -> RunStatus:
        """The run state right now."""
        answer = await self.monitor.execute("query-status", timeout=timeout)
        return RunStatus(str(answer["status"]), bool(answer["running"]))

    async def alive(self, *, timeout: float = RUN_TIMEOUT) -> None:
        """Return when QEMU answers out-of-band; its main loop may be busy. MonitorError if not."""
        await self.monitor.execute_oob("query-yank", timeout=timeout)

    async def cont(self, *, timeout: float = RUN_TIMEOUT) -> float:
        """Let the vCPUs run; the time of RESUME by QEMU's own stamp.

        Conflict while the machine still waits for its memory: ``cont`` would arm an automatic
        start there. QmpError when QEMU cannot (a disk is locked elsewhere). For vCPUs that ran
        already the answer is now.
        """
        before = await self.status(timeout=timeout)
        if before.status == "inmigrate":
            raise Conflict(f"{self.vm} still waits for its memory and must not start by itself")
        if before.running:
            return time.time()
        return await self._switch("cont", "RESUME", timeout=timeout)

    async def stop(self, *, timeout: float = RUN_TIMEOUT) -> float:
        """Hold the vCPUs; the time of STOP by QEMU's own stamp (now, when they were held)."""
        if not (await self.status(timeout=timeout)).running:
            return time.time()
        return await self._switch("stop", "STOP", timeout=timeout)

    async def _switch(self, command: str, event: str, *, timeout: float) -> float:
        with self.monitor.events(event) as stream:
            await self.monitor.execute(command, timeout=timeout)
            seen = await stream.wait(timeout=timeout)
        return seen.arrived if math.isnan(seen.timestamp) else seen.timestamp

    async def powerdown(self) -> None:
        """Press the power button; whether the guest obeys shows in a SHUTDOWN event."""
        await self.monitor.execute("system_powerdown")

    # What it is

    async def device_tree(self) -> DeviceTree:
        """The realised machine, for comparing source and destination."""
        return await read_device_tree(self.monitor)

    async def vcpu_threads(self) -> tuple[int, ...]:
        """Thread numbers of the vCPUs, in our PID namespace."""
        cpus = await self.monitor.execute("query-cpus-fast")
        return tuple(int(cpu["thread-id"]) for cpu in cpus)

    async def memory_info(self) -> MemoryInfo:
        """How much memory the VM has and takes."""
        summary, balloon = await asyncio.gather(
            self.monitor.execute("query-memory-size-summary"),
            self.monitor.execute("query-balloon"),
        )
        total = int(summary["base-memory"]) + int(summary.get("plugged-memory", 0))
        return MemoryInfo(total, int(balloon["actual"]), rss_bytes(self.pid))

    async def set_link(self, nic: str, up: bool) -> None:
        """Plug a card's cable in or out, as the guest sees it."""
        await self.monitor.execute("set_link", {"name": nic, "up": up})

    async def add_tls(self, role: tls.Role, directory: Path) -> str:
        """Make the credentials object of the next move, replacing an old one; its id.

        Read anew each time, so a renewed certificate counts at once.
        """
        name = tls.object_id(role)
        with contextlib.suppress(QmpError):
            await self.monitor.execute("object-del", {"id": name})
        await self.monitor.execute("object-add", tls.credentials(role, directory))
        return name

    async def query_migrate(self, *, timeout: float = RUN_TIMEOUT) -> Mapping[str, Any]:
        """What QEMU says of the move that is or was under way."""
        answer: Mapping[str, Any] = await self.monitor.execute("query-migrate", timeout=timeout)
        return answer

    # The end

    async def quit(self, *, timeout: float = 5.0) -> int | None:
        """End QEMU, by force when it has not gone after ``timeout`` seconds; its exit status."""
        with contextlib.suppress(MonitorError):
            await self.monitor.execute("quit", timeout=timeout)
        try:
            async with asyncio.timeout(timeout):
                await self.exited.wait()
        except TimeoutError:
            await self.kill()
        return self.exit_status

    async def kill(self, *, timeout: float = 10.0) -> int | None:
        """End QEMU at once and wait for its end; OperationFailed when it does not die.

        A process in uninterruptible I/O, or in a frozen control group, does not die at once.
        """
        kill(self.runtime.process)
        if (group := self.cgroup) is not None:
            with contextlib.suppress(CgroupError, OSError):
                group.thaw()
        try:
            async with asyncio.timeout(timeout):
                await self.exited.wait()
        except TimeoutError:
            raise OperationFailed(
                f"the QEMU of {self.vm} (process {self.pid}) does not die",
                hint="its storage may hang; its vCPUs may still run",
            ) from None
        return self.exit_status

    async def close(self) -> None:
        """Let go: end the watching and the monitor session, leave QEMU as it is. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._events.close()
        await self.monitor.close()

    async def discard(self) -> None:
        """Remove what a dead QEMU left: sockets, runtime record, control group.

        Logs, evidence and the durable note stay. Conflict while it lives.
        """
        if not self.exited.is_set():
            raise Conflict(f"the QEMU of {self.vm} (process {self.pid}) still runs")
        await self.close()
        if self._joining is not None:
            await asyncio.wait({self._joining})
        discard_traces(self.runtime)

    async def _watch_exit(self) -> None:
        status = await wait_exit(self.runtime.process)
        self.exit_status = status
        self.exited_at = time.time()
        self.witness("EXIT", at=self.exited_at, status=status)
        self.exited.set()

    async def _witness(self, events: EventStream) -> None:
        with contextlib.suppress(MonitorLost):
            async for event in events:
                self._write_down(event)

    def _write_down(self, event: Event) -> None:
        self.witness(event.name, at=event.timestamp, **_details(event.data))


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s failed: %r", task.get_name(), error)


def _details(data: Mapping[str, Any]) -> dict[str, object]:
    return {key: data[key] for key in ("reason", "guest") if key in data}


def discard_traces(runtime: Runtime) -> None:
    """Remove sockets, runtime record and control group of a QEMU that is dead.

    The record goes last: whoever is interrupted in here finds it and does it again.
    """
    ask = runtime.run / "incoming.json"  # what an arriving copy was prepared for
    sockets = (runtime.monitor, runtime.guard_monitor, runtime.serial, runtime.guest_agent)
    for path in (*sockets, ask):
        path.unlink(missing_ok=True)
    if runtime.cgroup:
        with contextlib.suppress(CgroupError):
            open_cgroup(runtime.cgroup).remove()
    runtime.remove()
    with contextlib.suppress(OSError):
        runtime.run.rmdir()
