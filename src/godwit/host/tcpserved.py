"""What a server on this machine has open for some of its clients, and how that is ended.

For whoever shuts a client out of a server that has no word for "and hang up on it". A server's
descriptor of a connection is what counts: servers keep it until the last request that came in on
it is answered, so once it is gone nothing of that client is under way in there any more.

The kernel's list of connections does not do for that. It forgets one that was reset at once, while
the server may still work on what it had read from it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from godwit.host import _libc
from godwit.host.errors import ProcessGone
from godwit.host.process import Process, identify, open_pidfd
from godwit.host.tcpcut import sockets
from godwit.host.tcptable import LISTENING, plain, rows


@dataclass(frozen=True, slots=True)
class Held:
    """One connection that a server has open. ``peer`` is empty when it is no longer connected."""

    process: Process
    inode: str
    peer: str


def servers(port: int) -> tuple[Process, ...]:
    """The processes of this network namespace that listen at a TCP port; all of /proc is read."""
    inodes = {f"socket:[{row.inode}]" for row in rows() if _listens(row.state, row.here[1], port)}
    found = []
    for entry in Path("/proc").iterdir() if inodes else ():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            process = identify(int(entry.name))
            if process is not None and inodes & sockets(process.pid).keys():
                found.append(process)
    return tuple(found)


def _listens(state: int, here: int, port: int) -> bool:
    return state == LISTENING and here == port


def held(process: Process, port: int, clients: Collection[str]) -> tuple[Held, ...]:
    """The connections at one of its ports that it has open with these addresses, and those of which
    nobody can tell.

    A connection that was reset has no peer any more, and its requests may be under way all the
    same. None for a process that has ended. OSError: we may not look (needs the right to trace).
    """
    wanted, found = {plain(address) for address in clients}, []
    with contextlib.suppress(ProcessGone):
        for inode, copy in _copies(process):
            with copy:
                peer = _peer(copy, port)
                if peer is not None and (not peer or peer in wanted):
                    found.append(Held(process=process, inode=inode, peer=peer))
    return tuple(found)


def hang_up(process: Process, inodes: Collection[str], *, answers: bool = True) -> None:
    """End these connections; the process finds them at their end and closes them.

    With ``answers`` it can still send them, as when the client itself has no more to say; without
    it, neither side can send anything. What it has read from them goes on: wait until `still_held`
    says that they are gone. OSError: we may not.
    """
    how = socket.SHUT_RD if answers else socket.SHUT_RDWR
    with contextlib.suppress(ProcessGone):
        for _, copy in _copies(process, inodes):
            with copy, contextlib.suppress(OSError):  # it is over by itself
                copy.shutdown(how)


def still_held(process: Process, inodes: Collection[str]) -> frozenset[str]:
    """Those of the connections that the process has not closed yet; none when it has ended."""
    if identify(process.pid) != process:
        return frozenset()
    try:
        return frozenset(inodes) & sockets(process.pid).keys()
    except FileNotFoundError:  # it ended meanwhile
        return frozenset()


def _copies(
    process: Process, inodes: Collection[str] | None = None
) -> list[tuple[str, socket.socket]]:
    """Copies of the process's TCP sockets that do not listen; the caller closes each of them."""
    pidfd = open_pidfd(process)
    found: list[tuple[str, socket.socket]] = []
    try:
        for inode, descriptor in sockets(process.pid).items():
            if inodes is not None and inode not in inodes:
                continue
            try:
                copied = _libc.pidfd_getfd(pidfd, descriptor)
            except OSError as error:
                if error.errno == errno.EBADF:  # closed meanwhile
                    continue
                raise
            found.append((inode, socket.socket(fileno=copied)))
    except FileNotFoundError as error:  # /proc of a process that has just ended
        _close(found)
        raise ProcessGone(f"process {process.pid} has ended") from error
    except BaseException:
        _close(found)
        raise
    finally:
        os.close(pidfd)
    return found


def _close(copies: list[tuple[str, socket.socket]]) -> None:
    for _, copy in copies:
        copy.close()


def _peer(one: socket.socket, port: int) -> str | None:
    """Who is at the other end, empty when nobody is any more; None: no connection at the port."""
    if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
        return None
    if one.getsockname()[1] != port:  # it keeps its own end also when the other is gone
        return None
    try:
        return plain(one.getpeername()[0])
    except OSError:
        state = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0]
        return None if state == LISTENING else ""
