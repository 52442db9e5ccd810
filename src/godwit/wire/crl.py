"""The list of certificates that count no more: signed by the cluster's CA, numbered, in X.509 form.

One list serves everybody: daemons take its serial numbers (`revoked`, one in hex a line, so that
who reads it needs no X.509), QEMU reads it as `ca-crl.pem`, etcd as its `--client-crl-file`.
Its `nextUpdate` is the end of the CA: how fresh a list is says the store, and a list that ran
out would lock out everybody.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from godwit.wire.ca import ClusterCa
from godwit.wire.errors import IdentityUnusable

# A reader whose clock is behind must not refuse a fresh list.
_BACKDATED = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Revocations:
    """A list that the CA signed; ``number`` rises with each."""

    number: int
    serials: frozenset[int]
    pem: bytes

    @property
    def lines(self) -> str:
        """The serial numbers as the `revoked` file has them."""
        return "".join(f"{serial:x}\n" for serial in sorted(self.serials))


def make(ca: ClusterCa, serials: Iterable[int], *, number: int) -> Revocations:
    """Sign a list. Whoever makes it sees to it that ``number`` rises and nobody is forgotten."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    wanted = frozenset(serials)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.certificate.subject)
        .last_update(now - _BACKDATED)
        .next_update(ca.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key()), False
        )
    )
    for serial in sorted(wanted):
        entry = x509.RevokedCertificateBuilder().serial_number(serial)
        builder = builder.add_revoked_certificate(entry.revocation_date(now - _BACKDATED).build())
    made = builder.sign(ca.key, hashes.SHA256())
    return Revocations(number, wanted, made.public_bytes(serialization.Encoding.PEM))


def read(pem: bytes, *, ca: bytes) -> Revocations:
    """A list as its serial numbers, once its signature is proven by the CA (PEM both).

    Errors: IdentityUnusable.
    """
    try:
        found = x509.load_pem_x509_crl(pem)
        authority = x509.load_pem_x509_certificate(ca)
        number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        proven = found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    except (ValueError, TypeError, x509.ExtensionNotFound) as error:
        raise IdentityUnusable(
            f"The list of revoked certificates cannot be read: {error}"
        ) from None
    if not proven or found.issuer != authority.subject:
        raise IdentityUnusable(
            "The list of revoked certificates is not signed by the cluster's CA."
        )
    return Revocations(number, frozenset(entry.serial_number for entry in found), pem)
