"""Looks at a VM's network a thousand times a second, and says how long it was gone.

A datagram leaves for the guest's UDP echo at every tick of an absolute schedule; its number says
which tick. Arrival times are the kernel's, so a prober that is scheduled late does not make the
guest look dark. The prober's own lateness is measured and told.

    godwit lab probe 10.91.0.100 --seconds 10 --save FILE

The saved file: one line of JSON (``{"count", "interval_ns"}``), then ``count`` send times and
``count`` arrival times as little-endian 64-bit nanoseconds of the monotonic clock, 0 = never.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ECHO_PORT = 7
INTERVAL_S = 0.001
NICE = -5
REAL_TIME = 1
LINGER_S = 0.5
NAMED = 20

_PACKET = struct.Struct("<QQ")
_TIMESPEC = struct.Struct("qq")
_SO_TIMESTAMPNS = 35
_MARK = 0x676F647769740000  # "godwit", so that a stranger's datagram is not taken for an answer
_DEEP = 4 << 20


@dataclass(frozen=True, slots=True)
class Samples:
    """Send and arrival time of each tick in nanoseconds, 0 = never."""

    sent: Sequence[int]
    arrived: Sequence[int]
    interval_ns: int = round(INTERVAL_S * 1e9)

    def save(self, path: Path) -> None:
        """Write them; see the module."""
        head = {"count": len(self.sent), "interval_ns": self.interval_ns}
        with path.open("wb") as stream:
            stream.write(json.dumps(head).encode() + b"\n")
            for values in (self.sent, self.arrived):
                raw = array("q", values)
                if sys.byteorder == "big":
                    raw.byteswap()
                stream.write(raw.tobytes())

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Read them back; ValueError when the file is something else."""
        with path.open("rb") as stream:
            head = json.loads(stream.readline())
            columns = []
            for _ in range(2):
                raw = array("q")
                raw.frombytes(stream.read(8 * head["count"]))
                if sys.byteorder == "big":
                    raw.byteswap()
                columns.append(raw)
        if any(len(column) != head["count"] for column in columns):
            raise ValueError(f"{path} is cut short")
        return cls(columns[0], columns[1], head["interval_ns"])


