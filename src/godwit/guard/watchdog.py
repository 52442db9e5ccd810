"""The machine's watchdog: fed so that it runs out at the deadline itself.

The kernel's interface (Documentation/watchdog/watchdog-api.rst): opening the device starts it,
WDIOC_SETTIMEOUT sets whole seconds and begins them anew, a close without a ``V`` written before
leaves it running. A guard that ends or hangs while it has promised something is thus no way out.

With nothing to watch over the device is closed: no host is ever reset for VMs that nobody would
start elsewhere.

A lab's hosts have a socket at the device's place (``godwit.lab.watchdog``). It takes the same
requests by the same numbers, one packet each.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable
from math import floor
from pathlib import Path
from typing import Final, Protocol

from godwit.guard.deadline import RESET_S

_log = logging.getLogger("guard")


def _request(direction: int, number: int, size: int) -> int:
    """An ioctl's number as include/uapi/asm-generic/ioctl.h composes it."""
    return direction << 30 | size << 16 | ord("W") << 8 | number


_READ, _BOTH = 2, 3
_INT: Final = struct.Struct("i")
INFO: Final = struct.Struct("II32s")
"""struct watchdog_info: options, firmware version, identity."""
GETSUPPORT: Final = _request(_READ, 0, INFO.size)
KEEPALIVE: Final = _request(_READ, 5, _INT.size)
SETTIMEOUT: Final = _request(_BOTH, 6, _INT.size)
GETTIMEOUT: Final = _request(_READ, 7, _INT.size)
CAN_SET_TIMEOUT, CAN_MAGIC_CLOSE = 0x80, 0x100  # WDIOF_SETTIMEOUT, WDIOF_MAGICCLOSE
WRITE: Final = 0
"""The packet that stands for a write(2) to the device."""
_MAGIC: Final = b"V"
SYSFS: Final = Path("/sys/class/watchdog")  # Documentation/ABI/testing/sysfs-class-watchdog
_ANSWER_S: Final = 1.0
SHORTEST_S: Final = 5
"""No shorter time is set: not all watchdogs know it, and a renewal gives a longer one."""
_WORTH_S: Final = 0.5


class Device(Protocol):
    """An open watchdog."""

    def ask(self, request: int, argument: bytes) -> bytes:
        """One ioctl; OSError as the driver gives it."""

    def write(self, data: bytes) -> None:
        """write(2)."""

    def close(self) -> None:
        """close(2)."""


class KernelDevice:
    """A real one."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def ask(self, request: int, argument: bytes) -> bytes:
        """See ``Device``."""
        return fcntl.ioctl(self._fd, request, argument)

    def write(self, data: bytes) -> None:
        """See ``Device``."""
        os.write(self._fd, data)

    def close(self) -> None:
        """See ``Device``."""
        os.close(self._fd)


class LabDevice:
    """A lab's: each answer is an errno and the argument as the driver would leave it."""

    def __init__(self, path: Path) -> None:
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(_ANSWER_S)
        try:
            self._channel.connect(os.fsencode(path))
            self.ask(KEEPALIVE, bytes(_INT.size))  # one that is open elsewhere hangs up
        except OSError:
            self._channel.close()
            raise

    def ask(self, request: int, argument: bytes) -> bytes:
        """See ``Device``."""
        self._channel.send(struct.pack("I", request) + argument)
        answer = self._channel.recv(4096)
        if len(answer) < _INT.size:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        (number,) = _INT.unpack_from(answer)
        if number:
            raise OSError(number, os.strerror(number))
        return answer[_INT.size :]

    def write(self, data: bytes) -> None:
        """See ``Device``."""
        self.ask(WRITE, data)

    def close(self) -> None:
        """See ``Device``."""
        self._channel.close()


def open_device(path: Path) -> Device:
    """The watchdog at a path; it runs from here on. OSError when there is none, or it is taken."""
    if stat.S_ISSOCK(path.stat().st_mode):
        return LabDevice(path)
    if _never_stops(path):
        raise OSError(errno.EPERM, "it could never be stopped again (nowayout)")
    return KernelDevice(path)


def _never_stops(path: Path) -> bool:
    """What sysfs says of it; a kernel without that says nothing, and magic close is believed."""
    name = path.resolve().name
    try:
        said = (SYSFS / (name if name != "watchdog" else "watchdog0") / "nowayout").read_text()
    except OSError:
        return False
    return said.strip() == "1"


class Watchdog:
    """Feeds a watchdog up to a moment. Times are seconds of ``now``.

    ``usable``: it was opened once, keeps the time it is set to, and lets go when asked.
    """

    def __init__(self, path: Path, *, now: Callable[[], float]) -> None:
        self._path = path
        self._now = now
        self._device: Device | None = None
        self._ends = 0.0
        self._complaint = ""
        self.usable = False

    @property
    def running(self) -> bool:
        """Whether it would reset the host if nobody fed it."""
        return self._device is not None

    def probe(self) -> bool:
        """Try it once and let go of it; also true from now on in ``usable``."""
        if self._device is None and self._open():
            self.rest()
        return self.usable

    def keep(self, until: float) -> bool:
        """Let it run out at ``until`` or up to a second earlier; False when it cannot be used.

        Once that is less than a few seconds away it is left alone: what was set before ends then.
        """
        if self._device is None and not self._open():
            return False
        device, now = self._device, self._now()
        seconds = floor(until - now)
        wanted = self._ends > until or now + seconds >= self._ends + _WORTH_S
        if device is None or seconds < SHORTEST_S or not wanted:
            return self.usable
        try:
            (real,) = _INT.unpack(device.ask(SETTIMEOUT, _INT.pack(seconds)))
        except OSError as error:
            self._fail(f"it cannot be fed: {error.strerror}")
            return False
        if real > seconds:
            self._fail(f"it runs for {real} s when {seconds} s are set")
            return False
        self._ends = now + real
        return True

    def rest(self) -> None:
        """Nothing is promised: stop it."""
        if self._device is not None:
            with contextlib.suppress(OSError):
                self._device.write(_MAGIC)
        self.leave()

    def leave(self) -> None:
        """Close it as it is, running."""
        if self._device is not None:
            with contextlib.suppress(OSError):
                self._device.close()
        self._device, self._ends = None, 0.0

    def _open(self) -> bool:
        try:
            self._device = open_device(self._path)
            options = INFO.unpack(self._device.ask(GETSUPPORT, bytes(INFO.size)))[0]
            (real,) = _INT.unpack(self._device.ask(SETTIMEOUT, _INT.pack(int(RESET_S))))
        except OSError as error:
            self._fail(error.strerror or str(error))
            return False
        self._ends = self._now() + real
        if not options & CAN_SET_TIMEOUT or not options & CAN_MAGIC_CLOSE or real != int(RESET_S):
            self._fail(f"it cannot be set to {RESET_S:g} s, or not be stopped")
            return False
        self.usable, self._complaint = True, ""
        return True

    def _fail(self, why: str) -> None:
        self.usable = False
        if why != self._complaint:
            self._complaint = why
            _log.warning("watchdog %s is not used: %s", self._path, why)
        self.rest()
