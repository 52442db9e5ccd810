"""The host's lease: granted once, renewed every few seconds, its last answered renewal known.

``renewed_at`` is the CLOCK_BOOTTIME at which the last *answered* renewal was sent: from then the
store promises at least ``TTL_S`` seconds, whatever the answer's way took.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Protocol

from godwit.model import keys
from godwit.model.world import Clock
from godwit.store.api import Store
from godwit.store.errors import LeaseNotFound, StoreError

TTL_S = 12
RENEW_S = 3.0
RETRY_S = 0.5
_log = logging.getLogger("guard")


class Told(Protocol):
    """Told after each answered renewal."""

    def __call__(self, renewed_at: float) -> None: ...


class HostLease:
    """Keeps ``hosts/<name>/lease`` present while this host reaches the store."""

    def __init__(
        self, store: Store, clock: Clock, *, host: str, boot_id: Callable[[], str]
    ) -> None:
        self._store = store
        self._clock = clock
        self._host = host
        self._boot_id = boot_id
        self.renewed_at: float | None = None

    async def serve(self) -> None:
        """Renew, for ever."""
        while True:
            try:
                lease = await self._take()
                while True:
                    await self._clock.sleep(RENEW_S)
                    await self._renew(lease)
            except LeaseNotFound:
                _log.warning("the lease was lost; taking a new one")
            except StoreError as error:
                _log.warning("the store does not answer: %s", error)
                await self._clock.sleep(RETRY_S)

    async def _take(self) -> int:
        sent = self._clock.monotonic()
        lease = await self._store.lease_grant(TTL_S)
        value = json.dumps({"boot_id": self._boot_id(), "guard": "armed"}).encode()
        await self._store.put(keys.host_lease(self._host), value, lease=lease.id)
        self.renewed_at = sent
        return lease.id

    async def _renew(self, lease: int) -> None:
        """One renewal; while the store is away it is tried often, for the lease may still hold."""
        while True:
            sent = self._clock.monotonic()
            try:
                await self._store.lease_keepalive(lease, timeout=RENEW_S)
            except LeaseNotFound:
                raise
            except StoreError:
                await self._clock.sleep(RETRY_S)
                continue
            self.renewed_at = sent
            return
