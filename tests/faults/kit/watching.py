"""The lab's probe, running beside what a test does."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from godwit.lab.probe import ProbeReport, Samples, analyse

END_S = 60.0


class Watching:
    """A probe of a guest. Times are nanoseconds of the monotonic clock of this machine."""

    def __init__(self, netns: str, address: str) -> None:
        descriptor, name = tempfile.mkstemp(prefix="godwit-probe-")
        os.close(descriptor)
        self._file = Path(name)
        argv = [sys.executable, "-m", "godwit.lab.probe", address, "--netns", netns]
        self._process = subprocess.Popen(
            [*argv, "--save", name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert self._process.stderr is not None
        assert b"probing" in self._process.stderr.readline()
        self.samples: Samples | None = None

    def end(self) -> None:
        """Stop it and read what it saw."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(END_S)
        finally:
            self._process.kill()
            self._process.wait()
            if self._process.stderr is not None:
                self._process.stderr.close()
        self.samples = Samples.load(self._file)
        self._file.unlink()

    @property
    def report(self) -> ProbeReport:
        """The whole of it."""
        assert self.samples is not None, "still probing"
        return analyse(self.samples)

    def between(self, start_ns: int, end_ns: int) -> ProbeReport:
        """The part of what was sent between two moments."""
        assert self.samples is not None, "still probing"
        pairs = [
            (sent, arrived)
            for sent, arrived in zip(self.samples.sent, self.samples.arrived, strict=True)
            if start_ns <= sent <= end_ns
        ]
        sent, arrived = zip(*pairs, strict=True) if pairs else ((), ())
        return analyse(Samples(sent, arrived, self.samples.interval_ns))

    def dark_after(self, start_ns: int) -> float:
        """Longest silence after a moment in milliseconds; a guest that is dark then counts from
        that moment on."""
        assert self.samples is not None, "still probing"
        heard = sorted(at for at in self.samples.arrived if at > start_ns)
        end = max(self.samples.sent)
        marks = [start_ns, *heard, *([end] if not heard or end > heard[-1] else [])]
        longest = max(later - before for before, later in itertools.pairwise(marks))
        return round(max(0.0, (longest - self.samples.interval_ns) / 1e6), 3)


@contextmanager
def watching(netns: str, address: str, *, settle_s: float = 0.3) -> Iterator[Watching]:
    """Probe while the block runs, and a little before and after it."""
    probe = Watching(netns, address)
    try:
        time.sleep(settle_s)
        yield probe
        time.sleep(settle_s)
    finally:
        probe.end()
