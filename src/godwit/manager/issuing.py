"""What lies where the CA's key is: the key, the journal of what it signed, the last list it made.

QEMU's certificates come from a CA of their own, in `migration` below: their keys lie where QEMU's
user can read them, and etcd asks a client for no role, only for a certificate of its CA.

The journal is the answer to "which certificates has this name ever got": it is written, and forced
to the disk, before a certificate is handed out. The store's copy of it is for people to see.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from godwit.model.trust import IssuedCertificate, JoinToken
from godwit.wire import crl
from godwit.wire.ca import ClusterCa, sign, write_whole
from godwit.wire.identity import MIGRATION

VALID_DAYS = 365.0
JOURNAL = "issued.jsonl"
CRL_FILE = "crl.pem"
STREAMS = "migration"  # where the CA of QEMU's certificates lies


class Issuer:
    """The CAs of a directory. Belongs to one process. Errors: IdentityUnusable."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = ClusterCa.load(directory)
        self.migration_ca = ClusterCa.load(directory / STREAMS)

    @classmethod
    def create(cls, directory: Path, *, cluster: str) -> Issuer:
        """Make both CAs and their first lists."""
        for where, name in ((directory, cluster), (directory / STREAMS, f"{cluster} migration")):
            ca = ClusterCa.create(cluster=name)
            ca.save(where)
            write_whole(where / CRL_FILE, crl.make(ca, (), number=1).pem, mode=0o644)
        return cls(directory)

    def of(self, role: str) -> ClusterCa:
        """Who signs for a role."""
        return self.migration_ca if role == MIGRATION else self.ca

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the CA's certificate, in hex."""
        return self.ca.certificate.fingerprint(hashes.SHA256()).hex()

    def certify(
        self,
        csr: bytes,
        *,
        role: str,
        name: str,
        now: float,
        dns: Sequence[str] = (),
        ips: Sequence[str] = (),
    ) -> tuple[str, IssuedCertificate]:
        """Sign and note it. Once this returns, it can be revoked."""
        pem = sign(self.of(role), csr, role=role, name=name, dns=dns, ips=ips, days=VALID_DAYS)
        record = describe(pem, role=role, name=name, now=now)
        self.note([record])
        return pem.decode(), record

    def note(self, records: Iterable[IssuedCertificate]) -> None:
        """Add to the journal, durably."""
        # On lines of their own, also after one that a power cut tore off.
        text = "".join(f"\n{record.model_dump_json(exclude_none=True)}\n" for record in records)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self.directory / JOURNAL, flags, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def noted(self) -> list[IssuedCertificate]:
        """Every certificate this CA has signed here, oldest first."""
        try:
            lines = (self.directory / JOURNAL).read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(IssuedCertificate.model_validate(json.loads(line)))
            except ValueError:
                continue  # a line that a power cut left behind: nothing was handed out for it
        return found

    def last_list(self, role: str) -> crl.Revocations:
        """The newest list made or seen here, of the CA that signs for a role."""
        return crl.read(self._list_of(role).read_bytes(), ca=self.of(role).pem)

    def keep_list(self, role: str, fresh: crl.Revocations) -> None:
        """Remember a list: a store that is restored from a backup must not bring back an older."""
        write_whole(self._list_of(role), fresh.pem, mode=0o644)

    def _list_of(self, role: str) -> Path:
        where = self.directory / STREAMS if role == MIGRATION else self.directory
        return where / CRL_FILE

    def seal(self, token: JoinToken) -> str:
        """The CA's word that it made this token: who may write to the store cannot make one."""
        signed = self.ca.key.sign(_sealed(token), ec.ECDSA(hashes.SHA256()))
        return base64.b64encode(signed).decode()

    def sealed(self, token: JoinToken) -> bool:
        """Whether the CA made it."""
        try:
            signature = base64.b64decode(token.seal, validate=True)
            self.ca.key.public_key().verify(signature, _sealed(token), ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError):
            return False
        return True


def _sealed(token: JoinToken) -> bytes:
    words = (token.id, token.hash, f"{token.expires_at:.3f}", token.host or "")
    return ("godwit join token\n" + "\n".join(words)).encode()


def describe(pem: bytes, *, role: str, name: str, now: float) -> IssuedCertificate:
    """The record of a certificate."""
    made = x509.load_pem_x509_certificate(pem)
    return IssuedCertificate(
        role=role,
        name=name,
        serial=f"{made.serial_number:x}",
        issued_at=now,
        not_after=made.not_valid_after_utc.timestamp(),
    )
