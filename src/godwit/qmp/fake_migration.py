"""The migration life cycle of a `FakeQemu`: states, events and a small model of pages and time.

Source:  setup -> active (passes) -> [pre-switchover ->] device -> completed
         any of these -> cancelling -> cancelled, or failed; then the guest runs again
         active -> postcopy-active -> completed; <-> postcopy-paused -> postcopy-recover
Target:  setup -> active -> completed (run state `paused` with -S, else `running`)

The model: a pass moves what is dirty at the link's rate while the guest dirties
`dirty_bytes_per_s` of at most `working_set_bytes`; QEMU switches over by itself once the rest
fits into `downtime-limit`. So a guest that outruns its link never converges here either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from godwit.qmp.errors import QmpError

if TYPE_CHECKING:
    from godwit.qmp.fake import FakeQemu

_CAPABILITIES = (
    "auto-converge", "background-snapshot", "events", "late-block-activate", "mapped-ram",
    "multifd", "pause-before-switchover", "postcopy-preempt", "postcopy-ram", "return-path",
    "switchover-ack", "validate-uuid", "xbzrle", "zero-copy-send",
)  # fmt: skip

_PARAMETERS: dict[str, Any] = {
    "max-bandwidth": 134217728,
    "avail-switchover-bandwidth": 0,
    "downtime-limit": 300,
    "multifd-channels": 2,
    "max-postcopy-bandwidth": 0,
    "cpu-throttle-initial": 20,
    "announce-initial": 50,
    "announce-max": 550,
    "announce-rounds": 5,
    "announce-step": 100,
    "tls-creds": "",
    "tls-hostname": "",
}

_SLICE = 0.02
"""Seconds of simulated time between looks at cancel, parameters and a broken link."""


class FakeMigration:
    """Both ends' migration state of one fake. `peer` is set by `godwit.qmp.fake.link`."""

    def __init__(self, qemu: FakeQemu) -> None:
        self._qemu = qemu
        self.peer: FakeMigration | None = None
        self.status = "none"
        self.error: str | None = None
        self.capabilities = dict.fromkeys(_CAPABILITIES, False)
        self.parameters = dict(_PARAMETERS)
        self.ram_bytes = 64 << 20
        self.link_bytes_per_s = 1e9
        self.dirty_bytes_per_s = 0.0
        self.working_set_bytes = 16 << 20
        self.device_seconds = 0.002
        self.transferred = 0
        self.remaining = 0
        self.passes = 0
        self.address: dict[str, str] | None = None
        self._downtime_ms = 0
        self._continue = asyncio.Event()
        self._want_postcopy = False
        self._broken: str | None = None
        self._recovered = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
        """QMP command name to method."""
        return {
            "migrate": self._migrate,
            "migrate-incoming": self._incoming,
            "migrate-set-capabilities": self._set_capabilities,
            "migrate-set-parameters": self._set_parameters,
            "query-migrate-capabilities": self._query_capabilities,
            "query-migrate-parameters": self._query_parameters,
            "query-migrate": self._query,
            "migrate-continue": self._go_on,
            "migrate_cancel": self._cancel,
            "migrate-start-postcopy": self._start_postcopy,
            "migrate-recover": self._recover,
            "migrate-pause": self._pause,
            "yank": self._yank,
            "query-yank": self._query_yank,
            "calc-dirty-rate": self._calc_dirty_rate,
            "query-dirty-rate": self._query_dirty_rate,
        }

    @property
    def busy(self) -> bool:
        """A migration is under way (also one that waits for recovery)."""
        return self.status not in {"none", "completed", "failed", "cancelled"}

    def background(self, work: Coroutine[Any, Any, Any], what: str) -> None:
        """Run `work` as a named task of this fake."""
        task = asyncio.create_task(work, name=f"{self._qemu.name}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End all background work but the caller's own task."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def break_link(self, reason: str) -> None:
        """The stream ends here and at the peer."""
        for end in (self, self.peer):
            if end is not None and end.busy:
                end._broken = reason

    def peer_died(self) -> None:
        """This QEMU is gone: the peer's stream breaks."""
        if self.peer is not None and self.peer.busy and self.busy:
            self.peer._broken = "Unable to write to socket: Broken pipe"

    # Commands.

    async def _set_capabilities(self, args: dict[str, Any]) -> Any:
        for item in args["capabilities"]:
            if item["capability"] not in self.capabilities:
                desc = f"Parameter 'capability' does not accept value '{item['capability']}'"
                raise _refused("migrate-set-capabilities", desc)
            self.capabilities[item["capability"]] = item["state"]
        return {}

    async def _set_parameters(self, args: dict[str, Any]) -> Any:
        self.parameters |= args
        return {}

    async def _query_capabilities(self, _args: dict[str, Any]) -> Any:
        return [{"capability": c, "state": s} for c, s in self.capabilities.items()]

    async def _query_parameters(self, _args: dict[str, Any]) -> Any:
        return self.parameters

    async def _query(self, _args: dict[str, Any]) -> Any:
        answer: dict[str, Any] = {"status": self.status} if self.status != "none" else {}
        if self.error is not None:
            answer["error-desc"] = self.error
        if self.address is not None:
            answer["socket-address"] = [self.address]
        if self.passes:
            answer["ram"] = {
                "transferred": self.transferred,
                "remaining": self.remaining,
                "total": self.ram_bytes,
                "dirty-sync-count": self.passes,
                "dirty-pages-rate": int(self.dirty_bytes_per_s / 4096),
                "page-size": 4096,
                "mbps": self._rate() * 8 / 1e6,
            }
            key = "downtime" if self.status == "completed" else "expected-downtime"
            answer[key] = self._downtime_ms
        return answer

    async def _incoming(self, args: dict[str, Any]) -> Any:
        if self._qemu.run_state != "inmigrate" or self.status != "none":
            raise _refused("migrate-incoming", "The incoming migration has already been started")
        uri = _uri(args)
        if uri.startswith("file:"):
            self._set("setup")
            self.background(self._load_file(), "load")
            return {}
        host = uri.removeprefix("tcp:").rpartition(":")[0]
        self.address = {"type": "inet", "host": host or "0.0.0.0", "port": "40000"}  # noqa: S104
        self._set("setup")
        return {}

    async def _migrate(self, args: dict[str, Any]) -> Any:
        if args.get("resume"):
            if self.status != "postcopy-paused":
                raise _refused("migrate", "Cannot resume if there is no paused migration")
            self._broken = None
            self._recovered.set()
            return {}
        if self.busy:
            raise _refused("migrate", "There's a migration process in progress")
        self.error = self._broken = None
        self.transferred = self.passes = 0
        self._want_postcopy = False
        self._continue.clear()
        self.background(self._send(_uri(args)), "migrate")
        return {}

    async def _go_on(self, args: dict[str, Any]) -> Any:
        if self.status != args["state"]:
            desc = f"Migration not in expected state: {self.status}"
            raise _refused("migrate-continue", desc)
        self._continue.set()
        return {}

    async def _cancel(self, _args: dict[str, Any]) -> Any:
        if self.status.startswith("postcopy"):
            raise _refused("migrate_cancel", "Postcopy migration in progress, cannot cancel.")
        if self.busy and self.status != "cancelling":
            if self.status == "pre-switchover":
                self._set("device")
            self._set("cancelling")
            self._broken = "cancelled"
            self._continue.set()
        return {}

    async def _start_postcopy(self, _args: dict[str, Any]) -> Any:
        if not self.capabilities["postcopy-ram"]:
            desc = "Enable postcopy with migrate_set_capability before the start of migration"
            raise _refused("migrate-start-postcopy", desc)
        self._want_postcopy = True
        return {}

    async def _recover(self, args: dict[str, Any]) -> Any:
        if self.status != "postcopy-paused":
            raise _refused(
                "migrate-recover", "Migrate recover can only be run when postcopy is paused"
            )
        _uri(args)
        self._broken = None
        self._recovered.set()
        return {}

    async def _pause(self, _args: dict[str, Any]) -> Any:
        if self.status not in {"postcopy-active", "postcopy-recover"}:
            desc = "migrate-pause is currently only supported during postcopy-active state"
            raise _refused("migrate-pause", desc)
        self.break_link("paused by request")
        return {}

    async def _query_yank(self, _args: dict[str, Any]) -> Any:
        return [{"type": "migration"}] if self.busy else []

    async def _yank(self, args: dict[str, Any]) -> Any:
        for instance in args["instances"]:
            if instance not in await self._query_yank({}):
                desc = "Instance not found"
                raise QmpError("yank", error_class="DeviceNotFound", desc=desc)
        self.break_link("Unable to write to socket: Broken pipe")
        return {}

    async def _calc_dirty_rate(self, args: dict[str, Any]) -> Any:
        if args.get("mode", "page-sampling") != "page-sampling":
            raise _refused("calc-dirty-rate", "only page-sampling is safe")
        return {}

    async def _query_dirty_rate(self, _args: dict[str, Any]) -> Any:
        rate = int(self.dirty_bytes_per_s / (1 << 20))
        return {"status": "measured", "dirty-rate": rate, "calc-time": 1, "mode": "page-sampling"}

    # Life cycle.

    async def _send(self, uri: str) -> None:
        was_running = self._qemu.run_state == "running"
        self._set("setup")
        to_file = uri.startswith("file:")
        peer = None if to_file else self.peer
        if not to_file and (peer is None or peer.status != "setup" or peer._qemu.dead):
            self._fail("Failed to connect: Connection refused", was_running=was_running)
            return
        try:
            await self._precopy(peer)
            if self._want_postcopy and self.remaining and peer is not None:
                await self._postcopy(peer)
            else:
                await self._switch_over(peer)
        except _BrokenError:
            self._fail(self._broken or "broken", was_running=was_running)
            if peer is not None and peer.busy:
                await peer._abandon()

    async def _precopy(self, peer: FakeMigration | None) -> None:
        self._set("active")
        if peer is not None:
            peer._set("active")
        self.remaining = self.ram_bytes
        while True:
            self.passes += 1
            if self.capabilities["events"]:
                self._qemu.emit("MIGRATION_PASS", {"pass": self.passes})
            dirtied = 0.0
            while self.remaining > 0:
                self._check(peer)
                if self._want_postcopy and self.passes > 1:
                    return
                step = min(_SLICE, self.remaining / self._rate())
                await self._qemu.sleep(step)
                if peer is not None and peer._qemu.frozen:
                    continue  # nobody takes the bytes; `transferred` stands still
                moved = min(self.remaining, max(1, round(self._rate() * step)))
                self.remaining -= moved
                self.transferred += moved
                if self._qemu.run_state == "running":
                    dirtied += self.dirty_bytes_per_s * step
            self.remaining = round(min(dirtied, self.working_set_bytes, self.ram_bytes))
            self._downtime_ms = round(self.remaining / self._rate() * 1000)
            if self._downtime_ms <= self.parameters["downtime-limit"] and not self._want_postcopy:
                return
            if self._want_postcopy and not self.remaining:
                return

    async def _switch_over(self, peer: FakeMigration | None) -> None:
        self._stop_guest()
        if self.capabilities["pause-before-switchover"]:
            self._set("pre-switchover")
            await self._continue.wait()
            if self._broken == "cancelled":
                raise _BrokenError
        self._set("device")
        await self._qemu.sleep(self.device_seconds + self.remaining / self._rate())
        self.transferred += self.remaining
        self.remaining = 0
        while peer is not None and peer._qemu.frozen and self.capabilities["return-path"]:
            self._check(peer)
            await self._qemu.sleep(_SLICE)
        if peer is not None and not (peer._qemu.dead and not self.capabilities["return-path"]):
            self._check(peer)
            peer._finish()
        self._complete()

    async def _postcopy(self, peer: FakeMigration) -> None:
        self._stop_guest()
        self._set("device")
        for end in (self, peer):
            end._set("postcopy-active")
        peer._qemu.set_run_state("running" if peer._qemu.autostart else "paused")
        while self.remaining > 0:
            step = min(_SLICE, self.remaining / self._rate())
            await self._qemu.sleep(step)
            if self._broken:
                await self._wait_recovery(peer)
                continue
            moved = min(self.remaining, max(1, round(self._rate() * step)))
            self.remaining -= moved
            self.transferred += moved
        peer._set("completed")
        self._complete()

    async def _wait_recovery(self, peer: FakeMigration) -> None:
        ends = (self, peer)
        for end in ends:
            end._recovered.clear()
            end._set("postcopy-paused")
        for end in ends:
            await end._recovered.wait()
        for end in ends:
            end._broken = None
            end._set("postcopy-recover")
        for end in ends:
            end._set("postcopy-active")

    async def _load_file(self) -> None:
        self._set("active")
        await self._qemu.sleep(self.device_seconds)
        self._finish()

    def _finish(self) -> None:
        self._set("completed")
        self._qemu.set_run_state("running" if self._qemu.autostart else "paused")

    def _complete(self) -> None:
        self._qemu.run_state = "postmigrate"
        self._set("completed")

    def _stop_guest(self) -> None:
        if self._qemu.run_state == "running":
            self._qemu.set_run_state("finish-migrate")

    def _fail(self, reason: str, *, was_running: bool) -> None:
        cancelled = reason == "cancelled"
        if not cancelled:
            self.error = reason
            self._set("failed")
        if self._qemu.run_state == "finish-migrate" and was_running:
            self._qemu.set_run_state("running")
        if cancelled:
            self._set("cancelled")

    async def _abandon(self) -> None:
        # A real target exits when its stream breaks in pre-copy; a frozen one when it wakes.
        await self._qemu.until_thawed()
        self._set("failed")
        await self._qemu.die()

    def _check(self, peer: FakeMigration | None) -> None:
        if peer is not None and peer._qemu.dead and not self._broken:
            self._broken = "Unable to write to socket: Broken pipe"
        if self._broken:
            raise _BrokenError

    def _rate(self) -> float:
        limit = self.parameters["max-bandwidth"] or self.link_bytes_per_s
        return float(min(limit, self.link_bytes_per_s))

    def _set(self, status: str) -> None:
        self.status = status
        if self.capabilities["events"]:
            self._qemu.emit("MIGRATION", {"status": status})


class _BrokenError(Exception):
    """The stream ended: cancelled, yanked, or the peer is gone."""


def _uri(args: dict[str, Any]) -> str:
    if "uri" in args:
        return str(args["uri"])
    address = args["channels"][0]["addr"]
    if address["transport"] == "file":
        return f"file:{address['filename']}"
    return f"tcp:{address.get('host', '')}:{address.get('port', 0)}"


def _refused(command: str, desc: str) -> QmpError:
    return QmpError(command, error_class="GenericError", desc=desc)
