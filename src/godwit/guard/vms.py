"""The guard's spare monitors: one per registered VM, kept open, watched, used in need."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from godwit.guard.decide import Act, Decision, Watch, decide
from godwit.host.process import Process, is_alive
from godwit.qmp import Monitor, MonitorError, MonitorLost

_log = logging.getLogger("guard")
CONNECT_S = 5.0
RECONNECT_S = 0.5
ACT_S = 1.0


@dataclass
class GuardedVm:
    """A registered QEMU: its process, its monitor, and what is known of its move."""

    vm: str
    process: Process
    monitor_path: Path
    epoch: int
    monitor: Monitor | None = None
    status: str = ""  # of its last or present move, and since when; known before it is armed
    status_since: float = 0.0
    armed: Watch | None = None
    migration: str = ""
    ha: bool = False  # it is started elsewhere when this host is lost
    deadline: bool = True  # what fences it counts on this host's own deadline
    cgroup: str = ""
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Vms:
    """All registered VMs. ``now`` is a monotonic clock; acts are appended to ``log``."""

    def __init__(self, *, now: Callable[[], float], log: Path, notify: Callable[[], None]) -> None:
        self._now = now
        self._log = log
        self._changed = notify
        self.vms: dict[str, GuardedVm] = {}

    def register(
        self,
        *,
        vm: str,
        process: Process,
        monitor: Path,
        epoch: int,
        ha: bool = False,
        deadline: bool = True,
        cgroup: str = "",
    ) -> None:
        """Watch a QEMU; the same one registered again keeps its monitor."""
        known = self.vms.get(vm)
        if known is not None and known.process == process:
            known.epoch, known.ha, known.deadline = epoch, ha, deadline
            known.cgroup = cgroup
            return
        self.forget(vm)
        entry = GuardedVm(
            vm=vm,
            process=process,
            monitor_path=monitor,
            epoch=epoch,
            ha=ha,
            deadline=deadline,
            cgroup=cgroup,
        )
        entry.task = asyncio.create_task(self._serve(entry), name=f"guard {vm}")
        self.vms[vm] = entry

    def forget(self, vm: str) -> None:
        """The QEMU is gone, or not ours to watch any more."""
        entry = self.vms.pop(vm, None)
        if entry is not None and entry.task is not None:
            entry.task.cancel()

    def sweep(self) -> bool:
        """Forget what has ended: an agent that was away at the time never says so. True if any."""
        ended = [name for name, entry in self.vms.items() if not is_alive(entry.process)]
        for name in ended:
            self.forget(name)
        return bool(ended)

    def arm(self, *, vm: str, migration: str, role: str) -> None:
        """A move of this VM began; KeyError when it is not registered."""
        entry = self.vms[vm]
        if entry.migration != migration or entry.armed is None:
            # A guard that was restarted in the middle of a move is told late what it sees already.
            entry.armed = Watch(
                role=role, status=entry.status, status_since=entry.status_since or self._now()
            )
            entry.migration = migration

    def disarm(self, vm: str) -> None:
        """The move is over."""
        entry = self.vms.get(vm)
        if entry is not None:
            entry.armed, entry.migration = None, ""

    async def act(self, *, agent_gone_for: float) -> bool:
        """Do what the table says for every armed VM; True when it wants to be asked again soon."""
        soon = False
        for entry in list(self.vms.values()):
            if entry.armed is None:
                continue
            decision = decide(entry.armed, agent_gone_for=agent_gone_for, now=self._now())
            if decision.act is Act.WAIT:
                soon = True
            elif decision.act is not Act.NOTHING:
                await self._carry_out(entry, decision)
                soon = True
        return soon

    async def _carry_out(self, entry: GuardedVm, decision: Decision) -> None:
        monitor = entry.monitor
        if monitor is None:
            self._note(entry, decision, "the spare monitor is away")
            return
        result = "done"
        try:
            if decision.act is Act.CANCEL:
                await monitor.execute("migrate_cancel", timeout=ACT_S)
            else:
                await self._yank(monitor)
        except MonitorLost as error:
            result = str(error)
        except (MonitorError, TimeoutError):
            # The main loop hangs: the out-of-band way is left.
            result = "the main loop hangs, yanked instead"
            with contextlib.suppress(MonitorError, TimeoutError):
                await self._yank(monitor)
        if entry.armed is not None:
            # Once is enough; QEMU's next event says what came of it.
            entry.armed = Watch(role=entry.armed.role, status="acted", status_since=self._now())
        self._note(entry, decision, result)

    async def _yank(self, monitor: Monitor) -> None:
        await monitor.execute_oob("yank", {"instances": [{"type": "migration"}]}, timeout=ACT_S)

    def _note(self, entry: GuardedVm, decision: Decision, result: str) -> None:
        line = {
            "at": self._now(),
            "vm": entry.vm,
            "migration": entry.migration,
            "act": decision.act.value,
            "sentence": decision.sentence,
            "result": result,
        }
        _log.warning("%s: %s (%s)", entry.vm, decision.sentence, result)
        with contextlib.suppress(OSError), self._log.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    async def _serve(self, entry: GuardedVm) -> None:
        """Keep a monitor open and follow the move's status, as long as the process lives."""
        while is_alive(entry.process):
            try:
                entry.monitor = await Monitor.connect(
                    entry.monitor_path, name=f"guard {entry.vm}", deadline=CONNECT_S
                )
                await self._follow(entry, entry.monitor)
            except MonitorError as error:
                if is_alive(entry.process):
                    _log.info("%s: spare monitor: %s", entry.vm, error)
            finally:
                monitor, entry.monitor = entry.monitor, None
                if monitor is not None:
                    await monitor.close()
            await asyncio.sleep(RECONNECT_S)  # a busy monitor announces nothing

    async def _follow(self, entry: GuardedVm, monitor: Monitor) -> None:
        with monitor.events("MIGRATION") as events:
            with contextlib.suppress(MonitorError):
                now = await monitor.execute("query-migrate", timeout=CONNECT_S)
                self._saw(entry, str(now.get("status", "")))
            async for event in events:
                self._saw(entry, str(event.data.get("status", "")))

    def _saw(self, entry: GuardedVm, status: str) -> None:
        if entry.status != status:
            entry.status, entry.status_since = status, self._now()
        if entry.armed is not None and entry.armed.status != status:
            entry.armed = Watch(role=entry.armed.role, status=status, status_since=self._now())
            self._changed()

    async def close(self) -> None:
        """Let go of all monitors; the VMs run on."""
        tasks = [entry.task for entry in self.vms.values() if entry.task is not None]
        self.vms.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
