"""Ask for one's own certificate anew: the old key vouches for the new one.

    daemon                        the store                      a manager with the CA's key
      | --- RenewalAsk ------------> |                                   |
      |     (new request, old        | --- watch ----------------------> |
      |      certificate, signature  |                                   | proves, signs
      |      of the old key)         | <-- Renewed ---------------------- |
      | <-- watch ------------------ |

What passes through the store is public; who may write there cannot ask in another's name,
because the signature is made with the key of the certificate that is to be renewed.
"""

from __future__ import annotations

import base64
import binascii
import datetime
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from godwit.model.trust import RenewalAsk
from godwit.wire.ca import ClusterCa, request
from godwit.wire.errors import IdentityUnusable
from godwit.wire.identity import PeerIdentity

_WORD = b"godwit renewal\n"


def ask(cert: Path, key: Path, *, now: float) -> tuple[bytes, RenewalAsk]:
    """A new key (PEM) and the question for its certificate. Errors: IdentityUnusable."""
    try:
        old = x509.load_pem_x509_certificate(cert.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise IdentityUnusable(f"{cert} and {key} cannot be read: {error}") from error
    peer = holder(old)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise IdentityUnusable(f"{key} is not an EC key.")
    fresh, csr = request(peer.role, peer.name)
    signature = private.sign(_WORD + csr, ec.ECDSA(hashes.SHA256()))
    return fresh, RenewalAsk(
        certificate=old.public_bytes(serialization.Encoding.PEM).decode(),
        csr=csr.decode(),
        signature=base64.b64encode(signature).decode(),
        asked_at=now,
    )


def judge(
    asked: RenewalAsk, signer: Callable[[str], ClusterCa]
) -> tuple[x509.Certificate, PeerIdentity]:
    """The old certificate and its holder, once it is proven that he asks and that it counts.

    ``signer`` names the CA of a role. Whether it was revoked the caller knows. Errors:
    IdentityUnusable, with the reason.
    """
    try:
        old = x509.load_pem_x509_certificate(asked.certificate.encode())
        peer = holder(old)
        old.verify_directly_issued_by(signer(peer.role).certificate)
        key = old.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise IdentityUnusable("the old certificate's key is not an EC key")
        signature = base64.b64decode(asked.signature, validate=True)
        key.verify(signature, _WORD + asked.csr.encode(), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise IdentityUnusable("it is not signed by whom it names") from None
    except (ValueError, TypeError, binascii.Error, x509.ExtensionNotFound) as error:
        raise IdentityUnusable(f"it cannot be read: {error}") from error
    if old.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        raise IdentityUnusable("the old certificate has expired: the host has to join again")
    return old, peer


def holder(certificate: x509.Certificate) -> PeerIdentity:
    """Whose certificate it is. Errors: IdentityUnusable."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    found = [peer for uri in uris if (peer := PeerIdentity.from_uri(uri)) is not None]
    if len(found) != 1:
        raise IdentityUnusable("the certificate does not carry one godwit://role/name identity")
    return found[0]


def other_names(certificate: x509.Certificate) -> tuple[list[str], list[str]]:
    """Its DNS names and its addresses, which the next one carries on."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = names.get_values_for_type(x509.DNSName)
    return dns, [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
