"""``godwit cluster join``: this host becomes a member, by a token that works once.

      this host                                        a manager with the CA's key
        | --- TLS, certificate not believed yet; GET /v1/cluster/ca ---> |
        | <-- the CA's certificate ------------------------------------- |
        |  its SHA-256 is the token's fingerprint? else: end             |
        |  make two keys                                                 |
        | --- TLS, checked by that CA: token, two signing requests ----> |
        |                                      token used up, signed     |
        | <-- two certificates, the list of revoked ones, the store ---- |

No secret leaves before the CA is known; the keys never leave.
"""

from __future__ import annotations

import hashlib
import hmac
import ssl
from dataclasses import dataclass
from pathlib import Path

from godwit.form.places import HostFacts, Places, host_config, qemu_gid, write_config
from godwit.model.errors import InvalidRequest, OperationFailed, Refused
from godwit.model.join import Token, parse_token
from godwit.model.trust import JoinAnswer, JoinAsk
from godwit.qemu.tls import ensure_dh_params
from godwit.wire import crl
from godwit.wire.ca import Issued, request, write_identity, write_qemu_files, write_whole
from godwit.wire.errors import IdentityUnusable, PeerRefused
from godwit.wire.http import PeerClient
from godwit.wire.identity import HOST, MIGRATION, Identity
from godwit.wire.keeper import Place
from godwit.wire.tls import ClientTls


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """What came of it. ``units`` are to be started in this order."""

    cluster: str
    host: str
    valid_until: float
    units: tuple[str, ...] = ("godwit-guard", "godwit-agent")


async def join(places: Places, facts: HostFacts, *, url: str, token: str) -> Joined:
    """Join, and write this host's identities and configuration.

    Errors: InvalidRequest, Refused (here, or by the manager), PeerUnreachable.
    """
    parsed = parse_token(token)
    facts.check()
    if not url.startswith("https://"):
        raise InvalidRequest(
            f"{url!r} is not the manager's address", hint="like: --url https://10.0.0.11:7100"
        )
    places.must_be_fresh()
    gid = qemu_gid(places)
    authority = await _believed_ca(url, parsed)
    places.etc.mkdir(parents=True, exist_ok=True)
    trusted = places.etc / "joining-ca.pem"
    write_whole(trusted, authority, mode=0o644)
    try:
        answer, keys = await _ask(url, trusted, parsed, facts)
    finally:
        trusted.unlink(missing_ok=True)
    _check(answer, authority)
    own = Issued(cert=answer.certificate.encode(), key=keys[0], ca=authority)
    stream = Issued(
        cert=answer.migration_certificate.encode(), key=keys[1], ca=answer.migration_ca.encode()
    )
    write_identity(places.tls, own)
    write_qemu_files(places.migration_tls, stream, gid=gid)
    ensure_dh_params(places.migration_tls)
    identity = Identity.load(places.tls)
    Place(places.tls).take_list(answer.crl.encode())
    Place.of_qemu(places.migration_tls).take_list(answer.migration_crl.encode())
    # The last file: it says that this machine belongs to a cluster.
    write_config(places.config("host"), host_config(places, facts, answer.store_endpoints))
    return Joined(cluster=answer.cluster, host=facts.name, valid_until=identity.not_after)


async def _believed_ca(url: str, token: Token) -> bytes:
    """The CA's certificate as the manager shows it, once it is the one that the token names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing but a public question is asked here
    async with PeerClient(url, tls=ClientTls(context=context, expect=None)) as client:
        try:
            pem = (await client.request("GET", "/v1/cluster/ca")).body
        except PeerRefused as error:
            raise error.error from None
    try:
        der = ssl.PEM_cert_to_DER_cert(pem.decode("ascii").strip())
    except ValueError:
        raise Refused(
            f"{url} shows no CA certificate", hint="check that this is a manager's address"
        ) from None
    if not hmac.compare_digest(hashlib.sha256(der).hexdigest(), token.fingerprint):
        raise Refused(
            f"{url} belongs to another cluster than the token: its CA is not the one it names",
            hint="nothing was sent to it; check the address and the token",
        )
    return pem


async def _ask(
    url: str, trusted: Path, token: Token, facts: HostFacts
) -> tuple[JoinAnswer, tuple[bytes, bytes]]:
    key, csr = request(HOST, facts.name)
    stream_key, stream_csr = request(MIGRATION, facts.name)
    addresses = dict.fromkeys(filter(None, (facts.address, facts.migration_address)))
    asked = JoinAsk(
        token=token.text,
        name=facts.name,
        csr=csr.decode(),
        migration_csr=stream_csr.decode(),
        addresses=tuple(addresses),
    )
    async with PeerClient(url, tls=ClientTls.for_api(trusted)) as client:
        try:
            answer = await client.post("/v1/cluster/join", asked.model_dump(mode="json"))
        except PeerRefused as error:
            raise error.error from None
    return JoinAnswer.model_validate(answer), (key, stream_key)


def _check(answer: JoinAnswer, authority: bytes) -> None:
    if answer.ca.encode() != authority:
        raise OperationFailed("the manager answered with another CA", hint="join anew")
    try:
        crl.read(answer.crl.encode(), ca=authority)
        crl.read(answer.migration_crl.encode(), ca=answer.migration_ca.encode())
    except IdentityUnusable as error:
        raise OperationFailed(error.message, hint="join anew, with a new token") from error
