"""Control groups of VMs: one group per VM, a sub-group ``vcpu`` for its vCPU threads.

``Cgroup`` is the face; ``cgroup_v1`` and ``cgroup_v2`` implement it.  :func:`open_cgroup` takes
the one this machine has.  The processor quota sits on ``vcpu`` alone, so that a throttled guest
never slows the migration thread of its own QEMU; the freezer takes the whole VM.

Version 1 wins when a ``cpu`` controller of version 1 is mounted: a controller serves only one
version at a time, so on such a (hybrid) machine version 2 has none to offer.

Numbers of processes and threads are those of the caller's PID namespace.  Names are paths below
the controller's root, like ``godwit/host1/web``; missing parents are created, and stay.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from godwit.host.errors import CgroupError

CGROUP_ROOT = Path("/sys/fs/cgroup")
VCPU = "vcpu"

# The kernel takes quotas from 1 ms and periods up to 1 s.  A short period keeps the throttled
# guest answering: it stands still for less than one period at a time.
_SHORTEST_QUOTA_US = 1_000
_SHORTEST_PERIOD_US = 10_000
_LONGEST_PERIOD_US = 1_000_000

_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


class Cgroup(Protocol):
    """The control group of one VM (or of a whole host of a lab)."""

    name: str
    version: int

    def create(self) -> None:
        """Make the group and its ``vcpu`` sub-group; fine when they exist."""

    def remove(self) -> None:
        """Remove the group, waiting briefly for dying members; CgroupError when some live."""

    def exists(self) -> bool:
        """Whether any part of the group is there."""

    def add_process(self, pid: int) -> None:
        """Move a process with all its threads into the group."""

    def add_vcpu_threads(self, thread_ids: Iterable[int]) -> None:
        """Move threads of a member process under the processor quota."""

    def set_quota(self, cores: float) -> None:
        """Let all vCPU threads together use at most this many cores (0.5 = half of one)."""

    def clear_quota(self) -> None:
        """Let the vCPU threads use what they can get."""

    def quota(self) -> float | None:
        """The quota in cores as the kernel has it, None when there is none."""

    def request_freeze(self) -> None:
        """Ask for a freeze without waiting for it."""

    def frozen(self) -> bool:
        """Whether every thread of the group stands still."""

    def freezes(self, pid: int) -> bool:
        """Whether a freeze of the group would hold this process."""

    def freeze_now(self, timeout: float = 1.0) -> None:
        """Freeze and block until it holds; CgroupError after ``timeout`` (then thawed)."""

    async def freeze(self, timeout: float = 1.0) -> None:
        """Freeze and wait until it holds; CgroupError after ``timeout`` (then thawed)."""

    def thaw(self) -> None:
        """Let a frozen group go on."""

    def cpu_seconds(self) -> float:
        """Processor time used by the group so far."""

    def pids(self) -> tuple[int, ...]:
        """Processes in the group and below that our PID namespace can name."""

    def kill_all(self, timeout: float = 5.0) -> None:
        """Kill every process of the group, frozen or not, until none is left."""


@dataclass(frozen=True, slots=True)
class CgroupFacts:
    """What control groups this machine offers."""

    version: int
    root: Path
    controllers: tuple[str, ...]


def detect(root: Path = CGROUP_ROOT) -> CgroupFacts:
    """Which version serves the processor controller, and what else is there.

    Raises CgroupError when neither version is mounted.
    """
    if (root / "cpu" / "cgroup.procs").exists():
        names = sorted(
            entry.name
            for entry in root.iterdir()
            if "," not in entry.name
            and (entry / "tasks").exists()
            and not (entry / "cgroup.controllers").exists()
        )
        return CgroupFacts(1, root, tuple(names))
    for candidate in (root, root / "unified"):
        listed = candidate / "cgroup.controllers"
        if listed.exists():
            return CgroupFacts(2, candidate, tuple(listed.read_text().split()))
    raise CgroupError(
        f"no control groups are mounted at {root}", hint=f"mount -t cgroup2 none {root}"
    )


def open_cgroup(name: str, *, facts: CgroupFacts | None = None) -> Cgroup:
    """The group of this name in the version this machine has; nothing is created yet."""
    found = facts or detect()
    if found.version == 1:
        from godwit.host.cgroup_v1 import CgroupV1

        return CgroupV1(name, found.root)
    from godwit.host.cgroup_v2 import CgroupV2

    return CgroupV2(name, found.root)


def checked_name(name: str) -> str:
    """The name itself, or CgroupError when it could leave the tree."""
    if not _NAME.fullmatch(name) or {"..", "."} & set(name.split("/")):
        raise CgroupError(f"{name!r} cannot name a control group")
    return name


def quota_and_period_us(cores: float) -> tuple[int, int]:
    """Quota and period in microseconds for a number of cores, with the shortest period allowed.

    Raises CgroupError when the kernel cannot express so little (under 1 ms a second).
    """
    if not cores > 0 or math.isinf(cores):
        raise CgroupError(f"a processor quota of {cores:g} cores makes no sense")
    period = max(_SHORTEST_PERIOD_US, math.ceil(_SHORTEST_QUOTA_US / cores))
    if period > _LONGEST_PERIOD_US:
        raise CgroupError(f"a processor quota of {cores:g} cores is less than the kernel can give")
    return max(_SHORTEST_QUOTA_US, round(cores * period)), period


def write(path: Path, value: str) -> None:
    """Write one value to a control file, in one system call, as the kernel wants it."""
    try:
        with path.open("wb", buffering=0) as stream:
            stream.write(value.encode())
    except OSError as error:
        raise CgroupError(f"writing {value!r} to {path}: {error.strerror}") from error


def read_numbers(path: Path) -> list[int]:
    """Numbers in a control file, one a line; empty when the group is gone."""
    try:
        return [int(word) for word in path.read_text().split()]
    except FileNotFoundError:
        return []


def wait_until(true: Callable[[], bool], timeout: float) -> bool:
    """Block until something holds that the kernel gives no event for; False at the timeout."""
    until = time.monotonic() + timeout
    pause = 0.0002
    while not true():
        if time.monotonic() >= until:
            return False
        time.sleep(pause)
        pause = min(pause * 2, 0.02)
    return True
