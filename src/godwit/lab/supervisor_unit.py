"""One unit of a lab node's supervisor: its state, when it is started again, and how.

Standard library only, like ``supervisor``.
"""

from __future__ import annotations

import contextlib
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

QUICK_DEATH_S = 1.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
_FIRST_INHERITED = 3


def restart_pause(quick_deaths: int) -> float:
    """Seconds to wait after a death: none, unless the unit keeps dying within a second."""
    if quick_deaths == 0:
        return 0.0
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (quick_deaths - 1)))


class Unit:
    """One daemon: what it is, and how it is now. Times are of the monotonic clock."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.name: str = spec["name"]
        self.argv: list[str] = spec["argv"]
        self.log: str = spec["log"]
        self.env: dict[str, str] = spec.get("env", {})
        self.sockets: list[str] = spec.get("sockets", [])
        self.notify: bool = spec.get("notify", True)
        self.watchdog_s: float | None = spec.get("watchdog_s")
        self.start_s: float = spec.get("start_s", 60.0)
        self.stop_s: float = spec.get("stop_s", 5.0)
        self.pid = 0
        self.ready = False
        self.held = False
        self.starts = 0
        self.watchdog_kills = 0
        self.quick_deaths = 0
        self.last_exit: int | None = None  # negative: killed by that signal
        self.started_at = 0.0
        self.beat_at = 0.0
        self.start_at: float | None = 0.0  # when it is to be started, None: not by itself
        self.kill_at: float | None = None
        self.dying = False  # killed, and its end not heard of yet
        self.restarting = False

    def deadline(self) -> float | None:
        """When something is to be done about this unit, if nothing happens before."""
        due: list[float] = []
        if not self.pid:
            if self.start_at is not None and not self.held:
                due.append(self.start_at)
        elif not self.dying:
            if self.kill_at is not None:
                due.append(self.kill_at)
            elif not self.held:
                if not self.ready:
                    due.append(self.started_at + self.start_s)
                elif self.watchdog_s is not None:
                    due.append(self.beat_at + self.watchdog_s)
        return min(due, default=None)

    def died(self, status: int, now: float) -> None:
        """Note the end and plan the next start."""
        quick = now - self.started_at < QUICK_DEATH_S and not self.restarting
        self.pid, self.ready, self.kill_at = 0, False, None
        self.dying = self.restarting = False
        self.last_exit = status
        self.quick_deaths = self.quick_deaths + 1 if quick else 0
        self.start_at = now + restart_pause(self.quick_deaths)

    def state(self) -> str:
        """One word for people."""
        if self.held:
            return "held"
        if self.pid:
            return "running" if self.ready else "starting"
        return "waiting" if self.start_at is not None else "stopped"

    def view(self, now: float) -> dict[str, Any]:
        """The unit as the control socket shows it."""
        return {
            "state": self.state(),
            "pid": self.pid,
            "ready": self.ready,
            "held": self.held,
            "starts": self.starts,
            "watchdog_kills": self.watchdog_kills,
            "last_exit": self.last_exit,
            "for_s": round(now - self.started_at, 3) if self.starts else 0.0,
        }


def spawn(unit: Unit, *, notify_path: str, listeners: dict[str, int]) -> int:
    """Fork and exec; ready-made ways cannot give the child its own number as LISTEN_PID."""
    environment = {**os.environ, **unit.env, "NOTIFY_SOCKET": notify_path}
    log = os.open(unit.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    try:
        pid = os.fork()
        if pid == 0:
            _become(unit, environment, log, listeners)
        return pid
    finally:
        os.close(log)


def _become(unit: Unit, environment: dict[str, str], log: int, listeners: dict[str, int]) -> None:
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        if unit.watchdog_s is not None:
            environment["WATCHDOG_USEC"] = str(int(unit.watchdog_s * 1e6))
            environment["WATCHDOG_PID"] = str(os.getpid())
        _place_descriptors(unit, environment, log, listeners)
        os.execvpe(unit.argv[0], unit.argv, environment)  # noqa: S606
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"cannot run {unit.argv[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def _place_descriptors(
    unit: Unit, environment: dict[str, str], log: int, listeners: dict[str, int]
) -> None:
    # Copied out of the way first: a source may lie where a target goes.
    given = [os.dup(listeners[name]) for name in unit.sockets]
    given = [_above(descriptor, _FIRST_INHERITED + len(given)) for descriptor in given]
    null = os.open(os.devnull, os.O_RDONLY)
    log = _above(log, _FIRST_INHERITED + len(given))
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    for index, source in enumerate(given):
        os.dup2(source, _FIRST_INHERITED + index)
    os.closerange(_FIRST_INHERITED + len(given), 1024)
    if given:
        environment["LISTEN_PID"] = str(os.getpid())
        environment["LISTEN_FDS"] = str(len(given))
        environment["LISTEN_FDNAMES"] = ":".join(unit.sockets)


def _above(descriptor: int, lowest: int) -> int:
    """The descriptor, or a copy of it, at or above a number."""
    copies = []
    while descriptor < lowest:
        copies.append(descriptor)
        descriptor = os.dup(descriptor)
    return descriptor
