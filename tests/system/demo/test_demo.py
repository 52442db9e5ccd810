"""The demonstration as a person meets it: its words, its end, and its manners."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from godwit.lab import leaks
from godwit.lab.down import down
from godwit.lab.layout import Layout

pytestmark = pytest.mark.system

LONGEST_S = 90.0  # of the whole, after set-up


@dataclass
class Demo:
    """Runs demonstrations of one name, one after the other, and finds their leavings."""

    name: str
    root: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def begin(self) -> subprocess.Popen[str]:
        environ = {**os.environ, "GODWIT_LAB_DIR": str(self.root), "GODWIT_URL": "https://wrong"}
        process = subprocess.Popen(
            [sys.executable, "-m", "godwit.lab.demo", "--name", self.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environ,
        )
        self.started.append(process)
        return process

    @property
    def layout(self) -> Layout:
        return Layout(self.name, 2, state_root=self.root)

    @property
    def home(self) -> Path:
        return self.root / f".demo-{self.name}"


@pytest.fixture
def demo() -> Iterator[Demo]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    root = Path(tempfile.mkdtemp(prefix="gwdemo-"))
    root.chmod(0o755)
    demo = Demo("d" + uuid.uuid4().hex[:5], root)
    os.environ["GODWIT_LAB_DIR"] = str(root)
    before = leaks.take(demo.name)
    try:
        yield demo
        for process in demo.started:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        left = leaks.compare(before, leaks.take(demo.name))
        down(demo.name, root=root)
        assert left == []
        assert not demo.home.exists()
    finally:
        del os.environ["GODWIT_LAB_DIR"]
        subprocess.run(["rm", "-rf", str(root)], check=True)


def until(process: subprocess.Popen[str], words: str) -> str:
    """What it says up to a line with these words."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(f"it ended without saying {words!r}:\n{said}")


def rest(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.read()


def test_it_shows_all_and_leaves_nothing(demo: Demo) -> None:
    start = time.monotonic()
    process = demo.begin()
    said = rest(process)
    assert process.wait() == 0, said
    assert time.monotonic() - start < LONGEST_S
    print(said)

    assert "\033" not in said  # there is no terminal
    assert max(len(line) for line in said.splitlines() if line.startswith("  ")) < 80
    table = re.findall(r"^(live|quick) +(host\d) → (host\d) .* (\d[\d.]* m?s)$", said, re.M)
    assert [(method, to) for method, _, to, _ in table] == [
        ("live", "host2"), ("live", "host1"), ("quick", "host2"), ("quick", "host1"),
    ]  # fmt: skip
    assert len(re.findall(r"completed in .*, dark ", said)) == 4
    assert len(re.findall(r"^  [ ▁▂▃▄▅▆▇█·]*·[ ▁▂▃▄▅▆▇█·]*$", said, re.M)) >= 4
    cancelled = said.partition("Cancelled half-way")[2]
    assert re.search(r"^web: host1 → host2 \(live\), cancelled in ", cancelled, re.M)
    assert re.search(r"^web +running +host1 ", cancelled, re.M)
    assert "it was never restarted" in said
    assert "✓ nothing is left" in said
    for command in ("lab up", "vm create", "vm list", "host list", "migration cancel", "lab down"):
        assert f"$ godwit {command}" in said
    script = said.partition("--script python\n")[2].partition("\n── ")[0]
    compile(script, "script", "exec")


def test_killed_in_the_middle_it_starts_over_clean(demo: Demo) -> None:
    first = demo.begin()
    until(first, "$ godwit vm start")
    first.kill()
    first.wait()
    assert demo.home.is_dir()
    assert leaks.take(demo.name).namespaces

    second = demo.begin()
    said = until(second, "$ godwit lab up")
    assert "taking down what it left" in said

    # Meanwhile a third one keeps its hands off.
    third = demo.begin()
    assert "another demonstration is running" in rest(third)
    assert third.wait() == 4

    until(second, "host1, host2: namespaces and supervisors")
    second.send_signal(signal.SIGTERM)
    assert "✓ nothing is left" in rest(second)
    assert second.wait() == 128 + signal.SIGTERM


def test_a_lab_of_somebody_else_is_not_touched(demo: Demo) -> None:
    demo.layout.state.mkdir(parents=True)
    process = demo.begin()
    said = rest(process)
    assert process.wait() == 4
    assert said.splitlines()[0].startswith(f"error: there is a lab {demo.name} already")
    assert "--name OTHER" in said
    assert demo.layout.state.is_dir()
    demo.layout.state.rmdir()


def test_nobody_reads_any_more(demo: Demo) -> None:
    process = demo.begin()
    until(process, "$ godwit lab up")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 1
