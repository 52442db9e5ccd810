"""Is the way from this host to a volume open? A bounded question, whatever hangs on the way.

A directory is asked by a process that may be killed: a mount of a dead server hangs in the kernel.
What is served over the network is asked by `godwit.storage.served_paths`.
"""

from __future__ import annotations

from pathlib import Path

from godwit.model.base import Record
from godwit.model.volume import SERVED, Volume
from godwit.storage.places import Access
from godwit.storage.remote import Child, Server


class PathProbe(Record):
    """What one look at a volume found. Sizes in bytes, None where nobody can tell.

    ``hung``: there was no answer in time. ``firm`` False: perhaps because this machine was slow
    and not the path. ``identity`` names the volume itself.
    """

    ok: bool
    reason: str = ""
    capacity_bytes: int | None = None
    used_bytes: int | None = None
    identity: str = ""
    hung: bool = False
    firm: bool = True


async def probe(
    volume: Volume, timeout: float, *, root: Path, host: str, access: Access | None = None
) -> PathProbe:
    """Look once, with a process of its own."""
    if volume.kind in SERVED:
        from godwit.storage.served_paths import ServedProber

        prober = ServedProber(volume, access or Access(), host)
        try:
            return await prober.probe(timeout)
        finally:
            await prober.close()
    child = Child(Server())
    try:
        found = await child.ask("directory", timeout=timeout, path=str(root / volume.name))
    except OSError as error:
        hung = isinstance(error, TimeoutError)
        return PathProbe(ok=False, hung=hung, reason=f"{volume.name}: {error.strerror or error}")
    finally:
        child.close()
    return PathProbe(ok=True, capacity_bytes=found["capacity"], used_bytes=found["used"])
