"""TLS for daemons: version 1.3 only, both sides with certificates of the cluster CA.

Host names and addresses say where a peer is, not who it is, so between daemons the check is
on the identity in the certificate (`Expect`), made right after the handshake and before the
first byte of a request or token is sent. No session tickets: every connection proves anew.

A context follows its files: `refresh` reads a renewed certificate into every context of this
process that was made from that directory, and the serial numbers that are revoked. New
connections use them; open ones go on.
"""

from __future__ import annotations

import logging
import ssl
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from godwit.wire.errors import IdentityUnusable, PeerNotTrusted
from godwit.wire.identity import MANAGER, Identity, PeerIdentity

REVOKED_FILE = "revoked"

_contexts: weakref.WeakKeyDictionary[ssl.SSLContext, Path] = weakref.WeakKeyDictionary()
_revoked: dict[Path, frozenset[int]] = {}
_log = logging.getLogger("godwit.wire")


class ToldHandshake(ssl.SSLObject):
    """A server's side of a connection: says why it let somebody not in, which asyncio keeps."""

    def do_handshake(self) -> None:
        """As ever, with a line in the log when it fails."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLCertVerificationError as error:
            _log.warning("refused a connection: %s", error.verify_message)
            raise
        except ssl.SSLError as error:
            _log.warning("refused a connection: %s", _in_words(error))
            raise


def _in_words(error: ssl.SSLError) -> str:
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it shows no certificate"
    return (error.reason or str(error)).replace("_", " ").lower()


@dataclass(frozen=True, slots=True)
class Expect:
    """Whom we mean to talk to; without a name, anyone with the role."""

    role: str
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.role}/{self.name or '*'}"

    def accepts(self, peer: PeerIdentity | None) -> bool:
        return peer is not None and peer.role == self.role and self.name in (None, peer.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """How a client speaks TLS: the context, and whom it expects (None: checked by host name)."""

    context: ssl.SSLContext
    expect: Expect | None
    directory: Path | None = None  # whose list of revoked certificates counts

    @classmethod
    def for_daemon(cls, identity: Identity, expect: Expect) -> ClientTls:
        """Between daemons: our certificate, the cluster CA, a named peer."""
        context = _client_context(ca=identity.ca)
        _load_chain(context, identity)
        _follow(context, identity)
        return cls(context=context, expect=expect, directory=identity.directory)

    def towards(self, expect: Expect) -> ClientTls:
        """The same for another peer. A context is some hundred kilobytes: one does for all."""
        return replace(self, expect=expect)

    @classmethod
    def for_api(cls, ca: Path | None) -> ClientTls:
        """For people's tools: with `ca` the cluster's own CA and the manager's role are
        required; without, the system's trust store and the host name."""
        if ca is None:
            context = ssl.create_default_context()
            return cls(context=context, expect=None)
        return cls(context=_client_context(ca=ca), expect=Expect(MANAGER))

    def verify(self, ssl_object: ssl.SSLObject | None, *, where: str) -> PeerIdentity | None:
        """The proven identity of the peer. Errors: PeerNotTrusted when it is not the expected."""
        peer = peer_identity(ssl_object)
        if self.expect is not None and not self.expect.accepts(peer):
            raise PeerNotTrusted(
                f"{where} is {peer or 'somebody without a cluster identity'}, not {self.expect}.",
                hint="Check the address: another daemon or another machine answers there.",
            )
        if is_revoked(ssl_object, self.directory):
            raise PeerNotTrusted(
                f"{where} is {peer}, whose certificate was revoked.",
                hint="It was removed from the cluster.",
            )
        return peer


def server_context(identity: Identity, *, client_certificates: bool) -> ssl.SSLContext:
    """For a listening socket; with `client_certificates` nobody enters without one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.sslobject_class = ToldHandshake
    _load_chain(context, identity)
    _follow(context, identity)
    if client_certificates:
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        _load_ca(context, identity.ca)
    return context


def peer_identity(ssl_object: ssl.SSLObject | ssl.SSLSocket | None) -> PeerIdentity | None:
    """Who is at the other end of a finished handshake; None when no certificate was verified."""
    return None if ssl_object is None else PeerIdentity.from_certificate(ssl_object.getpeercert())


def is_revoked(ssl_object: ssl.SSLObject | ssl.SSLSocket | None, directory: Path | None) -> bool:
    """Whether the peer's verified certificate is on the list that lies in our directory."""
    serials = _revoked.get(directory) if directory is not None else None
    if not serials or ssl_object is None:
        return False
    return serial_of(ssl_object.getpeercert()) in serials


def serial_of(certificate: dict[str, Any] | None) -> int | None:
    """The serial number in what ``getpeercert`` answers."""
    number = (certificate or {}).get("serialNumber")
    return int(number, 16) if isinstance(number, str) else None


def refresh(directory: Path) -> Identity:
    """Read a directory's files again into all contexts made from it; the identity as it is now.

    Errors: IdentityUnusable, for instance while the files are being replaced; then the old
    certificate stays in use.
    """
    identity = Identity.load(directory)
    for context, where in list(_contexts.items()):
        if where == directory:
            _load_chain(context, identity)
            if context.verify_mode is not ssl.CERT_NONE:
                _load_ca(context, identity.ca)
    _revoked[directory] = read_revoked(directory)
    return identity


def read_revoked(directory: Path) -> frozenset[int]:
    """The serial numbers in the directory's `revoked` file; none when there is no file.

    Errors: IdentityUnusable.
    """
    path = directory / REVOKED_FILE
    try:
        return frozenset(int(line, 16) for line in path.read_text().split())
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise IdentityUnusable(
            f"{path} cannot be read: {error}", hint="Remove it; the next list replaces it."
        ) from error


def _follow(context: ssl.SSLContext, identity: Identity) -> None:
    _contexts[context] = identity.directory
    _revoked[identity.directory] = read_revoked(identity.directory)


def _client_context(*, ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the identity URI is checked instead, see `verify`
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    _load_ca(context, ca)
    return context


def _load_chain(context: ssl.SSLContext, identity: Identity) -> None:
    try:
        context.load_cert_chain(identity.cert, identity.key)
    except (ssl.SSLError, OSError) as error:
        raise IdentityUnusable(
            f"{identity.cert} and {identity.key} cannot be used: {error}",
            hint="Check that both are readable PEM files that belong together.",
        ) from error


def _load_ca(context: ssl.SSLContext, ca: Path) -> None:
    try:
        context.load_verify_locations(ca)
    except (ssl.SSLError, OSError) as error:
        raise IdentityUnusable(
            f"The CA file {ca} cannot be used: {error}",
            hint="Copy the cluster's ca.pem there.",
        ) from error
