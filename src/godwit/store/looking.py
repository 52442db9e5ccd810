"""When to look at records again: at every change a watch tells, and in any case now and then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from godwit.store.api import Store

RESYNC_S = 45.0


async def looks(
    store: Store, prefix: str, *, resync_s: float = RESYNC_S
) -> AsyncGenerator[None, None]:
    """Yield once a watch stands, after each change under ``prefix``, and every ``resync_s``.

    Whoever reads the records each time misses nothing for longer than that, whatever the watch
    left out. Raises what the watch raises; close it with ``aclosing``.
    """
    now = asyncio.get_running_loop().time
    async with store.watch(prefix) as watch:
        stands, due = False, now() + resync_s
        while True:
            try:
                async with asyncio.timeout_at(due):
                    batch = await anext(watch, None)
            except TimeoutError:
                due = now() + resync_s
                yield
                continue
            if batch is None:
                return
            # The first one says that the watch stands: what came before it is not told.
            if batch.events or not stands:
                stands, due = True, now() + resync_s
                yield
