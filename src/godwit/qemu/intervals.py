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

_TRACE_LINE = re.compile(r"^\d+@(\d+\.\d+):vm_state_notify running ([01]) reason ")


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


def read_trace(state: Path) -> list[tuple[float, bool]]:
    """QEMU's own lines: (time, vCPUs run from here on), as written.

    The number before the time is that of the *thread* (the migration thread, at a switchover), so
    whose line it is follows from the agent's lines: one QEMU of a VM at a time lives on a host.
    """
    matches = (_TRACE_LINE.match(line) for line in _text(state / LOG).splitlines())
    return [(float(m[1]), m[2] == "1") for m in matches if m]


def read_guard(log: Path, vm: str) -> list[tuple[float, str]]:
    """What the guard's log says of a VM: (time, ``frozen`` | ``thawed`` | ``gone``).

    A frozen QEMU cannot write that it stands still. A freeze is stamped once it held, a thaw before
    it was asked for.
    """
    found: list[tuple[float, str]] = []
    for text in _text(log).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line.get("vm") == vm and "time" in line:
            word = "thawed" if line["act"] == "thaw" else str(line["result"])
            if word in ("frozen", "thawed", "gone"):
                found.append((float(line["time"]), word))
    return found


def running_spans(state: Path, *, until: float, guard: Path | None = None) -> list[Span]:
    """Every stretch in which vCPUs of this VM ran on this host; open ones end at ``until``.

    ``state`` is the VM's state directory of that host, ``guard`` the log of its guard. A stretch
    ends with QEMU's own word, with its EXIT, with the guard's word that it stands still, or at the
    latest with the START of the next one.
    """
    lines = read_lines(state)
    marks: list[tuple[float, str, int]] = [
        (at, "run" if running else "halt", 0) for at, running in read_trace(state)
    ]
    marks += [
        (float(line["at"]), str(line["event"]), int(line["pid"]))
        for line in lines
        if line["event"] in ("START", "EXIT")
    ]
    if guard is not None:
        marks += [(at, word, 0) for at, word in read_guard(guard, state.name)]
    spans: list[Span] = []
    since: float | None = None
    held = False  # it would run if it were not frozen
    for at, what, pid in [*sorted(marks), (until, "halt", 0)]:
        if what == "run" or (what == "thawed" and held):
            since, held = (at if since is None else since), False
        elif what == "thawed":
            continue
        elif since is not None:
            held = what == "frozen"
            host, owner, epoch = _owner_of(lines, since)
            if what != "EXIT" or pid == owner:
                spans.append(Span(since, max(since, at), host, owner, epoch))
                since = None
    return spans


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


def _owner_of(lines: list[dict[str, Any]], since: float) -> tuple[str, int, int]:
    """Host, process and epoch of the QEMU whose vCPUs began to run at a moment."""
    takers = [line for line in lines if line["event"] in ("START", "ADOPT")]
    known = [line for line in takers if float(line["at"]) <= since] or takers[:1]
    if not known:
        return "", 0, 0
    owner = max(known, key=lambda line: float(line["at"]))
    # The epoch of a process may rise in its life; its next line, the RESUME, has the right one.
    own = [line for line in lines if line["pid"] == owner["pid"]]
    later = [line for line in own if float(line["at"]) >= since - 0.01]
    return str(owner["host"]), int(owner["pid"]), int((later or own[-1:])[0]["epoch"])


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
