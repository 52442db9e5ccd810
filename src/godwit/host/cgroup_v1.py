"""Control groups of version 1: one tree per controller.

A VM's processes sit in ``freezer``, ``cpu``, ``cpuacct`` and ``memory``; its vCPU threads move on
into ``vcpu`` below ``cpu`` only, for threads of one process may sit apart in this version.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from godwit.host.cgroup import (
    VCPU,
    checked_name,
    quota_and_period_us,
    read_numbers,
    wait_until,
    write,
)
from godwit.host.errors import CgroupError

_CONTROLLERS = ("freezer", "cpu", "cpuacct", "memory")
_REMOVE_TIMEOUT = 2.0


class CgroupV1:
    """The group of one VM over the trees of version 1; implements ``Cgroup``."""

    version = 1

    def __init__(self, name: str, root: Path) -> None:
        self.name = checked_name(name)
        # cpu and cpuacct are often one tree under two names.
        trees = {(root / c).resolve() for c in _CONTROLLERS if (root / c).is_dir()}
        self._groups = tuple(sorted(tree / name for tree in trees))
        self._cpu = root / "cpu" / name
        self._vcpu = self._cpu / VCPU
        self._freezer = root / "freezer" / name
        self._usage = root / "cpuacct" / name / "cpuacct.usage"

    def create(self) -> None:
        """See ``Cgroup``; on an error nothing new stays behind but parents."""
        try:
            for group in (*self._groups, self._vcpu):
                group.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._remove_empty()
            raise CgroupError(f"cannot create control group {self.name}: {error}") from error

    def remove(self) -> None:
        """See ``Cgroup``."""
        # A dying process keeps its group busy for a moment after its end was reported, and
        # version 1 has no event for the last one leaving.
        if not wait_until(self._remove_empty, _REMOVE_TIMEOUT):
            raise CgroupError(
                f"control group {self.name} is still in use by processes {list(self.pids())}",
                hint="stop them first",
            )

    def _remove_empty(self) -> bool:
        done = True
        for group in (self._vcpu, *self._groups):
            try:
                group.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                done = False
        return done

    def exists(self) -> bool:
        """See ``Cgroup``."""
        return any(group.is_dir() for group in self._groups)

    def add_process(self, pid: int) -> None:
        """See ``Cgroup``."""
        for group in self._groups:
            write(group / "cgroup.procs", str(pid))

    def add_vcpu_threads(self, thread_ids: Iterable[int]) -> None:
        """See ``Cgroup``."""
        for thread_id in thread_ids:
            write(self._vcpu / "tasks", str(thread_id))

    def set_quota(self, cores: float) -> None:
        """See ``Cgroup``."""
        quota, period = quota_and_period_us(cores)
        now = self._vcpu / "cpu.cfs_period_us"
        if read_numbers(now) != [period]:
            # The old quota and the new period may be a pair the kernel refuses.
            self.clear_quota()
            write(now, str(period))
        write(self._vcpu / "cpu.cfs_quota_us", str(quota))

    def clear_quota(self) -> None:
        """See ``Cgroup``."""
        write(self._vcpu / "cpu.cfs_quota_us", "-1")

    def quota(self) -> float | None:
        """See ``Cgroup``."""
        quota = int((self._vcpu / "cpu.cfs_quota_us").read_text())
        if quota < 0:
            return None
        return quota / int((self._vcpu / "cpu.cfs_period_us").read_text())

    def request_freeze(self) -> None:
        """See ``Cgroup``."""
        write(self._freezer / "freezer.state", "FROZEN")

    def frozen(self) -> bool:
        """See ``Cgroup``."""
        return (self._freezer / "freezer.state").read_text().strip() == "FROZEN"

    def freezes(self, pid: int) -> bool:
        """See ``Cgroup``."""
        return pid in read_numbers(self._freezer / "cgroup.procs")

    def _frozen_or_ask_again(self) -> bool:
        # FREEZING may last for ever when a thread forked or was traced meanwhile; asking again
        # makes the kernel look again.
        self.request_freeze()
        return self.frozen()

    def _give_up(self, timeout: float) -> CgroupError:
        self.thaw()
        return CgroupError(f"control group {self.name} did not freeze within {timeout:g} s")

    def freeze_now(self, timeout: float = 1.0) -> None:
        """See ``Cgroup``."""
        if not wait_until(self._frozen_or_ask_again, timeout):
            raise self._give_up(timeout)

    async def freeze(self, timeout: float = 1.0) -> None:
        """See ``Cgroup``; version 1 has no event, so the state is read at growing intervals."""
        until = time.monotonic() + timeout
        pause = 0.0005
        while not self._frozen_or_ask_again():
            if time.monotonic() >= until:
                raise self._give_up(timeout)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.02)

    def thaw(self) -> None:
        """See ``Cgroup``."""
        write(self._freezer / "freezer.state", "THAWED")

    def cpu_seconds(self) -> float:
        """See ``Cgroup``."""
        return int(self._usage.read_text()) / 1e9

    def pids(self) -> tuple[int, ...]:
        """See ``Cgroup``."""
        found: set[int] = set()
        for group in self._groups:
            for folder, _, _ in os.walk(group):
                found.update(read_numbers(Path(folder) / "cgroup.procs"))
        # 0 stands for a process that our PID namespace cannot name.
        return tuple(sorted(found - {0}))

    def _kill_found(self) -> bool:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                # A member's number cannot be taken by another process before it is reaped, and
                # a stranger is hit only in the instant between this read and this call.
                os.kill(pid, signal.SIGKILL)
        return not self.pids()

    def kill_all(self, timeout: float = 5.0) -> None:
        """See ``Cgroup``; zombies that nobody reaps do not count as members."""
        if self.exists() and self._freezer.is_dir():
            self.thaw()  # a frozen process dies only when it moves again
        if not wait_until(self._kill_found, timeout):
            raise CgroupError(f"processes {list(self.pids())} of {self.name} do not die")
