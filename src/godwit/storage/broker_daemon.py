"""The process of a storage daemon: started, found again, and ended for certain.

Its end is the fence: once `Daemon.kill` has returned, no write of it can land any more. The kernel
lets no process go before its synchronous and native asynchronous requests are done, so on a path
that hangs the kill does not return, and says so. A client of network storage that lives in the
process (NFS, iSCSI, another host's export) leaves more behind: what lies unsent in its sockets,
which the kernel would deliver after its end. Copies of them are held here and reset with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from godwit.host.cgroup import open_cgroup
from godwit.host.errors import CgroupError, HostError, ProcessGone
from godwit.host.process import Process, freeze, is_alive, kill, stands_still, wait_exit
from godwit.host.sockets import bind_unix
from godwit.host.tcpcut import TcpCopies, unsent
from godwit.model.errors import OperationFailed
from godwit.qemu.launch import Binary, log_size, log_tail
from godwit.qmp import Monitor, MonitorError, MonitorLost
from godwit.storage.broker_record import DaemonRecord
from godwit.storage.nodes import Aio, Node

START_DEADLINE = 10.0
ADOPT_DEADLINE = 3.0
KILL_TIMEOUT = 10.0
STILL_S, STILL_STEP_S = 0.05, 0.001

_log = logging.getLogger("storage")


@dataclass(frozen=True, slots=True)
class DaemonPlace:
    """Where on this host a VM's storage daemons live.

    ``run`` and ``state`` are the VM's own directories; ``binary`` is qemu-storage-daemon with the
    user it runs as, who must be allowed to write the images. ``cgroup`` is the name of a control
    group of its own (never the VM's, which may be frozen), empty for none. ``locking`` is whether
    it locks images of its own host; a daemon that serves another host never does.
    """

    host: str
    run: Path
    state: Path
    binary: Binary
    cgroup: str = ""
    boot_id: str = ""
    aio: Aio = "threads"
    locking: bool = True


class Daemon:
    """A running qemu-storage-daemon and its monitor; make one with `start` or `adopt`."""

    def __init__(
        self, process: Process, monitor: Monitor, *, name: str, cgroup: str, argv: tuple[str, ...]
    ) -> None:
        """Not for callers: the process must be alive and the monitor connected."""
        self.process = process
        self.monitor = monitor
        self.name = name
        self.cgroup = cgroup
        self.argv = argv
        self.exited = asyncio.Event()
        self.exit_status: int | None = None
        self.on_exit: Callable[[], None] | None = None
        self._connections = TcpCopies()
        self._watch = asyncio.create_task(self._watch_exit(), name=f"{name}: exit")

    @classmethod
    async def start(
        cls,
        place: DaemonPlace,
        *,
        name: str,
        label: str,
        clients: int,
        options: Callable[[int], Sequence[str]],
        deadline: float = START_DEADLINE,
    ) -> Self:
        """Start a daemon that accepts clients on the listening socket ``clients``.

        ``label`` names its monitor (``<run>/<label>.sock``) and log; ``options`` makes its command
        line from the monitor's descriptor. OperationFailed, with its own words, when it does not
        come up within ``deadline`` seconds; then no process is left.
        """
        log, monitor_path = place.state / f"{label}.log", place.run / f"{label}.sock"
        for folder in (place.run, place.state):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        offset = log_size(log)
        try:
            async with AsyncExitStack() as undo:
                with bind_unix(monitor_path) as listener:
                    argv = list(options(listener.fileno()))
                    fds = [listener.fileno(), clients]
                    process = place.binary.start(argv, pass_fds=fds, log=log)
                undo.push_async_callback(wait_exit, process)
                undo.callback(kill, process)
                monitor = await connect_or_exit(monitor_path, process, name, deadline)
                undo.push_async_callback(monitor.close)
                # The kernel takes 10-20 ms to move a process between groups.
                await asyncio.to_thread(join_cgroup, place.cgroup, process.pid)
                undo.pop_all()
        except (Ended, MonitorError, HostError, OSError) as error:
            said = log_tail(log, offset=offset)
            raise OperationFailed(
                f"{name} did not come up: {said or error}", hint=f"see {log} on {place.host}"
            ) from error
        full = (place.binary.path, *argv)
        return cls(process, monitor, name=name, cgroup=place.cgroup, argv=full)

    @classmethod
    async def adopt(
        cls,
        process: Process,
        *,
        name: str,
        monitor: Path,
        cgroup: str,
        argv: tuple[str, ...],
        deadline: float = ADOPT_DEADLINE,
    ) -> Self:
        """Take over a daemon that another life of the agent started.

        ProcessGone when it has ended, MonitorLost when it does not answer in time.
        """
        if not process.pid or not is_alive(process):
            raise ProcessGone(f"{name} (process {process.pid}) has ended")
        session = await Monitor.connect(monitor, name=name, deadline=deadline)
        return cls(process, session, name=name, cgroup=cgroup, argv=argv)

    async def execute(self, command: str, arguments: Node | None = None, *, timeout: float) -> Any:
        """Run a QMP command; errors as `Monitor.execute`."""
        return await self.monitor.execute(command, arguments, timeout=timeout)

    def hold_connections(self) -> None:
        """Note its present connections, so that they end with it even if nobody here kills it."""
        self._connections.refresh(self.process)

    @property
    def connections(self) -> tuple[str, ...]:
        """Those that are held, by name."""
        return self._connections.names

    async def kill(self, *, timeout: float = KILL_TIMEOUT, still: bool = True) -> None:
        """End it at once and return when it is gone; OperationFailed when it does not die.

        ``still`` False: what its connections hold can do no harm, or is fenced otherwise.
        """
        if still:
            await self._hold_still()
        kill(self.process)
        if self._watch.done() and not self.exited.is_set():  # after `close`
            self._watch = asyncio.create_task(self._watch_exit(), name=f"{self.name}: exit")
        if self.cgroup:
            # A frozen group of the first kind holds even the dead.
            with contextlib.suppress(CgroupError, OSError):
                open_cgroup(self.cgroup).thaw()
        try:
            async with asyncio.timeout(timeout):
                await self.exited.wait()
        except TimeoutError:
            raise OperationFailed(
                f"{self.name} (process {self.process.pid}) does not die",
                hint="its storage hangs: no other host may write this VM's disks until the path "
                "fails or comes back",
            ) from None
        await self.monitor.close()

    async def _hold_still(self) -> None:
        """Stop it, so that no connection is made between the last look and its end."""
        if not freeze(self.process):
            return
        left = STILL_S
        while left > 0 and not stands_still(self.process):
            await asyncio.sleep(STILL_STEP_S)  # only a parent would hear of it
            left -= STILL_STEP_S
        self.hold_connections()

    async def close(self) -> None:
        """Let go: end the watching and the session, leave the daemon as it is. Idempotent."""
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        self._connections.close()
        await self.monitor.close()

    async def _watch_exit(self) -> None:
        self.exit_status = await wait_exit(self.process)
        self._connections.reset()
        self.exited.set()
        try:
            if self.on_exit is not None:
                self.on_exit()
        except OSError as error:  # a full disk must not hide the end of the daemon
            _log.error("%s: its end could not be written down: %s", self.name, error)


class Ended(Exception):
    """The daemon ended before it answered; its own words are in the log."""


async def connect_or_exit(path: Path, process: Process, name: str, deadline: float) -> Monitor:
    """The monitor of a daemon that is coming up; `Ended` when it ends instead."""
    connecting = asyncio.create_task(
        Monitor.connect(path, name=name, deadline=deadline), name=f"{name}: connect"
    )
    ending = asyncio.create_task(wait_exit(process), name=f"{name}: early end")
    try:
        await asyncio.wait({connecting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if connecting.done() and connecting.exception() is None:
            return connecting.result()
        if ending.done():
            raise Ended(f"it ended at once with status {ending.result()}")
        return await connecting
    finally:
        ending.cancel()
        if not connecting.done():
            connecting.cancel()
        await asyncio.gather(connecting, ending, return_exceptions=True)


async def end_recorded(
    record: DaemonRecord, monitor: Path, *, name: str, timeout: float = KILL_TIMEOUT
) -> None:
    """End whatever daemon a record stands for, and return when it is gone.

    A record without a pid may stand for one that was started by an agent which died before it
    could write that down: whoever answers on the monitor is told to quit. OperationFailed when it
    does not go.
    """
    try:
        async with asyncio.timeout(timeout):
            if record.pid:
                kill(record.process)
                await wait_exit(record.process)
            else:
                await _quit_unrecorded(monitor, name, timeout)
    except (MonitorError, TimeoutError) as error:
        raise OperationFailed(
            f"{name} (process {record.pid or 'unknown'}) does not go: {error}",
            hint="end it by hand before anybody else opens its images",
        ) from error


async def _quit_unrecorded(path: Path, name: str, timeout: float) -> None:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        channel.close()
        return
    async with await Monitor.connect(channel, name=name, deadline=timeout) as monitor:
        with contextlib.suppress(MonitorLost):
            await monitor.execute("quit")
        # It closes its images before its monitor.
        await monitor.wait_lost()


def join_cgroup(name: str, pid: int) -> None:
    """Move a daemon into its control group; the kernel takes 10-20 ms for it."""
    if name:
        group = open_cgroup(name)
        group.create()
        group.add_process(pid)


def remove_cgroup(name: str) -> None:
    """Remove the control group of a daemon that has ended."""
    if name:
        with contextlib.suppress(CgroupError):
            open_cgroup(name).remove()


def check_delivered(names: tuple[str, ...], whose: str) -> None:
    """OperationFailed while the kernel may still deliver writes of a daemon that has ended.

    Only for one that ended with the agent that held copies of its connections.
    """
    if left := unsent(names):
        raise OperationFailed(
            f"the kernel still has unsent data of {whose}, which has ended ({left[0]})",
            hint="it gives up within two minutes, or delivers it when the link is back",
        )


def forget_recorded(record: DaemonRecord, monitor: Path) -> None:
    """Remove what a daemon that has ended left of itself: its socket, its group, its record."""
    monitor.unlink(missing_ok=True)
    remove_cgroup(record.cgroup)
    record.remove()


def forget_place(place: DaemonPlace, label: str) -> None:
    """Remove the directories of a daemon that had them for itself; its log stays if it spoke."""
    log = place.state / f"{label}.log"
    if log.exists() and not log.stat().st_size:
        log.unlink()
    for folder in (place.run, place.state):
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()
