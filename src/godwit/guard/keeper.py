"""Keeps the deadline (``deadline``) for the highly available VMs of this host, one task each.

A VM that cannot be frozen, asked about or killed holds up no other one. What is known of them lies
in ``notes``, so that a guard that was restarted thaws or kills what an earlier one froze; what a
VM's processes really do is asked of the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from godwit.guard import notes
from godwit.guard.deadline import (
    FREEZE_S,
    Copy,
    Decision,
    Stand,
    Step,
    Word,
    decide,
    fed_until,
    judge,
    next_look,
)
from godwit.guard.freezer import Freezer, apart
from godwit.guard.lease import HostLease, Promise
from godwit.guard.notes import NotedVm, Notes
from godwit.guard.vms import GuardedVm, Vms
from godwit.guard.watchdog import Watchdog
from godwit.host.errors import HostError
from godwit.host.process import Process
from godwit.model.errors import GodwitError
from godwit.model.world import Clock
from godwit.store.errors import StoreError
from godwit.store.records import Records

LOOK_S = 0.5
"""Seconds between looks while something is to be waited for that nothing announces."""
PAUSE_S = 0.02
"""The same, while a VM is on its way to standing still or to its end."""
TRIES = 4
"""Looks at a freezer before a renewal says that it does not work: a QEMU joins its group late."""
WORK_S = 0.5
"""Seconds a step at the freezer may take before it counts as hanging."""
ASK_S = 2.0
_log = logging.getLogger("guard")


@dataclass
class Kept:
    """One VM under the deadline: its task, and what is known of it."""

    copy: Copy
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    unfit: str = "not tried yet"  # why a freeze would not hold it; empty when it would
    look: bool = False  # somebody else may have frozen it
    said: str = ""


class Keeper:
    """All VMs under the deadline. Belongs to the guard's event loop.

    Times are ``clock.monotonic``; steps are appended to ``log``, what is known is kept in ``file``.
    """

    def __init__(
        self,
        vms: Vms,
        lease: HostLease,
        records: Records,
        clock: Clock,
        *,
        host: str,
        boot_id: str,
        watchdog: Watchdog,
        file: Path,
        log: Path,
        freezer: Callable[[Process, str], Freezer] = Freezer,
    ) -> None:
        self._vms = vms
        self._lease = lease
        self._records = records
        self._clock = clock
        self._host = host
        self._boot_id = boot_id
        self.watchdog = watchdog
        self._file = file
        self._log = log
        self._freezer = freezer
        self._bell = asyncio.Event()
        self._began = clock.monotonic()
        self.kept: dict[str, Kept] = {}
        self._before: dict[str, tuple[object, ...]] = {}

    # What others are told.

    def frozen(self) -> dict[str, str]:
        """The VMs that stand still by the deadline, and why."""
        still = (Stand.FROZEN, Stand.FREEZING)
        return {name: kept.said for name, kept in self.kept.items() if kept.copy.stand in still}

    async def promise(self) -> Promise:
        """What is true of this guard now: each freezer was tried, and what stands behind it."""
        for attempt in range(TRIES):
            if attempt:
                await self._clock.sleep(PAUSE_S)  # nothing announces a group's new member
            await self._try_freezers()
            armed = not any(kept.unfit for kept in self.kept.values())
            if armed:
                break
        if self.kept:
            watchdog = self.watchdog.usable and self.watchdog.running
        else:
            watchdog = self.watchdog.usable
        return Promise(guard="armed" if armed else "unarmed", watchdog=watchdog)

    def renewed(self) -> None:
        """The lease was renewed, or counts as such."""
        self._feed()
        self.note()
        self._ring()

    def registered(self) -> None:
        """The agent told something of its VMs."""
        self._fit()
        self._feed()
        self.note()
        self._ring()

    def look(self, vm: str) -> None:
        """The agent froze a VM while this guard was silent: ask the kernel."""
        if vm in self.kept:
            self.kept[vm].look = True
            self._ring()

    # Life.

    def recall(self) -> None:
        """Go on where the guard before stopped; nothing is known in the first one of a boot."""
        known = notes.load(self._file, boot_id=self._boot_id)
        if known is None:
            return
        self._lease.resume(
            renewed_at=known.renewed_at, counts_from=known.counts_from, number=known.number
        )
        for one in known.vms:
            self._vms.register(
                vm=one.vm,
                process=Process(one.pid, one.start_time),
                monitor=Path(one.monitor),
                epoch=one.epoch,
                ha=one.ha,
                deadline=one.deadline,
                cgroup=one.cgroup,
            )
        self._fit()

    async def serve(self) -> None:
        """Feed the watchdog and wake who waits, for ever."""
        self.watchdog.probe()
        try:
            while True:
                if self._vms.sweep():
                    self.note()
                self._fit()
                self._feed()
                await self._clock.sleep(LOOK_S)
        finally:
            for kept in self.kept.values():
                if kept.task is not None:
                    kept.task.cancel()
            if self.kept:
                self.watchdog.leave()  # the next guard feeds it, or the host is not trusted
            else:
                self.watchdog.rest()

    def _ring(self) -> None:
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    def note(self) -> None:
        """Write down what the next guard needs."""
        vms = tuple(
            NotedVm(
                vm=entry.vm,
                pid=entry.process.pid,
                start_time=entry.process.start_time,
                monitor=str(entry.monitor_path),
                epoch=entry.epoch,
                ha=entry.ha,
                deadline=entry.deadline,
                cgroup=entry.cgroup,
            )
            for entry in self._vms.vms.values()
        )
        lease = self._lease
        kept = Notes(self._boot_id, lease.renewed_at, lease.counts_from, lease.number, vms)
        try:
            kept.save(self._file)
        except OSError as error:
            _log.error("what the next guard needs cannot be written: %s", error)

    def _fit(self) -> None:
        """Have one task for each VM that is to be watched, and none for others."""
        wanted = {e.vm: e for e in self._vms.vms.values() if e.ha and e.deadline}
        for name in [*self.kept]:
            entry = wanted.get(name)
            if entry is None or self._before[name] != _identity(entry):
                self._let_go(name)
        fresh = [name for name in wanted if name not in self.kept]
        for name in fresh:
            kept = Kept(Copy(name, Stand.RUNNING))
            self.kept[name], self._before[name] = kept, _identity(wanted[name])
            kept.task = asyncio.create_task(self._keep(wanted[name], kept), name=f"keep {name}")
        if fresh:
            self._lease.hasten()  # what the last renewal said may not be true of these

    def _let_go(self, name: str) -> None:
        kept = self.kept.pop(name)
        del self._before[name]
        if kept.task is not None:
            kept.task.cancel()

    def _feed(self) -> None:
        if not self.kept:
            self.watchdog.rest()
            return
        copies = tuple(kept.copy for kept in self.kept.values())
        until = fed_until(copies, counts_from=self._counts_from(), now=self._clock.monotonic())
        self.watchdog.keep(until)

    def _counts_from(self) -> float:
        # A guard that knows of no renewal counts from its own beginning.
        known = self._lease.counts_from
        return self._began if known is None else known

    async def _try_freezers(self) -> None:
        async def one(name: str, kept: Kept) -> None:
            entry = self._vms.vms.get(name)
            if entry is None or kept.copy.stand is not Stand.RUNNING:
                return
            freezer = self._freezer(entry.process, entry.cgroup)
            try:
                kept.unfit = await apart(freezer.check, timeout=WORK_S)
            except TimeoutError:
                kept.unfit = "its freezer hangs"

        unfit = {name: kept.unfit for name, kept in self.kept.items()}
        await asyncio.gather(*(one(name, kept) for name, kept in self.kept.items()))
        for name, kept in self.kept.items():
            if kept.unfit and unfit.get(name) != kept.unfit:
                _log.warning("%s: the deadline is not kept: %s", name, kept.unfit)

    # One VM.

    async def _keep(self, entry: GuardedVm, kept: Kept) -> None:
        freezer = self._freezer(entry.process, entry.cgroup)
        kept.look = True  # an earlier guard may have frozen it
        while kept.copy.stand is not Stand.GONE:
            if kept.look and kept.copy.stand is Stand.RUNNING:
                await self._look(entry, kept, freezer)
            bell, now = self._bell, self._clock.monotonic()
            kept.copy = replace(kept.copy, serves_pages=entry.status.startswith("postcopy"))
            counts_from = self._counts_from()
            proven = self._lease.renewed_at
            decision = decide(
                kept.copy,
                renewed_at=now - FREEZE_S if proven is None else proven,
                counts_from=counts_from,
                now=now,
            )
            if decision.step is Step.NOTHING:
                await self._wait(next_look(kept.copy, counts_from=counts_from, now=now), bell)
            else:
                await self._do(entry, kept, freezer, decision)

    async def _look(self, entry: GuardedVm, kept: Kept, freezer: Freezer) -> None:
        kept.look = False
        with contextlib.suppress(TimeoutError, HostError, OSError):
            await self._work(kept, freezer.stand)
        if kept.copy.stand is Stand.FROZEN:
            kept.said, kept.unfit = "it was found frozen", ""
            self._say(entry, "look", kept.said, Stand.FROZEN.value, self._clock.realtime())

    async def _do(self, entry: GuardedVm, kept: Kept, freezer: Freezer, decision: Decision) -> None:
        if decision.step is Step.ASK:
            if not await self._ask(entry, kept):
                await self._clock.sleep(LOOK_S)
            return
        before, fault = kept.copy.stand, ""
        work = {
            Step.FREEZE: freezer.freeze,
            Step.THAW: freezer.thaw,
            Step.KILL: freezer.kill,
        }[decision.step]
        if decision.step is Step.FREEZE and before is Stand.RUNNING:
            kept.copy = replace(kept.copy, stand=Stand.FREEZING)
            kept.said = decision.sentence
        asked = self._clock.realtime()
        try:
            await self._work(kept, work)
        except TimeoutError:
            fault = "the freezer hangs"
        except (HostError, OSError) as error:
            fault = str(error)
        if decision.step is Step.THAW and not fault:
            kept.copy = replace(kept.copy, word=None)
        if kept.copy.stand is not before or fault:
            # What ran is never shown shorter than it ran: a freeze once it held, a thaw before.
            at = asked if decision.step is Step.THAW else self._clock.realtime()
            result = fault or kept.copy.stand.value
            self._say(entry, decision.step.value, decision.sentence, result, at)
            self._feed()
        if kept.copy.stand is Stand.FREEZING:
            # Nothing announces it; and each step that hangs holds a thread.
            await self._clock.sleep(LOOK_S if fault and decision.step is Step.KILL else PAUSE_S)

    async def _work(self, kept: Kept, work: Callable[[], Stand]) -> None:
        kept.copy = replace(kept.copy, stand=await apart(work, timeout=WORK_S))

    async def _ask(self, entry: GuardedVm, kept: Kept) -> bool:
        """Read the record; False when the store did not answer."""
        proven = self._lease.renewed_at
        if proven is None:
            return False
        try:
            found = await self._records.owner(entry.vm, timeout=ASK_S)
        except (StoreError, GodwitError, ValueError) as error:
            _log.warning("%s: the owner record cannot be read: %s", entry.vm, error)
            return False
        run = entry.monitor_path.parent
        epoch = notes.noted_epoch(run, pid=entry.process.pid) or entry.epoch
        word, why = judge(found.value if found else None, host=self._host, epoch=epoch)
        if word is Word.MOVED:
            _log.warning("%s: %s", entry.vm, why)
        kept.copy = replace(kept.copy, word=word, word_of=proven)
        return True

    async def _wait(self, seconds: float | None, bell: asyncio.Event) -> None:
        """Until the next renewal or registration, or until time alone changes the decision."""
        waiting = [asyncio.ensure_future(bell.wait())]
        if seconds is not None:
            waiting.append(asyncio.ensure_future(self._sleep(seconds)))
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()

    async def _sleep(self, seconds: float) -> Literal[True]:
        await self._clock.sleep(seconds)
        return True

    def _say(self, entry: GuardedVm, act: str, sentence: str, result: str, at: float) -> None:
        _log.warning("%s: %s (%s)", entry.vm, sentence, result)
        line = {
            "at": self._clock.monotonic(),
            "time": at,
            "vm": entry.vm,
            "act": act,
            "sentence": sentence,
            "result": result,
        }
        with contextlib.suppress(OSError), self._log.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def _identity(entry: GuardedVm) -> tuple[object, ...]:
    return (entry.process, entry.cgroup)
