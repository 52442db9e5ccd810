"""Tells the target daemon of a lab's storage node of its LUNs, each time it has started.

tgtd knows nothing when it comes up. Its socket's appearance is the event.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

from godwit.host.errors import ProgramFailed
from godwit.host.inotify import PathWatch
from godwit.host.run import run_async
from godwit.host.sockets import notify
from godwit.lab.serving import LUN_BYTES, LUN_COUNT, TARGET, lun_file

SOCKETS: Final = Path("/run/tgtd")
_ANSWER_S: Final = 10.0
_TRIES: Final = 60
_RETRY_S: Final = 0.05
_ADM: Final = ("tgtadm", "--lld", "iscsi")


async def serve() -> None:
    """Look at each start of the daemon, for ever."""
    for lun in range(1, LUN_COUNT + 1):
        path = lun_file(lun)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            os.truncate(stream.fileno(), max(LUN_BYTES, path.stat().st_size))
    with PathWatch(SOCKETS) as watch:
        while True:
            if any(SOCKETS.glob("socket.*")):
                await _configure()
                notify("READY=1")
            await watch.changed()


async def _configure() -> None:
    for left in reversed(range(_TRIES)):
        try:
            shown = await _adm("--op", "show", "--mode", "target")
            break
        except ProgramFailed:
            if not left:
                raise
            await asyncio.sleep(_RETRY_S)  # the socket is there before anybody listens on it
    if TARGET.encode() in shown:
        return
    one = ("--tid", "1")
    await _adm("--op", "new", "--mode", "target", *one, "--targetname", TARGET)
    for lun in range(1, LUN_COUNT + 1):
        words = ("--lun", str(lun), "--backing-store", str(lun_file(lun)))
        await _adm("--op", "new", "--mode", "logicalunit", *one, *words)
    # Hosts are let in by the fencing daemon. It finds the target as soon as that has this entry.
    await _adm("--op", "bind", "--mode", "target", *one, "--initiator-address", "127.0.0.1")


async def _adm(*words: str) -> bytes:
    return await run_async([*_ADM, *words], timeout=_ANSWER_S)


if __name__ == "__main__":
    asyncio.run(serve())
