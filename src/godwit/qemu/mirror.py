"""A disk of a machine that runs is copied to another image, and takes to it.

    begin     blockdev-add of the new image's nodes, blockdev-mirror to them
    ready     both hold the same; what the guest writes from here on goes to both
    complete  the last bytes; no I/O passes, both images are flushed and equal
    finalize  the device stands on the new image          abandon  it stays on the old one

The job waits before its last step (``auto-finalize`` off), so that the caller can write down which
image is the disk's while both are equal: see `complete`. It also stays to be looked at when it has
ended (``auto-dismiss`` off), so that an agent which comes later can tell what became of it.

Facts, seen on QEMU 10.0: a job that waits to be finalized holds the disk's I/O; cancelled there it
leaves the device on the old image. A device's drive takes the new node's name, and no node can be
renamed, so each image of a disk brings names of its own (`godwit.qemu.layout`). Ranges of zeroes
are written out by the drivers of VHD and VHDX, so such a target takes its whole size. A copy that
is called off while guests' writes wait for it can end QEMU ("malloc(): unaligned tcache chunk"): so
only a guest that outruns the copy is made to wait, and it stands still while such a copy ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from godwit.model.errors import GodwitError, OperationFailed, OutcomeUnknown
from godwit.model.vm import Disk
from godwit.qemu import layout
from godwit.qemu.blocks import disk_nodes, node_names
from godwit.qemu.hotplug import COMMAND_TIMEOUT, drop_nodes
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place
from godwit.qmp import EventStream, MonitorError, QmpError

LOOK_S: Final = 0.5
"""Seconds between two looks at how far it is: QEMU tells only of the end."""

SWITCH_S: Final = 30.0
"""Seconds that the last bytes may take, with the VM standing still."""

STALL_S: Final = 10.0
"""Seconds without less to copy than ever before after which the guest outruns the copy."""

TRIES: Final = 5
AGAIN_S: Final = 0.1

_EVENT: Final = "JOB_STATUS_CHANGE"
_OVER: Final = frozenset({"aborting", "concluded"})

Heard = Callable[[int, int], None]
"""Hears how many bytes are copied, of how many."""

_log = logging.getLogger("agent")

Where = Literal["old", "new", "neither"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What QEMU says of a disk on its way: which image its device has, and the job's status."""

    device: Where
    job: str = ""


class Pace:
    """When the guest's writes have to wait for the new image too, or the copy never ends. Pure."""

    def __init__(self) -> None:
        self._best: int | None = None
        self._since = 0.0

    def blocks(self, copied: int, total: int, *, now: float) -> bool:
        """Whether to hold the guest's writes from here on: there is no progress."""
        left = total - copied
        if self._best is None or left < self._best:
            self._best, self._since = left, now
        return now - self._since >= STALL_S


