"""Evidence of when a VM's vCPUs ran on this host, from two witnesses.

QEMU itself: its trace point ``vm_state_notify`` writes a stamped line to ``qemu.log`` whenever
the vCPUs start or stop, whatever becomes of the agent. And the agent: ``intervals.jsonl`` says
which process belongs to which epoch, when it ended (a killed QEMU writes no last line), and what
events came over the monitor. Nothing here guards anything; it proves what happened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FILE: Final = "intervals.jsonl"
LOG: Final = "qemu.log"
TRACE_POINT: Final = "vm_state_notify"
WITNESSED_EVENTS: Final = ("RESUME", "STOP", "SHUTDOWN", "SUSPEND", "WAKEUP", "RESET")

_TRACE_LINE = re.compile(r"^(\d+)@(\d+\.\d+):vm_state_notify running ([01]) reason \d+ \((.+)\)")


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A stretch in which the vCPUs of one QEMU ran, in seconds since the epoch of its host."""

    start: float
    end: float
    host: str
    pid: int
    epoch: int


def append_line(
    state: Path, *, event: str, at: float, host: str, vm: str, pid: int, epoch: int, **more: object
) -> None:
    """Add one line; a single write, so that lines of several writers never mix."""
    line: dict[str, object] = {
        "event": event,
        "at": at,
        "host": host,
        "vm": vm,
        "pid": pid,
        "epoch": epoch,
        **more,
    }
    data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    descriptor = os.open(state / FILE, flags, 0o640)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def read_lines(state: Path) -> list[dict[str, Any]]:
    """The agent's lines so far, oldest first; a line torn by a crash is left out."""
    lines: list[dict[str, Any]] = []
    for text in _text(state / FILE).splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def read_trace(state: Path) -> list[tuple[float, int, bool]]:
    """QEMU's own lines: (time, pid, vCPUs run from here on), as written."""
    matches = (_TRACE_LINE.match(line) for line in _text(state / LOG).splitlines())
    return [(float(m[2]), int(m[1]), m[3] == "1") for m in matches if m]


def running_spans(state: Path, *, until: float) -> list[Span]:
    """Every stretch in which vCPUs of this VM ran on this host; open ones end at ``until``.

    ``state`` is the VM's state directory of that host. Process numbers are told apart by time: a
    ``START`` line begins a new life of its number.
    """
    marks: list[tuple[float, int, str]] = [
        (at, pid, "run" if running else "halt") for at, pid, running in read_trace(state)
    ]
    lines = read_lines(state)
    marks += [
        (float(line["at"]), int(line["pid"]), "end") for line in lines if line["event"] == "EXIT"
    ]
    open_since: dict[int, float] = {}
    spans: list[Span] = []

    def close(pid: int, end: float) -> None:
        start = open_since.pop(pid, None)
        if start is not None:
            host, epoch = _owner_of(lines, pid, start)
            spans.append(Span(start, max(start, end), host, pid, epoch))

    for at, pid, what in sorted(marks):
        if what == "run":
            open_since.setdefault(pid, at)
        else:
            close(pid, at)
    for pid in list(open_since):
        close(pid, until)
    return sorted(spans)


def overlaps(spans: Iterable[Span], *, slack: float = 0.0) -> list[tuple[Span, Span]]:
    """Pairs of stretches of different QEMUs that overlap by more than ``slack`` seconds.

    ``slack`` is what the hosts' clocks may differ by; bring stamps to one clock first.
    """
    ordered = sorted(spans)
    return [
        (first, second)
        for number, first in enumerate(ordered)
        for second in ordered[number + 1 :]
        if (first.host, first.pid) != (second.host, second.pid)
        and min(first.end, second.end) - max(first.start, second.start) > slack
    ]


def _owner_of(lines: list[dict[str, Any]], pid: int, at: float) -> tuple[str, int]:
    """Host and epoch that the agent last wrote down for a process before a moment."""
    host, epoch = "", 0
    for line in lines:
        if int(line["pid"]) == pid and (float(line["at"]) <= at or not host):
            host, epoch = str(line["host"]), int(line["epoch"])
    return host, epoch


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
