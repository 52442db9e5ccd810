"""The cluster's certificate authority: used at set-up, and by a manager that keeps its key.

ECDSA P-256 throughout. A certificate names its holder as `godwit://role/name` (URI) and may
carry DNS names and addresses for tools that check those. One CA signs every role, so a
server must say which roles may enter (`godwit.wire.server`).

Files are written whole or not at all; keys are 0600, or 0640 when a group is named.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from godwit.wire.errors import IdentityUnusable
from godwit.wire.identity import (
    CA_FILE,
    CERT_FILE,
    KEY_FILE,
    MIGRATION,
    STORE,
    STORE_MEMBER_DNS,
    PeerIdentity,
    migration_dns,
)

CA_KEY_FILE = "ca-key.pem"
_SUBJECT = "Godwit cluster "
CA_DAYS, ISSUED_DAYS = 3650.0, 825.0
# A peer whose clock is behind must not refuse a fresh certificate.
_BACKDATED = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its key and its CA, all PEM."""

    cert: bytes
    key: bytes
    ca: bytes


@dataclass(frozen=True, slots=True)
class ClusterCa:
    """The CA's certificate and private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, *, cluster: str, days: float = CA_DAYS) -> ClusterCa:
        """A new self-signed CA for a cluster."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"{_SUBJECT}{cluster}")
        builder = (
            _dated(days)
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        )
        return cls(certificate=builder.sign(key, hashes.SHA256()), key=key)

    @classmethod
    def load(cls, directory: Path) -> ClusterCa:
        """Errors: IdentityUnusable."""
        try:
            certificate = x509.load_pem_x509_certificate((directory / CA_FILE).read_bytes())
            key = serialization.load_pem_private_key(
                (directory / CA_KEY_FILE).read_bytes(), password=None
            )
        except (OSError, ValueError, TypeError) as error:
            raise IdentityUnusable(
                f"The cluster CA in {directory} cannot be read: {error}",
                hint="Run this where the CA is kept, as root.",
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IdentityUnusable(f"The key in {directory} is not an EC key.")
        if key.public_key() != certificate.public_key():
            raise IdentityUnusable(
                f"{CA_FILE} and {CA_KEY_FILE} in {directory} do not belong together."
            )
        return cls(certificate=certificate, key=key)

    def save(self, directory: Path) -> None:
        """Write ca-key.pem (0600) and ca.pem (0644); the key first, so a CA file implies one."""
        _directory(directory)
        write_whole(directory / CA_KEY_FILE, _key_pem(self.key), mode=0o600)
        write_whole(directory / CA_FILE, self.pem, mode=0o644)

    @property
    def cluster(self) -> str:
        """The name of the cluster it was made for."""
        [named] = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(named.value).removeprefix(_SUBJECT)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def issue(
    ca: ClusterCa,
    *,
    role: str,
    name: str,
    dns: Sequence[str] = (),
    ips: Sequence[str] = (),
    days: float = ISSUED_DAYS,
) -> Issued:
    """A new key and a certificate for `godwit://role/name`, good as server and as client.

    One for the store also has the name by which its members know one another.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    peer = PeerIdentity(role=role, name=name)
    made = _certify(ca, key.public_key(), peer=peer, dns=dns, ips=ips, days=days)
    return Issued(cert=made, key=_key_pem(key), ca=ca.pem)


def request(role: str, name: str) -> tuple[bytes, bytes]:
    """A new key and a signing request for it (PEM both): the key need never leave its machine."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(str(PeerIdentity(role=role, name=name)))
    asked = x509.CertificateSigningRequestBuilder().subject_name(subject)
    made = asked.sign(key, hashes.SHA256())
    return _key_pem(key), made.public_bytes(serialization.Encoding.PEM)


def sign(
    ca: ClusterCa,
    csr: bytes,
    *,
    role: str,
    name: str,
    dns: Sequence[str] = (),
    ips: Sequence[str] = (),
    days: float = ISSUED_DAYS,
) -> bytes:
    """The certificate for the key in a signing request, as PEM.

    Of the request only the key counts, which its sender has proven to hold; who the holder is
    says the caller. Errors: IdentityUnusable.
    """
    try:
        asked = x509.load_pem_x509_csr(csr)
        key = asked.public_key()
        proven = asked.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityUnusable(f"The signing request cannot be read: {error}") from error
    if not proven or not isinstance(key, ec.EllipticCurvePublicKey):
        raise IdentityUnusable("The signing request does not prove an EC key.")
    peer = PeerIdentity(role=role, name=name)
    return _certify(ca, key, peer=peer, dns=dns, ips=ips, days=days)


def _certify(
    ca: ClusterCa,
    key: ec.EllipticCurvePublicKey,
    *,
    peer: PeerIdentity,
    dns: Sequence[str],
    ips: Sequence[str],
    days: float,
) -> bytes:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(peer.uri)]
    members = (STORE_MEMBER_DNS,) if peer.role == STORE else ()
    names += [x509.DNSName(value) for value in dict.fromkeys((*dns, *members))]
    names += [x509.IPAddress(ipaddress.ip_address(value)) for value in ips]
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    builder = (
        _dated(days)
        .subject_name(_name(str(peer)))
        .issuer_name(ca.certificate.subject)
        .public_key(key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
        .add_extension(authority, critical=False)
    )
    made = builder.sign(ca.key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


def write_identity(directory: Path, issued: Issued, *, gid: int | None = None) -> None:
    """Write what `Identity.load` reads; with `gid` that group may read the key (0640).

    The key goes first: a reader between two writes sees a pair that does not fit and says so.
    """
    _directory(directory, gid=gid)
    write_whole(directory / KEY_FILE, issued.key, mode=0o600, gid=gid)
    write_whole(directory / CERT_FILE, issued.cert, mode=0o644)
    write_whole(directory / CA_FILE, issued.ca, mode=0o644)


def write_qemu_credentials(
    directory: Path, ca: ClusterCa, *, host: str, gid: int, days: float = ISSUED_DAYS
) -> Issued:
    """Write a tls-creds-x509 directory for a host's QEMUs, readable by their group `gid`.

    One certificate serves as server-cert and client-cert. Its role is `migration`, which no
    daemon lets in: whoever takes over a QEMU gains no voice in the cluster.
    """
    issued = issue(ca, role=MIGRATION, name=host, dns=[migration_dns(host)], days=days)
    write_qemu_files(directory, issued, gid=gid)
    return issued


def write_qemu_files(directory: Path, issued: Issued, *, gid: int) -> None:
    """Write what QEMU reads: one key and certificate for both ends, and the authority."""
    _directory(directory, gid=gid)
    write_whole(directory / "ca-cert.pem", issued.ca, mode=0o644)
    for side in ("server", "client"):
        write_whole(directory / f"{side}-key.pem", issued.key, mode=0o600, gid=gid)
        write_whole(directory / f"{side}-cert.pem", issued.cert, mode=0o644)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _dated(days: float) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _BACKDATED)
        .not_valid_after(end)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        # Means nothing for an EC key, but QEMU before 10.2 refuses certificates without it.
        key_encipherment=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _directory(path: Path, *, gid: int | None = None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700 if gid is None else 0o750)
    if gid is not None:
        os.chown(path, -1, gid)


def replace_whole(path: Path, content: bytes) -> None:
    """Put new content in a file's place, with the old one's owner and rights."""
    old = path.stat()
    mode = stat.S_IMODE(old.st_mode)
    write_whole(path, content, mode=mode, uid=old.st_uid, gid=old.st_gid, exact=True)


def write_whole(
    path: Path,
    content: bytes,
    *,
    mode: int,
    uid: int = -1,
    gid: int | None = None,
    exact: bool = False,
) -> None:
    """Whole or not at all, with its final rights before its name exists.

    A group that is named may read it, whatever ``mode`` says, unless ``exact``.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if gid is not None:
                os.fchown(file.fileno(), uid, gid)
            os.fchmod(file.fileno(), mode if gid is None or exact else mode | 0o040)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