class Mirror:
    """The way of one disk from its image ``old`` to its image ``new``; both name the same disk."""

    def __init__(self, machine: Machine, old: Disk, new: Disk) -> None:
        self._machine = machine
        self._old = old
        self._new = new
        self._job = layout.mirror_job(old)
        self._blocking: bool | None = None  # not known of a copy that an earlier agent began

    async def begin(self, place: Place, *, rate: int = 0) -> None:
        """Open the new image and begin to copy, at ``rate`` bytes a second at most (0: no limit).

        OperationFailed with QEMU's words when it cannot; `abandon` clears up then."""
        new, vm = self._new, self._machine.vm
        self._blocking = False
        try:
            nodes = disk_nodes(
                new,
                vm=vm,
                aio=place.aio,
                broker=place.broker,
                served=place.served.get(new.id),
                locking=place.locking,
            )
            for node in nodes:
                await self._execute("blockdev-add", node)
            await self._execute(
                "blockdev-mirror",
                {
                    "job-id": self._job,
                    "device": layout.format_node(self._old),
                    "target": layout.format_node(new),
                    "sync": "full",
                    "speed": rate,
                    "copy-mode": "background",
                    "on-source-error": "report",
                    "on-target-error": "report",
                    "auto-finalize": False,
                    "auto-dismiss": False,
                },
            )
        except QmpError as error:
            raise self._failed(error.desc) from error

    async def until_ready(self, heard: Heard) -> None:
        """Return when both images hold the same. OperationFailed when the copy fails, as it does
        when the new image's volume is full; the VM does not notice."""
        pace, loop = Pace(), asyncio.get_running_loop()
        with self._machine.monitor.events(_EVENT) as events:
            while True:
                job = await self._look()
                copied, total = int(job["current-progress"]), int(job["total-progress"])
                heard(copied, total)
                if job["status"] == "ready":
                    return
                if job["status"] in _OVER:
                    raise self._failed(str(job.get("error", "it was called off")))
                if total and pace.blocks(copied, total, now=loop.time()):
                    await self._block()
                with contextlib.suppress(TimeoutError):
                    await events.wait(self._ours, timeout=LOOK_S)

    async def complete(self) -> None:
        """Copy the last bytes; when this returns no I/O passes and both images are equal and
        flushed. The VM should stand still, or its guest may wait long for its disk.

        Until `finalize` or `abandon` it does not matter which of the two a crash leaves.
        """
        with self._machine.monitor.events(_EVENT) as events:
            # It may just be coming back from the pause that the stop of the VM was for it.
            await self._await(events, frozenset({"ready"}))
            try:
                await self._execute("job-complete", {"id": self._job})
            except QmpError as error:
                raise self._failed(error.desc) from error
            await self._await(events, frozenset({"pending"}))

    async def finalize(self) -> None:
        """Let the device take to the new image. OperationFailed: it stays on the old one."""
        with self._machine.monitor.events(_EVENT) as events:
            try:
                await self._execute("job-finalize", {"id": self._job})
                error = (await self._await(events, frozenset({"concluded"}))).get("error")
                await self.forget()
            except QmpError as refusal:
                raise self._failed(refusal.desc) from refusal
        if error or (await self.seen()).device != "new":
            raise self._failed(str(error or "the device kept its image"))

    async def abandon(self) -> None:
        """End the copy, whatever it is at, and close the new image; the old one stays the disk's.

        Can be repeated; nothing to end is no fault.
        """
        with self._machine.monitor.events(_EVENT) as events:
            job = await self._job_now()
            async with self._standing_still():
                if job is not None and job["status"] not in _OVER:
                    with contextlib.suppress(QmpError):  # it has ended by itself meanwhile
                        await self._execute("job-cancel", {"id": self._job})
                if job is not None:
                    await self._await(events, frozenset({"concluded"}))
            await self.forget()
        await drop_nodes(self._machine, node_names(self._new)[::-1])

    async def forget(self) -> None:
        """Let go of a job that has ended; none is no fault."""
        if (job := await self._job_now()) is not None and job["status"] == "concluded":
            await self._execute("job-dismiss", {"id": self._job})

    async def close_old(self) -> None:
        """Close the image that was the disk's; what is closed already is no fault."""
        await drop_nodes(self._machine, node_names(self._old)[::-1])

    async def seen(self) -> Seen:
        """Which image the device really has, and how the job stands."""
        blocks: list[dict[str, Any]] = await self._execute("query-block")
        nodes = {
            str(block["inserted"].get("node-name", ""))
            for block in blocks
            if block.get("qdev") == self._old.id and block.get("inserted")
        }
        device: Where = "neither"
        if layout.format_node(self._new) in nodes:
            device = "new"
        elif nodes:
            # While it is copied a filter of QEMU's own, with a name of its own, lies on top.
            device = "old"
        job = await self._job_now()
        return Seen(device, "" if job is None else str(job["status"]))

    # Steps.

    @contextlib.asynccontextmanager
    async def _standing_still(self) -> AsyncIterator[None]:
        """No write of the guest is under way in here, where one might wait for the new image."""
        if self._blocking is False or not (await self._machine.status()).running:
            yield
            return
        await self._machine.stop()
        try:
            yield
        finally:
            await asyncio.shield(self._machine.cont())

    async def _block(self) -> None:
        """Have the guest's writes wait for the new image too; QEMU before 8.2 cannot."""
        if self._blocking:
            return
        self._blocking = True
        with contextlib.suppress(QmpError):
            change = {"id": self._job, "type": "mirror", "copy-mode": "write-blocking"}
            await self._execute("block-job-change", change)

    async def _await(self, events: EventStream, wanted: frozenset[str]) -> dict[str, Any]:
        """The job once it is in one of these states; OperationFailed when it ends otherwise,
        OutcomeUnknown when it does neither in time."""
        try:
            async with asyncio.timeout(SWITCH_S):
                while True:
                    job = await self._look()
                    if job["status"] in wanted:
                        return job
                    if job["status"] == "concluded":
                        raise self._failed(str(job.get("error", "it ended")))
                    await events.wait(self._ours, timeout=None)
        except MonitorError:
            raise
        except TimeoutError:
            raise OutcomeUnknown(
                f"the copy of {self._old.id} of {self._machine.vm} is not "
                f"{' or '.join(sorted(wanted))} after {SWITCH_S:g} s",
                hint="is its storage stuck? see the agent's log",
            ) from None

    def _ours(self, event: Any) -> bool:
        return bool(event.data.get("id") == self._job)

    async def _look(self) -> dict[str, Any]:
        job = await self._job_now()
        if job is None:
            raise self._failed("QEMU knows nothing of it any more")
        return job

    async def _job_now(self) -> dict[str, Any] | None:
        jobs: list[dict[str, Any]] = await self._execute("query-jobs")
        return next((job for job in jobs if job["id"] == self._job), None)

    async def _execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        return await self._machine.monitor.execute(command, arguments, timeout=COMMAND_TIMEOUT)

    def _failed(self, words: str) -> OperationFailed:
        space = "No space" in words
        return OperationFailed(
            f"{self._old.id} of {self._machine.vm} cannot be moved to {self._new.path}: {words}",
            hint="make room on its volume" if space else "is the volume sound? ask again",
        )


async def let_go(mirror: Mirror) -> bool:
    """As `Mirror.abandon`; False when QEMU did not do it, which an adoption finds later.

    Asked again a few times: a job that has ended may hold its nodes for a moment more.
    """
    for attempt in range(TRIES):
        try:
            await mirror.abandon()
        except (MonitorError, GodwitError) as error:
            _log.warning("attempt %d to end a copy: %s", attempt + 1, error)
            await asyncio.sleep(AGAIN_S)  # nothing announces that a node is free
        else:
            return True
    return False
