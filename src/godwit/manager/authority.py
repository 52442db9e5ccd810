"""The manager that keeps the CA's key: it signs for hosts that join, renew and leave.

What it decides is written in one transaction before anything is handed out: the token that was
used, the certificate that was signed. No secret is logged or stored; of a token the store keeps a
hash.
"""

from __future__ import annotations

import asyncio
import logging

from godwit.manager.issuing import Issuer
from godwit.manager.revoking import Lists, place_of
from godwit.model import keys
from godwit.model.errors import Conflict, InvalidRequest, NotAllowed
from godwit.model.join import UNKNOWN, Token, new_token, objection, parse_token
from godwit.model.trust import (
    ClusterIdentity,
    IssuedCertificate,
    JoinAnswer,
    JoinAsk,
    JoinToken,
    NewToken,
    RenewalAsk,
    Renewed,
    TokenView,
)
from godwit.model.world import Clock
from godwit.store.api import KeyValue, Op, absent, delete, mod_is, put
from godwit.store.errors import Compacted, StoreError
from godwit.store.records import Records, Versioned, decode, encode, new_event
from godwit.wire import renewal
from godwit.wire.errors import IdentityUnusable
from godwit.wire.identity import HOST, MIGRATION, migration_dns

_RETRY_S = 1.0
_KEPT_S = 86400.0  # how long a used or expired token is remembered, to say why it is refused
_PRUNED_AT_ONCE = 100
_log = logging.getLogger("godwit.trust")


