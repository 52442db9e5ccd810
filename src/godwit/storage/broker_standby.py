"""A storage daemon that stands ready while another one still serves, its images not yet open.

    cold     old one ends -> process, libraries, images, clients    all in the dark
    ready    process, libraries -> old one ends -> images, clients

While a guest waits only the images are opened. It cannot open them early: `godwit.storage.latch`
holds it back, and it ends by itself with the agent that holds the latch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, Self

from godwit.host.errors import HostError
from godwit.host.process import Process, is_alive, kill, wait_exit
from godwit.host.sockets import bind_unix
from godwit.model.errors import OperationFailed
from godwit.qemu.launch import log_size, log_tail
from godwit.qmp import MonitorError
from godwit.storage.broker_daemon import (
    START_DEADLINE,
    Daemon,
    DaemonPlace,
    Ended,
    connect_or_exit,
    join_cgroup,
)
from godwit.storage.latch import Latch

MONITOR: Final = "standby.sock"


class Standby:
    """One that is ready; `go` makes a `Daemon` of it, `end` sends it away."""

    def __init__(
        self,
        process: Process,
        latch: Latch,
        *,
        place: DaemonPlace,
        name: str,
        argv: tuple[str, ...],
        log: Path,
        log_offset: int,
    ) -> None:
        """Not for callers."""
        self.process = process
        self.argv = argv
        self._latch = latch
        self._place = place
        self._name = name
        self._log = log
        self._log_offset = log_offset

    @classmethod
    async def start(
        cls,
        place: DaemonPlace,
        *,
        name: str,
        label: str,
        clients: int,
        options: Callable[[int, Latch], Sequence[str]],
        deadline: float = START_DEADLINE,
    ) -> Self:
        """Start one and return when it stands at its latch.

        ``options`` makes its command line from the monitor's descriptor and the latch, whose node
        comes before all images. OperationFailed when it is not there within ``deadline`` seconds;
        then no process is left.
        """
        log = place.state / f"{label}.log"
        offset = log_size(log)
        try:
            async with AsyncExitStack() as undo:
                latch = Latch()
                undo.callback(latch.close)
                with bind_unix(place.run / MONITOR) as listener, latch.theirs:
                    argv = list(options(listener.fileno(), latch))
                    fds = [listener.fileno(), clients, latch.theirs.fileno()]
                    process = place.binary.start(argv, pass_fds=fds, log=log)
                undo.push_async_callback(wait_exit, process)
                undo.callback(kill, process)
                async with asyncio.timeout(deadline):
                    await latch.reached()
                undo.pop_all()
        except (EOFError, TimeoutError, HostError, OSError) as error:
            said = log_tail(log, offset=offset)
            raise OperationFailed(
                f"{name} does not get ready: {said or error}", hint=f"see {log} on {place.host}"
            ) from error
        full = (place.binary.path, *argv)
        return cls(process, latch, place=place, name=name, argv=full, log=log, log_offset=offset)

    @property
    def alive(self) -> bool:
        """Whether it still stands there."""
        return is_alive(self.process)

    async def go(self, *, label: str, deadline: float = START_DEADLINE) -> Daemon:
        """Let it open its images and take clients; errors as `Daemon.start`.

        Only when nobody else has them open any more, and with its process written down.
        """
        monitor_path = self._place.run / f"{label}.sock"
        try:
            async with AsyncExitStack() as undo:
                undo.callback(self._latch.close)
                undo.push_async_callback(wait_exit, self.process)
                undo.callback(kill, self.process)
                self._latch.open()
                (self._place.run / MONITOR).replace(monitor_path)
                monitor = await connect_or_exit(monitor_path, self.process, self._name, deadline)
                # Not earlier: as one of the VM's group it would wait its turn among busy vCPUs.
                await asyncio.to_thread(join_cgroup, self._place.cgroup, self.process.pid)
                undo.pop_all()
        except (Ended, MonitorError, OSError) as error:
            said = log_tail(self._log, offset=self._log_offset)
            raise OperationFailed(
                f"{self._name} did not come up: {said or error}",
                hint=f"see {self._log} on {self._place.host}",
            ) from error
        self._latch.close()
        return Daemon(
            self.process, monitor, name=self._name, cgroup=self._place.cgroup, argv=self.argv
        )

    async def end(self) -> None:
        """Send it away; it has opened nothing."""
        kill(self.process)
        self._latch.close()
        await wait_exit(self.process)
        (self._place.run / MONITOR).unlink(missing_ok=True)
