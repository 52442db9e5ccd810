"""A store daemon as a child process, for tests that kill, freeze, starve or restart it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.store.client import StoreClient


class Daemon:
    """One data directory and the process that serves it on a unix socket."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        self.socket = directory / "s.sock"
        self.endpoint = f"unix:{self.socket}"
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def argv(self, *extra: str) -> list[str]:
        base = [sys.executable, "-m", "godwit.store.daemon.main", "--data", str(self.data)]
        return [*base, "--listen", self.endpoint, *extra]

    def start(self, *extra: str) -> Daemon:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.argv(*extra), stderr=log)
        limit = time.monotonic() + 10
        while f"pid {self.process.pid}" not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < limit, self.text()
            time.sleep(0.01)
        return self

    def text(self) -> str:
        return self.log.read_text()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(10)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def client(self, *, timeout: float = 5.0) -> StoreClient:
        return StoreClient([self.endpoint], timeout=timeout)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    if daemon.process is not None and daemon.process.poll() is None:
        daemon.signal(signal.SIGCONT)
        daemon.kill()
