"""What a guest says on its serial port, as the log of its host keeps it, and until when."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

from godwit.host.inotify import MODIFIED, PathWatch

from .cluster import Cluster


def log_of(cluster: Cluster, vm: str, host: str) -> Path:
    """The log of a VM's serial port on a host; there is none before its first start there."""
    return cluster.lab.root_of(host) / f"var/lib/godwit/vms/{vm}/console.log"


def length(cluster: Cluster, vm: str, host: str) -> int:
    """Bytes said there so far: what comes after them is new."""
    path = log_of(cluster, vm, host)
    return path.stat().st_size if path.exists() else 0


def said(cluster: Cluster, vm: str, host: str, *, after: int = 0) -> str:
    """What was said there after so many bytes."""
    path = log_of(cluster, vm, host)
    return path.read_bytes()[after:].decode(errors="replace") if path.exists() else ""


def await_said(
    cluster: Cluster, vm: str, host: str, wanted: str, *, after: int = 0, timeout: float = 60.0
) -> tuple[bool, str]:
    """Whether a VM that was started there says it in time (a regular expression), and its last
    words; each new piece of the log wakes us."""
    path = log_of(cluster, vm, host)

    def found() -> bool:
        return re.search(wanted, said(cluster, vm, host, after=after)) is not None

    good = asyncio.run(_until(path, found, timeout))
    return good, said(cluster, vm, host, after=after)[-160:]


async def _until(path: Path, found: Callable[[], bool], timeout: float) -> bool:
    with PathWatch(path, mask=MODIFIED) as watch:
        try:
            async with asyncio.timeout(timeout):
                while not found():
                    await watch.changed()
        except TimeoutError:
            return False
    return True
