"""A fake QEMU that speaks the real protocol on unix sockets: for the tests of upper rooms.

It keeps the manners of a real one: one client per socket, a greeting, out-of-band beside a
strictly serial in-band queue that stops reading when it is full, run states, and migration with
QEMU's own events in QEMU's order (`godwit.qmp.fake_migration`). Two fakes that are `link`ed
migrate into each other. Nothing is emulated: RAM is a number that shrinks and grows.

    source, target = FakeQemu(name="s"), FakeQemu(name="d", incoming=True)
    await source.listen(tmp_path / "s.qmp"); await target.listen(tmp_path / "d.qmp")
    link(source, target)

Faults: `freeze`/`thaw`, `die`, `fail`, `delay`, `hang`, and `cut_link`. `received` lists every
command in the order it was taken from the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.qmp.errors import QmpError
from godwit.qmp.fake_migration import FakeMigration

Handler = Callable[[dict[str, Any]], Awaitable[Any]]
Sleep = Callable[[float], Awaitable[None]]

_QUEUE_LIMIT = 7
"""In-band requests QEMU queues before it stops reading a monitor."""

_OOB_COMMANDS = frozenset({"yank", "query-yank", "migrate-recover", "migrate-pause", "x-oob-test"})


@dataclass(frozen=True, slots=True)
class Received:
    """One command as it came in."""

    command: str
    arguments: Mapping[str, Any]
    oob: bool


class FakeQemu:
    """One fake QEMU process.

    `incoming`: started with `-incoming defer` (run state `inmigrate`); `autostart` False is
    `-S`. `sleep` carries all simulated time, so a test may pass its own clock's.
    """

    def __init__(
        self,
        *,
        name: str = "fake",
        version: tuple[int, int, int] = (10, 0, 2),
        oob: bool = True,
        incoming: bool = False,
        autostart: bool = True,
        cpus: int = 1,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.name = name
        self.version = version
        self.oob = oob
        self.autostart = autostart
        self.run_state = "inmigrate" if incoming else "running" if autostart else "prelaunch"
        self.cpus = cpus
        self.dead = False
        self.received: list[Received] = []
        self.emitted: list[tuple[str, Mapping[str, Any]]] = []
        self.objects: dict[str, dict[str, Any]] = {}
        self.blocks: dict[str, dict[str, Any]] = {}
        self.devices: dict[str, dict[str, Any]] = {}
        self.on_powerdown = "shutdown"
        self.migration = FakeMigration(self)
        self.clock = clock
        self.sleep = sleep
        self._servers: list[asyncio.Server] = []
        self._clients: set[_Connection] = set()
        self._main_loop = asyncio.Lock()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._failures: dict[str, deque[tuple[str, str]]] = defaultdict(deque)
        self._delays: dict[str, float] = {}
        self._hangs: dict[str, asyncio.Event] = {}
        self._handlers: dict[str, Handler] = {
            attribute[4:].replace("__", "-"): getattr(self, attribute)
            for attribute in dir(self)
            if attribute.startswith("cmd_")
        }
        self._handlers |= self.migration.handlers()

    async def listen(self, path: Path) -> None:
        """Serve one more monitor on `path`, one client at a time."""
        connection_free = asyncio.Semaphore(1)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async with connection_free:  # the next client waits for its greeting
                connection = _Connection(self, reader, writer)
                self._clients.add(connection)
                try:
                    await connection.serve()
                finally:
                    self._clients.discard(connection)

        self._servers.append(await asyncio.start_unix_server(serve, str(path)))

    def emit(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Send an event to all connected monitors."""
        self.emitted.append((name, data or {}))
        now = self.clock()
        stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        message: dict[str, Any] = {"event": name, "timestamp": stamp}
        if data:
            message["data"] = dict(data)
        for client in list(self._clients):
            client.offer_event(message)

    def set_run_state(self, state: str) -> None:
        """Move to `state`, with STOP or RESUME when vCPUs stop or start."""
        was, self.run_state = self.run_state, state
        if (was == "running") != (state == "running"):
            self.emit("RESUME" if state == "running" else "STOP")

    # Faults.

    def freeze(self) -> None:
        """Stop answering on every socket, as under SIGSTOP; connections stay."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Go on after `freeze`; what piled up is answered now."""
        self._thawed.set()

    @property
    def frozen(self) -> bool:
        return not self._thawed.is_set()

    def fail(
        self, command: str, desc: str, *, error_class: str = "GenericError", times: int = 1
    ) -> None:
        """Refuse the next `times` calls of `command`."""
        self._failures[command].extend([(error_class, desc)] * times)

    def delay(self, command: str, seconds: float) -> None:
        """Answer `command` late from now on; in-band ones hold up the others."""
        self._delays[command] = seconds

    def hang(self, command: str) -> asyncio.Event:
        """`command` hangs in the main loop until the returned event is set."""
        return self._hangs.setdefault(command, asyncio.Event())

    def cut_link(self) -> None:
        """The migration connection breaks now."""
        self.migration.break_link("Unable to write to socket: Connection reset by peer")

    async def die(self) -> None:
        """Gone, as after SIGKILL: sockets closed, nothing more sent. Idempotent."""
        self.dead = True
        self.run_state = "dead"
        self.migration.peer_died()
        for server in self._servers:
            server.close()
        for client in list(self._clients):
            client.close()
        await self.migration.stop()

    async def until_thawed(self) -> None:
        await self._thawed.wait()

    # Commands.

    async def run(self, command: str, arguments: dict[str, Any], *, oob: bool) -> Any:
        """Carry out one command; raises `QmpError` when it is refused."""
        self.received.append(Received(command, arguments, oob))
        handler = self._handlers.get(command)
        if handler is None:
            desc = f"The command {command} has not been found"
            raise QmpError(command, error_class="CommandNotFound", desc=desc)
        if oob and command not in _OOB_COMMANDS:
            desc = f"The command {command} does not support OOB"
            raise QmpError(command, error_class="GenericError", desc=desc)
        if command in self._delays:
            await self.sleep(self._delays[command])
        if command in self._hangs:
            await self._hangs[command].wait()
        if self._failures[command]:
            error_class, desc = self._failures[command].popleft()
            raise QmpError(command, error_class=error_class, desc=desc)
        return await handler(arguments)

    async def cmd_query__status(self, _args: dict[str, Any]) -> Any:
        return {"status": self.run_state, "running": self.run_state == "running"}

    async def cmd_query__version(self, _args: dict[str, Any]) -> Any:
        return version_object(self.version)

    async def cmd_query__cpus__fast(self, _args: dict[str, Any]) -> Any:
        return [
            {"cpu-index": i, "thread-id": 1000 + i, "target": "x86_64", "qom-path": f"/cpu[{i}]"}
            for i in range(self.cpus)
        ]

    async def cmd_query__qmp__schema(self, _args: dict[str, Any]) -> Any:
        return [
            {"name": name, "meta-type": "command", "arg-type": "0", "ret-type": "1"}
            | ({"allow-oob": True} if name in _OOB_COMMANDS else {})
            for name in sorted(self._handlers)
        ]

    async def cmd_cont(self, _args: dict[str, Any]) -> Any:
        if self.run_state == "inmigrate":
            self.autostart = True  # as the real one: it will run by itself after the load
        elif self.run_state in {"postmigrate", "finish-migrate"} and self.migration.busy:
            raise QmpError("cont", error_class="GenericError", desc="Migration is not finished")
        else:
            self.set_run_state("running")
        return {}

    async def cmd_stop(self, _args: dict[str, Any]) -> Any:
        if self.run_state == "inmigrate":
            self.autostart = False
        elif self.run_state == "running":
            self.set_run_state("paused")
        return {}

    async def cmd_quit(self, _args: dict[str, Any]) -> Any:
        self.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        asyncio.get_running_loop().call_soon(self.migration.background, self.die(), "quit")
        return {}

    async def cmd_system_powerdown(self, _args: dict[str, Any]) -> Any:
        self.emit("POWERDOWN")
        if self.on_powerdown == "shutdown":
            self.guest_shutdown()
        return {}

    def guest_shutdown(self) -> None:
        """The guest powers itself off; QEMU stays, as with `-no-shutdown`."""
        self.emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
        self.set_run_state("shutdown")

    async def cmd_announce__self(self, _args: dict[str, Any]) -> Any:
        return {}

    async def cmd_getfd(self, _args: dict[str, Any]) -> Any:
        return {}

    async def cmd_object__add(self, args: dict[str, Any]) -> Any:
        return _add(self.objects, args["id"], args, "object-add")

    async def cmd_object__del(self, args: dict[str, Any]) -> Any:
        return _remove(self.objects, args["id"], "object-del")

    async def cmd_blockdev__add(self, args: dict[str, Any]) -> Any:
        return _add(self.blocks, args["node-name"], args, "blockdev-add")

    async def cmd_blockdev__del(self, args: dict[str, Any]) -> Any:
        return _remove(self.blocks, args["node-name"], "blockdev-del")

    async def cmd_device_add(self, args: dict[str, Any]) -> Any:
        return _add(self.devices, args["id"], args, "device_add")

    async def cmd_device_del(self, args: dict[str, Any]) -> Any:
        _remove(self.devices, args["id"], "device_del")
        self.emit("DEVICE_DELETED", {"device": args["id"], "path": f"/machine/{args['id']}"})
        return {}


