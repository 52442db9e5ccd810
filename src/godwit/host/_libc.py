"""The few system calls that Python 3.11 does not offer."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Final

_PIDFD_GETFD: Final = 438  # the same number on every architecture


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def setns(descriptor: int, kind: int) -> None:
    """Move the calling thread into a namespace."""
    _checked(_libc().setns(descriptor, kind), "setns")


def inotify_init() -> int:
    """A new inotify descriptor, non-blocking and closed on exec."""
    return _checked(_libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")


def inotify_add(descriptor: int, path: str, mask: int) -> int:
    """Add a watch on a path; returns the watch's number."""
    return _checked(
        _libc().inotify_add_watch(descriptor, os.fsencode(path), ctypes.c_uint32(mask)),
        f"inotify {path}",
    )


def pidfd_getfd(pidfd: int, descriptor: int) -> int:
    """A copy of another process's descriptor, closed on exec; needs the right to trace it."""
    result = _libc().syscall(
        ctypes.c_long(_PIDFD_GETFD), ctypes.c_int(pidfd), ctypes.c_int(descriptor), ctypes.c_uint(0)
    )
    return _checked(int(result), f"pidfd_getfd {descriptor}")
