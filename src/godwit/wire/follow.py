"""Notice that a daemon's certificate, or the list of revoked ones, was replaced on disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from godwit.host.inotify import PathWatch
from godwit.wire.errors import IdentityUnusable
from godwit.wire.identity import Identity
from godwit.wire.tls import read_revoked, refresh

_SETTLE_S = 2.0  # files are replaced one after the other: only what stays broken is told
_log = logging.getLogger("godwit.wire")


async def follow(
    directory: Path,
    *,
    changed: Callable[[], None] | None = None,
    revoked: Callable[[], None] | None = None,
) -> None:
    """Read the directory again whenever a file in it is replaced, for ever.

    ``changed`` is called after each time that worked, for instance ``WireServer.expel``. New
    connections use what was read; nothing that is open is touched but by ``changed``.
    ``revoked`` is called when our own certificate comes to be on the list: a daemon ends then, so
    that it holds no connection that others (etcd) would not end. One that begins so is not told.
    """
    last: Identity | None = None
    out = False
    with PathWatch(directory) as watch:
        while True:
            try:
                identity = refresh(directory)
                gone = identity.serial in read_revoked(directory)
            except IdentityUnusable as error:
                if not await _changed(watch, within_s=_SETTLE_S):
                    _log.error("the old certificate stays in use: %s", error.message)
                    await watch.changed()
                continue
            if last is not None and identity.fingerprint != last.fingerprint:
                _log.info("%s: a new certificate is in use", identity.peer)
            if gone and last is not None and not out:
                _log.error(
                    "%s was removed from the cluster: its certificate counts no more", last.peer
                )
                if revoked is not None:
                    revoked()
            last, out = identity, gone
            if changed is not None:
                changed()
            await watch.changed()


async def _changed(watch: PathWatch, *, within_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await watch.changed()
        return True
    return False
