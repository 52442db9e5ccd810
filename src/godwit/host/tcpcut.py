"""Throws away what a process has given to the kernel to send, when the process must have ended.

The end of a process does not end its TCP connections at once: the kernel goes on delivering what
is queued, and on a link that is down it would deliver it when the link is back. For a process
that writes to storage that is a write landing after its fence. So somebody else holds a copy of
each of its connections while it lives; once it is dead, the copy is the last descriptor, and
closing it with SO_LINGER (1, 0) drops the queue and resets the connection.

Whoever comes after both of them, the process and the holder of its copies, cannot reset anything.
It can still see by the connections' addresses whether the kernel holds data of them (`unsent`), and
wait: on a link that stays down the kernel gives up after two minutes at most.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Collection
from typing import Final

from godwit.host import _libc
from godwit.host.errors import ProcessGone
from godwit.host.process import Process, open_pidfd
from godwit.host.tcptable import LISTENING, TABLES, plain, rows

_AT_ONCE: Final = struct.pack("ii", 1, 0)
_TABLES = TABLES


class TcpCopies:
    """Copies of the TCP connections of one process. Cheap to refresh: only new ones are taken."""

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}
        self._other: set[str] = set()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def names(self) -> tuple[str, ...]:
        """The connections by their ends, as `unsent` takes them."""
        found = set()
        for one in self._held.values():
            with contextlib.suppress(OSError):  # it never came about, or is over
                found.add(_name(one.getsockname()[:2], one.getpeername()[:2]))
        return tuple(sorted(found))

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
                seen = sockets(process.pid)
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


def sockets(pid: int) -> dict[str, int]:
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
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0] != LISTENING


def _reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    one.close()


def unsent(names: Collection[str]) -> tuple[str, ...]:
    """Those of the connections, ended ones too, for which the kernel still has data to deliver."""
    found = set()
    for row in rows(_TABLES):
        name = _name(row.here, row.there)
        if name in names and row.unsent:
            found.add(name)
    return tuple(sorted(found))


def _name(here: tuple[str, int], there: tuple[str, int]) -> str:
    return "-".join(f"[{plain(address)}]:{port}" for address, port in (here, there))
