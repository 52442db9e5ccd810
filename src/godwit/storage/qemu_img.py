"""Runs qemu-img: images as descriptors, its words as one line, its progress as a number.

An image is given to qemu-img as a descriptor that we opened (``/proc/self/fd/N``) and as an exact
block node, so nothing depends on which directories its user may enter, no name can be swapped
under it, no format is guessed and no backing file is followed that was not named here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from godwit.host.errors import HostError, ProgramFailed, ProgramTimedOut
from godwit.host.run import Limits, run_async
from godwit.model.errors import Conflict, NotFound, OperationFailed, Refused
from godwit.qemu.launch import Binary
from godwit.storage.formats import FORMATS, SourceFormat

QEMU_IMG: Final = Binary("qemu-img")
"""qemu-img as ourselves, for images that Godwit made."""

INFO_TIMEOUT: Final = 60.0
GIB: Final = 1 << 30
NOT_SUPPORTED: Final = 63
"""qemu-img's status for a check that the format does not have."""

Progress = Callable[[float], None]
"""Hears how much is done, from 0 to 1."""

_PERCENT: Final = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")
_ENDS: Final = {
    -signal.SIGXFSZ: "it grew larger than it may",
    -signal.SIGXCPU: "it took more processor time than it may",
    -signal.SIGKILL: "it was killed; was memory short?",
    -signal.SIGABRT: "it gave up; it may have asked for more memory than it may take",
}


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An image we hold open. ``size``: how much of it is the guest's, when it is opened as raw.

    ``base`` is the image under it, for one that Godwit itself put on another. Without ``locking``
    qemu-img neither asks for QEMU's image lock nor takes it. One that is served over the network
    is open to nobody: ``served`` leads to it, and ``length`` is its file's.
    """

    path: Path
    format: SourceFormat
    descriptor: int = -1
    size: int | None = None
    base: OpenImage | None = None
    served: Mapping[str, Any] | None = None
    length: int = 0
    allocated: int = 0
    locking: bool = True

    def node(self) -> dict[str, Any]:
        """The block node, as qemu-img takes it after ``json:``."""
        file = file_node(self.file_name(), locking=self.locking)
        if self.served is not None:
            file = dict(self.served)
        if self.size is not None:
            return {"driver": "raw", "offset": 0, "size": self.size, "file": file}
        node: dict[str, Any] = {"driver": FORMATS[self.format].driver, "file": file}
        if FORMATS[self.format].can_lead:
            node["backing"] = None if self.base is None else self.base.node()
        return node

    def file_name(self) -> str:
        """The descriptor as a file."""
        return f"/proc/self/fd/{self.descriptor}"

    def bytes_long(self) -> int:
        """Length of the file."""
        return self.length if self.served is not None else os.fstat(self.descriptor).st_size

    def bytes_allocated(self) -> int:
        """What the file takes of its volume."""
        if self.served is not None:
            return self.allocated
        return os.fstat(self.descriptor).st_blocks * 512

    def name(self) -> str:
        """The image as a word of qemu-img's command line."""
        return "json:" + json.dumps(self.node(), separators=(",", ":"))

    def chain(self) -> Iterator[OpenImage]:
        """This image and those under it."""
        yield self
        if self.base is not None:
            yield from self.base.chain()


def file_node(name: str, *, locking: bool) -> dict[str, Any]:
    """The node of a file of this host."""
    node: dict[str, Any] = {"driver": "file", "filename": name}
    return node if locking else node | {"locking": "off"}


class ProgressReader:
    """Finds the percentage in what ``qemu-img -p`` prints, piece by piece."""

    def __init__(self, progress: Progress) -> None:
        """``progress`` hears each new value, never a smaller one."""
        self._progress = progress
        self._rest = b""
        self._last = -1.0

    def feed(self, piece: bytes) -> None:
        """Take what was printed since the last call; a number may be cut in two."""
        text = self._rest + piece
        end = 0
        for match in _PERCENT.finditer(text):
            end = match.end()
            value = min(1.0, float(match[1]) / 100)
            if value > self._last:
                self._last = value
                self._progress(value)
        self._rest = text[end:][-64:]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file, for reading; NotFound or Refused when it is none."""
    try:
        # Not to wait for the writer of a pipe that lies there.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}", hint="is it on this host?") from None
    except OSError as error:
        raise OperationFailed(f"cannot open {path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Refused(f"{path} is not a file", hint="name an image")
        yield descriptor
    finally:
        os.close(descriptor)


def work_limits(data_bytes: int, *, file_bytes: int = 0) -> Limits:
    """Limits for reading an image with so many bytes of data, and writing ``file_bytes``.

    A slow processor converts 100 MiB in a second; 10 leaves room.
    """
    seconds = 120 + data_bytes // (10 << 20)
    return Limits(memory_bytes=8 * GIB, cpu_seconds=seconds, file_bytes=file_bytes)


INFO_LIMITS: Final = Limits(memory_bytes=2 * GIB, cpu_seconds=20, file_bytes=0)


async def qemu_img(
    tool: Binary,
    words: Sequence[str],
    *,
    images: Sequence[OpenImage],
    limits: Limits | None,
    timeout: float,
    descriptors: Sequence[int] = (),
    progress: Progress | None = None,
) -> bytes:
    """Run qemu-img as ``tool`` says and return what it printed.

    ``images`` are those whose `OpenImage.name` is among the words, ``descriptors`` others it
    inherits. Raises ProgramFailed and other HostErrors; `explain` makes them fit for people.
    """
    chain = [one for image in images for one in image.chain()]
    heard = None if progress is None else ProgressReader(progress).feed
    # Each thread would reserve address space for a heap of its own, and its limit is on that.
    env = tool.environment() | {"MALLOC_ARENA_MAX": "2"}
    return await run_async(
        [tool.path, *words],
        timeout=timeout,
        env=env,
        cwd="/",
        user=tool.user,
        limits=limits,
        pass_fds=[*(one.descriptor for one in chain if one.served is None), *descriptors],
        on_output=heard,
    )


def explain(error: HostError, *images: OpenImage, names: Sequence[tuple[str, Path]] = ()) -> str:
    """qemu-img's own words in one line, with paths for what it knows by descriptor."""
    if isinstance(error, ProgramTimedOut):
        return f"it took longer than {error.timeout:g} s"
    if not isinstance(error, ProgramFailed):
        return error.message
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    if not lines:
        return _ENDS.get(error.returncode, f"qemu-img ended with status {error.returncode}")
    if error.returncode in _ENDS:
        return f"{_ENDS[error.returncode]} ({lines[-1][:200]})"
    text = lines[0].removeprefix("qemu-img: ")
    for image in images:
        for one in image.chain():
            text = text.replace(one.name(), str(one.path))
            if one.served is None:
                text = text.replace(one.file_name(), str(one.path))
    for name, path in names:
        text = text.replace(name, str(path))
    # What is left of nodes spelled out is of no use to a reader.
    return re.sub(r"'?json:\{.*\}'?", "the image", text)[:400]


def failure(what: str, error: HostError, *images: OpenImage) -> Conflict | OperationFailed:
    """The error for people: ``what`` could not be done, with qemu-img's reason.

    Conflict when another process has an image open for writing.
    """
    reason = explain(error, *images)
    if isinstance(error, ProgramFailed) and re.search(r'Failed to get .*"\w+" lock', error.stderr):
        return Conflict(f"{what}: the image is in use", hint="stop the VM that uses it")
    return OperationFailed(f"{what}: {reason}")
