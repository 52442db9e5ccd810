"""Is the way from this host to a volume open? A bounded question, whatever hangs on the way.

dir, local  statvfs in a process that may be killed: a mount of a dead server hangs in the kernel
nfs         GETATTR and FSSTAT of the export, through libnfs
iscsi       login, TEST UNIT READY and READ CAPACITY of every LUN, through libiscsi
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from godwit.model.disks import CLUSTER_STORAGE
from godwit.model.volume import Volume
from godwit.storage.places import Access, portal
from godwit.storage.remote import ASK_S, Child, Server

PROBE_S: Final = 3.0


async def list_luns(volume: Volume, access: Access, *, timeout: float = ASK_S) -> dict[int, int]:
    """The sizes of an iscsi volume's LUNs that are disks; OSError when its target cannot say."""
    child = Child(Server(user=access.user))
    try:
        return await _luns(child, volume, access, timeout)
    finally:
        child.close()


async def _luns(child: Child, volume: Volume, access: Access, timeout: float) -> dict[int, int]:
    found = await child.ask(
        "luns",
        timeout=timeout,
        portal=portal(volume),
        target=volume.target,
        initiator=access.initiator,
    )
    return {int(lun): int(size) for lun, size in found.items()}


@dataclass(frozen=True, slots=True)
class PathProbe:
    """What was found. ``reason`` is empty when the path is open. Sizes in bytes.

    ``used_bytes`` is None where nobody can tell: what is on a LUN is its user's secret.
    """

    ok: bool
    reason: str = ""
    capacity_bytes: int | None = None
    used_bytes: int | None = None


async def probe(
    volume: Volume,
    timeout: float = PROBE_S,
    *,
    access: Access = Access(),  # noqa: B008 - frozen
    root: str = CLUSTER_STORAGE,
) -> PathProbe:
    """Ask anew, with a process of its own; answers within ``timeout`` seconds in any case."""
    if volume.kind == "nfs":
        child = Child(Server(volume.server, volume.export, access.user))
    else:
        child = Child(Server(user=access.user))
    try:
        if volume.kind == "iscsi":
            found = await _luns(child, volume, access, timeout)
            return PathProbe(ok=True, capacity_bytes=sum(found.values()))
        if volume.kind == "nfs":
            found = await child.ask("space", timeout=timeout)
        else:
            found = await child.ask("directory", timeout=timeout, path=f"{root}/{volume.name}")
        return PathProbe(ok=True, capacity_bytes=found["capacity"], used_bytes=found["used"])
    except OSError as error:
        return PathProbe(ok=False, reason=f"{volume.name}: {error.strerror or error}")
    finally:
        child.close()
