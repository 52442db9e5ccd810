"""Syncs and mends an image that a daemon left without closing it, before another one serves it.

A new daemon's flush reaches only what it has written itself: QEMU skips a flush of a node that was
not written to. Writes which a dead daemon had acknowledged would stay in the cache of the disk or
the file server although the guest was told "flushed".

The sync runs as a process of its own: on a path that hangs it hangs in the kernel, and nobody but
it may wait there. So does the mending (`godwit.storage.mend`).
"""

from __future__ import annotations

import asyncio
from typing import Any

from godwit.host.errors import ProgramMissing
from godwit.host.process import kill, spawn, wait_exit
from godwit.model.errors import OperationFailed
from godwit.storage.mend import mend
from godwit.storage.nodes import BrokerDisk
from godwit.storage.remote import Child, Server

SETTLE_TIMEOUT = 10.0


async def settle(
    path: str, *, user: tuple[int, int] | None = None, timeout: float = SETTLE_TIMEOUT
) -> None:
    """Return when everything written to the file or device lies on its medium.

    OperationFailed when the path is dead, or hangs for ``timeout`` seconds; a sync that hangs is
    killed and left behind, it writes nothing that was not acknowledged.
    """
    try:
        process = spawn(["sync", "--data", path], user=user, env={"LC_ALL": "C.UTF-8"})
    except (ProgramMissing, OSError) as error:
        raise OperationFailed(f"cannot sync {path}: {error}") from error
    ending = asyncio.create_task(wait_exit(process), name=f"sync {path}")
    try:
        done, _ = await asyncio.wait({ending}, timeout=timeout)
        if done and ending.result() == 0:
            return
        what = "failed" if done else f"took longer than {timeout:g} s"
    finally:
        # The task goes on until the process is reaped, however long the kernel holds it.
        if not ending.done():
            kill(process)
            _REAPERS.add(ending)
            ending.add_done_callback(_REAPERS.discard)
    raise OperationFailed(
        f"the sync of {path} {what}",
        hint="the path to the storage is gone: bring it back, or redirect through another host",
    )


async def settle_disk(
    disk: BrokerDisk, *, user: tuple[int, int] | None = None, timeout: float = SETTLE_TIMEOUT
) -> None:
    """As `settle`, for a disk wherever it lies: a file server or a target is told to write.

    The image is mended after that, so nobody may have it open, here or elsewhere.
    """
    node = disk.served
    ask: dict[str, Any] = {}
    if node is None:
        await settle(disk.path, user=user, timeout=timeout)
        child, path = Child(Server(user=user)), disk.path
    elif node["driver"] == "rbd":
        return  # opened past librbd's cache: what it answered, Ceph has on its media
    elif node["driver"] == "nfs":
        folder, _, name = str(node["path"]).rpartition("/")
        child = Child(Server(str(node["server"]["host"]), folder or "/", user))
        path, ask = f"/{name}", {"op": "sync", "path": f"/{name}"}
    else:
        child, path = Child(Server(user=user)), ""
        words = {"portal": node["portal"], "target": node["target"], "lun": node["lun"]}
        ask = {"op": "flush-lun", "initiator": node["initiator-name"], **words}
    try:
        if ask:
            await child.ask(**ask, timeout=timeout)
        if path:
            await mend(disk, child, path, timeout=timeout)
    except OSError as error:
        raise OperationFailed(
            f"the sync of {disk.path} failed: {error.strerror or error}",
            hint="the path to the storage is gone: bring it back, or redirect through another host",
        ) from error
    finally:
        child.close()


_REAPERS: set[asyncio.Task[int | None]] = set()
