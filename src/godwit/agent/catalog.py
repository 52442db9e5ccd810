"""The volumes this host knows, and how it reaches what lies in them.

A directory below the volumes' root is a volume without anybody saying so; what is served over the
network is known by its record alone. Everything that depends on the kind is asked of
`godwit.storage`; this room only finds the record.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from godwit.agent.facts import seen_volumes
from godwit.model import keys
from godwit.model.disks import volume_of
from godwit.model.errors import NotFound, OperationFailed, Refused
from godwit.model.vm import Disk, Vm
from godwit.model.volume import SERVED, Volume
from godwit.storage.files import DirectoryFiles, VolumeFiles
from godwit.storage.places import Access, Node, initiator_name, served_node
from godwit.storage.served import NoFiles, ServedFiles
from godwit.store.errors import StoreError
from godwit.store.looking import looks
from godwit.store.records import decode
from godwit.wire.identity import CA_FILE

if TYPE_CHECKING:
    from godwit.agent.desk import Desk  # it owns these volumes

_log = logging.getLogger("agent")
_RETRY_S = 1.0
_HASH_DIGITS = 64


class Catalog:
    """Follows the volume records. Belongs to the agent's event loop."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._known: dict[str, Volume] = {}
        self._served: dict[str, ServedFiles | NoFiles] = {}
        self._listing: asyncio.Task[tuple[str, ...]] | None = None
        self.local = DirectoryFiles(locking=desk.config.qemu.image_locks)
        self.access = Access(
            user=desk.equipment.binary.user,
            initiator=initiator_name(_cluster_mark(desk.config.tls.dir), desk.host),
            ceph_conf=str(desk.config.storage.ceph_conf),
        )

    async def serve(self) -> None:
        """Look once, then at every change, for ever."""
        store = self._desk.records.store
        while True:
            try:
                async with contextlib.aclosing(looks(store, keys.VOLUMES)) as times:
                    async for _ in times:
                        await self.sync()
            except StoreError as error:
                _log.warning("volumes: %s", error)
                await self._desk.clock.sleep(_RETRY_S)

    async def sync(self) -> None:
        """Read the records, and tell the cluster which volumes this host has now."""
        found: dict[str, Volume] = {}
        for kv in (await self._desk.records.store.range(keys.VOLUMES)).kvs:
            try:
                volume = decode(kv, Volume).value
            except ValueError as error:  # of a newer Godwit: that one volume is not for us
                _log.warning("%s: %s", kv.key, error)
                continue
            found[volume.name] = volume
        for name, files in list(self._served.items()):
            before, after = self._known.get(name), found.get(name)
            if before is None or after is None or before.beneath != after.beneath:
                files.close()
                del self._served[name]
        self._known = found
        await self._desk.publish_host()

    async def names(self) -> tuple[str, ...]:
        """All volumes of this host.

        Directories are listed beside the event loop, and by one thread however many ask: a file
        system that hangs below them must not hold the agent. Then this does not return; it may be
        cancelled.
        """
        if self._listing is None:
            work = asyncio.to_thread(seen_volumes, self._desk.config.paths.volumes)
            self._listing = asyncio.create_task(work, name="volumes: listed")
            self._listing.add_done_callback(self._listed)
        seen = await asyncio.shield(self._listing)
        served = {name for name, volume in self._known.items() if volume.kind in SERVED}
        return tuple(sorted({*seen, *served}))

    def _listed(self, _task: asyncio.Task[tuple[str, ...]]) -> None:
        self._listing = None

    def get(self, name: str) -> Volume:
        """The volume's record; a plain directory when there is none."""
        return self._known.get(name) or Volume(name=name)

    def files(self, name: str) -> VolumeFiles:
        """The files of a volume, whatever it stands on."""
        volume = self.get(name)
        if volume.kind not in SERVED:
            return self.local
        if name not in self._served:
            kind = ServedFiles if volume.kind == "nfs" else NoFiles
            self._served[name] = kind(volume, self.access)
        return self._served[name]

    def files_at(self, path: str | Path) -> VolumeFiles:
        """The files of the volume a path lies in."""
        name = volume_of(str(path))
        return self.local if name is None else self.files(name)

    def served(self, disks: Iterable[Disk]) -> dict[str, Node]:
        """By disk, QEMU's nodes of those that no host has a file or a device of."""
        found = {}
        for disk in disks:
            if disk.volume and (volume := self.get(disk.volume)).kind in SERVED:
                node = served_node(volume, disk.path, self.access)
                if node is not None:
                    found[disk.id] = node
        return found

    def check_inside(self, path: Path, volume: str) -> Path:
        """The path itself; NotFound or Refused unless it lies in that volume of this host."""
        root = self._desk.config.paths.volumes / volume
        if self.get(volume).kind not in SERVED and not root.is_dir():
            raise NotFound(f"{self._desk.host} does not see volume {volume}", hint="mount it")
        if root not in path.parents or ".." in path.parts:
            raise Refused(f"{path} is outside of volume {volume}", hint="correct the record")
        return path

    # Boot files: QEMU reads kernel and initrd as files of this host.

    def boot(self, vm: Vm) -> dict[str, str]:
        """By path, where this host keeps its copy of a boot file that lies on a served volume."""
        paths = [path for path in (vm.boot.kernel, vm.boot.initrd) if path]
        return {path: str(self._kept(path)) for path in paths if self._is_served(path)}

    async def fetch_boot(self, vm: Vm) -> None:
        """Have the copies of its boot files here. They are what their names say, or refused."""
        for path, kept in self.boot(vm).items():
            if not Path(kept).exists():
                await self._fetch(path, Path(kept))

    async def _fetch(self, path: str, kept: Path) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        passing = kept.with_name(f".{kept.name}.{os.getpid()}")
        try:
            await self.files_at(path).fetch(Path(path), passing)
            if await asyncio.to_thread(_sha256, passing) != kept.name:
                raise OperationFailed(f"{path} is damaged", hint="upload it again")
            passing.chmod(0o444)
            passing.replace(kept)
        except OSError as error:
            raise OperationFailed(
                f"cannot read {path}: {error.strerror}", hint="see: godwit volume list"
            ) from error
        finally:
            passing.unlink(missing_ok=True)

    def _is_served(self, path: str) -> bool:
        name = volume_of(path)
        return name is not None and self.get(name).kind in SERVED

    def _kept(self, path: str) -> Path:
        name = Path(path).name
        if len(name) != _HASH_DIGITS or set(name) - set("0123456789abcdef"):
            raise Refused(
                f"{path} lies on a volume that QEMU cannot read boot files from",
                hint="upload it, so that its name is its hash",
            )
        return self._desk.config.paths.state / "boot" / name

    def close(self) -> None:
        """End the helper processes."""
        for files in self._served.values():
            files.close()


def _cluster_mark(tls: Path) -> str:
    """Something short that all hosts of a cluster have in common, and no other cluster."""
    try:
        return hashlib.sha256((tls / CA_FILE).read_bytes()).hexdigest()[:12]
    except OSError:
        return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
