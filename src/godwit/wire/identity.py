"""Know who holds a certificate: `godwit://role/name`, carried as a URI in it.

The standard library only: daemons load identities without the `cryptography` package.
A directory holds `cert.pem`, `key.pem` (0600) and `ca.pem`.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.wire.errors import IdentityUnusable

CERT_FILE, KEY_FILE, CA_FILE = "cert.pem", "key.pem", "ca.pem"
HOST, MANAGER, STORE, MIGRATION = "host", "manager", "store", "migration"
STORAGE = "storage"  # the fencing daemon of a storage server

# What etcd asks of a certificate before its holder may speak as a member: it knows DNS names alone.
STORE_MEMBER_DNS = "member.store.godwit"

_URI = re.compile(r"godwit://([a-z][a-z0-9-]{0,62})/([a-z0-9][a-z0-9-]{0,62})")
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME; the ssl module has no name for it


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """The role and name a certificate proves, such as host/host1 or manager/manager1."""

    role: str
    name: str

    def __post_init__(self) -> None:
        if not _URI.fullmatch(self.uri):
            raise ValueError(f"{self.role}/{self.name} is not a valid role and name")

    def __str__(self) -> str:
        return f"{self.role}/{self.name}"

    @property
    def uri(self) -> str:
        return f"godwit://{self.role}/{self.name}"

    @classmethod
    def from_uri(cls, uri: str) -> PeerIdentity | None:
        match = _URI.fullmatch(uri)
        return cls(role=match[1], name=match[2]) if match else None

    @classmethod
    def from_certificate(cls, certificate: Mapping[str, Any] | None) -> PeerIdentity | None:
        """From `SSLObject.getpeercert()`; None unless it carries exactly one identity."""
        if not certificate:
            return None
        uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
        found = [peer for uri in uris if (peer := cls.from_uri(uri)) is not None]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Our own certificate, key and cluster CA on disk. Times are seconds since the epoch."""

    cert: Path
    key: Path
    ca: Path
    peer: PeerIdentity
    fingerprint: str
    serial: int
    not_before: float
    not_after: float

    @classmethod
    def load(cls, directory: Path) -> Identity:
        """Read and prove a directory: the key fits, the CA signed it, it names an identity.

        An expired certificate loads (so that its date can be shown); peers will refuse it.
        Errors: IdentityUnusable, with what is wrong in which file.
        """
        cert, key, ca = directory / CERT_FILE, directory / KEY_FILE, directory / CA_FILE
        for path in (cert, key, ca):
            if not path.is_file():
                raise IdentityUnusable(
                    f"{path} is missing.",
                    hint="Issue this machine's certificate again and put all three files there.",
                )
        facts, der = _prove(cert=cert, key=key, ca=ca)
        peer = PeerIdentity.from_certificate(facts)
        if peer is None:
            raise IdentityUnusable(
                f"{cert} does not carry a godwit://role/name identity.",
                hint="Use a certificate issued by the cluster CA.",
            )
        return cls(
            cert=cert,
            key=key,
            ca=ca,
            peer=peer,
            fingerprint=hashlib.sha256(der).hexdigest(),
            serial=int(facts["serialNumber"], 16),
            not_before=ssl.cert_time_to_seconds(facts["notBefore"]),
            not_after=ssl.cert_time_to_seconds(facts["notAfter"]),
        )

    @property
    def directory(self) -> Path:
        """Where the three files lie."""
        return self.cert.parent

    def seconds_left(self, now: float | None = None) -> float:
        """How long peers will still accept it; negative once expired."""
        return self.not_after - (time.time() if now is None else now)


def _prove(*, cert: Path, key: Path, ca: Path) -> tuple[dict[str, Any], bytes]:
    """Shake hands with ourselves in memory: the verified facts and the certificate in DER."""
    try:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(cert, key)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= _NO_CHECK_TIME
        client.load_verify_locations(ca)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        near = client.wrap_bio(to_client, to_server)
        far = server.wrap_bio(to_server, to_client, server_side=True)
        for side in (near, far, near, far):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
        facts, der = near.getpeercert(), near.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        raise IdentityUnusable(
            f"{cert} was not issued by {ca}: {error.verify_message}.",
            hint="Certificate, key and CA must come from the same cluster.",
        ) from error
    except (ssl.SSLError, OSError, ValueError) as error:
        raise IdentityUnusable(
            f"{cert} and {key} cannot be used: {error}",
            hint="Check that both are readable PEM files that belong together.",
        ) from error
    if not facts or der is None:
        raise IdentityUnusable(f"{cert} could not be proven against {ca}.")
    return facts, der


def migration_dns(host: str) -> str:
    """The DNS name QEMU's `tls-hostname` checks for the migration stream into a host."""
    return f"{host}.migration.godwit"
