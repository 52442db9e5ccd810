"""The files of volumes that are served over the storage network; see `godwit.storage.files`."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Final

from godwit.model.errors import Refused
from godwit.model.volume import Volume
from godwit.storage.files import FILE_MODE, Channel, FileFacts, Node
from godwit.storage.places import Access, image_word, served_node, within
from godwit.storage.remote import Child, Server, Transfer

DIRECTORY_MODE: Final = 0o755
COPY_S: Final = 3600.0
STREAM_FD: Final = "godwit-memory"


class ServedFiles:
    """An NFS export, used as QEMU's user uses it: whom a file is for is not ours to choose."""

    def __init__(self, volume: Volume, access: Access) -> None:
        self._volume = volume
        self._access = access
        self._server = Server(volume.server, volume.export, access.user)
        self._child = Child(self._server)

    @property
    def locking(self) -> bool:
        return False  # no client of QEMU's own knows locks

    def node(self, path: Path) -> Node | None:
        return served_node(self._volume, str(path), self._access)

    def word(self, path: Path) -> str:
        return image_word(self._volume, str(path), self._access)

    async def look(self, path: Path) -> FileFacts | None:
        found = await self._child.ask("stat", path=self._at(path))
        return None if found is None else FileFacts(**found)

    async def names(self, path: Path) -> list[str]:
        return [str(name) for name in await self._child.ask("names", path=self._at(path))]

    async def make_directories(self, path: Path) -> None:
        await self._child.ask("make-directories", path=self._at(path), mode=DIRECTORY_MODE)

    async def create(self, path: Path) -> None:
        await self._child.ask("create", path=self._at(path), mode=FILE_MODE)

    async def remove(self, path: Path) -> None:
        await self._child.ask("remove", path=self._at(path))

    async def remove_directory(self, path: Path) -> None:
        await self._child.ask("remove-directory", path=self._at(path))

    async def read(self, path: Path, offset: int, length: int) -> bytes:
        got = await self._child.ask("read", path=self._at(path), offset=offset, length=length)
        return base64.b64decode(got)

    async def write(self, path: Path, content: bytes, *, mode: int) -> None:
        text = base64.b64encode(content).decode()
        await self._child.ask("write", path=self._at(path), content=text, mode=mode)

    async def patch(self, path: Path, offset: int, content: bytes) -> None:
        text = base64.b64encode(content).decode()
        await self._child.ask("patch", path=self._at(path), content=text, offset=offset)

    async def sync(self, path: Path) -> None:
        await self._child.ask("sync", path=self._at(path))

    async def bring(self, source: Path, path: Path) -> None:
        passing = f"{self._at(path)}.new"
        await self._child.ask("remove", path=passing)
        with source.open("rb") as stream:
            await Transfer.push(self._server, passing, stream.fileno()).done(timeout=COPY_S)
        await self._child.ask("rename", path=passing, to=self._at(path))

    async def fetch(self, path: Path, target: Path) -> Path:
        with target.open("wb") as stream:
            pulling = Transfer.pull(self._server, self._at(path), stream.fileno())
            try:
                await pulling.done(timeout=COPY_S)
            except BaseException:
                pulling.stop()
                target.unlink(missing_ok=True)
                raise
        return target

    async def write_through(self, path: Path, *, owner: tuple[int, int]) -> Channel:
        await self.make_directories(path.parent)
        await self.remove(path)
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            transfer = Transfer.push(self._server, self._at(path), reading)
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        return _Piped(transfer, writing)

    async def read_through(self, path: Path) -> Channel:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            transfer = Transfer.pull(self._server, self._at(path), writing)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return _Piped(transfer, reading)

    def close(self) -> None:
        """End the helper process."""
        self._child.close()

    def _at(self, path: Path) -> str:
        return within(self._volume, str(path))


class NoFiles:
    """A volume of LUNs or of a Ceph pool's images: it has nodes, and no files at all."""

    def __init__(self, volume: Volume, access: Access) -> None:
        self._volume = volume
        self._access = access

    @property
    def locking(self) -> bool:
        return False  # no client of QEMU's own knows locks

    def node(self, path: Path) -> Node | None:
        return served_node(self._volume, str(path), self._access)

    def word(self, path: Path) -> str:
        raise self._refusal()

    async def look(self, path: Path) -> FileFacts | None:
        raise self._refusal()

    async def names(self, path: Path) -> list[str]:
        raise self._refusal()

    async def make_directories(self, path: Path) -> None:
        raise self._refusal()

    async def create(self, path: Path) -> None:
        raise self._refusal()

    async def remove(self, path: Path) -> None:
        raise self._refusal()

    async def remove_directory(self, path: Path) -> None:
        raise self._refusal()

    async def read(self, path: Path, offset: int, length: int) -> bytes:
        raise self._refusal()

    async def write(self, path: Path, content: bytes, *, mode: int) -> None:
        raise self._refusal()

    async def patch(self, path: Path, offset: int, content: bytes) -> None:
        raise self._refusal()

    async def sync(self, path: Path) -> None:
        raise self._refusal()

    async def bring(self, source: Path, path: Path) -> None:
        raise self._refusal()

    async def fetch(self, path: Path, target: Path) -> Path:
        raise self._refusal()

    async def write_through(self, path: Path, *, owner: tuple[int, int]) -> Channel:
        raise self._refusal()

    async def read_through(self, path: Path) -> Channel:
        raise self._refusal()

    def close(self) -> None:
        """Nothing is open."""

    def _refusal(self) -> Refused:
        return Refused(
            f"{self._volume.name} is of kind {self._volume.kind} and holds no files",
            hint="name another volume for it",
        )


class _Piped:
    """QEMU has one end of a pipe, a helper process the other."""

    def __init__(self, transfer: Transfer, descriptor: int) -> None:
        self.uri = f"fd:{STREAM_FD}"
        self.descriptor: int | None = descriptor
        self._transfer = transfer

    def passed(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    async def done(self, *, timeout: float) -> None:
        self.passed()  # the helper hears of the end only when nobody holds it
        await self._transfer.done(timeout=timeout)

    def stop(self) -> None:
        self.passed()
        self._transfer.stop()
