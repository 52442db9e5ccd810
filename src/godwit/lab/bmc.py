"""An emulated BMC: a computer's power behind a Redfish service, over HTTPS.

Speaks what a client of DSP0266 needs: service root, sessions and basic authentication, one computer
system with ``ComputerSystem.Reset``, errors with extended information. It is a process of the real
machine with a listening socket in a namespace of its own on the management network: it stays up
when its host is off, and is killed, frozen or cut off apart from it.

Whether its host has power it sees for itself: some process is in the host's control group, or
none. A reset is accepted at once (204) and takes its time; until it has happened the state read
back is the old one, as with real ones.

    python -I -m godwit.lab.bmc CONFIG.json --fd N [--group FILE]...
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hmac
import json
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from godwit.lab.bmc_tree import METADATA, RESETS, Tree

_BODY_LIMIT = 65536
_QUIET_S = 60.0  # after which a silent connection is let go of
_V1 = "/redfish/v1"


class Machine(Protocol):
    """The computer behind a BMC."""

    def is_on(self) -> bool:
        """Whether it has power, looked at now."""
        ...

    def reset(self, kind: str) -> None:
        """Do what a reset type says; returns when it has happened. Called in a thread."""
        ...


@dataclass(frozen=True, slots=True)
class Account:
    """Who is let in."""

    user: str
    password: str

    def fits(self, user: object, password: object) -> bool:
        """Whether these are they, in constant time."""
        same_user = hmac.compare_digest(str(user).encode(), self.user.encode())
        return hmac.compare_digest(str(password).encode(), self.password.encode()) and same_user


class Refusal(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, message: str, *, key: str = "GeneralError") -> None:
        super().__init__(message)
        self.status, self.message, self.key = status, message, key

    def body(self) -> dict[str, Any]:
        """The error as Redfish shapes it."""
        told = {
            "@odata.type": "#Message.v1_1_1.Message",
            "MessageId": f"Base.1.12.{self.key}",
            "Message": self.message,
            "Severity": "Critical",
            "MessageSeverity": "Critical",
            "Resolution": "See the message.",
        }
        error = {"code": f"Base.1.12.{self.key}", "message": self.message}
        return {"error": {**error, "@Message.ExtendedInfo": [told]}}


class Service:
    """What the service answers, apart from HTTP. Thread-safe."""

    def __init__(self, name: str, machine: Machine, account: Account) -> None:
        self.machine = machine
        self.account = account
        self.tree = Tree(name)
        self._sessions: dict[str, str] = {}  # token -> id
        self._next = 1
        self._lock = threading.Lock()
        self._busy = threading.Lock()

    def knows(self, headers: Message) -> bool:
        """Whether a request comes from somebody who is let in."""
        token = headers.get("X-Auth-Token")
        if token is not None:
            with self._lock:
                return token in self._sessions
        scheme, _, words = str(headers.get("Authorization", "")).partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(words, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        return self.account.fits(user, password)

    def log_in(self, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """A new session: its token and its resource."""
        if not self.account.fits(body.get("UserName"), body.get("Password")):
            raise Refusal(401, "The user name or the password is wrong.", key="NoValidSession")
        token = secrets.token_urlsafe(24)
        with self._lock:
            number = str(self._next)
            self._next += 1
            self._sessions[token] = number
        return token, self.tree.session(number, self.account.user)

    def log_out(self, number: str) -> None:
        """End a session."""
        with self._lock:
            left = {token: one for token, one in self._sessions.items() if one != number}
            if len(left) == len(self._sessions):
                raise Refusal(404, f"There is no session {number}.", key="ResourceMissingAtURI")
            self._sessions = left

    def sessions(self) -> tuple[str, ...]:
        """The numbers of those open."""
        with self._lock:
            return tuple(self._sessions.values())

    def reset(self, body: Mapping[str, Any]) -> None:
        """Begin a reset; it goes on by itself."""
        kind = body.get("ResetType")
        if kind not in RESETS:
            raise Refusal(400, f"ResetType may not be {kind!r}.", key="ActionParameterNotSupported")
        if not self._busy.acquire(blocking=False):
            raise Refusal(503, "A reset is under way.", key="ServiceTemporarilyUnavailable")

        def work() -> None:
            try:
                self.machine.reset(str(kind))
            except Exception as error:
                say(f"reset {kind} failed: {error}")
            finally:
                self._busy.release()

        say(f"reset {kind}")
        threading.Thread(target=work, name=f"reset {kind}", daemon=True).start()

    def read(self, path: str) -> dict[str, Any] | None:
        """The resource at a path."""
        return self.tree.read(path, on=self.machine.is_on(), sessions=self.sessions())


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "godwit-lab-bmc"
    sys_version = ""
    timeout = _QUIET_S
    service: Service  # set on a subclass by `serve`
    # A header and a body in two segments would wait for each other's acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def do_PATCH(self) -> None:
        self._answer(self._not_here)

    def do_PUT(self) -> None:
        self._answer(self._not_here)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        """Nothing: who reads a state twice a second would fill the log."""

    def _answer(self, act: Callable[[str], None]) -> None:
        path = self.path.partition("?")[0]
        try:
            self._body = self._take_body()
            act(path.rstrip("/") or "/")
        except Refusal as refusal:
            more = {"Allow": "GET, HEAD"} if refusal.status == 405 else {}
            if refusal.status == 401:
                more["WWW-Authenticate"] = 'Basic realm="Redfish"'
            self._send(refusal.status, refusal.body(), **more)
        self.wfile.flush()

    def _take_body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if length > _BODY_LIMIT:
            self.close_connection = True
            raise Refusal(413, "The body is too large.")
        return self.rfile.read(length)

    def _json(self) -> dict[str, Any]:
        try:
            found = json.loads(self._body or b"{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Refusal(400, "The body is no JSON object.", key="MalformedJSON")
        return found

    def _must_be_known(self) -> None:
        if not self.service.knows(self.headers):
            raise Refusal(401, "There is no valid session or login.", key="NoValidSession")

    def _get(self, path: str) -> None:
        if path == f"{_V1}/$metadata":
            self._send(200, METADATA)
            return
        if path not in ("/redfish", _V1, f"{_V1}/odata"):
            self._must_be_known()
        found = self.service.read(path)
        if found is None:
            raise Refusal(404, f"There is no {path}.", key="ResourceMissingAtURI")
        self._send(200, found)

    def _post(self, path: str) -> None:
        if path in (f"{_V1}/SessionService/Sessions", f"{_V1}/SessionService/Sessions/Members"):
            token, session = self.service.log_in(self._json())
            where = session["@odata.id"]
            self._send(201, session, **{"X-Auth-Token": token, "Location": where})
            return
        self._must_be_known()
        if path != self.service.tree.reset_target:
            there = self.service.read(path) is not None
            raise Refusal(405 if there else 404, f"Nobody posts to {path}.")
        self.service.reset(self._json())
        self._send(204, None)

    def _delete(self, path: str) -> None:
        self._must_be_known()
        folder, _, number = path.rpartition("/")
        if folder != f"{_V1}/SessionService/Sessions":
            self._not_here(path)
        self.service.log_out(number)
        self._send(204, None)

    def _not_here(self, path: str) -> None:
        self._must_be_known()
        raise Refusal(405, f"This cannot be done to {path}.", key="OperationNotAllowed")

    def _send(self, status: int, value: dict[str, Any] | str | None, **headers: str) -> None:
        content, kind = b"", ""
        if isinstance(value, str):
            content, kind = value.encode(), "application/xml"
        elif value is not None:
            content, kind = json.dumps(value).encode(), "application/json"
        self.send_response(status)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("OData-Version", "4.0")
        self.send_header("Cache-Control", "no-store")
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Server(ThreadingHTTPServer):
    """A thread for each connection; the TLS handshake is in it, so that nobody holds up all."""

    daemon_threads = True

    def __init__(self, sock: socket.socket, service: Service, context: ssl.SSLContext) -> None:
        handler = type("ServiceHandler", (Handler,), {"service": service})
        super().__init__(sock.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self._context = context

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection, not greeted yet."""
        connection, peer = self.socket.accept()
        connection.settimeout(_QUIET_S)
        greeted = self._context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        )
        return greeted, peer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that does not like us or goes away is no event."""
        error = sys.exception()
        if not isinstance(error, OSError):
            say(f"{client_address[0]}: {type(error).__name__}: {error}")


def context_of(cert: Path, key: Path) -> ssl.SSLContext:
    """TLS as the service speaks it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert, key)
    return context


def say(text: str) -> None:
    """One line for the BMC's log."""
    stamp = time.strftime("%H:%M:%S") + f".{int(time.time() * 1000) % 1000:03d}"
    sys.stderr.write(f"{stamp} bmc: {text}\n")
    sys.stderr.flush()


def main(arguments: list[str] | None = None) -> int:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="bmc", description="Emulate the BMC of a lab host.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--fd", type=int, required=True, help="the listening socket")
    parser.add_argument("--group", type=Path, action="append", default=[])
    given = parser.parse_args(arguments)
    for entry in given.group:  # before anything else, so that lab down finds us
        entry.write_text("0")
    from godwit.lab.bmc_power import LabMachine

    config = json.loads(given.config.read_text())
    machine = LabMachine(config["lab"], Path(config["root"]), config["host"], group=config["group"])
    service = Service(config["host"], machine, Account(config["user"], config["password"]))
    context = context_of(Path(config["cert"]), Path(config["key"]))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with Server(socket.socket(fileno=given.fd), service, context) as server:
        say(f"serving {config['host']}")
        server.serve_forever(poll_interval=3600.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