def link(source: FakeQemu, target: FakeQemu) -> None:
    """`migrate` on either one makes the other load."""
    source.migration.peer = target.migration
    target.migration.peer = source.migration


def version_object(version: tuple[int, int, int]) -> dict[str, Any]:
    numbers = dict(zip(("major", "minor", "micro"), version, strict=True))
    return {"qemu": numbers, "package": "fake"}


def _add(kind: dict[str, dict[str, Any]], key: str, args: dict[str, Any], command: str) -> Any:
    if key in kind:
        desc = f"attempt to add duplicate '{key}'"
        raise QmpError(command, error_class="GenericError", desc=desc)
    kind[key] = args
    return {}


def _remove(kind: dict[str, dict[str, Any]], key: str, command: str) -> Any:
    if kind.pop(key, None) is None:
        error_class = "DeviceNotFound" if command == "device_del" else "GenericError"
        raise QmpError(command, error_class=error_class, desc=f"'{key}' not found")
    return {}


async def requests(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """JSON objects from a stream; QMP clients need not end them with a newline."""
    decoder = json.JSONDecoder()
    buffer = ""
    while chunk := await reader.read(65536):
        buffer = (buffer + chunk.decode()).lstrip()
        while buffer:
            try:
                request, end = decoder.raw_decode(buffer)
            except json.JSONDecodeError:
                break  # the rest is still on its way
            yield request
            buffer = buffer[end:].lstrip()


class _Connection:
    """One client of one monitor socket."""

    def __init__(
        self, qemu: FakeQemu, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._qemu = qemu
        self._reader = reader
        self._writer = writer
        self._negotiated = False
        self._oob = False
        self._queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(_QUEUE_LIMIT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: list[dict[str, Any]] = []

    async def serve(self) -> None:
        qemu = self._qemu
        capabilities = ["oob"] if qemu.oob else []
        greeting = {"version": version_object(qemu.version), "capabilities": capabilities}
        await qemu.until_thawed()
        self._write({"QMP": greeting})
        self._spawn(self._in_band(), "in-band")
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            async for request in requests(self._reader):
                await qemu.until_thawed()
                if "exec-oob" in request and self._oob:
                    self._spawn(self._answer(request), "oob")
                else:
                    await self._queue.put(request)
        for task in list(self._tasks):
            task.cancel()
        self.close()

    def offer_event(self, message: dict[str, Any]) -> None:
        if not self._negotiated:
            return
        if self._qemu.frozen:
            if not self._held:
                self._spawn(self._flush(), "held events")
            self._held.append(message)
        else:
            self._write(message)

    def close(self) -> None:
        self._writer.close()

    async def _flush(self) -> None:
        await self._qemu.until_thawed()
        held, self._held = self._held, []
        for message in held:
            self._write(message)

    async def _in_band(self) -> None:
        while True:
            request = await self._queue.get()
            async with self._qemu._main_loop:
                await self._answer(request)

    async def _answer(self, request: dict[str, Any]) -> None:
        command = request.get("exec-oob") or request["execute"]
        arguments = request.get("arguments", {})
        reply: dict[str, Any] = {"id": request["id"]} if "id" in request else {}
        try:
            if command == "qmp_capabilities":
                self._oob = "oob" in arguments.get("enable", [])
                self._negotiated = True
                reply["return"] = {}
            elif not self._negotiated:
                desc = "Expecting capabilities negotiation with 'qmp_capabilities'"
                raise QmpError(command, error_class="CommandNotFound", desc=desc)
            else:
                oob = "exec-oob" in request
                reply["return"] = await self._qemu.run(command, arguments, oob=oob)
        except QmpError as error:
            reply["error"] = {"class": error.error_class, "desc": error.desc}
        except KeyError as error:
            desc = f"Parameter {error} is missing"
            reply["error"] = {"class": "GenericError", "desc": desc}
        await self._qemu.until_thawed()
        self._write(reply)

    def _write(self, message: dict[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\r\n")

    def _spawn(self, work: Any, what: str) -> None:
        task = asyncio.create_task(work, name=f"{self._qemu.name}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
