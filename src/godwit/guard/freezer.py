"""Stops and kills a VM's processes whatever state they are in: its QEMU and its storage broker.

Everything here may block: a write to a control file can hang in the kernel. Nobody calls it on an
event loop; :func:`apart` runs it in a thread that nobody has to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from godwit.guard.deadline import Stand
from godwit.host.cgroup import Cgroup, open_cgroup, wait_until
from godwit.host.errors import CgroupError
from godwit.host.process import Process, identify, is_alive, kill

T = TypeVar("T")

MOMENT_S = 0.2
"""Seconds that a freeze or a death is waited for before one looks again."""
BROKER = "-broker"
"""What the name of a VM's group ends in for its storage broker's."""


@dataclass(frozen=True)
class Freezer:
    """The groups of one VM. ``name`` is its QEMU's, empty when it has none."""

    process: Process
    name: str

    def check(self) -> str:
        """Why a freeze would not hold the VM, empty when it would; a running VM notices nothing.

        What it is now is written again, so that the way of a freeze is gone once.
        """
        if not self.name:
            return "it has no control group"
        try:
            group = open_cgroup(self.name)
            if not group.freezes(self.process.pid):
                return f"its QEMU is not in control group {self.name}"
            if not group.frozen():
                group.thaw()
        except (CgroupError, OSError) as error:
            return str(error)
        return ""

    def stand(self) -> Stand:
        """What the kernel says of the VM now; CgroupError when it says nothing."""
        if not is_alive(self.process):
            return Stand.GONE
        return Stand.FROZEN if self.name and open_cgroup(self.name).frozen() else Stand.RUNNING

    def freeze(self) -> Stand:
        """Ask for a freeze, and wait a moment for it. Errors as ``stand``."""
        if not is_alive(self.process):
            return Stand.GONE
        # What QEMU gave its broker already may still be on its way to a disk.
        groups = [g for g in (open_cgroup(self.name), self._broker()) if g is not None]

        def still() -> bool:
            for group in groups:
                group.request_freeze()  # again: a thread that forked makes the kernel wait for ever
            return all(group.frozen() for group in groups)

        frozen = wait_until(still, MOMENT_S)
        if not is_alive(self.process):
            return Stand.GONE
        return Stand.FROZEN if frozen else Stand.FREEZING

    def thaw(self) -> Stand:
        """Let it run on. Errors as ``stand``."""
        broker = self._broker()
        if broker is not None:
            broker.thaw()
        open_cgroup(self.name).thaw()
        return self.stand()

    def kill(self) -> Stand:
        """Kill QEMU and its broker: the signal first, so that no frozen one runs before it dies."""
        doomed = [self.process]
        broker = self._broker()
        if broker is not None:
            doomed += [p for pid in broker.pids() if (p := identify(pid)) is not None]
        for process in doomed:
            kill(process)
        for group in (broker, open_cgroup(self.name) if self.name else None):
            if group is not None:
                with contextlib.suppress(CgroupError, OSError):
                    group.thaw()  # version 1: a frozen process dies only when it moves again
        gone = wait_until(lambda: not is_alive(self.process), MOMENT_S)
        return Stand.GONE if gone else Stand.FREEZING

    def _broker(self) -> Cgroup | None:
        group = open_cgroup(self.name + BROKER)
        return group if group.exists() else None


async def apart(work: Callable[[], T], *, timeout: float) -> T:
    """The result of blocking work done in a thread of its own; TimeoutError leaves it behind there.

    A thread that hangs in the kernel holds up neither others nor the end of this process.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        failed: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=run, daemon=True, name="freezer").start()
    async with asyncio.timeout(timeout):
        return await done
