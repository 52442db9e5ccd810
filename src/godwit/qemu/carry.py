"""Disks that only one host has go along with their VM: sent by its QEMU, taken in by the new one.

    destination  empty images, opened by the waiting QEMU, exported by it over NBD, TLS
    source       blockdev-mirror of each disk to its export; ready before memory is copied
    switchover   the VM stands: each mirror copies what is left and ends in order; from then on
                 both hosts hold the same, and either copy will do
    destination  the export ends before the VM runs: ``cont`` with it up is refused in silence

The mirror copies behind the guest's back: no write of the guest ever waits for the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from godwit.model.errors import OperationFailed
from godwit.model.vm import Disk
from godwit.qemu import layout
from godwit.qemu.hotplug import COMMAND_TIMEOUT, drop_nodes
from godwit.qemu.machine import Machine
from godwit.qmp import EventStream, MonitorError, QmpError

LOOK_S: Final = 0.5
STALL_S: Final = 5.0
"""Seconds without a byte after which the way to the other host counts as cut."""
LAST_S: Final = 10.0
"""Seconds for what is left while the VM stands."""
END_S: Final = 5.0

_EVENT: Final = "JOB_STATUS_CHANGE"
Heard = Callable[[int, int], None]


class Sender:
    """The source's side, for the disks of one VM."""

    def __init__(self, machine: Machine, disks: Sequence[Disk], *, tls: str = "") -> None:
        """``tls`` is the id of the client's credentials object; empty for none."""
        self._machine = machine
        self._disks = tuple(disks)
        self._tls = tls
        self._patience = COMMAND_TIMEOUT

    async def copy(self, host: str, port: int, *, tls_hostname: str, heard: Heard) -> None:
        """Return when the other host holds the same. OperationFailed when it cannot be done."""
        try:
            for disk in self._disks:
                await self._execute("blockdev-add", self._target(disk, host, port, tls_hostname))
                await self._execute(
                    "blockdev-mirror",
                    {
                        "job-id": _job(disk),
                        "device": layout.format_node(disk),
                        "target": _node(disk),
                        "sync": "full",
                        "copy-mode": "background",
                        "on-source-error": "report",
                        "on-target-error": "report",
                        "auto-dismiss": False,
                    },
                )
        except QmpError as error:
            raise self._failed(error.desc) from error
        await self._until_ready(heard)

    async def settle(self) -> None:
        """With the VM standing: copy what is left and let go. OperationFailed: they may differ."""
        with self._machine.monitor.events(_EVENT) as events:
            for disk in self._disks:
                try:
                    # Of a mirror that is ready this is its end in order: nothing is left behind.
                    await self._execute("block-job-cancel", {"device": _job(disk), "force": False})
                except QmpError as error:
                    raise self._failed(error.desc) from error
            jobs = await self._ended(events, timeout=LAST_S)
        errors = [str(job["error"]) for job in jobs if job.get("error")]
        if errors or len(jobs) != len(self._disks):
            raise self._failed(errors[0] if errors else "a copy is gone")
        await self._forget()

    async def drop(self) -> None:
        """Call the copying off, whatever it is at; the disks here stay as they are. Idempotent."""
        self._patience = END_S  # the VM may be dark, or its QEMU frozen
        for disk in self._disks:
            # A request on its way over a cut network holds its job for as long as TCP tries.
            with contextlib.suppress(MonitorError):
                there = {"type": "block-node", "node-name": _node(disk)}
                await self._machine.monitor.execute_oob("yank", {"instances": [there]}, timeout=1.0)
        with contextlib.suppress(MonitorError, OperationFailed):
            with self._machine.monitor.events(_EVENT) as events:
                for job in await self._jobs():
                    if job["status"] not in ("concluded", "aborting"):
                        with contextlib.suppress(QmpError):  # it has ended by itself meanwhile
                            await self._execute("job-cancel", {"id": job["id"]})
                await self._ended(events, timeout=END_S)
            await self._forget()

    # Steps.

    def _target(self, disk: Disk, host: str, port: int, tls_hostname: str) -> dict[str, object]:
        node: dict[str, object] = {
            "driver": "nbd",
            "node-name": _node(disk),
            "server": {"type": "inet", "host": host, "port": str(port)},
            "export": disk.id,
            "discard": "unmap",
        }
        if self._tls:
            node |= {"tls-creds": self._tls, "tls-hostname": tls_hostname}
        return node

    async def _until_ready(self, heard: Heard) -> None:
        loop = asyncio.get_running_loop()
        best, since = -1, loop.time()
        with self._machine.monitor.events(_EVENT) as events:
            while True:
                jobs = await self._jobs()
                copied = sum(int(job["current-progress"]) for job in jobs)
                heard(copied, sum(int(job["total-progress"]) for job in jobs))
                over = [job for job in jobs if job["status"] in ("aborting", "concluded")]
                if over or len(jobs) != len(self._disks):
                    words = str(over[0].get("error", "it ended")) if over else "a copy is gone"
                    raise self._failed(words)
                if all(job["status"] == "ready" for job in jobs):
                    return
                if copied > best:
                    best, since = copied, loop.time()
                if loop.time() - since > STALL_S:
                    raise self._failed(f"no byte arrived for {STALL_S:g} s")
                with contextlib.suppress(TimeoutError):
                    await events.wait(timeout=LOOK_S)

    async def _ended(self, events: EventStream, *, timeout: float) -> list[dict[str, Any]]:
        """The jobs once all have ended."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    jobs = await self._jobs()
                    if all(job["status"] == "concluded" for job in jobs):
                        return jobs
                    await events.wait(timeout=None)
        except MonitorError:
            raise
        except TimeoutError:
            raise self._failed(f"it did not end within {timeout:g} s") from None

    async def _forget(self) -> None:
        for job in await self._jobs():
            await self._execute("job-dismiss", {"id": job["id"]})
        await drop_nodes(self._machine, [_node(disk) for disk in self._disks])

    async def _jobs(self) -> list[dict[str, Any]]:
        mine = {_job(disk) for disk in self._disks}
        jobs: list[dict[str, Any]] = await self._execute("query-jobs")
        return [job for job in jobs if job["id"] in mine]

    async def _execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        return await self._machine.monitor.execute(command, arguments, timeout=self._patience)

    def _failed(self, words: str) -> OperationFailed:
        names = ", ".join(disk.id for disk in self._disks)
        return OperationFailed(
            f"{names} of {self._machine.vm} cannot be copied to the other host: {words}",
            hint="is there room on its volume, and does the migration network hold?",
        )


async def offer(machine: Machine, disks: Sequence[Disk], *, address: str, tls: str = "") -> int:
    """Have a waiting machine take disks in; the port. ``tls``: the server's credentials object."""
    with socket.socket() as probe:  # QEMU does not tell which port it chose
        probe.bind((address, 0))
        port = int(probe.getsockname()[1])
    where: dict[str, object] = {
        "addr": {"type": "inet", "data": {"host": address, "port": str(port)}}
    }
    if tls:
        where["tls-creds"] = tls
    await machine.monitor.execute("nbd-server-start", where, timeout=COMMAND_TIMEOUT)
    for disk in disks:
        await machine.monitor.execute(
            "block-export-add",
            {
                "type": "nbd",
                "id": f"take-{disk.id}",
                "node-name": layout.format_node(disk),
                "name": disk.id,
                "writable": True,
            },
            timeout=COMMAND_TIMEOUT,
        )
    return port


async def withdraw(machine: Machine) -> None:
    """Take nothing in any more; a machine that did not is no fault."""
    with contextlib.suppress(QmpError):
        await machine.monitor.execute("nbd-server-stop", timeout=COMMAND_TIMEOUT)


def _job(disk: Disk) -> str:
    return f"send-{disk.id}"


def _node(disk: Disk) -> str:
    return layout.sending_node(disk)
