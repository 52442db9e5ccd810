"""Unix sockets bound before they are needed, and the little of systemd's protocol we speak."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping
from pathlib import Path

from godwit.host.errors import HostError

_LONGEST_PATH = 107
_FIRST_INHERITED = 3


def bind_unix(path: Path, mode: int = 0o600, *, backlog: int = 128) -> socket.socket:
    """A listening stream socket at a path, replacing a dead one; non-blocking.

    The mode holds from the first moment.  Raises HostError when the path is too long for the
    kernel, OSError(EADDRINUSE) when somebody still listens there.
    """
    return _bind(path, mode, backlog, socket.SOCK_STREAM)


def bind_packets(path: Path, mode: int = 0o600, *, backlog: int = 8) -> socket.socket:
    """The same, of the kind that keeps each message whole."""
    return _bind(path, mode, backlog, socket.SOCK_SEQPACKET)


def _bind(path: Path, mode: int, backlog: int, kind: socket.SocketKind) -> socket.socket:
    raw = os.fsencode(path)
    if len(raw) > _LONGEST_PATH:
        raise HostError(f"socket path has {len(raw)} bytes, at most {_LONGEST_PATH} work: {path}")
    _remove_dead(path, kind)
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        # The mode of the descriptor becomes the mode of the path at bind(), so that nobody can
        # connect in between.  A process-wide umask would race with other threads.
        os.fchmod(listener.fileno(), mode)
        listener.bind(raw)
        path.chmod(mode)
        listener.listen(backlog)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_dead(path: Path, kind: socket.SocketKind) -> None:
    """Unlink a socket nobody listens on; leave anything else alone."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        except OSError:
            return


def inherited_listeners(
    environ: MutableMapping[str, str] | None = None,
) -> dict[str, socket.socket]:
    """Sockets given by the service manager (LISTEN_FDS), by name; takes the variables away.

    Sockets without a name in LISTEN_FDNAMES are called ``0``, ``1``, ...
    """
    env = os.environ if environ is None else environ
    pid, count = env.pop("LISTEN_PID", ""), env.pop("LISTEN_FDS", "")
    names = env.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, socket.socket] = {}
    for index in range(int(count)):
        descriptor = _FIRST_INHERITED + index
        os.set_inheritable(descriptor, False)
        name = names[index] if index < len(names) and names[index] else str(index)
        listener = socket.socket(fileno=descriptor)
        listener.setblocking(False)
        found[name] = listener
    return found


def notify(message: str) -> bool:
    """Tell the service manager something (``READY=1``, ``WATCHDOG=1``, ``STATUS=...``).

    False when there is none, or when it does not listen: a daemon lives on without it.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)
        try:
            channel.sendto(message.encode(), address)
        except OSError:
            return False
    return True


def watchdog_interval() -> float | None:
    """Seconds within which the service manager wants a ``WATCHDOG=1``, None when it does not."""
    text = os.environ.get("WATCHDOG_USEC", "")
    meant_for = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not text.isdigit() or meant_for != str(os.getpid()):
        return None
    return int(text) / 1e6
