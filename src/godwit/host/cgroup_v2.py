"""Control groups of version 2: one tree, threads apart in a threaded sub-group.

``vcpu`` is made ``threaded``; that turns the VM's group into a "domain threaded" one, which may
hold processes and still hand the (threaded) ``cpu`` controller down.  Ancestors hold no processes
of their own and hand down what they have of ``cpu`` and ``memory``.
"""

from __future__ import annotations

import asyncio
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
from godwit.host.inotify import MODIFIED, PathWatch

_WANTED = ("cpu", "memory")
_REMOVE_TIMEOUT = 2.0


class CgroupV2:
    """The group of one VM in the tree of version 2; implements ``Cgroup``."""

    version = 2

    def __init__(self, name: str, root: Path) -> None:
        self.name = checked_name(name)
        self._root = root
        self._group = root / name
        self._vcpu = self._group / VCPU

    def create(self) -> None:
        """See ``Cgroup``; on an error nothing new stays behind but parents."""
        try:
            self._create()
        except (OSError, CgroupError) as error:
            self._remove_empty()
            raise CgroupError(f"cannot create control group {self.name}: {error}") from error

    def _create(self) -> None:
        parent = self._root
        for part in Path(self.name).parts:
            self._hand_down(parent, _WANTED)
            parent /= part
            parent.mkdir(exist_ok=True)
        self._vcpu.mkdir(exist_ok=True)
        kind = self._vcpu / "cgroup.type"
        if kind.read_text().strip() != "threaded":
            write(kind, "threaded")
        self._hand_down(self._group, ("cpu",))

    def _hand_down(self, group: Path, wanted: tuple[str, ...]) -> None:
        offered = (group / "cgroup.controllers").read_text().split()
        given = (group / "cgroup.subtree_control").read_text().split()
        for controller in wanted:
            if controller in offered and controller not in given:
                write(group / "cgroup.subtree_control", f"+{controller}")

    def remove(self) -> None:
        """See ``Cgroup``."""
        if not wait_until(self._remove_empty, _REMOVE_TIMEOUT):
            raise CgroupError(
                f"control group {self.name} is still in use by processes {list(self.pids())}",
                hint="stop them first",
            )

    def _remove_empty(self) -> bool:
        for group in (self._vcpu, self._group):
            try:
                group.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True

    def exists(self) -> bool:
        """See ``Cgroup``."""
        return self._group.is_dir()

    def add_process(self, pid: int) -> None:
        """See ``Cgroup``."""
        write(self._group / "cgroup.procs", str(pid))

    def add_vcpu_threads(self, thread_ids: Iterable[int]) -> None:
        """See ``Cgroup``."""
        for thread_id in thread_ids:
            write(self._vcpu / "cgroup.threads", str(thread_id))

    def _cpu_max(self) -> Path:
        path = self._vcpu / "cpu.max"
        if not path.exists():
            raise CgroupError(
                f"no processor controller for {self.name}",
                hint=f"its parents need +cpu in cgroup.subtree_control below {self._root}",
            )
        return path

    def set_quota(self, cores: float) -> None:
        """See ``Cgroup``."""
        quota, period = quota_and_period_us(cores)
        write(self._cpu_max(), f"{quota} {period}")

    def clear_quota(self) -> None:
        """See ``Cgroup``."""
        write(self._cpu_max(), "max")

    def quota(self) -> float | None:
        """See ``Cgroup``."""
        quota, period = self._cpu_max().read_text().split()
        return None if quota == "max" else int(quota) / int(period)

    def request_freeze(self) -> None:
        """See ``Cgroup``."""
        write(self._group / "cgroup.freeze", "1")

    def _event(self, name: str) -> bool:
        try:
            lines = (self._group / "cgroup.events").read_text().splitlines()
        except FileNotFoundError:
            return False
        return f"{name} 1" in lines

    def frozen(self) -> bool:
        """See ``Cgroup``."""
        return self._event("frozen")

    def freezes(self, pid: int) -> bool:
        """See ``Cgroup``."""
        return pid in self.pids()

    def _give_up(self, timeout: float) -> CgroupError:
        self.thaw()
        return CgroupError(f"control group {self.name} did not freeze within {timeout:g} s")

    def freeze_now(self, timeout: float = 1.0) -> None:
        """See ``Cgroup``."""
        self.request_freeze()
        if not wait_until(self.frozen, timeout):
            raise self._give_up(timeout)

    async def freeze(self, timeout: float = 1.0) -> None:
        """See ``Cgroup``; hears of it through inotify on ``cgroup.events``."""
        with PathWatch(self._group / "cgroup.events", mask=MODIFIED) as watch:
            self.request_freeze()
            try:
                async with asyncio.timeout(timeout):
                    while not self.frozen():
                        await watch.changed()
            except TimeoutError as error:
                raise self._give_up(timeout) from error

    def thaw(self) -> None:
        """See ``Cgroup``."""
        write(self._group / "cgroup.freeze", "0")

    def cpu_seconds(self) -> float:
        """See ``Cgroup``."""
        for line in (self._group / "cpu.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "usage_usec":
                return int(value) / 1e6
        raise CgroupError(f"the kernel tells no processor time for {self.name}")

    def pids(self) -> tuple[int, ...]:
        """See ``Cgroup``; the group lists its threaded children's processes too."""
        found: set[int] = set()
        for folder in (self._group, *(p for p in self._group.rglob("*") if p.is_dir())):
            if _is_threaded(folder):
                continue  # its cgroup.procs cannot be read; the group above lists them
            found.update(read_numbers(folder / "cgroup.procs"))
        return tuple(sorted(found - {0}))

    def kill_all(self, timeout: float = 5.0) -> None:
        """See ``Cgroup``; the kernel kills (from 5.14 on), frozen members too."""
        if not self.exists():
            return
        write(self._group / "cgroup.kill", "1")
        if not wait_until(lambda: not self._event("populated"), timeout):
            raise CgroupError(f"processes {list(self.pids())} of {self.name} do not die")


def _is_threaded(group: Path) -> bool:
    try:
        return (group / "cgroup.type").read_text().strip() == "threaded"
    except FileNotFoundError:
        return False
