"""The files of a volume, whatever it stands on: one protocol, so that nobody else has to ask.

    DirectoryFiles  a directory of this host                      (dir, local)
    ServedFiles     an NFS export, through a helper process       (nfs; `godwit.storage.served`)
    NoFiles         LUNs: every question is refused in one line   (iscsi; there too)

Paths are those people see, below /clusterstorage. Failures of the storage are ``OSError``.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from godwit.host.files import sync_directory, write_durable

Node = dict[str, Any]

FILE_MODE = 0o600


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file or directory; sizes in bytes, ``mode`` as ``stat`` has it."""

    mode: int
    uid: int
    gid: int
    size: int
    allocated: int

    @property
    def is_file(self) -> bool:
        """A regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        """A directory."""
        return stat.S_ISDIR(self.mode)


class Channel(Protocol):
    """How QEMU writes or reads a file as a stream: by its name, or through a descriptor.

    ``uri`` as ``migrate`` takes it; with ``descriptor`` QEMU is given that one first, under the
    name in the uri, and our copy is closed then.
    """

    uri: str
    descriptor: int | None

    def passed(self) -> None:
        """QEMU has the descriptor."""
        ...

    async def done(self, *, timeout: float) -> None:
        """QEMU is through: what it wrote is whole and on the medium. OSError when it is not."""
        ...

    def stop(self) -> None:
        """Give it up; harmless after `done`."""
        ...


class VolumeFiles(Protocol):
    """What the agent does with a volume's files."""

    @property
    def locking(self) -> bool:
        """Whether qemu-img locks an image that it opens there."""
        ...

    def node(self, path: Path) -> Node | None:
        """QEMU's block node of the bytes there, unnamed; None for a file of this host."""
        ...

    def word(self, path: Path) -> str:
        """The file in a command line of ``qemu-img create`` or ``convert``."""
        ...

    async def look(self, path: Path) -> FileFacts | None:
        """What is there; None for nothing."""
        ...

    async def names(self, path: Path) -> list[str]:
        """What lies in a directory; nothing when there is none."""
        ...

    async def make_directories(self, path: Path) -> None:
        """A directory and all above it; fine when it is there."""
        ...

    async def create(self, path: Path) -> None:
        """A new, empty file for us alone; FileExistsError when the name is taken."""
        ...

    async def remove(self, path: Path) -> None:
        """Delete a file; fine when there is none."""
        ...

    async def remove_directory(self, path: Path) -> None:
        """Delete a directory if it is empty."""
        ...

    async def read(self, path: Path, offset: int, length: int) -> bytes:
        """Some bytes of a file; fewer only at its end."""
        ...

    async def write(self, path: Path, content: bytes, *, mode: int) -> None:
        """A small file, whole: a reader sees the old or the new one; durable."""
        ...

    async def patch(self, path: Path, offset: int, content: bytes) -> None:
        """Some bytes of a file that is there, which may become longer; durable."""
        ...

    async def sync(self, path: Path) -> None:
        """Whatever anybody wrote to the file, and its name, is on the medium."""
        ...

    async def bring(self, source: Path, path: Path) -> None:
        """Copy a file of this host into the volume under a name that is free or replaced."""
        ...

    async def fetch(self, path: Path, target: Path) -> Path:
        """The file as one of this host: itself where it is one, or a copy called ``target``."""
        ...

    async def write_through(self, path: Path, *, owner: tuple[int, int]) -> Channel:
        """Let QEMU write a new file, for its user alone."""
        ...

    async def read_through(self, path: Path) -> Channel:
        """Let QEMU read a file as a stream."""
        ...


class DirectoryFiles:
    """Files of this host: of a file system that is mounted here, shared or not."""

    def __init__(self, *, locking: bool = True) -> None:
        self.locking = locking

    def node(self, path: Path) -> Node | None:
        return None

    def word(self, path: Path) -> str:
        return str(path)

    async def look(self, path: Path) -> FileFacts | None:
        try:
            found = await asyncio.to_thread(path.stat)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileFacts(
            mode=found.st_mode,
            uid=found.st_uid,
            gid=found.st_gid,
            size=found.st_size,
            allocated=found.st_blocks * 512,
        )

    async def names(self, path: Path) -> list[str]:
        if not path.is_dir():
            return []
        return sorted(one.name for one in path.iterdir())

    async def make_directories(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    async def create(self, path: Path) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))

    async def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    async def remove_directory(self, path: Path) -> None:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()

    async def read(self, path: Path, offset: int, length: int) -> bytes:
        with path.open("rb") as stream:
            return os.pread(stream.fileno(), length, offset)

    async def write(self, path: Path, content: bytes, *, mode: int) -> None:
        await asyncio.to_thread(write_durable, path, content, mode)

    async def patch(self, path: Path, offset: int, content: bytes) -> None:
        await asyncio.to_thread(_patch, path, offset, content)

    async def sync(self, path: Path) -> None:
        await asyncio.to_thread(_sync, path)

    async def bring(self, source: Path, path: Path) -> None:
        await asyncio.to_thread(_copy, source, path)

    async def fetch(self, path: Path, target: Path) -> Path:
        return path

    async def write_through(self, path: Path, *, owner: tuple[int, int]) -> Channel:
        await self.make_directories(path.parent)
        await self.remove(path)
        await self.create(path)
        os.chown(path, *owner, follow_symlinks=False)
        return _Named(path, files=self)

    async def read_through(self, path: Path) -> Channel:
        return _Named(path)


LOCAL = DirectoryFiles()


class _Named:
    """QEMU opens the file by itself."""

    descriptor: int | None = None

    def __init__(self, path: Path, *, files: VolumeFiles | None = None) -> None:
        self.uri = f"file:{path}"
        self._path = path
        self._files = files

    def passed(self) -> None:
        return

    async def done(self, *, timeout: float) -> None:
        if self._files is not None:
            await self._files.sync(self._path)

    def stop(self) -> None:
        return


def _patch(path: Path, offset: int, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        done = 0
        while done < len(content):
            done += os.pwrite(descriptor, content[done:], offset + done)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def _copy(source: Path, path: Path) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream, source.open("rb") as origin:
            while piece := origin.read(1 << 20):
                stream.write(piece)
            stream.flush()
            os.fchmod(stream.fileno(), 0o444)
            os.fsync(stream.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    sync_directory(path.parent)
