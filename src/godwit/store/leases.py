"""When leases run out, on whatever clock the caller reads. Seconds, monotonic."""

from __future__ import annotations

from math import inf


class LeaseClock:
    """Deadlines of leases. A lease is never due before its TTL has passed since its renewal."""

    def __init__(self) -> None:
        self._ttl: dict[int, int] = {}
        self._deadline: dict[int, float] = {}

    def start(self, lease_id: int, *, ttl_s: int, now: float) -> None:
        """Begin to count for a new lease."""
        self._ttl[lease_id] = ttl_s
        self._deadline[lease_id] = now + ttl_s

    def renew(self, lease_id: int, *, now: float) -> int | None:
        """Count from the beginning again; the TTL, or None when there is no such lease."""
        ttl = self._ttl.get(lease_id)
        if ttl is not None:
            self._deadline[lease_id] = now + ttl
        return ttl

    def remaining(self, lease_id: int, *, now: float) -> float | None:
        """Seconds left, None when there is no such lease."""
        deadline = self._deadline.get(lease_id)
        return None if deadline is None else max(0.0, deadline - now)

    def stop(self, lease_id: int) -> None:
        """Forget a lease."""
        self._ttl.pop(lease_id, None)
        self._deadline.pop(lease_id, None)

    def due(self, now: float) -> list[int]:
        """The leases that have run out, earliest first."""
        late = [(at, lease) for lease, at in self._deadline.items() if at <= now]
        return [lease for _, lease in sorted(late)]

    def next_deadline(self) -> float:
        """When the next lease runs out, infinity when none will."""
        return min(self._deadline.values(), default=inf)

    def restart(self, *, now: float) -> None:
        """Give every lease its full time: nobody could renew while the store stood still."""
        for lease, ttl in self._ttl.items():
            self._deadline[lease] = now + ttl
