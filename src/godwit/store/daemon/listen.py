"""The sockets the daemon listens on: bound here, or bound by whoever started it."""

from __future__ import annotations

import os
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from godwit.store.daemon.server import Listener, ToldHandshake

_BACKLOG = 128
_FIRST_INHERITED = 3


class ListenError(Exception):
    """An address that cannot be listened on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The daemon's certificate and key, and the authority that clients must be signed by."""

    cert: Path
    key: Path
    ca: Path

    def context(self) -> ssl.SSLContext:
        """TLS 1.3 only, client certificate required. Raises ListenError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.num_tickets = 0  # connections live long; a ticket would never be used
        context.sslobject_class = ToldHandshake
        self.reload(context)
        return context

    def reload(self, context: ssl.SSLContext) -> None:
        """Read renewed files; connections made from now on use them. Raises ListenError."""
        try:
            context.load_cert_chain(self.cert, self.key)
            context.load_verify_locations(self.ca)
        except (OSError, ssl.SSLError) as error:
            names = f"{self.cert}, {self.key}, {self.ca}"
            raise ListenError(f"the TLS files {names} cannot be used: {error}") from error

    def revoked(self) -> frozenset[int]:
        """The serial numbers of certificates that count no more, from the file `revoked` beside
        the certificate: one in hex a line. None without the file. Raises ListenError."""
        path = self.cert.with_name("revoked")
        try:
            return frozenset(int(line, 16) for line in path.read_text().split())
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError) as error:
            raise ListenError(f"{path} cannot be read: {error}") from error


def open_listener(address: str, tls: ssl.SSLContext | None) -> Listener:
    """``unix:PATH`` (mode 0600) or ``tcp:HOST:PORT`` (TLS only). Raises ListenError."""
    kind, _, rest = address.partition(":")
    try:
        if kind == "unix" and rest.startswith("/"):
            return Listener(_bind_unix(Path(rest)), None)
        if kind == "tcp":
            host, _, port = rest.rpartition(":")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.create_server(
                (host.strip("[]"), int(port)), family=family, backlog=_BACKLOG
            )
            return with_tls(sock, tls)
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {error.strerror}") from error
    except ValueError as error:
        raise ListenError(f"{address!r} has no port number") from error
    raise ListenError(f"{address!r} is neither unix:/PATH nor tcp:HOST:PORT")


def inherit(handle: int, tls: ssl.SSLContext | None) -> Listener:
    """A listening socket that came with the process. Raises ListenError."""
    try:
        sock = socket.socket(fileno=handle)
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ListenError(f"descriptor {handle} is not a socket: {error.strerror}") from error
    if not listening:
        raise ListenError(f"descriptor {handle} is not a listening socket")
    os.set_inheritable(handle, False)
    return with_tls(sock, tls)


def inherited_handles() -> list[int]:
    """The descriptors passed by the supervisor (LISTEN_FDS), meant for this very process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    return list(range(_FIRST_INHERITED, _FIRST_INHERITED + count))


def with_tls(sock: socket.socket, tls: ssl.SSLContext | None) -> Listener:
    """A listener that never serves the network without TLS."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return Listener(sock, None)
    if tls is None:
        sock.close()
        raise ListenError("the network is served with TLS only: give --cert, --key and --ca")
    return Listener(sock, tls)


def _bind_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear_stale(path)
        mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _clear_stale(path: Path) -> None:
    """Remove the socket of a daemon that was killed, but not one that somebody answers on."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(f"{path} exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ListenError(f"somebody already answers on {path}")
