"""TLS for daemons: version 1.3 only, both sides with certificates of the cluster CA.

Host names and addresses say where a peer is, not who it is, so between daemons the check is
on the identity in the certificate (`Expect`), made right after the handshake and before the
first byte of a request or token is sent. No session tickets: every connection proves anew.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from godwit.wire.errors import IdentityUnusable, PeerNotTrusted
from godwit.wire.identity import MANAGER, Identity, PeerIdentity


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

    @classmethod
    def for_daemon(cls, identity: Identity, expect: Expect) -> ClientTls:
        """Between daemons: our certificate, the cluster CA, a named peer."""
        context = _client_context(ca=identity.ca)
        _load_chain(context, identity)
        return cls(context=context, expect=expect)

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
        return peer


def server_context(identity: Identity, *, client_certificates: bool) -> ssl.SSLContext:
    """For a listening socket; with `client_certificates` nobody enters without one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    _load_chain(context, identity)
    if client_certificates:
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        _load_ca(context, identity.ca)
    return context


def peer_identity(ssl_object: ssl.SSLObject | ssl.SSLSocket | None) -> PeerIdentity | None:
    """Who is at the other end of a finished handshake; None when no certificate was verified."""
    return None if ssl_object is None else PeerIdentity.from_certificate(ssl_object.getpeercert())


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
