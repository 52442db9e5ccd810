"""A BMC that speaks real Redfish over HTTPS, with a machine whose power tests see and spoil."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path

from godwit.lab.bmc import Account, Server, Service, context_of
from godwit.lab.bmcs import make_certificate

USER, PASSWORD = "admin", "correct horse, battery: ümlaut"


@dataclass
class FakeMachine:
    """A computer with power; ``deaf`` ignores its BMC, ``seen`` is what it was told."""

    on: bool = True
    deaf: bool = False
    seen: list[str] = field(default_factory=list)
    told: threading.Event = field(default_factory=threading.Event)

    def is_on(self) -> bool:
        return self.on

    def reset(self, kind: str) -> None:
        self.seen.append(kind)
        if not self.deaf:
            self.on = kind != "ForceOff"
        self.told.set()


class Bmc:
    """A running BMC. ``hang`` makes it fall silent in the middle of every answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine = FakeMachine()
        self.asked: list[str] = []
        self.port = 0
        self.service = Service("host1", self.machine, Account(USER, PASSWORD))
        self._awake = threading.Event()
        self._awake.set()
        read = self.service.read

        def slowly(path: str) -> dict[str, object] | None:
            self.asked.append(path)
            self._awake.wait()
            return read(path)

        self.service.read = slowly  # type: ignore[method-assign]
        self.start()

    def start(self) -> None:
        """Serve with a certificate of this very start."""
        cert, key = self.folder / "cert.pem", self.folder / "key.pem"
        make_certificate(cert, key, name="bmc1", address="127.0.0.1")
        self.ca = cert.read_text()
        der = ssl.PEM_cert_to_DER_cert(self.ca)
        self.fingerprint = hashlib.sha256(der).hexdigest()
        sock = socket.create_server(("127.0.0.1", self.port))
        self.port = sock.getsockname()[1]
        self.server = Server(sock, self.service, context_of(cert, key))
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def hang(self) -> None:
        self._awake.clear()

    def wake(self) -> None:
        self._awake.set()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"
