"""Named network namespaces, and sockets made inside one from outside."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from godwit.host.errors import HostError, ProgramFailed
from godwit.host.ifctl import in_netns
from godwit.host.run import NETNS_DIRECTORY, netns_path, run

_TIMEOUT = 20.0

__all__ = [
    "create",
    "delete",
    "in_netns",
    "names",
    "netns_path",
    "open_netns",
    "opened_netns",
    "run_in_netns",
    "socket_in_netns",
]


def names() -> tuple[str, ...]:
    """All named network namespaces."""
    folder = Path(NETNS_DIRECTORY)
    return tuple(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ()


def create(name: str) -> None:
    """Make a named namespace with its loopback up; HostError when the name is taken."""
    if name in names():
        raise HostError(f"network namespace {name} exists already")
    run(["ip", "netns", "add", name], timeout=_TIMEOUT)
    try:
        run(["ip", "link", "set", "dev", "lo", "up"], timeout=_TIMEOUT, netns=name)
    except HostError:
        delete(name)
        raise


def delete(name: str) -> None:
    """Remove a named namespace; fine when there is none.

    Its links vanish when the last process or descriptor inside is gone too.
    """
    try:
        run(["ip", "netns", "del", name], timeout=_TIMEOUT)
    except ProgramFailed:
        if name in names():
            raise


def open_netns(where: str | int) -> int:
    """A descriptor of a namespace: by name, by path, or of a process; the caller closes it."""
    path = f"/proc/{where}/ns/net" if isinstance(where, int) else netns_path(where)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise HostError(f"there is no network namespace {where}") from error


@contextlib.contextmanager
def opened_netns(where: str | int) -> Iterator[int]:
    """A descriptor of a namespace for a while."""
    descriptor = open_netns(where)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def run_in_netns(
    where: str, argv: Sequence[str], *, timeout: float, stdin: bytes | None = None
) -> bytes:
    """Run a program inside a namespace; errors as in :func:`godwit.host.run.run`."""
    return run(argv, timeout=timeout, input=stdin, netns=where)


def socket_in_netns(
    netns_fd: int,
    family: int = socket.AF_INET,
    kind: int = socket.SOCK_STREAM,
    proto: int = 0,
) -> socket.socket:
    """A socket that lives in another namespace while this process stays where it is."""
    return in_netns(netns_fd, lambda: socket.socket(family, kind | socket.SOCK_CLOEXEC, proto))
