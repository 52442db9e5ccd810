"""Keep a machine's certificates alive: renewed in time, and with the newest list of revoked ones.

One daemon of a machine does it for all identities there (the agent; where there is none, the
manager). It talks through the store, which it reaches anyhow: see `godwit.wire.renewal`. Whoever
uses the files notices that they are new (`godwit.wire.follow`); QEMU reads them with each move.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from godwit.model import keys as keys_
from godwit.model.trust import Renewed
from godwit.model.world import Clock
from godwit.store.api import Store, delete, put
from godwit.store.errors import Compacted, StoreError
from godwit.store.records import decode, encode
from godwit.wire import crl, renewal
from godwit.wire.ca import replace_whole, write_whole
from godwit.wire.errors import IdentityUnusable
from godwit.wire.identity import CA_FILE, CERT_FILE, KEY_FILE, Identity
from godwit.wire.tls import REVOKED_FILE

CRL_FILE = "crl.pem"
LOOK_S = 3600.0  # clocks are set and machines sleep: nothing announces that a date has come near
RETRY_S = 60.0
ANSWER_S = 30.0
_log = logging.getLogger("godwit.trust")


@dataclass(frozen=True, slots=True)
class Place:
    """A directory with an identity, and how its files are called there."""

    directory: Path
    certs: tuple[str, ...] = (CERT_FILE,)
    keys: tuple[str, ...] = (KEY_FILE,)
    ca: str = CA_FILE
    crl: str = CRL_FILE
    revoked: str = REVOKED_FILE
    list_key: str = keys_.TRUST_CRL  # where the store has its CA's list

    @classmethod
    def of_qemu(cls, directory: Path) -> Place:
        """What QEMU reads for the migration stream and for exports."""
        return cls(
            directory,
            certs=("server-cert.pem", "client-cert.pem"),
            keys=("server-key.pem", "client-key.pem"),
            ca="ca-cert.pem",
            crl="ca-crl.pem",
            revoked="",
            list_key=keys_.TRUST_CRL_MIGRATION,
        )

    def identity(self) -> Identity:
        """The identity that lies there, proven. Errors: IdentityUnusable."""
        return _proven(*(self._read(name) for name in (self.certs[0], self.keys[0], self.ca)))

    def number(self) -> int:
        """The number of the list that lies there; -1 when there is none that counts."""
        try:
            return crl.read(self._read(self.crl), ca=self._read(self.ca)).number
        except IdentityUnusable:
            return -1

    def _read(self, name: str) -> bytes:
        try:
            return (self.directory / name).read_bytes()
        except OSError as error:
            raise IdentityUnusable(f"{self.directory / name}: {error.strerror}") from error

    def take_list(self, pem: bytes) -> bool:
        """Put a list there if it is signed by the CA and newer; whether it was.

        Errors: IdentityUnusable.
        """
        fresh = crl.read(pem, ca=self._read(self.ca))
        if fresh.number <= self.number():
            return False
        if self.revoked:  # first what daemons read: the list's own file says that all is done
            lines = fresh.lines.encode()
            write_whole(self.directory / self.revoked, lines, mode=0o644)
        write_whole(self.directory / self.crl, fresh.pem, mode=0o644)
        return True

    def take_certificate(self, cert: bytes, key: bytes) -> Identity:
        """Put a certificate and its key in the old ones' place, once they are proven."""
        found = _proven(cert, key, self._read(self.ca))
        for name in self.keys:
            replace_whole(self.directory / name, key)
        for name in self.certs:
            replace_whole(self.directory / name, cert)
        return found


def _proven(cert: bytes, key: bytes, ca: bytes) -> Identity:
    with tempfile.TemporaryDirectory() as name:  # is 0700
        directory = Path(name)
        for file, content in ((CERT_FILE, cert), (KEY_FILE, key), (CA_FILE, ca)):
            (directory / file).write_bytes(content)
        return Identity.load(directory)


def due_in(identity: Identity, *, now: float) -> float:
    """Seconds until a certificate should be renewed: when a third of its life is left."""
    life = identity.not_after - identity.not_before
    return identity.not_after - life / 3 - now


class Keeper:
    """Run :meth:`follow_list` and :meth:`renew` in the background.

    ``copy``: a file that gets each list for other programs to read, such as etcd.
    """

    def __init__(
        self, store: Store, places: Sequence[Place], clock: Clock, *, copy: Path | None = None
    ) -> None:
        self._store = store
        self._places = tuple(places)
        self._clock = clock
        self._copy = copy
        self.retry_s = RETRY_S

    async def follow_list(self) -> None:
        """Take each new list of revoked certificates, for ever."""
        while True:
            try:
                async with self._store.watch(keys_.TRUST_CRL) as watch:
                    async for _ in watch:
                        await self._take_list()
            except Compacted:
                continue
            except StoreError as error:
                _log.warning("the list of revoked certificates cannot be followed: %s", error)
                await self._clock.sleep(self.retry_s)

    async def _take_list(self) -> None:
        lists = {kv.key: kv.value for kv in (await self._store.range(keys_.TRUST_CRL)).kvs}
        for place in self._places:
            pem = lists.get(place.list_key)
            try:
                if pem is not None and place.take_list(pem):
                    _log.info("%s: a new list of revoked certificates", place.directory)
            except IdentityUnusable as error:
                _log.error("%s: %s", place.directory, error.message)
        first = self._places[0].directory / self._places[0].crl
        if self._copy is not None and first.exists():
            write_whole(self._copy, first.read_bytes(), mode=0o644)

    async def renew(self) -> None:
        """Renew each certificate when its time comes, for ever."""
        while True:
            pause = LOOK_S
            for place in self._places:
                left = await self._renew_if_due(place)
                pause = min(pause, left if left > 0 else self.retry_s)
            await self._clock.sleep(pause)

    async def _renew_if_due(self, place: Place) -> float:
        """Seconds until it is due; 0 or less: it is, and could not be renewed now."""
        try:
            identity = place.identity()
            if (left := due_in(identity, now=self._clock.realtime())) > 0:
                return left
            return await self._renew(place, identity)
        except (IdentityUnusable, StoreError, TimeoutError) as error:
            said = getattr(error, "message", None) or str(error) or "no manager answers"
            _log.warning("%s: not renewed: %s", place.directory, said)
            return 0.0

    async def _renew(self, place: Place, old: Identity) -> float:
        now = self._clock.realtime()
        cert, key = place.directory / place.certs[0], place.directory / place.keys[0]
        fresh, asked = renewal.ask(cert, key, now=now)
        serial = f"{old.serial:x}"
        answer = keys_.renewed(serial)
        await self._store.txn([], [delete(answer), put(keys_.renewal_asked(serial), encode(asked))])
        said = await self._await(answer)
        if said.problem:
            raise IdentityUnusable(said.problem)
        new = place.take_certificate(said.certificate.encode(), fresh)
        _log.info("%s: renewed, %.0f days", new.peer, (new.not_after - now) / 86400)
        with contextlib.suppress(StoreError):
            await self._store.delete(answer)
        return due_in(new, now=now)

    async def _await(self, key: str) -> Renewed:
        async with asyncio.timeout(ANSWER_S), self._store.watch(key) as watch:
            async for _ in watch:
                found = await self._store.get(key)
                if found is not None:
                    return decode(found, Renewed).value
        raise TimeoutError
