"""The watchdogs of a lab: one process on the real machine that is every host's /dev/watchdog.

    python -I -m godwit.lab.watchdog --name LAB --root DIR --fd HOST=N... --enter GROUP...
        --ready-fd N

It enters the control groups, by which ``lab down`` finds it, and then says that it is ready.

A host sees a socket there. Who connects has opened the device, and it runs; each packet is an ioctl
(its number, then its argument) or, with the number 0, a write. The answer is an errno and the
argument as the driver leaves it. A close without a ``V`` written before leaves it running. When it
runs out, the host's wires go dead and everything in its namespaces ends, as if its power were cut;
it stays off, like a machine whose firmware was told so.

It times each *boot* of a host: one that was switched off meanwhile, by whomever, is left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import selectors
import socket
import struct
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from godwit.guard.watchdog import (
    CAN_MAGIC_CLOSE,
    CAN_SET_TIMEOUT,
    GETSUPPORT,
    GETTIMEOUT,
    INFO,
    KEEPALIVE,
    SETTIMEOUT,
    WRITE,
)
from godwit.host.process import Process, is_alive
from godwit.lab import groups, network, nodes
from godwit.lab.handle import is_first
from godwit.lab.layout import Layout
from godwit.lab.record import load
from godwit.model.errors import GodwitError

FIRST_S = 60
LONGEST_S = 65535
_INT = struct.Struct("i")
_NUMBER = struct.Struct("I")
_LONGEST_PACKET = 4096


@dataclass
class Dog:
    """One host's watchdog; pure but for what it is told. Times are of one monotonic clock."""

    timeout_s: int = FIRST_S
    ends: float | None = None  # None: it does not run
    magic: bool = False

    def open(self, now: float) -> None:
        """It runs from here on."""
        self.magic = False
        self.ends = now + self.timeout_s

    def ask(self, packet: bytes, now: float) -> bytes:
        """The answer to one packet."""
        if len(packet) < _NUMBER.size:
            return _INT.pack(errno.EINVAL)
        (request,), argument = _NUMBER.unpack_from(packet), packet[_NUMBER.size :]
        if request == WRITE:
            self.magic = argument.endswith(b"V")
        elif request == GETSUPPORT:
            options = CAN_SET_TIMEOUT | CAN_MAGIC_CLOSE
            return _INT.pack(0) + INFO.pack(options, 0, b"Godwit lab")
        elif request == GETTIMEOUT:
            return _INT.pack(0) + _INT.pack(self.timeout_s)
        elif request == SETTIMEOUT:
            (wanted,) = _INT.unpack(argument)
            if not 1 <= wanted <= LONGEST_S:
                return _INT.pack(errno.EINVAL)
            self.timeout_s = wanted
        elif request != KEEPALIVE:
            return _INT.pack(errno.ENOTTY)
        self.ends = now + self.timeout_s
        return _INT.pack(0) + argument

    def close(self) -> None:
        """Let go of it: it runs on, unless it was told to stop."""
        if self.magic:
            self.ends = None


class Kennel:
    """All of a lab's, in one loop."""

    def __init__(self, layout: Layout, listeners: dict[str, socket.socket]) -> None:
        self._layout = layout
        self._dogs = {host: Dog() for host in listeners}
        self._boots: dict[str, Process | None] = {}
        self._open: dict[str, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        for host, listener in listeners.items():
            listener.setblocking(False)
            self._selector.register(
                listener, selectors.EVENT_READ, partial(self._accept, host, listener)
            )

    def run(self) -> None:
        """For ever."""
        while True:
            due = [dog.ends for dog in self._dogs.values() if dog.ends is not None]
            left = max(0.0, min(due) - time.monotonic()) if due else None
            # What was said in time counts, even when this machine stood still and we are late.
            for key, _ in self._selector.select(left):
                key.data()
            now = time.monotonic()
            for host, dog in self._dogs.items():
                if dog.ends is not None and dog.ends <= now:
                    dog.ends = None
                    self._reset(host)

    def _accept(self, host: str, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            channel, _ = listener.accept()
            if host in self._open:
                channel.close()  # one at a time; the driver says EBUSY
                return
            channel.setblocking(False)
            self._open[host], self._boots[host] = channel, self._first(host)
            self._dogs[host].open(time.monotonic())
            self._selector.register(
                channel, selectors.EVENT_READ, partial(self._hear, host, channel)
            )

    def _hear(self, host: str, channel: socket.socket) -> None:
        try:
            packet = channel.recv(_LONGEST_PACKET)
            if packet:
                channel.send(self._dogs[host].ask(packet, time.monotonic()))
                return
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        self._selector.unregister(channel)
        channel.close()
        del self._open[host]
        self._dogs[host].close()

    def _first(self, host: str) -> Process | None:
        """The first process of the host as it is now."""
        members = groups.members(self._layout.cgroup(host))
        return next((process for process in members if is_first(process.pid)), None)

    def _reset(self, host: str) -> None:
        first = self._boots.get(host)
        if first is None or not is_alive(first):
            say(f"{host}: ran out, but that boot of it is over")
            return
        say(f"{host}: was not fed, reset")
        with contextlib.suppress(GodwitError, OSError):
            network.carriers(self._layout, host, up=False)  # first: nothing says farewell
        try:
            nodes.end(self._layout, host, first)
        except (GodwitError, OSError) as error:
            say(f"{host}: {error}")


def say(text: str) -> None:
    """One line for the log."""
    stamp = time.strftime("%H:%M:%S") + f".{int(time.time() * 1000) % 1000:03d}"
    sys.stderr.write(f"{stamp} watchdog: {text}\n")
    sys.stderr.flush()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="watchdog", description="The watchdogs of a lab.")
    parser.add_argument("--name", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--fd", action="append", default=[], metavar="HOST=N")
    parser.add_argument("--enter", action="append", default=[], metavar="FILE")
    parser.add_argument("--ready-fd", type=int, required=True)
    given = parser.parse_args()
    for entry in given.enter:
        Path(entry).write_text("0")
    pairs = (word.partition("=") for word in given.fd)
    listeners = {host: socket.socket(fileno=int(number)) for host, _, number in pairs}
    kennel = Kennel(load(given.name, root=given.root).layout(given.root), listeners)
    os.write(given.ready_fd, b"ready")
    os.close(given.ready_fd)
    kennel.run()


if __name__ == "__main__":
    main()
