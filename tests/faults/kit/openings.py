"""Who has an image open for writing, as the kernel tells it: the witness of two open gates.

fanotify tells of every open and close of the file with the pid of the process, whatever namespace
that is in, and in the order in which they happened. For brokered disks only: a QEMU keeps its
images open, inactive, while another host's writes.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

_EVENT = struct.Struct("=IBBHQii")
_NOTIFY = 0x1 | 0x2  # close on exec, do not block
_ADD = 0x1
_CLOSE_WRITE, _CLOSE_OTHER, _OPEN = 0x8, 0x10, 0x20
_HERE = -100
_ACCESS = 0o3


@dataclass(frozen=True)
class Seen:
    """An opening or closing; ``writes`` says whether this pid has the file open for writing now."""

    pid: int
    closed: bool
    writes: bool


@dataclass
class Judge:
    """Says when two processes had the file open for writing at once. Pure."""

    writers: set[int] = field(default_factory=set)
    openings: int = 0
    together: list[tuple[int, ...]] = field(default_factory=list)

    def take(self, seen: Seen) -> None:
        """The next event, in the order of the kernel's."""
        if seen.writes and seen.pid not in self.writers:
            self.writers.add(seen.pid)
            self.openings += 1
            if len(self.writers) > 1:
                self.together.append(tuple(sorted(self.writers)))
        elif seen.closed and not seen.writes:
            self.writers.discard(seen.pid)


class Openings:
    """Watches one file while the context lasts; whoever has it open already counts."""

    def __init__(self, image: Path) -> None:
        self._image = image
        self._node = image.stat()
        self.judge = Judge()
        self._end, self._ended = os.pipe2(os.O_CLOEXEC)
        self._descriptor = _watch(image)
        self._thread = threading.Thread(target=self._listen, name="openings")

    def __enter__(self) -> Openings:
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and self._writes(int(folder.name)):
                self.judge.take(Seen(int(folder.name), closed=False, writes=True))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.write(self._ended, b"x")
        self._thread.join()
        for descriptor in (self._descriptor, self._end, self._ended):
            os.close(descriptor)

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._descriptor, self._end], [], [])
            if self._descriptor in ready:
                for pid, mask in _events(self._descriptor):
                    self._event(pid, mask)
            elif ready:
                return

    def _event(self, pid: int, mask: int) -> None:
        # A close may be told while another descriptor of the same process is still open.
        closed = bool(mask & (_CLOSE_WRITE | _CLOSE_OTHER))
        self.judge.take(Seen(pid, closed=closed, writes=self._writes(pid)))

    def _writes(self, pid: int) -> bool:
        """Whether the process has the file open for writing at this moment."""
        try:
            entries = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            return False
        return any(self._writable(pid, entry) for entry in entries)

    def _writable(self, pid: int, entry: Path) -> bool:
        try:
            found = entry.stat()
            if (found.st_dev, found.st_ino) != (self._node.st_dev, self._node.st_ino):
                return False
            flags = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split("flags:")[1]
        except (OSError, IndexError):
            return False
        return bool(int(flags.split()[0], 8) & _ACCESS)


def image_locks(image: Path) -> list[str]:
    """The locks that anybody holds on the file, as the kernel lists them; QEMU's are such."""
    node = image.stat()
    number = f"{os.major(node.st_dev):02x}:{os.minor(node.st_dev):02x}:{node.st_ino}"
    lines = Path("/proc/locks").read_text().splitlines()
    return [line for line in lines if number in line.split()]


def _watch(image: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.fanotify_init(_NOTIFY, os.O_RDONLY)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    mask = ctypes.c_uint64(_OPEN | _CLOSE_WRITE | _CLOSE_OTHER)
    if libc.fanotify_mark(descriptor, _ADD, mask, _HERE, os.fsencode(image)) < 0:
        number = ctypes.get_errno()
        os.close(descriptor)
        raise OSError(number, f"fanotify {image}: {os.strerror(number)}")
    return int(descriptor)


def _events(descriptor: int) -> Iterable[tuple[int, int]]:
    data = os.read(descriptor, 65536)
    at = 0
    while at + _EVENT.size <= len(data):
        length, _, _, _, mask, opened, pid = _EVENT.unpack_from(data, at)
        if opened >= 0:
            os.close(opened)
        yield pid, mask
        at += length
