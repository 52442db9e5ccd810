"""The first process of each lab node: keeps its daemons running, as systemd does on a real host.

Standard library only: 13 MiB, up in 50 ms.

    python -I -m godwit.lab.supervisor UNITS.json --control-fd N
        [--fd NAME=N]... [--notify PATH] [--node LABEL]

It starts the units, starts each again when it ends, kills one that misses its watchdog, holds
their listening sockets across restarts, and reaps orphans. Processes that a unit left behind
(QEMU reparents to us when its agent dies) are never touched before the end. On SIGTERM the units
get SIGTERM, then SIGKILL, and then everything else in the PID namespace; when *we* are killed,
the kernel does the same at once.

The control socket takes one JSON object a line and answers each with one line, in order:

    {"op": "status"} {"op": "pids"} {"op": "stop"}
    {"op": "restart", "unit": U}   SIGTERM (in time SIGKILL), then anew; answers when it is ready
    {"op": "hold", "unit": U}      leave it as it is from now on: frozen, or dead once it died
    {"op": "release", "unit": U}   undo hold; answers when it is ready
    {"op": "wait-ready", "units": [...], "timeout": S}
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time

from godwit.lab.supervisor_unit import Unit, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

END_S = 5.0
READY_S = 30.0
_LATE_S = 0.25
_CREDENTIALS = struct.Struct("3i")


class Supervisor:
    """The loop over children, notifications, questions and deadlines."""

    def __init__(
        self,
        units: list[Unit],
        *,
        control: socket.socket,
        listeners: dict[str, int],
        notify_path: str,
    ) -> None:
        self.units = {unit.name: unit for unit in units}
        self.listeners = listeners
        self.notify_path = notify_path
        self.control = control
        self.stopping = False
        self.poller = select.epoll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self.clients: dict[int, Client] = {}
        self.waiting: list[Waiter] = []
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def open(self) -> None:
        """Take the places that units and people speak to."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.notify_path)  # noqa: PTH108
        self.notified.bind(self.notify_path)
        os.chmod(self.notify_path, 0o666)  # noqa: PTH101, S103 - the sender is checked
        self.notified.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.notified.setblocking(False)
        self.control.setblocking(False)
        wake_in, wake_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_out, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self.watch(wake_in, lambda: self._on_signals(wake_in))
        self.watch(self.notified.fileno(), self._on_notify)
        self.watch(self.control.fileno(), self._on_connect)

    def watch(self, descriptor: int, handler: Callable[[], None]) -> None:
        """Call the handler whenever the descriptor is readable."""
        self.handlers[descriptor] = handler
        self.poller.register(descriptor, select.EPOLLIN)

    def forget(self, descriptor: int) -> None:
        """Stop watching."""
        del self.handlers[descriptor]
        self.poller.unregister(descriptor)

    def run(self) -> None:
        """Until told to stop."""
        while not self.stopping:
            self._turn()
        self._end()

    def _turn(self) -> None:
        due = [d for unit in self.units.values() if (d := unit.deadline()) is not None]
        due += [waiter.until for waiter in self.waiting]
        now = time.monotonic()
        until = min(due, default=None)
        timeout = -1.0 if until is None else max(0.0, until - now)
        for descriptor, _ in self.poller.poll(timeout):
            handler = self.handlers.get(descriptor)
            if handler is not None:
                handler()
        woke = time.monotonic()
        late = woke - now - timeout if timeout >= 0 else 0.0
        if late > _LATE_S:
            # This machine stood still, and so did our units: no fault of theirs.
            for unit in self.units.values():
                unit.beat_at += late
        for unit in self.units.values():
            self._attend(unit, woke)
        self._answer_waiters(woke)

    def _attend(self, unit: Unit, now: float) -> None:
        deadline = unit.deadline()
        if deadline is None or deadline > now:
            return
        if not unit.pid:
            self._start(unit, now)
            return
        if unit.kill_at is None:
            unit.watchdog_kills += unit.ready
            what = "missed its watchdog" if unit.ready else "did not become ready"
            say(f"{unit.name} (pid {unit.pid}) {what}: killed")
        unit.dying = True
        os.kill(unit.pid, signal.SIGKILL)

    def _start(self, unit: Unit, now: float) -> None:
        unit.started_at = unit.beat_at = now
        unit.starts += 1
        unit.start_at = None
        unit.ready = not unit.notify
        try:
            unit.pid = spawn(unit, notify_path=self.notify_path, listeners=self.listeners)
        except OSError as error:
            say(f"{unit.name} cannot be started: {error}")
            unit.died(127, now)
            return
        say(f"{unit.name} started, pid {unit.pid}")

    # Events

    def _on_signals(self, descriptor: int) -> None:
        with contextlib.suppress(BlockingIOError):
            numbers = os.read(descriptor, 4096)
            if signal.SIGTERM in numbers or signal.SIGINT in numbers:
                self.stopping = True
        self._reap()

    def _reap(self) -> None:
        """Every dead child, ours and adopted ones alike."""
        while True:
            try:
                pid, raw = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            status = os.waitstatus_to_exitcode(raw)
            unit = next((u for u in self.units.values() if u.pid == pid), None)
            if unit is not None:
                say(f"{unit.name} (pid {pid}) ended: {_ending(status)}")
                unit.died(status, time.monotonic())

    def _on_notify(self) -> None:
        while True:
            try:
                data, extra, _, _ = self.notified.recvmsg(
                    4096, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except BlockingIOError:
                return
            pid = next(
                (_CREDENTIALS.unpack(raw)[0] for _, kind, raw in extra if kind == 2),  # CREDENTIALS
                0,
            )
            unit = next((u for u in self.units.values() if u.pid and u.pid == pid), None)
            if unit is not None:
                self._hear(unit, data.split(b"\n"))

    def _hear(self, unit: Unit, lines: list[bytes]) -> None:
        now = time.monotonic()
        if b"READY=1" in lines and not unit.ready:
            unit.ready, unit.beat_at = True, now
            say(f"{unit.name} is ready after {now - unit.started_at:.2f} s")
        if b"WATCHDOG=1" in lines:
            unit.beat_at = now

    def _on_connect(self) -> None:
        while True:
            try:
                channel, _ = self.control.accept()
            except OSError:
                return
            channel.setblocking(False)
            client = Client(channel)
            self.clients[channel.fileno()] = client
            self.watch(channel.fileno(), lambda client=client: self._on_words(client))  # type: ignore[misc]

    def _on_words(self, client: Client) -> None:
        descriptor = client.channel.fileno()
        lines = client.read()
        for line in lines or ():
            try:
                self._do(client, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                client.answer({"error": f"{type(error).__name__}: {error}"})
        if lines is None:
            self.forget(descriptor)
            del self.clients[descriptor]
            self.waiting = [waiter for waiter in self.waiting if waiter.client is not client]
            client.channel.close()

    def _do(self, client: Client, ask: dict[str, Any]) -> None:
        op, now = ask["op"], time.monotonic()
        if op in ("status", "pids"):
            views = {name: unit.view(now) for name, unit in self.units.items()}
            pids = {name: view["pid"] for name, view in views.items()}
            client.answer({"pid": os.getpid(), "units": views} if op == "status" else pids)
        elif op == "stop":
            self.stopping = True
            client.answer({"stopping": True})
        elif op == "wait-ready":
            names = ask.get("units") or list(self.units)
            self._wait(client, [self.units[name] for name in names], ask.get("timeout", READY_S))
        else:
            self._change(client, op, self.units[ask["unit"]], ask.get("timeout", READY_S))

    def _change(self, client: Client, op: str, unit: Unit, timeout: float) -> None:
        now = time.monotonic()
        if op == "hold":
            unit.held = True
            client.answer(unit.view(now))
        elif op == "release":
            unit.held, unit.beat_at = False, now
            unit.started_at = unit.started_at if unit.ready else now
            self._wait(client, [unit], timeout)
        elif op == "restart":
            unit.held, unit.quick_deaths = False, 0
            if unit.pid:
                unit.ready = False  # so that the wait is for the next one
                unit.restarting, unit.kill_at = True, now + unit.stop_s
                os.kill(unit.pid, signal.SIGTERM)
                os.kill(unit.pid, signal.SIGCONT)
            else:
                unit.start_at = now
            self._wait(client, [unit], timeout, starts=unit.starts + 1)
        else:
            raise ValueError(f"unknown op {op!r}")

    def _wait(self, client: Client, units: list[Unit], timeout: float, *, starts: int = 0) -> None:
        self.waiting.append(Waiter(client, units, time.monotonic() + timeout, starts))

    def _answer_waiters(self, now: float) -> None:
        for waiter in [*self.waiting]:
            if waiter.fulfilled():
                views = {unit.name: unit.view(now) for unit in waiter.units}
                waiter.client.answer({"units": views})
            elif now >= waiter.until:
                late = [u.name for u in waiter.units if not u.ready]
                waiter.client.answer({"error": f"not ready in time: {', '.join(late)}"})
            else:
                continue
            self.waiting.remove(waiter)

    # The end

    def _end(self) -> None:
        say("stopping")
        live = [unit for unit in self.units.values() if unit.pid]
        for unit in self.units.values():
            unit.held = True  # nothing is started again
        for unit in live:
            os.kill(unit.pid, signal.SIGTERM)
            os.kill(unit.pid, signal.SIGCONT)
        until = time.monotonic() + END_S
        while any(unit.pid for unit in live) and (left := until - time.monotonic()) > 0:
            for descriptor, _ in self.poller.poll(left):
                self.handlers[descriptor]()
        for unit in live:
            if unit.pid:
                os.kill(unit.pid, signal.SIGKILL)
        if os.getpid() != 1:
            return  # -1 would mean everybody on this machine
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


class Waiter:
    """Somebody who wants to hear when units are ready."""

    def __init__(self, client: Client, units: list[Unit], until: float, starts: int) -> None:
        self.client, self.units, self.until, self.starts = client, units, until, starts

    def fulfilled(self) -> bool:
        """Whether all are ready, and none is still the one to be replaced."""
        return all(unit.ready and unit.starts >= self.starts for unit in self.units)


class Client:
    """One open connection to the control socket."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.text = b""

    def read(self) -> list[bytes] | None:
        """Whole lines that came; None at the end."""
        try:
            chunk = self.channel.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not chunk:
            return None
        *lines, self.text = (self.text + chunk).split(b"\n")
        return [line for line in lines if line.strip()]

    def answer(self, value: dict[str, Any]) -> None:
        """Send a line; one who does not read loses it."""
        with contextlib.suppress(OSError):
            self.channel.send(json.dumps(value).encode() + b"\n")


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


def say(text: str) -> None:
    """One line for the node's log."""
    stamp = time.strftime("%H:%M:%S") + f".{int(time.time() * 1000) % 1000:03d}"
    sys.stderr.write(f"{stamp} supervisor: {text}\n")
    sys.stderr.flush()


def main(arguments: list[str] | None = None) -> int:
    """Read the units and keep them running."""
    parser = argparse.ArgumentParser(prog="supervisor", description="Keep a lab node's units up.")
    parser.add_argument("units")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--fd", action="append", default=[], metavar="NAME=N")
    parser.add_argument("--notify", default="/run/supervisor.notify")
    parser.add_argument("--node", default="", help="only shown in the list of processes")
    given = parser.parse_args(arguments)
    with open(given.units) as stream:  # noqa: PTH123
        specs = json.load(stream)["units"]
    listeners = {name: int(number) for name, _, number in (w.partition("=") for w in given.fd)}
    for descriptor in (given.control_fd, *listeners.values()):
        os.set_inheritable(descriptor, False)
    supervisor = Supervisor(
        [Unit(spec) for spec in specs],
        control=socket.socket(fileno=given.control_fd),
        listeners=listeners,
        notify_path=given.notify,
    )
    supervisor.open()
    supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
