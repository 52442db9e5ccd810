"""The key that says that an agent lives, while the store comes and goes."""

from __future__ import annotations

import asyncio

import pytest

from godwit.agent.main import AGENT_TTL_S, _keep
from godwit.host.clock import RealClock
from godwit.store.errors import LeaseNotFound
from godwit.store.memory import MemoryStore


async def test_a_lease_is_kept_though_the_store_was_away_for_a_moment() -> None:
    store = MemoryStore()
    lease = await store.lease_grant(AGENT_TTL_S)
    store.faults.fail_next(2)
    async with asyncio.timeout(5):
        await _keep(store, lease.id, RealClock())
    assert store.faults.refuse_next == 0
    assert await store.lease_time_to_live(lease.id) == AGENT_TTL_S


async def test_a_lease_that_is_gone_is_told() -> None:
    store = MemoryStore()
    lease = await store.lease_grant(AGENT_TTL_S)
    await store.lease_revoke(lease.id)
    with pytest.raises(LeaseNotFound):
        await _keep(store, lease.id, RealClock())