class Authority:
    """Signs for the cluster. ``endpoints`` is how a host that joins reaches the store."""

    def __init__(
        self,
        issuer: Issuer,
        records: Records,
        clock: Clock,
        *,
        endpoints: tuple[str, ...],
    ) -> None:
        self.issuer = issuer
        self._records = records
        self._store = records.store
        self._clock = clock
        self._name = issuer.ca.cluster
        self._endpoints = endpoints
        self.lists = Lists(issuer, records, clock)
        self._joining = asyncio.Lock()  # the second of one name must see what the first was given

    # In the background

    async def run(self) -> None:
        """Bring what lies beside the key into the store, then answer who asks for renewal."""
        while True:
            try:
                await self.publish()
                async with self._store.watch(keys.TRUST_ASKED) as watch:
                    async for _ in watch:
                        await self._answer_all()
            except Compacted:
                continue
            except StoreError as error:
                _log.warning("nobody can join or renew now: %s", error)
                await self._clock.sleep(_RETRY_S)

    async def publish(self) -> None:
        """The cluster's name, its list of revoked certificates, and what was signed so far."""
        now = self._clock.realtime()
        about = ClusterIdentity(
            name=self._name, ca_fingerprint=self.issuer.fingerprint, created_at=now
        )
        key = keys.TRUST_CLUSTER
        await self._store.txn([absent(key)], [put(key, encode(about))])
        await self.lists.publish()
        known = await self._records.list(keys.TRUST_ISSUED, IssuedCertificate)
        noted = {place_of(record): record for record in self.issuer.noted()}
        for place in noted.keys() - known.keys():
            await self._store.txn([absent(place)], [put(place, encode(noted[place]))])
        self.issuer.note(known[place].value for place in known.keys() - noted.keys())

    async def _answer_all(self) -> None:
        found = await self._store.range(keys.TRUST_ASKED)
        for kv in found.kvs:
            await self._answer(kv)

    async def _answer(self, kv: KeyValue) -> None:
        """Sign for the holder of a certificate that counts; whoever else asked is told why not."""
        serial = kv.key.removeprefix(keys.TRUST_ASKED)
        also: list[Op] = []
        try:
            said, record = await self._renew(kv, serial)
            also.append(put(place_of(record), encode(record)))
        except (IdentityUnusable, ValueError) as error:
            problem = error.message if isinstance(error, IdentityUnusable) else "it is damaged"
            _log.warning("renewal of certificate %s refused: %s", serial[:40], problem)
            said = Renewed(problem=problem)
        ops = [delete(kv.key), put(keys.renewed(serial), encode(said)), *also]
        await self._store.txn([mod_is(kv.key, kv.mod_revision)], ops)

    async def _renew(self, kv: KeyValue, serial: str) -> tuple[Renewed, IssuedCertificate]:
        asked = decode(kv, RenewalAsk).value
        old, peer = renewal.judge(asked, self.issuer.of)
        if f"{old.serial_number:x}" != serial:
            raise IdentityUnusable("it names another certificate")
        if old.serial_number in (await self.lists.newest(peer.role)).value.serials:
            raise IdentityUnusable("the certificate was revoked")
        dns, ips = renewal.other_names(old)
        now = self._clock.realtime()
        pem, record = self.issuer.certify(
            asked.csr.encode(), role=peer.role, name=peer.name, now=now, dns=dns, ips=ips
        )
        _log.info("%s: certificate renewed", peer)
        return Renewed(certificate=pem), record

    # Joining

    async def create_token(self, asked: NewToken, *, by: str) -> TokenView:
        """A new join token; its text exists nowhere but in the answer."""
        await self._prune_tokens()
        now = self._clock.realtime()
        token = new_token(self.issuer.fingerprint)
        record = JoinToken(
            id=token.id,
            hash=token.hash,
            created_at=now,
            expires_at=round(now + asked.ttl_s, 3),
            by=by,
            host=asked.host,
        )
        record = record.but(seal=self.issuer.seal(record))
        whose = f" for {asked.host}" if asked.host else ""
        event = new_event(
            "cluster.token",
            f"token/{token.id}",
            f"join token {token.id}{whose}, for {asked.ttl_s:.0f} s, asked for by {by}",
            at=now,
        )
        key = keys.join_token(token.id)
        answer = await self._store.txn(
            [absent(key)], [put(key, encode(record)), put(keys.event(event.id), encode(event))]
        )
        if not answer.succeeded:
            raise Conflict("the token's id was taken in this moment", hint="ask again")
        return TokenView(
            id=token.id, token=token.text, expires_at=record.expires_at, host=asked.host
        )

    async def join(self, asked: JoinAsk, *, where: str) -> JoinAnswer:
        """Let a host in: its token is used up, its certificates are signed.

        ``where`` is the address it calls from. Errors: NotAllowed (the token), Conflict (the name
        is taken), InvalidRequest (the signing requests).
        """
        token = self._parsed(asked, where)
        now = self._clock.realtime()
        found = await self._records.get(keys.join_token(token.id), JoinToken)
        why = objection(token, found.value if found else None, host=asked.name, now=now)
        if not why and found is not None and not self.issuer.sealed(found.value):
            why = UNKNOWN
        if why or found is None:
            await self._refused(asked.name, where, f"token {token.id}: {why}")
            raise NotAllowed(why, hint="make a new one with: godwit cluster token create")
        if await self._store.get(keys.host_info(asked.name)) is not None:
            await self._refused(asked.name, where, "a host of that name is a member")
            raise Conflict(
                f"{asked.name} is a member already",
                hint=f"take another name, or first: godwit cluster remove {asked.name}",
            )
        async with self._joining:
            return await self._let_in(asked, found, where=where, now=now)

    def _parsed(self, asked: JoinAsk, where: str) -> Token:
        try:
            return parse_token(asked.token)
        except InvalidRequest:
            _log.warning("join of %s from %s refused: no join token", asked.name, where)
            raise NotAllowed(
                UNKNOWN, hint="make a new one with: godwit cluster token create"
            ) from None

    async def _refused(self, name: str, where: str, why: str) -> None:
        _log.warning("join of %s from %s refused: %s", name, where, why)
        await self._records.append_event(
            "cluster.join-refused",
            f"host/{name}",
            f"{name} at {where} may not join: {why}",
            at=self._clock.realtime(),
            level="warning",
        )

    async def _let_in(
        self, asked: JoinAsk, token: Versioned[JoinToken], *, where: str, now: float
    ) -> JoinAnswer:
        # A certificate of this name that never came to be used must not count beside the new one.
        await self.lists.revoke(asked.name, roles=(HOST, MIGRATION))
        try:
            pem, record = self.issuer.certify(
                asked.csr.encode(), role=HOST, name=asked.name, now=now, ips=asked.addresses
            )
            stream, stream_record = self.issuer.certify(
                asked.migration_csr.encode(),
                role=MIGRATION,
                name=asked.name,
                now=now,
                dns=[migration_dns(asked.name)],
            )
        except (IdentityUnusable, ValueError) as error:
            raise InvalidRequest(f"{asked.name} cannot join: {error}", hint="join anew") from error
        event = new_event(
            "cluster.joined", f"host/{asked.name}", f"{asked.name} joined from {where}", at=now
        )
        used = token.value.but(used_at=now, used_by=f"{asked.name} at {where}")
        key = keys.join_token(used.id)
        answer = await self._store.txn(
            [mod_is(key, token.revision), absent(keys.host_info(asked.name))],
            [
                put(key, encode(used)),
                *(put(place_of(one), encode(one)) for one in (record, stream_record)),
                put(keys.event(event.id), encode(event)),
            ],
        )
        if not answer.succeeded:
            await self._refused(asked.name, where, f"token {used.id} was used in this moment")
            raise NotAllowed(
                "the join token has been used",
                hint="make a new one with: godwit cluster token create",
            )
        _log.info("%s joined from %s with token %s", asked.name, where, used.id)
        return JoinAnswer(
            cluster=self._name,
            certificate=pem,
            ca=self.issuer.of(HOST).pem.decode(),
            crl=await self._list(HOST),
            migration_certificate=stream,
            migration_ca=self.issuer.of(MIGRATION).pem.decode(),
            migration_crl=await self._list(MIGRATION),
            store_endpoints=self._endpoints,
        )

    async def _list(self, role: str) -> str:
        return (await self.lists.newest(role)).value.pem.decode()

    async def _prune_tokens(self) -> None:
        before = self._clock.realtime() - _KEPT_S
        found = await self._records.list(keys.TRUST_TOKENS, JoinToken)
        old = [key for key, one in found.items() if one.value.expires_at < before]
        if old:
            await self._store.txn([], [delete(key) for key in old[:_PRUNED_AT_ONCE]])
