"""What a guard knows and the next one needs: kept in /run, where it lives as long as the VMs do.

Not forced to the disk: it has to survive the end of the guard, not that of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from godwit.host.files import load_json

_T = TypeVar("_T")


@dataclass(frozen=True)
class NotedVm:
    """A registered QEMU; see ``socket`` for the words."""

    vm: str
    pid: int
    start_time: int
    monitor: str
    epoch: int
    ha: bool
    deadline: bool
    cgroup: str


@dataclass(frozen=True)
class Notes:
    """All of it. Times are CLOCK_BOOTTIME of the boot named."""

    boot_id: str
    renewed_at: float | None
    counts_from: float | None
    number: int
    vms: tuple[NotedVm, ...]

    def save(self, path: Path) -> None:
        """Replace the file; a reader sees the old one or the new one."""
        fresh = path.with_name(f".{path.name}.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(asdict(self), stream)
        fresh.replace(path)


def _known(kind: type[_T], found: dict[str, Any]) -> _T:
    """A note without what only a newer guard knows; TypeError when something is missing.

    What a later version adds needs a default, for notes of the guard before it.
    """
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in found.items() if name in names})


def load(path: Path, *, boot_id: str) -> Notes | None:
    """What the guard before knew; None when there was none in this boot, or it cannot be read."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
        found = load_json(path)
        if isinstance(found, dict) and found["boot_id"] == boot_id:
            vms = tuple(_known(NotedVm, entry) for entry in found["vms"])
            return _known(Notes, {**found, "vms": vms})
    return None


def noted_epoch(run: Path, *, pid: int) -> int | None:
    """The epoch that the agent last noted for this QEMU in ``runtime.json``; None when unknown.

    A copy that was given back got a new one while it ran.
    """
    with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
        found = load_json(run / "runtime.json")
        if isinstance(found, dict) and found["pid"] == pid:
            return int(found["epoch"])
    return None