@dataclass(frozen=True, slots=True)
class Window:
    """A time in which the guest was not to be heard: from the last answer to the next one."""

    start_s: float  # since the first datagram
    duration_ms: float
    lost: int


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the probe saw. Times in milliseconds.

    ``blackout_ms``: longest time between two sends that were answered, less the interval: how long
    what was sent got lost. ``silence_ms``: the same between two arrivals. It also sees a guest
    that stood still while its datagrams waited and were answered late (a move called off, a
    pause), and whatever delays the first answer afterwards.
    ``stalled_ms``: the same between two sends, answered or not: what the prober itself missed.
    ``windows``: the longest silences over 10 intervals, in order of time.
    """

    sent: int
    answered: int
    lost: int
    blackout_ms: float
    silence_ms: float
    stalled_ms: float
    p50_rtt_ms: float
    p99_rtt_ms: float
    windows: tuple[Window, ...]


def analyse(samples: Samples) -> ProbeReport:
    """What the samples say; pure."""
    interval = samples.interval_ns
    ticks = [(s, a) for s, a in zip(samples.sent, samples.arrived, strict=True) if s]
    answered = [(s, a) for s, a in ticks if a]
    rtts = sorted(a - s for s, a in answered)
    arrivals = sorted(a for _, a in answered)
    blackout = _longest([s for s, _ in answered])
    silence = _longest(arrivals)
    # Silence at the end counts: the guest may never have come back.
    if ticks and (not answered or answered[-1][0] != ticks[-1][0]):
        tail = ticks[-1][0] - (answered[-1][0] if answered else ticks[0][0])
        blackout, silence = max(blackout, tail), max(silence, tail)
    return ProbeReport(
        sent=len(ticks),
        answered=len(answered),
        lost=len(ticks) - len(answered),
        blackout_ms=_ms(blackout - interval),
        silence_ms=_ms(silence - interval),
        stalled_ms=_ms(_longest([s for s, _ in ticks]) - interval),
        p50_rtt_ms=_ms(_quantile(rtts, 0.5)),
        p99_rtt_ms=_ms(_quantile(rtts, 0.99)),
        windows=_windows(ticks, arrivals, interval),
    )


def _windows(
    ticks: list[tuple[int, int]], arrivals: list[int], interval: int
) -> tuple[Window, ...]:
    if not ticks:
        return ()
    first, last = ticks[0][0], ticks[-1][0] + interval
    # Before the first answer nobody knows whether the guest was up.
    edges = [*(arrivals or [first]), *([last] if not arrivals or arrivals[-1] < last else [])]
    silent = [(a, b) for a, b in itertools.pairwise(edges) if b - a > 10 * interval]
    silent.sort(key=lambda pair: pair[0] - pair[1])
    found = []
    # Only for those that are told: each looks at every tick, and there may be a million.
    for before, after in sorted(silent[:NAMED]):
        lost = sum(1 for s, a in ticks if before <= s < after and not a)
        start_s = round((before - first) / 1e9, 6)
        found.append(Window(start_s, _ms(after - before - interval), lost))
    return tuple(found)


def _longest(times: Sequence[int]) -> int:
    return max((b - a for a, b in itertools.pairwise(times)), default=0)


def _quantile(values: Sequence[int], share: float) -> int:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0


def _ms(ns: int) -> float:
    return round(max(0, ns) / 1e6, 3)


class Prober:
    """Sends and listens on one socket until told to stop. Belongs to one thread."""

    def __init__(
        self, channel: socket.socket, address: str, *, interval_s: float = INTERVAL_S
    ) -> None:
        self._channel = channel
        self._interval_ns = round(interval_s * 1e9)
        self._sent, self._arrived = array("q"), array("q")
        self._stop = False
        channel.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            channel.setsockopt(socket.SOL_SOCKET, option, _DEEP)
        channel.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        channel.connect((address, ECHO_PORT))

    def stop(self) -> None:
        """End after what is under way; may be called from a signal handler."""
        self._stop = True

    def run(self, *, seconds: float | None = None) -> Samples:
        """Probe until stopped, or for so long; then wait briefly for late answers."""
        start = time.monotonic_ns()
        count = None if seconds is None else round(seconds * 1e9 / self._interval_ns)
        number = 0
        while not self._stop and number != count:
            due = start + number * self._interval_ns
            self._listen_until(due)
            # Behind the schedule: what is overdue leaves at once, at its true time.
            self._send(number)
            number += 1
        until = time.monotonic_ns() + round(LINGER_S * 1e9)
        self._listen_until(until)
        return Samples(self._sent, self._arrived, self._interval_ns)

    def _send(self, number: int) -> None:
        now = time.monotonic_ns()
        self._sent.append(now)
        self._arrived.append(0)
        # A full queue or an unreachable guest: it counts as lost.
        with contextlib.suppress(OSError):
            self._channel.send(_PACKET.pack(_MARK, number))

    def _listen_until(self, due: int) -> None:
        descriptor = self._channel.fileno()
        while True:
            left = due - time.monotonic_ns()
            # select counts in microseconds, poll only in milliseconds.
            ready, _, _ = select.select([descriptor], [], [], max(0.0, left / 1e9))
            if ready:
                self._receive()
            if left <= 0:
                return

    def _receive(self) -> None:
        """One datagram; select tells of the next, which costs less than to be refused it."""
        offset = time.time_ns() - time.monotonic_ns()
        try:
            data, extra, _, _ = self._channel.recvmsg(64, 64)
        except OSError:
            return  # an earlier datagram was refused: its error is reported here, once
        if len(data) != _PACKET.size:
            return
        mark, number = _PACKET.unpack(data)
        if mark == _MARK and number < len(self._arrived) and not self._arrived[number]:
            self._arrived[number] = _arrival(extra, offset)


def _arrival(extra: list[tuple[int, int, bytes]], offset: int) -> int:
    """When the kernel had it, on the monotonic clock."""
    for level, kind, raw in extra:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = _TIMESPEC.unpack(raw[: _TIMESPEC.size])
            return int(seconds * 10**9 + nanoseconds - offset)
    return time.monotonic_ns()


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe from a network namespace until SIGTERM, SIGINT or the time is up; prints the report."""
    parser = argparse.ArgumentParser(prog="probe", description=main.__doc__)
    parser.add_argument("address")
    parser.add_argument("--netns", help="name of the namespace to send from")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--interval-ms", type=float, default=INTERVAL_S * 1e3)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args(arguments)
    channel = _channel(given.netns)
    prober = Prober(channel, given.address, interval_s=given.interval_ms / 1e3)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: prober.stop())
    _go_first()
    sys.stderr.write("probing\n")  # whoever waits for the start reads this
    sys.stderr.flush()
    samples = prober.run(seconds=given.seconds)
    if given.save is not None:
        samples.save(given.save)
    sys.stdout.write(json.dumps(asdict(analyse(samples))) + "\n")
    return 0


def _go_first() -> None:
    """Be scheduled before the guests: an instrument must not wait for what it measures."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(REAL_TIME))
    except OSError:  # not root, or a control group without real-time
        with contextlib.suppress(OSError):
            os.nice(NICE)


def _channel(netns: str | None) -> socket.socket:
    if netns is None:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    from godwit.host.netns import opened_netns, socket_in_netns

    with opened_netns(netns) as descriptor:
        return socket_in_netns(descriptor, kind=socket.SOCK_DGRAM)


if __name__ == "__main__":
    sys.exit(main())
