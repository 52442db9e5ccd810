"""``godwit-iofence``: the fencing daemon's entry point."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from godwit.host.clock import RealClock
from godwit.host.sockets import notify, watchdog_interval
from godwit.iofence.app import App
from godwit.iofence.cuts import CutBook
from godwit.iofence.fence import Fence
from godwit.iofence.ganesha import Ganesha
from godwit.iofence.servers import Server
from godwit.iofence.settings import Kind, Settings
from godwit.iofence.tgt import Tgt
from godwit.model.errors import GodwitError
from godwit.wire.follow import follow
from godwit.wire.identity import MANAGER, Identity
from godwit.wire.server import Listener, ServerTls, WireServer

_BEAT_S = 0.5
_READY_S = 10.0
_GRACE_S = 2.0
_log = logging.getLogger("godwit.iofence")


async def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT (0), or until a part breaks (1)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    servers: dict[Kind, Server] = {"iscsi": Tgt(), "nfs": Ganesha()}
    fence = Fence(settings, servers, CutBook(settings.state), RealClock())
    tls = ServerTls(Identity.load(settings.tls_dir), roles={MANAGER})
    server = WireServer(App(fence), [Listener.tcp(settings.address, settings.port, tls=tls)])
    parts = [
        asyncio.create_task(fence.run(), name="cuts"),
        asyncio.create_task(follow(settings.tls_dir, changed=server.expel), name="certificates"),
    ]
    for part in parts:
        part.add_done_callback(lambda _: stop.set())
    await server.start()
    _log.info("serving at %s port %s", settings.address, server.ports[0])
    ready = asyncio.create_task(_say_ready(fence), name="ready")
    try:
        await _beat_until(stop)
    finally:
        ready.cancel()
        notify("STOPPING=1")
        await server.stop(grace_s=_GRACE_S)
        broken = [part for part in parts if part.done() and not part.cancelled()]
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)
    for part in broken:
        _log.error("%s ended", part.get_name(), exc_info=part.exception())
    return 1 if broken else 0


async def _say_ready(fence: Fence) -> None:
    """Ready is when the hosts are let in; a server that is away must not hold us up for ever."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_READY_S):
            await fence.settled.wait()
    notify("READY=1")


async def _beat_until(stop: asyncio.Event) -> None:
    """Feed the watchdog from the event loop, so that a loop that hangs is found out."""
    interval = watchdog_interval()
    beat_s = min(_BEAT_S, interval / 3) if interval else None
    while not stop.is_set():
        if beat_s:
            notify("WATCHDOG=1")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(beat_s):
                await stop.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the configuration and serve. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="godwit-iofence", description="Shut lost hosts out of this storage server."
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    given = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(levelname)s iofence: %(message)s"
    )
    try:
        return asyncio.run(serve(Settings.load(given.config)))
    except GodwitError as error:
        sys.stderr.write(f"godwit-iofence: {error.message}\n  {error.hint}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
