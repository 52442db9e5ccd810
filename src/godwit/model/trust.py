"""Who belongs to the cluster, as its records say: its CA, its certificates, its join tokens."""

from __future__ import annotations

from pydantic import Field

from godwit.model.base import Name, Record, Value

PEM_LIMIT = 16384


class ClusterIdentity(Record):
    """What makes this cluster this one; written once. ``ca_fingerprint`` is SHA-256 in hex."""

    name: Name
    ca_fingerprint: str
    created_at: float


class IssuedCertificate(Record):
    """A certificate that the CA has signed. ``serial`` is in hex; times in s since the epoch."""

    role: Name
    name: Name
    serial: str
    issued_at: float
    not_after: float
    revoked_at: float | None = None


class JoinToken(Record):
    """A token that lets one host in, once; of its secret only a hash is here.

    A used or expired one stays a day, so that whoever offers it again learns why it is refused.
    """

    id: str
    hash: str  # SHA-256 of the secret, hex
    created_at: float
    expires_at: float
    by: str = ""
    host: Name | None = None  # only this host may use it
    seal: str = ""  # the CA's signature over the fields above
    used_at: float | None = None
    used_by: str = ""


class RenewalAsk(Record):
    """A holder's question for its next certificate; see ``godwit.wire.renewal``."""

    certificate: str = Field(max_length=PEM_LIMIT)
    csr: str = Field(max_length=PEM_LIMIT)
    signature: str = Field(max_length=1024)
    asked_at: float


class Renewed(Record):
    """The answer: a certificate (PEM), or why there is none."""

    certificate: str = ""
    problem: str = ""


class NewToken(Value):
    """Body of ``POST /v1/cluster/tokens``."""

    ttl_s: float = Field(default=3600.0, ge=1.0, le=604800.0)
    host: Name | None = None


class TokenView(Record):
    """A new token, the only time it is shown."""

    id: str
    token: str
    expires_at: float
    host: Name | None = None


class JoinAsk(Value):
    """Body of ``POST /v1/cluster/join``: a host that holds a token asks for its certificates.

    ``addresses`` go into its certificate, for tools that check those.
    """

    token: str = Field(max_length=512)
    name: Name
    csr: str = Field(max_length=PEM_LIMIT)
    migration_csr: str = Field(max_length=PEM_LIMIT)
    addresses: tuple[str, ...] = Field(default=(), max_length=16)


class JoinAnswer(Record):
    """What the host gets: its certificates, the CA and the list of revoked ones for each, and
    where the store is."""

    cluster: Name
    certificate: str
    ca: str
    crl: str
    migration_certificate: str
    migration_ca: str
    migration_crl: str
    store_endpoints: tuple[str, ...]
