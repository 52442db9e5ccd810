"""What is special on a terminal: the live line, the console. Each runs on a real pty."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from typing import Any

PROGRAM = [sys.executable, "-c", "from godwit.cli.main import main; main()"]


class Screen:
    """A program on a pty and what it wrote."""

    def __init__(self, *words: str, stdout: int | None = None) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [*PROGRAM, *words],
            stdin=self.slave,
            stdout=self.slave if stdout is None else stdout,
            stderr=self.slave,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        )
        self.text = ""

    def until(self, wanted: str, seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while wanted not in self.text:
            left = end - time.monotonic()
            assert left > 0, f"no {wanted!r} in {self.text!r}"
            if select.select([self.master], [], [], left)[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> int:
        code = self.process.wait(10)
        while select.select([self.master], [], [], 0.1)[0]:
            self.text += os.read(self.master, 65536).decode(errors="replace")
        os.close(self.master)
        os.close(self.slave)
        return code


def test_a_move_on_a_terminal_has_a_live_line(api: Any) -> None:
    api.hold_at = "handover"
    screen = Screen("vm", "migrate", "web", "--to", "host2")
    screen.until("handover")
    api.let_go.set()
    screen.until("completed in 870 ms")
    assert screen.close() == 0
    shown = [float(found) for found in re.findall(r"(\d+) %", screen.text)]
    assert shown
    assert shown == sorted(shown)
    assert "\x1b[" in screen.text  # redrawn in place
    assert "web host1 → host2" in screen.text


def test_the_console_takes_every_key_but_its_escape(api: Any) -> None:
    screen = Screen("vm", "console", "web")
    screen.until("login: ")
    assert "Ctrl-] leaves" in screen.text
    assert not termios.tcgetattr(screen.slave)[3] & termios.ICANON
    screen.type(b"ab\x03")  # Ctrl-C is for the guest
    screen.until("AB\x03")
    screen.type(b"\x1d")
    screen.until("it runs on")
    assert termios.tcgetattr(screen.slave) == screen.before
    assert screen.close() == 0


def test_the_console_through_pipes(api: Any) -> None:
    done = subprocess.run(
        [*PROGRAM, "vm", "console", "web", "--linger", "300ms"],
        input=b"uname\n",
        capture_output=True,
        check=False,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"login: UNAME\n"


def test_a_console_that_ends_ends_the_command(api: Any) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [*PROGRAM, "vm", "console", "web", "--linger", "30s"],
        input=b"poweroff\n",
        capture_output=True,
        check=False,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert time.monotonic() - began < 10


def test_events_are_printed_as_they_come(api: Any) -> None:
    api.publish("first")
    process = subprocess.Popen(
        [*PROGRAM, "event", "follow", "--since", "0"], stdout=subprocess.PIPE, text=True
    )
    api.publish("second")
    assert process.stdout
    assert process.stdout.readline().rstrip().endswith("vm/web               second")
    process.send_signal(2)
    process.communicate(timeout=30)
    assert process.returncode == 130
