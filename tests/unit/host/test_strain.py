"""How long threads wait for a processor, measured on real ones that share one or do not."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from godwit.host import process
from godwit.host.process import Process
from godwit.host.strain import Strain

FOREVER = "\nprint(flush=True)\nwhile os.getppid() == {parent}:\n for _ in range(100000): pass"
SPIN = "import os, sys\nos.sched_setaffinity(0, [int(sys.argv[1])])" + FOREVER
NAMED = "import os\nopen('/proc/self/comm', 'w').write('CPU 0/TCG')" + FOREVER
"""Both end with their parent, however that ends."""


@contextmanager
def spinning(program: str, *argv: str) -> Iterator[Process]:
    """A process that computes, from when it says so."""
    reader, writer = os.pipe()
    words = program.format(parent=os.getpid())
    child = process.spawn([sys.executable, "-c", words, *argv], stdout=writer)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"\n"
        yield child
    finally:
        process.kill(child)
        os.waitpid(child.pid, 0)
        os.close(reader)


def seconds_of(pid: int, seconds: float) -> None:
    """Until the process has computed for that long."""
    until = process.cpu_seconds(pid) + seconds
    while process.cpu_seconds(pid) < until:
        time.sleep(0.01)


def test_three_on_one_processor_take_three_times_as_long() -> None:
    core = str(min(os.sched_getaffinity(0)))
    with spinning(SPIN, core) as one, spinning(SPIN, core), spinning(SPIN, core):
        strain = Strain()
        assert strain.read([one.pid]) == 1.0  # what was before does not count
        seconds_of(one.pid, 0.2)
        assert strain.read([one.pid]) >= 2.0


def test_a_process_that_waits_for_nothing_is_not_strained() -> None:
    strain = Strain()
    reader, writer = os.pipe()
    child = process.spawn(["sleep", "60"], stdout=writer)
    os.close(reader)
    os.close(writer)
    try:
        strain.read([child.pid])
        assert strain.read([child.pid]) == 1.0
    finally:
        process.kill(child)
        os.waitpid(child.pid, 0)


def test_threads_of_virtual_processors_do_not_count() -> None:
    strain = Strain()
    with spinning(NAMED) as guest:
        strain.read([guest.pid])
        seconds_of(guest.pid, 0.05)
        assert strain.read([guest.pid]) == 1.0
        assert strain._before == {}


def test_a_process_that_is_gone_counts_for_nothing() -> None:
    strain = Strain()
    assert strain.read([2**22 + 1]) == 1.0


@pytest.mark.parametrize("text", ["", "nonsense"])
def test_a_kernel_without_statistics_shows_no_strain(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathlib import Path

    def read(path: Path) -> str:
        return text if path.name == "schedstat" else "qemu"

    monkeypatch.setattr(Path, "read_text", read)
    strain = Strain()
    strain.read([os.getpid()])
    assert strain.read([os.getpid()]) == 1.0
