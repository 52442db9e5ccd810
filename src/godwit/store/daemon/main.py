"""``godwit-store``: the embedded store daemon's entry point."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from godwit.host.inotify import PathWatch
from godwit.store.daemon.database import Database, DatabaseError, Loaded
from godwit.store.daemon.gateway import Gateway
from godwit.store.daemon.listen import (
    ListenError,
    TlsFiles,
    inherit,
    inherited_handles,
    open_listener,
)
from godwit.store.daemon.server import Listener, Server
from godwit.store.daemon.service import DEFAULT_HISTORY, Service

_GRACE_S = 2.0
_SETTLE_S = 0.2
# The loop must not wait 5 ms (the default) for the writer's thread to yield, nor the reverse.
_SWITCH_INTERVAL_S = 0.0005
_log = logging.getLogger("store")


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the data is, where to listen, and with what identity."""

    data: Path
    listen: tuple[str, ...] = ()
    handles: tuple[int, ...] = ()
    tls: TlsFiles | None = None
    history: int = DEFAULT_HISTORY


class UsageError(Exception):
    """The command line or the configuration is wrong."""


def settings_from(arguments: Sequence[str]) -> Settings:
    """The command line, over the configuration file where one is named. Raises UsageError."""
    parser = argparse.ArgumentParser(
        prog="godwit-store", description="Keep the cluster's records on this machine."
    )
    parser.add_argument("--config", type=Path, help="TOML file: [store] data, listen; [tls] dir")
    parser.add_argument("--data", type=Path, help="directory of the database")
    parser.add_argument("--listen", action="append", help="unix:PATH or tcp:HOST:PORT; repeatable")
    parser.add_argument("--fd", action="append", type=int, help="inherited listening socket")
    parser.add_argument("--cert", type=Path, help="the daemon's certificate")
    parser.add_argument("--key", type=Path, help="its key")
    parser.add_argument("--ca", type=Path, help="authority that clients must be signed by")
    parser.add_argument("--history", type=int, help="revisions kept for watches that resume")
    given = parser.parse_args(arguments)
    file = _read_config(given.config) if given.config else {}
    store, tls = file.get("store", {}), file.get("tls", {})
    data = given.data or store.get("data")
    if data is None:
        raise UsageError("say where the data is: --data DIR, or [store] data in the --config file")
    handles = tuple(given.fd or ()) or tuple(inherited_handles())
    listen = tuple(given.listen or store.get("listen", ()))
    if not listen and not handles:
        raise UsageError("say where to listen: --listen unix:PATH or tcp:HOST:PORT, or --fd N")
    return Settings(
        data=Path(data),
        listen=listen,
        handles=handles,
        tls=_tls_files(given, Path(tls["dir"]) if "dir" in tls else None),
        history=given.history or int(store.get("history", DEFAULT_HISTORY)),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _tls_files(given: argparse.Namespace, directory: Path | None) -> TlsFiles | None:
    names = (given.cert, given.key, given.ca)
    if any(names):
        if not all(names):
            raise UsageError("--cert, --key and --ca go together")
        return TlsFiles(given.cert, given.key, given.ca)
    if directory is None:
        return None
    return TlsFiles(directory / "cert.pem", directory / "key.pem", directory / "ca.pem")


@dataclass(slots=True)
class Notifier:
    """Tells a supervisor that asked for it (NOTIFY_SOCKET) how the daemon is."""

    address: str = field(default_factory=lambda: os.environ.get("NOTIFY_SOCKET", ""))

    def say(self, text: str) -> None:
        """One message; a supervisor that does not listen is no reason to fail."""
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.setblocking(False)
            s.sendto(text.encode(), address)

    def beat(self, loop: asyncio.AbstractEventLoop, period_s: float) -> None:
        """Say that the event loop turns, now and from now on."""
        self.say("WATCHDOG=1")
        loop.call_later(period_s, self.beat, loop, period_s)


def _listeners(settings: Settings, tls: ssl.SSLContext | None) -> list[Listener]:
    opened = [inherit(handle, tls) for handle in settings.handles]
    opened += [open_listener(address, tls) for address in settings.listen]
    return opened


async def run(settings: Settings, database: Database, loaded: Loaded) -> int:
    """Serve until SIGTERM or SIGINT, or until nothing can be written; the exit code."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        stop.set()

    tls = settings.tls.context() if settings.tls else None
    listeners = _listeners(settings, tls)
    service = Service(database, loaded, on_failure=fail, history=settings.history)
    server = Server(Gateway(service))
    await server.start(listeners)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    following: asyncio.Task[None] | None = None
    if settings.tls is not None and tls is not None:
        again = functools.partial(_reload, settings.tls, tls, server)
        again(quiet=True)
        loop.add_signal_handler(signal.SIGHUP, again)
        following = asyncio.create_task(_follow(settings.tls, again), name="certificate files")
    names = [*settings.listen, *(f"fd {handle}" for handle in settings.handles)]
    _log.info(
        "pid %d, revision %d, listening on %s",
        os.getpid(),
        loaded.engine.revision,
        ", ".join(names),
    )
    notifier = Notifier()
    notifier.say("READY=1")
    if notifier.address and (limit := os.environ.get("WATCHDOG_USEC")):
        notifier.beat(loop, int(limit) / 4e6)
    await stop.wait()
    notifier.say("STOPPING=1")
    if following is not None:
        following.cancel()
    await server.close(grace_s=0 if failures else _GRACE_S)
    service.close()
    for address in settings.listen:
        if address.startswith("unix:"):
            Path(address.removeprefix("unix:")).unlink(missing_ok=True)
    if failures:
        _log.error("cannot write any more, ending: %s", failures[0])
        return 1
    _log.info("ended at revision %d", service.engine.revision)
    return 0


def _reload(
    files: TlsFiles, context: ssl.SSLContext, server: Server, *, quiet: bool = False
) -> None:
    try:
        files.reload(context)
        server.expel(files.revoked())
    except ListenError as error:
        _log.error("keeping the old certificate: %s", error)
    else:
        if not quiet:
            _log.info("certificate read again")


async def _follow(files: TlsFiles, again: Callable[[], None]) -> None:
    """Read the files again whenever one beside them is replaced, for ever."""
    with PathWatch(files.cert.parent) as watch:
        while True:
            await watch.changed()
            # They are replaced one after the other: wait until the last one has come.
            with contextlib.suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(_SETTLE_S):
                        await watch.changed()
            again()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; exit 0 after SIGTERM, 1 on failure, 2 on wrong usage."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # Each host has some connections; the usual soft limit of 1024 is that of few hosts.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        settings = settings_from(sys.argv[1:] if arguments is None else arguments)
        database = Database(settings.data)
        try:
            loaded = database.load()
            gc.freeze()
            return asyncio.run(run(settings, database, loaded))
        finally:
            database.close()
    except UsageError as error:
        _log.error("%s", error)
        return 2
    except (DatabaseError, ListenError) as error:
        _log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
