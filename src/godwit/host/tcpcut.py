"""Throws away what a process has given to the kernel to send, when the process must have ended.

The end of a process does not end its TCP connections at once: the kernel goes on delivering what
is queued, and on a link that is down it would deliver it when the link is back. For a process
that writes to storage that is a write landing after its fence. So somebody else holds a copy of
each of its connections while it lives; once it is dead, the copy is the last descriptor, and
closing it with SO_LINGER (1, 0) drops the queue and resets the connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Final

from godwit.host import _libc
from godwit.host.errors import ProcessGone
from godwit.host.process import Process, open_pidfd

_AT_ONCE: Final = struct.pack("ii", 1, 0)
_LISTENING: Final = 10  # TCP_LISTEN, the first byte of TCP_INFO


class TcpCopies:
    """Copies of the TCP connections of one process. Cheap to refresh: only new ones are taken."""

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}
        self._other: set[str] = set()

    def __len__(self) -> int:
        return len(self._held)

    def refresh(self, process: Process) -> None:
        """Take what is new; reset what the process has closed since.

        It closed such a one with every request answered, or gave up on it: either way nothing that
        it left in there may still arrive. Does nothing for a process that has ended.
        """
        try:
            pidfd = open_pidfd(process)
        except ProcessGone:
            return
        try:
            try:
                seen = _sockets(process.pid)
            except OSError:  # it is ending: what is held is what there was
                return
            for inode, descriptor in seen.items():
                if inode not in self._held and inode not in self._other:
                    self._take(pidfd, inode, descriptor)
        finally:
            os.close(pidfd)
        self._other &= seen.keys()
        for inode in self._held.keys() - seen.keys():
            _reset(self._held.pop(inode))

    def _take(self, pidfd: int, inode: str, descriptor: int) -> None:
        try:
            copy = socket.socket(fileno=_libc.pidfd_getfd(pidfd, descriptor))
        except OSError:  # closed meanwhile
            return
        if _is_connection(copy):
            self._held[inode] = copy
        else:
            copy.close()
            self._other.add(inode)

    def reset(self) -> int:
        """The process is dead: drop what its connections still hold. How many they were."""
        count = len(self._held)
        while self._held:
            _reset(self._held.popitem()[1])
        return count

    def close(self) -> None:
        """Let go; the process has its connections still."""
        while self._held:
            self._held.popitem()[1].close()


def _sockets(pid: int) -> dict[str, int]:
    """All sockets of a process, by inode. OSError rather than some of them."""
    found: dict[str, int] = {}
    for entry in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - thousands of times
        try:
            target = os.readlink(f"/proc/{pid}/fd/{entry}")  # noqa: PTH115 - no path at all
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:"):
            found[target] = int(entry)
    return found


def _is_connection(one: socket.socket) -> bool:
    if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
        return False
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0] != _LISTENING


def _reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    one.close()
