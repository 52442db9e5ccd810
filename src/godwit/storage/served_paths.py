"""Looks at volumes that are served over the network: does this host reach them, right now?

    nfs    a real write, COMMIT and read of a file of this host's below ``.godwit``, and the sizes
    iscsi  login, TEST UNIT READY and READ CAPACITY of every LUN; never a write: all is the guests'
    rbd    an object of the pool, and how much room the cluster has; never a write, for that reason

As `godwit.storage.paths` asks it of a directory, in a process that may be killed. Nothing of it
hangs in the kernel, so one that was killed is gone, and the next look starts another one.
"""

from __future__ import annotations

from typing import Final

from godwit.model.errors import InvalidRequest
from godwit.model.volume import SERVED, Volume
from godwit.storage.paths import PathProbe
from godwit.storage.places import Access, portal, rbd_pool
from godwit.storage.remote import ASK_S, Child, Server

START_S: Final = 10.0


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


async def rbd_size(volume: Volume, image: str, access: Access, *, timeout: float = ASK_S) -> int:
    """The bytes of an rbd volume's image; OSError when Ceph cannot say, or there is none."""
    child = Child(Server(user=access.user))
    try:
        where = _pool_words(volume, access)
        return int(await child.ask("rbd-size", timeout=timeout, image=image, **where))
    finally:
        child.close()


def _pool_words(volume: Volume, access: Access) -> dict[str, str]:
    pool, namespace = rbd_pool(volume)
    return {
        "pool": pool,
        "namespace": namespace,
        "client": volume.client,
        "conf": access.ceph_conf,
    }


class ServedProber:
    """Looks at one served volume, again and again; ``host`` names this host's own file there."""

    def __init__(self, volume: Volume, access: Access, host: str) -> None:
        if volume.kind not in SERVED:
            raise InvalidRequest(f"{volume.name} is not served over the network")
        self._volume = volume
        self._access = access
        self._host = host
        self._child = Child(Server(volume.server, volume.export, access.user))

    async def probe(self, timeout: float, *, identity: str = "") -> PathProbe:
        """One look, answered within ``timeout`` seconds once its process is there."""
        volume = self._volume
        ours = f"{volume.kind}:{volume.server}{volume.export}{volume.portal}:{volume.target}"
        if volume.kind == "rbd":
            ours = f"rbd:{volume.pool}"
        if identity not in ("", ours):
            return PathProbe(ok=False, reason=f"{volume.name} is another one now: {ours}")
        try:
            await self._child.ask("ready", timeout=START_S)
        except OSError as error:
            why = f"nobody could look at {volume.name}: {error.strerror or error}"
            return PathProbe(ok=False, firm=False, reason=why)
        try:
            if volume.kind == "iscsi":
                sizes = await _luns(self._child, volume, self._access, timeout)
                return PathProbe(ok=True, capacity_bytes=sum(sizes.values()), identity=ours)
            if volume.kind == "rbd":
                where = _pool_words(volume, self._access)
                found = await self._child.ask("rbd-space", timeout=timeout, **where)
            else:
                found = await self._child.ask("look", timeout=timeout, name=self._host)
        except TimeoutError as error:
            return PathProbe(ok=False, hung=True, reason=f"{volume.name}: {error.strerror}")
        except OSError as error:
            return PathProbe(ok=False, reason=f"{volume.name}: {error.strerror or error}")
        return PathProbe(
            ok=True,
            capacity_bytes=found["capacity"],
            used_bytes=found["used"],
            identity=ours,
        )

    async def close(self) -> None:
        """End its process."""
        self._child.close()
