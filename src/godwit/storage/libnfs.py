"""An NFS export through libnfs, without a mount: what the helper process may do with it.

libnfs's calls wait for the server for as long as it is away, whatever time-out it is given. So
nothing but `godwit.storage.remote_child` uses this, a process that may be killed at any moment.
Paths are absolute within the export. Every failure is an ``OSError``.

NFS 3, as QEMU's own driver, with the identity of the process (AUTH_SYS).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

LIBRARIES: Final = ("libnfs.so.13", "libnfs.so.14")
"""Versions whose calls are those written down here; later ones changed the order of arguments."""

_WORDS: Final = 32  # of the largest structure that libnfs fills in for us, and some to spare
_BLOCK: Final = 512


class _Entry(ctypes.Structure):
    """The beginning of libnfs's directory entry."""


_Entry._fields_ = [("next", ctypes.POINTER(_Entry)), ("name", ctypes.c_char_p)]

_POINTER, _TEXT, _INT, _U64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64
_CALLS: Final[dict[str, tuple[Any, ...]]] = {
    "nfs_mount": (_TEXT, _TEXT),
    "nfs_lstat64": (_TEXT, _POINTER),
    "nfs_open": (_TEXT, _INT, _POINTER),
    "nfs_create": (_TEXT, _INT, _INT, _POINTER),
    "nfs_close": (_POINTER,),
    "nfs_pread": (_POINTER, _U64, _U64, _POINTER),
    "nfs_pwrite": (_POINTER, _U64, _U64, _POINTER),
    "nfs_fsync": (_POINTER,),
    "nfs_unlink": (_TEXT,),
    "nfs_mkdir2": (_TEXT, _INT),
    "nfs_rmdir": (_TEXT,),
    "nfs_rename": (_TEXT, _TEXT),
    "nfs_opendir": (_TEXT, _POINTER),
    "nfs_statvfs": (_TEXT, _POINTER),
}


def load() -> Any:
    """The library; OSError (ENOENT) with words for people when it is not there."""
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nfs_init_context.restype = _POINTER
        library.nfs_get_error.restype = _TEXT
        library.nfs_get_error.argtypes = (_POINTER,)
        library.nfs_readdir.restype = ctypes.POINTER(_Entry)
        library.nfs_readdir.argtypes = (_POINTER, _POINTER)
        library.nfs_closedir.argtypes = (_POINTER, _POINTER)
        library.nfs_closedir.restype = None
        for size in ("nfs_get_readmax", "nfs_get_writemax"):
            getattr(library, size).restype = _U64
            getattr(library, size).argtypes = (_POINTER,)
        for call, arguments in _CALLS.items():
            getattr(library, call).argtypes = (_POINTER, *arguments)
            getattr(library, call).restype = _INT
        return library
    raise OSError(errno.ENOENT, f"the library {LIBRARIES[0]} is not installed")


class Export:
    """One export of one server, as the user of this process."""

    def __init__(self, server: str, path: str) -> None:
        """Connect; OSError when the server refuses."""
        self._library = load()
        self._context = self._library.nfs_init_context()
        if not self._context:
            raise OSError(errno.ENOMEM, "libnfs gives no context")
        self._call("nfs_mount", server.encode(), path.encode())

    def stat(self, path: str) -> dict[str, int]:
        """``mode``, ``uid``, ``gid``, ``size`` and ``allocated`` bytes; links are not followed."""
        found = (_U64 * _WORDS)()
        self._call("nfs_lstat64", path.encode(), found)
        return {
            "mode": found[2],
            "uid": found[4],
            "gid": found[5],
            "size": found[7],
            "allocated": found[9] * _BLOCK,
        }

    def space(self) -> dict[str, int]:
        """``capacity`` and ``used`` bytes; the server itself answers, nothing is remembered."""
        self.stat("/")
        found = (_U64 * _WORDS)()
        self._call("nfs_statvfs", b"/", found)
        unit, blocks, free = found[1] or found[0], found[2], found[3]
        return {"capacity": blocks * unit, "used": (blocks - free) * unit}

    def names(self, path: str) -> list[str]:
        """What lies in a directory."""
        handle = _POINTER()
        self._call("nfs_opendir", path.encode(), ctypes.byref(handle))
        found = []
        try:
            while entry := self._library.nfs_readdir(self._context, handle):
                found.append(os.fsdecode(entry.contents.name))
        finally:
            self._library.nfs_closedir(self._context, handle)
        return sorted(name for name in found if name not in (".", ".."))

    def make_directories(self, path: str, mode: int) -> None:
        """A directory with all above it; fine when it is there."""
        parts = [part for part in path.split("/") if part]
        for count in range(1, len(parts) + 1):
            try:
                self._call("nfs_mkdir2", ("/" + "/".join(parts[:count])).encode(), mode)
            except FileExistsError:
                continue

    def remove(self, path: str) -> None:
        """Delete a file."""
        self._call("nfs_unlink", path.encode())

    def remove_directory(self, path: str) -> None:
        """Delete an empty directory."""
        self._call("nfs_rmdir", path.encode())

    def rename(self, old: str, new: str) -> None:
        """Give a file another name; what had that name is gone."""
        self._call("nfs_rename", old.encode(), new.encode())

    def sync(self, path: str) -> None:
        """Have the server put on its medium whatever anybody has written to the file."""
        with self.opened(path, os.O_RDWR) as handle:
            self._call("nfs_fsync", handle)

    def create(self, path: str, mode: int) -> None:
        """Make a new, empty file; FileExistsError when the name is taken."""
        handle = _POINTER()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._call("nfs_create", path.encode(), flags, mode, ctypes.byref(handle))
        self._call("nfs_close", handle)

    @contextmanager
    def opened(self, path: str, flags: int) -> Iterator[Any]:
        """A file that is there, for `read` and `write`."""
        handle = _POINTER()
        self._call("nfs_open", path.encode(), flags, ctypes.byref(handle))
        try:
            yield handle
        finally:
            self._call("nfs_close", handle)

    def read(self, handle: Any, offset: int, length: int) -> bytes:
        """Bytes of an open file; fewer only at its end."""
        most = self._library.nfs_get_readmax(self._context) or _BLOCK
        pieces = []
        while length > 0:
            buffer = ctypes.create_string_buffer(min(most, length))
            count = self._call("nfs_pread", handle, offset, len(buffer), buffer)
            if count == 0:
                break
            pieces.append(buffer.raw[:count])
            offset, length = offset + count, length - count
        return b"".join(pieces)

    def write(self, handle: Any, offset: int, content: bytes) -> None:
        """Write all of it; on the medium only after `flush`."""
        most = self._library.nfs_get_writemax(self._context) or _BLOCK
        done = 0
        while done < len(content):
            piece = content[done : done + most]
            done += self._call("nfs_pwrite", handle, offset + done, len(piece), piece)

    def flush(self, handle: Any) -> None:
        """What was written to the open file is on the server's medium."""
        self._call("nfs_fsync", handle)

    def _call(self, name: str, *arguments: Any) -> int:
        answer = int(getattr(self._library, name)(self._context, *arguments))
        if answer < 0:
            said = (self._library.nfs_get_error(self._context) or b"").decode(errors="replace")
            number = -answer if -answer in errno.errorcode else errno.EIO
            raise OSError(number, said.strip() or os.strerror(number))
        return answer
