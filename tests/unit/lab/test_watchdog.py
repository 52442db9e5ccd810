"""A lab's watchdog and the guard's end of it against each other; and the guard's rules."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from godwit.guard.deadline import RESET_S
from godwit.guard.watchdog import (
    GETSUPPORT,
    GETTIMEOUT,
    KEEPALIVE,
    SETTIMEOUT,
    KernelDevice,
    LabDevice,
    Watchdog,
    open_device,
)
from godwit.host.sockets import bind_packets
from godwit.lab.layout import Layout
from godwit.lab.watchdog import FIRST_S, Dog, Kennel


class Here:
    """A kennel of one, in a thread; what it resets is only noted."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path / "dog"
        self.reset = threading.Event()
        self.listener = bind_packets(self.path)
        monkeypatch.setattr(Kennel, "_first", lambda *_: None)
        monkeypatch.setattr(Kennel, "_reset", lambda *_: self.reset.set())
        layout = Layout("x", 1, state_root=path)
        self.kennel = Kennel(layout, {"host1": self.listener})
        threading.Thread(target=self.kennel.run, daemon=True).start()

    @property
    def dog(self) -> Dog:
        return self.kennel._dogs["host1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    return Here(tmp_path, monkeypatch)


def test_numbers_are_the_kernels() -> None:
    """As linux/watchdog.h has them on x86-64."""
    assert (GETSUPPORT, KEEPALIVE) == (0x80285700, 0x80045705)
    assert (SETTIMEOUT, GETTIMEOUT) == (0xC0045706, 0x80045707)


def test_a_dog_runs_from_its_opening_until_it_is_let_go() -> None:
    dog = Dog()
    assert dog.ends is None
    dog.open(100.0)
    assert dog.ends == 100 + FIRST_S
    dog.ask(SETTIMEOUT.to_bytes(4, "little") + (10).to_bytes(4, "little"), 101.0)
    assert dog.ends == 111
    dog.ask(KEEPALIVE.to_bytes(4, "little") + bytes(4), 105.0)
    assert dog.ends == 115
    dog.close()  # nobody said that it should stop
    assert dog.ends == 115
    dog.open(106.0)
    dog.ask(bytes(4) + b"V", 107.0)
    dog.close()
    assert dog.ends is None


BAD = [(b"", errno.EINVAL), (b"\1\2\3\4", errno.ENOTTY)]
BAD += [(SETTIMEOUT.to_bytes(4, "little") + bytes(4), errno.EINVAL)]


@pytest.mark.parametrize(("packet", "number"), BAD)
def test_what_it_does_not_know_it_refuses(packet: bytes, number: int) -> None:
    dog = Dog()
    assert int.from_bytes(dog.ask(packet, 1.0)[:4], "little") == number
    assert dog.ends is None


def test_one_at_a_time(here: Here) -> None:
    first = open_device(here.path)
    assert isinstance(first, LabDevice)
    with pytest.raises(OSError, match=r"busy|reset by peer|Broken pipe"):
        open_device(here.path)
    first.close()
    with contextlib.suppress(OSError):
        open_device(here.path).close()


def test_what_is_not_fed_resets(here: Here) -> None:
    device = open_device(here.path)
    device.ask(SETTIMEOUT, (1).to_bytes(4, "little"))
    assert not here.reset.wait(0.7)
    device.close()  # it runs on
    assert here.reset.wait(1.0)


def test_what_is_fed_does_not_and_what_is_let_go_never(here: Here) -> None:
    device = open_device(here.path)
    for _ in range(4):
        device.ask(SETTIMEOUT, (1).to_bytes(4, "little"))
        assert not here.reset.wait(0.5)
    device.write(b"V")
    device.close()
    assert not here.reset.wait(1.5)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeDevice:
    """A driver; ``rounds`` is what it makes of a time."""

    def __init__(self, rounds: Callable[[int], int] = lambda s: s, options: int = 0x180) -> None:
        self.rounds, self.options = rounds, options
        self.set: list[int] = []
        self.wrote = b""
        self.closed = False
        self.fails = False

    def ask(self, request: int, argument: bytes) -> bytes:
        if self.fails:
            raise OSError(errno.EIO, "I/O error")
        if request == GETSUPPORT:
            return self.options.to_bytes(4, "little") + bytes(36)
        assert request == SETTIMEOUT
        wanted = self.rounds(int.from_bytes(argument, "little"))
        self.set.append(wanted)
        return wanted.to_bytes(4, "little")

    def write(self, data: bytes) -> None:
        self.wrote += data

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    found = FakeDevice()
    monkeypatch.setattr("godwit.guard.watchdog.open_device", lambda _: found)
    return found


def test_it_is_set_to_end_at_the_deadline_and_not_a_moment_later(device: FakeDevice) -> None:
    clock = Clock()
    dog = Watchdog(Path("/dev/watchdog"), now=clock)
    ends = 0.0
    for renewal in range(3):
        renewed = 100.0 + 3 * renewal
        for tick in range(30):
            clock.now = renewed + tick / 10
            before = len(device.set)
            assert dog.keep(renewed + RESET_S)
            if len(device.set) > before:
                ends = clock.now + device.set[-1]
            assert ends <= renewed + RESET_S + 1e-6
        assert ends >= renewed + RESET_S - 1
    for tick in range(100):  # no more renewals
        clock.now = renewed + tick / 10
        dog.keep(renewed + RESET_S)
        if len(device.set) > before:
            before = len(device.set)
            ends = clock.now + device.set[-1]
    assert ends <= renewed + RESET_S
    assert not device.wrote


def test_an_opening_that_gave_too_long_is_mended_at_once(device: FakeDevice) -> None:
    clock = Clock()
    dog = Watchdog(Path("/dev/watchdog"), now=clock)
    dog.keep(97.5 + RESET_S)
    assert device.set == [10, 7]


def test_a_trial_leaves_it_stopped(device: FakeDevice) -> None:
    dog = Watchdog(Path("/dev/watchdog"), now=Clock())
    assert dog.probe()
    assert (device.wrote, device.closed, dog.running, dog.usable) == (b"V", True, False, True)


def test_the_next_guard_finds_it_running(device: FakeDevice) -> None:
    dog = Watchdog(Path("/dev/watchdog"), now=Clock())
    dog.keep(110)
    dog.leave()
    assert (device.wrote, device.closed, dog.running) == (b"", True, False)


UNFIT = [
    FakeDevice(rounds=lambda s: s * 2),
    FakeDevice(options=0x100),  # its time cannot be set
    FakeDevice(options=0x80),  # it can never be stopped again
]


@pytest.mark.parametrize("unfit", UNFIT)
def test_one_that_does_not_keep_its_time_is_no_proof(
    unfit: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("godwit.guard.watchdog.open_device", lambda _: unfit)
    dog = Watchdog(Path("/dev/watchdog"), now=Clock())
    assert not dog.probe()
    assert not dog.keep(110)
    assert not dog.usable
    assert unfit.closed


def test_one_that_breaks_is_no_proof_any_more(device: FakeDevice) -> None:
    clock = Clock()
    dog = Watchdog(Path("/dev/watchdog"), now=clock)
    assert dog.keep(110)
    device.fails = True
    clock.now = 103
    assert not dog.keep(113)
    assert not dog.usable


def test_one_that_never_stops_is_not_even_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening would start it, for good."""
    monkeypatch.setattr("godwit.guard.watchdog.SYSFS", tmp_path)
    device, said = tmp_path / "watchdog", tmp_path / "watchdog0/nowayout"
    device.touch()
    said.parent.mkdir()
    said.write_text("1\n")
    with pytest.raises(PermissionError, match="nowayout"):
        open_device(device)
    said.write_text("0\n")
    opened = open_device(device)
    assert isinstance(opened, KernelDevice)
    with pytest.raises(OSError, match="ioctl"):
        opened.ask(GETSUPPORT, bytes(40))  # a plain file is none
    opened.write(b"V")
    opened.close()
    assert device.read_bytes() == b"V"


def test_no_device_is_no_fault(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path / "none", now=Clock())
    assert not dog.probe()
    assert not dog.keep(110)
    dog.rest()
    taken = tmp_path / "file"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wrong:
        wrong.bind(str(taken))
        assert not Watchdog(taken, now=Clock()).probe()
