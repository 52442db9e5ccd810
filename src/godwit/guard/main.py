"""Start and end of the guard."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from godwit.guard.keeper import Keeper
from godwit.guard.lease import HostLease, Promise
from godwit.guard.socket import AgentLine
from godwit.guard.vms import Vms
from godwit.guard.watchdog import Watchdog
from godwit.host.clock import RealClock
from godwit.host.config import AgentConfig
from godwit.host.sockets import bind_unix, notify, watchdog_interval
from godwit.model.errors import GodwitError
from godwit.store.client import StoreClient
from godwit.store.records import Records
from godwit.wire.follow import follow
from godwit.wire.identity import STORE, Identity
from godwit.wire.tls import ClientTls, Expect

_MCL_CURRENT, _MCL_FUTURE = 1, 2
_STACK_BYTES = 256 << 10  # of a thread; all of it is locked
_PRIORITY = 1  # the lowest of the real-time ones
_NICE = -20
_log = logging.getLogger("guard")


def lock_memory() -> None:
    """Keep the guard out of swap: it must act when the machine is short of memory."""
    threading.stack_size(_STACK_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) != 0:
        _log.warning("memory is not locked: errno %d", ctypes.get_errno())


def go_first() -> None:
    """Run before all ordinary processes: a deadline does not wait until a busy machine has time."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
    except OSError:  # a control group of version 1 without real-time of its own, for one
        try:
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)
        except OSError as error:
            _log.warning("it has to wait like all others: %s", error.strerror)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def run(config: AgentConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    clock = RealClock()
    tls = ClientTls.for_daemon(Identity.load(config.tls.dir), Expect(STORE))
    store = StoreClient(
        config.store.endpoints,
        ssl_context=tls.context,
        verify_peer=lambda ssl_object: tls.verify(ssl_object, where="the store"),
    )
    config.paths.run.mkdir(parents=True, exist_ok=True)
    config.paths.state.mkdir(parents=True, exist_ok=True)
    listener = bind_unix(config.paths.guard_socket)

    async def promise() -> Promise:
        return await keeper.promise()

    lease = HostLease(
        store,
        clock,
        host=config.host,
        boot_id=_boot_id,
        promise=promise,
        renewed=lambda: keeper.renewed(),
    )
    wake = asyncio.Event()
    log = config.paths.state / "guard.log"
    vms = Vms(now=clock.monotonic, log=log, notify=wake.set)
    keeper = Keeper(
        vms,
        lease,
        Records(store),
        clock,
        host=config.host,
        boot_id=_boot_id(),
        watchdog=Watchdog(config.guard.watchdog, now=clock.monotonic),
        file=config.paths.run / "guard.json",
        log=log,
    )
    line = AgentLine(vms, lease, clock, keeper=keeper)
    line.look = wake
    lock_memory()
    go_first()
    keeper.recall()
    notify("READY=1")
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(keeper.serve(), name="deadline"),
            group.create_task(lease.serve(), name="lease"),
            group.create_task(lease.failsafe(), name="failsafe"),
            group.create_task(line.serve(listener), name="agent socket"),
            group.create_task(line.act(), name="act"),
            group.create_task(_watchdog(clock), name="watchdog"),
            group.create_task(follow(config.tls.dir, revoked=ending.set), name="certificate files"),
        ]
        await ending.wait()
        for task in tasks:
            task.cancel()
    await vms.close()
    await store.aclose()


async def _watchdog(clock: RealClock) -> None:
    interval = watchdog_interval()
    while interval:
        notify("WATCHDOG=1")
        await clock.sleep(interval / 4)


def main() -> None:
    """``godwit-guard --config FILE``."""
    parser = argparse.ArgumentParser(prog="godwit-guard", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="TOML file of this host")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        asyncio.run(run(AgentConfig.load(options.config)))
    except GodwitError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)  # noqa: T201
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
