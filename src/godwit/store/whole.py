"""Do not use a store that is only half filled: a backup is being written into it."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from godwit.model import keys
from godwit.store.api import Store
from godwit.store.errors import StoreError

_RETRY_S = 1.0
_log = logging.getLogger("store")


async def until_whole(store: Store, *, reached: bool = True) -> None:
    """Return once the store carries no mark of an unfinished import.

    A store that does not answer is waited for, unless ``reached`` is false.
    """
    told = False
    while True:
        with contextlib.suppress(StoreError):
            if await store.get(keys.RESTORING) is None:
                return
            if not told:
                _log.warning("a backup is being imported into the store: waiting for its end")
                told = True
            async with store.watch(keys.RESTORING) as watch:
                async for _ in watch:
                    if await store.get(keys.RESTORING) is None:
                        return
        if not (reached or told):
            return
        # Nothing announces that a store which is away has come back.
        await asyncio.sleep(_RETRY_S)
