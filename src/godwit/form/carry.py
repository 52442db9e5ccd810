"""``godwit cluster export`` and ``import``: straight to the store, with a manager's identity.

No manager has to run for it: that is when a backup is needed. The agents are asked which epochs
they have seen; for that they need no store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from godwit.form import backup
from godwit.form.backup import Backup, Plan
from godwit.manager.agents import HttpAgents
from godwit.manager.config import ManagerConfig
from godwit.model.errors import Unavailable
from godwit.model.host import HostInfo
from godwit.store.api import Store
from godwit.store.client import StoreClient
from godwit.store.errors import StoreError
from godwit.wire.identity import STORE, Identity
from godwit.wire.tls import ClientTls, Expect

T = TypeVar("T")
_TIMEOUT_S = 30.0  # one list of everything


def export_to(file: str, *, config: str, endpoint: str | None) -> Backup:
    """Write all records to a new file."""

    async def work(store: Store, _identity: Identity) -> Backup:
        return await backup.export(store, Path(file))

    return _with_store(config, endpoint, work)


def import_from(
    file: str,
    *,
    config: str,
    endpoint: str | None,
    gone: Sequence[str],
    keep_running: bool,
    dry_run: bool,
) -> tuple[Plan, int]:
    """Fill an empty store; what was planned, and how many records were written."""
    content = backup.read(Path(file))

    async def work(store: Store, identity: Identity) -> tuple[Plan, int]:
        agents = HttpAgents(identity)

        async def ask(info: HostInfo) -> Any:
            return await agents.call(info, "GET", "/v1/epochs", deadline_s=5.0)

        try:
            asked = {name: info for name, info in content.hosts().items() if name not in gone}
            said = await backup.ask_hosts(asked, ask)
        finally:
            await agents.aclose()
        planned = backup.plan(content, said, gone=gone, keep_running=keep_running)
        if dry_run:
            return planned, 0
        written = await backup.import_into(store, content, planned, by=identity.peer.name)
        return planned, written

    return _with_store(config, endpoint, work)


def _with_store(
    config: str, endpoint: str | None, work: Callable[[Store, Identity], Awaitable[T]]
) -> T:
    told = ManagerConfig.load(Path(config))
    identity = Identity.load(told.tls_dir)
    tls = ClientTls.for_daemon(identity, Expect(STORE))

    async def run() -> T:
        store = StoreClient(
            [endpoint] if endpoint else told.store_endpoints,
            ssl_context=tls.context,
            verify_peer=lambda ssl_object: tls.verify(ssl_object, where="the store"),
            timeout=_TIMEOUT_S,
        )
        try:
            return await work(store, identity)
        except StoreError as error:
            raise Unavailable(f"the store: {error}", hint=error.hint) from error
        finally:
            await store.aclose()

    return asyncio.run(run())
