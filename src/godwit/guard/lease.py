"""The host's lease: granted once, renewed every few seconds, its last answered renewal known.

A renewal is two requests sent side by side: the lease is kept alive, and ``hosts/<host>/renewal``
is written. It counts when both were answered. What is written hangs on no lease: whoever comes to
count after it ran out still reads the last word (docs/design/0021). Two times come of it,
CLOCK_BOOTTIME both:

``renewed_at``  when the last answered renewal was *sent*: from then the store promises at least
                ``TTL_S`` seconds, whatever the answer's way took, and no taker began to count later
                than that
``counts_from`` the same, or later: while a majority of the store's members says that there is no
                leader, nobody can take anything over, and the time of asking counts like a renewal
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from godwit.model import keys
from godwit.model.membership import Renewal
from godwit.model.world import Clock
from godwit.store.api import Store, put
from godwit.store.errors import LeaseNotFound, StoreError

TTL_S = 12
RENEW_S = 3.0
ATTEMPT_S = 2.0
"""Seconds one renewal may take: a store that comes back is found within this and ``RETRY_S``."""
RETRY_S = 0.5
OVERDUE_S = RENEW_S + 1.0
"""Seconds after the last renewal from which the members are asked whether they have a leader."""
FAILSAFE_S = 1.0
_log = logging.getLogger("guard")


@dataclass(frozen=True)
class Promise:
    """What a renewal says of this host's guard, true at the moment it is asked for."""

    guard: Literal["armed", "unarmed"] = "unarmed"
    watchdog: bool = False


async def _no_promise() -> Promise:
    return Promise()


class HostLease:
    """Keeps ``hosts/<name>/lease`` and ``hosts/<name>/renewal`` while this host reaches the store.

    ``promise`` is asked before each renewal, ``renewed`` is called after each that was answered.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        host: str,
        boot_id: Callable[[], str],
        promise: Callable[[], Awaitable[Promise]] = _no_promise,
        renewed: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._host = host
        self._boot_id = boot_id
        self._promise = promise
        self._told = renewed
        self._now = asyncio.Event()
        self.number = 0
        self.renewed_at: float | None = None
        self.counts_from: float | None = None

    def resume(self, *, renewed_at: float | None, counts_from: float | None, number: int) -> None:
        """Go on from what an earlier guard of the same boot knew."""
        self.renewed_at, self.counts_from, self.number = renewed_at, counts_from, number

    def hasten(self) -> None:
        """Renew at once: what the last renewal said is not true any more."""
        self._now.set()

    async def serve(self) -> None:
        """Renew, for ever."""
        while True:
            try:
                lease = await self._take()
                while True:
                    await self._pause()
                    await self._renew(lease)
            except LeaseNotFound:
                _log.warning("the lease was lost; taking a new one")
            except StoreError as error:
                _log.warning("the store does not answer: %s", error)
                await self._clock.sleep(RETRY_S)

    async def failsafe(self) -> None:
        """While renewals stay away ask whether anybody could take over at all, for ever."""
        while True:
            await self._clock.sleep(FAILSAFE_S)
            if self.counts_from is None or self._clock.monotonic() - self.counts_from < OVERDUE_S:
                continue
            sent = self._clock.monotonic()
            try:
                nobody = await self._store.without_leader()
            except StoreError:
                continue
            if nobody:
                self.counts_from = max(self.counts_from, sent)
                self._told()

    async def _pause(self) -> None:
        """Until the next renewal is due, or something changed that it should say."""
        waiting = [
            asyncio.ensure_future(self._clock.sleep(RENEW_S)),
            asyncio.ensure_future(self._now.wait()),
        ]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
            self._now.clear()

    async def _take(self) -> int:
        promise = await self._promise()
        sent = self._clock.monotonic()
        lease = await self._store.lease_grant(TTL_S, timeout=ATTEMPT_S)
        value = json.dumps({"boot_id": self._boot_id(), "guard": promise.guard}).encode()
        renewal = self._record(promise)
        steps = [
            put(keys.host_lease(self._host), value, lease=lease.id),
            put(keys.host_renewal(self._host), renewal),
        ]
        await self._store.txn([], steps, timeout=ATTEMPT_S)
        self._answered(sent)
        return lease.id

    async def _renew(self, lease: int) -> None:
        """One renewal; while the store is away it is tried often, for the lease may still hold."""
        key = keys.host_renewal(self._host)
        while True:
            value = self._record(await self._promise())
            sent = self._clock.monotonic()
            answers = await asyncio.gather(
                self._store.lease_keepalive(lease, timeout=ATTEMPT_S),
                self._store.put(key, value, timeout=ATTEMPT_S),
                return_exceptions=True,
            )
            failed = [answer for answer in answers if isinstance(answer, BaseException)]
            for error in failed:
                if isinstance(error, LeaseNotFound) or not isinstance(error, StoreError):
                    raise error
            if not failed:
                self._answered(sent)
                return
            await self._clock.sleep(RETRY_S)

    def _record(self, promise: Promise) -> bytes:
        self.number += 1
        made = Renewal(
            boot_id=self._boot_id(),
            number=self.number,
            guard=promise.guard,
            watchdog=promise.watchdog,
        )
        return made.model_dump_json().encode()

    def _answered(self, sent: float) -> None:
        self.renewed_at = sent
        self.counts_from = max(self.counts_from or sent, sent)
        self._told()
