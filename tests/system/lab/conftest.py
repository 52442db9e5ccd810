"""Labs for tests: small ones with stand-in daemons, up in a second; each must leave nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from godwit.lab import leaks
from godwit.lab.configs import LOGS, Unit
from godwit.lab.down import down
from godwit.lab.handle import Lab
from godwit.lab.layout import Layout
from godwit.lab.options import Options
from godwit.lab.up import up

# Says that it is ready and beats; a thread-free picture of agent, guard, manager and store.
DAEMON = """
import os, socket, sys, time
def say(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(text, os.environ["NOTIFY_SOCKET"])
say(b"READY=1")
while True:
    time.sleep(0.2)
    say(b"WATCHDOG=1")
"""


def stand_in(name: str, *, program: str = DAEMON, watchdog_s: float = 2.0) -> Unit:
    """A unit that behaves like a daemon."""
    argv = (sys.executable, "-I", "-S", "-c", program)
    return Unit(name=name, argv=argv, log=str(LOGS / f"{name}.log"), watchdog_s=watchdog_s)


def small(name: str, root: Path, *, hosts: int = 2, rate: str = "1gbit") -> Options:
    """A lab of stand-ins."""
    layout = Layout(name, hosts, rate, root, storage="dir")
    units = {host: (stand_in("guard"), stand_in("agent")) for host in layout.host_names}
    units["control"] = (stand_in("store"), stand_in("manager"))
    return Options(layout, image=False, join=False, units=units)


@pytest.fixture(autouse=True, scope="session")
def root_only() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def root() -> Iterator[Path]:
    """Where labs of this session keep their state."""
    folder = Path(tempfile.mkdtemp(prefix="gwlab-"))
    # QEMU's user and what else lives inside hosts must get through.
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def name() -> str:
    return "t" + uuid.uuid4().hex[:5]


@pytest.fixture
def clean(name: str, root: Path) -> Iterator[None]:
    """Nothing of the lab is there before or after, whatever the test does."""
    with environment(root):
        before = leaks.take(name)
        yield
        down(name, root=root)
        # What was just being started when everything was killed finds its group gone, and ends.
    until = time.monotonic() + 5
    while left := leaks.compare(before, leaks.take(name)):
        assert time.monotonic() < until, left
        time.sleep(0.05)


@pytest.fixture
def make(name: str, root: Path, clean: None) -> Callable[..., Lab]:
    """Raises the test's lab."""

    def raise_lab(**changes: object) -> Lab:
        options = replace(small(name, root), **changes)  # type: ignore[arg-type]
        up(options)
        return Lab.load(name, root=root)

    return raise_lab


@contextlib.contextmanager
def environment(root: Path) -> Iterator[None]:
    """The variables by which commands find the labs of this session."""
    old = dict(os.environ)
    os.environ["GODWIT_LAB_DIR"] = str(root)
    os.environ["XDG_CONFIG_HOME"] = str(root / "config")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(old)


@pytest.fixture(scope="module")
def shared(root: Path) -> Iterator[Lab]:
    """One lab of stand-ins for the tests that leave it as it was."""
    name = "m" + uuid.uuid4().hex[:5]
    with environment(root):
        before = leaks.take(name)
        up(small(name, root, rate="80mbit"))
        yield Lab.load(name, root=root)
        down(name, root=root)
        # What was just being started when everything was killed finds its group gone, and ends.
    until = time.monotonic() + 5
    while left := leaks.compare(before, leaks.take(name)):
        assert time.monotonic() < until, left
        time.sleep(0.05)
