"""How the store stands: its term with each reading, its members every few seconds.

That it answered a linearizable read shows that it has a leader. The members are asked beside the
readings, for one that does not answer must not make a reading late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlsplit

from godwit.cluster.facts import Member, StoreSeen
from godwit.model.host import HostInfo
from godwit.model.world import Clock
from godwit.store.api import MemberView, Store
from godwit.store.members import leader_of

MEMBERS_S = 2.0
ASK_S = 1.0


class StoreMembers:
    """Knows an embedded store by its having no list of members."""

    def __init__(
        self, store: Store, clock: Clock, *, hosts: Callable[[], Mapping[str, HostInfo]]
    ) -> None:
        self._store = store
        self._clock = clock
        self._hosts = hosts
        self._views: tuple[MemberView, ...] = ()
        self._asked = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def look(self, *, asked_at: float, answered_at: float) -> StoreSeen:
        """See `godwit.manager.failover.reading.StoreLook`."""
        status = await self._store.status(timeout=ASK_S)
        if not self._views:
            await self._ask()
        elif self._clock.monotonic() - self._asked >= MEMBERS_S and self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="members of the store")
            self._asking.add_done_callback(self._asked_them)
        return StoreSeen(
            term=status.raft_term,
            asked_at=asked_at,
            answered_at=answered_at,
            embedded=is_embedded(self._views),
            members=members_of(self._views, self._hosts()),
        )

    async def _ask(self) -> None:
        self._asked = self._clock.monotonic()
        self._views = await self._store.members(timeout=ASK_S)

    def _asked_them(self, task: asyncio.Task[None]) -> None:
        self._asking = None
        if not task.cancelled():
            task.exception()  # the next one tells


def is_embedded(views: Sequence[MemberView]) -> bool:
    """One that answers and has no list of members is the store daemon of one machine. Pure."""
    return len(views) == 1 and views[0].status is not None and views[0].voters == 0


def members_of(views: Sequence[MemberView], hosts: Mapping[str, HostInfo]) -> tuple[Member, ...]:
    """The members by the host they run on, or by their address. Pure.

    Healthy is one that follows the leader which a majority has.
    """
    leader = leader_of(views)
    at = {urlsplit(info.agent_url).hostname or "": name for name, info in hosts.items()}
    found = []
    for view in views:
        address = urlsplit(view.endpoint).hostname or view.endpoint
        host = at.get(address, "")
        follows = (
            leader is not None
            and leader.status is not None
            and view.status is not None
            and view.status.leader == leader.status.member_id
        )
        found.append(Member(name=host or address, host=host, healthy=follows))
    return tuple(found)
