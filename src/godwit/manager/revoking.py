"""The lists of revoked certificates, as the manager that keeps the CA's key writes them.

Two CAs sign, so there are two lists: one for daemons, one for QEMU's streams. A list only grows;
its newest copy also lies beside the key, so that a store which was restored from a backup does not
bring back who was removed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from godwit.manager.issuing import Issuer
from godwit.model import keys
from godwit.model.errors import OperationFailed
from godwit.model.trust import IssuedCertificate
from godwit.model.world import Clock
from godwit.store.api import Compare, Op, absent, mod_is, put
from godwit.store.records import Records, Versioned, encode
from godwit.wire import crl
from godwit.wire.identity import HOST, MANAGER, MIGRATION, STORE

ROLES = (HOST, MIGRATION, MANAGER, STORE)
_LISTS = {HOST: keys.TRUST_CRL, MIGRATION: keys.TRUST_CRL_MIGRATION}  # by a role of its CA


@dataclass(frozen=True, slots=True)
class Listed:
    """A list as it stands in the store, and the revision it was written at (0: not there)."""

    value: crl.Revocations
    revision: int


class Lists:
    """Both lists."""

    def __init__(self, issuer: Issuer, records: Records, clock: Clock) -> None:
        self._issuer = issuer
        self._records = records
        self._store = records.store
        self._clock = clock

    async def publish(self) -> None:
        """Bring the newer of each list, the store's or the one beside the key, to the other."""
        for role in _LISTS:
            stored, ours = await self.newest(role), self._issuer.last_list(role)
            if stored.value.number > ours.number:
                self._issuer.keep_list(role, stored.value)
            elif stored.revision == 0 or ours.number > stored.value.number:
                await self._store.txn([_guard(role, stored)], [put(_LISTS[role], ours.pem)])

    async def newest(self, role: str) -> Listed:
        """The list of the CA that signs for a role."""
        mine = MIGRATION if role == MIGRATION else HOST
        kv = await self._store.get(_LISTS[mine])
        if kv is None:
            return Listed(self._issuer.last_list(mine), 0)
        return Listed(crl.read(kv.value, ca=self._issuer.of(mine).pem), kv.mod_revision)

    async def live(self, name: str, role: str) -> bool:
        """Whether a certificate of that role still counts."""
        now, listed = self._clock.realtime(), (await self.newest(role)).value.serials
        found = await self._certificates_of(name, (role,))
        return any(one.not_after > now and int(one.serial, 16) not in listed for one in found)

    async def revoke(
        self, name: str, *, roles: Sequence[str] = ROLES, also: Sequence[Op] = ()
    ) -> int:
        """Put every certificate of a name on its list, ``also`` in the same transaction.

        Returns how many are new there. Errors: OperationFailed when others change the lists all
        the time.
        """
        now = self._clock.realtime()
        live = [one for one in await self._certificates_of(name, roles) if one.not_after > now]
        for _ in range(10):
            done = await self._try(live, also, now=now)
            if done is not None:
                return done
        raise OperationFailed("the list of revoked certificates changes all the time", hint="again")

    async def _try(
        self, live: Sequence[IssuedCertificate], also: Sequence[Op], *, now: float
    ) -> int | None:
        guards: list[Compare] = []
        ops: list[Op] = []
        fresh: dict[str, crl.Revocations] = {}
        count = 0
        for role in _LISTS:
            stored = await self.newest(role)
            of_ca = {
                int(one.serial, 16)
                for one in live
                if (one.role == MIGRATION) == (role == MIGRATION)
            }
            serials = stored.value.serials | of_ca
            new = len(serials - stored.value.serials)
            if not new:
                continue
            count += new
            fresh[role] = crl.make(self._issuer.of(role), serials, number=stored.value.number + 1)
            guards.append(_guard(role, stored))
            ops.append(put(_LISTS[role], fresh[role].pem))
        marks = [
            put(place_of(one), encode(one.but(revoked_at=now)))
            for one in live
            if one.revoked_at is None
        ]
        if fresh or also:
            answer = await self._store.txn(guards, [*ops, *marks, *also])
            if not answer.succeeded:
                return None
        for role, one in fresh.items():
            self._issuer.keep_list(role, one)
        return count

    async def _certificates_of(self, name: str, roles: Sequence[str]) -> list[IssuedCertificate]:
        """From the store and from the journal: who takes his record away is not spared."""
        found: dict[str, Versioned[IssuedCertificate]] = {}
        for role in roles:
            prefix = f"{keys.TRUST_ISSUED}{role}/{name}/"
            found |= await self._records.list(prefix, IssuedCertificate)
        merged = {key: one.value for key, one in found.items()}
        for one in self._issuer.noted():
            if one.name == name and one.role in roles:
                merged.setdefault(place_of(one), one)
        return list(merged.values())


def place_of(record: IssuedCertificate) -> str:
    """Where a certificate's record lies."""
    return keys.issued(record.role, record.name, record.serial)


def _guard(role: str, stored: Listed) -> Compare:
    key = _LISTS[role]
    return mod_is(key, stored.revision) if stored.revision else absent(key)
