"""The supervisor as an ordinary process: it keeps units up, and never harms what is not its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from godwit.host.process import Process, is_alive, kill, spawn
from godwit.lab.control import ask
from godwit.lab.supervisor_unit import restart_pause

# A daemon in small: says that it is ready, beats unless told not to, shows what it inherited.
DAEMON = """
import json, os, socket, sys, time
def say(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(text, os.environ["NOTIFY_SOCKET"])
keys = ("LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_USEC")
facts = {k: os.environ.get(k) for k in keys}
facts["mine"] = os.environ.get("LISTEN_PID") == str(os.getpid())
facts["watch_mine"] = os.environ.get("WATCHDOG_PID") == str(os.getpid())
facts["fds"] = sorted(int(f) for f in os.listdir("/proc/self/fd"))[:-1]
print(json.dumps(facts), flush=True)
say(b"READY=1")
mode = sys.argv[1]
if mode == "silent":
    time.sleep(1000)
while True:
    time.sleep(0.02)
    say(b"WATCHDOG=1")
"""


class Nest:
    """A supervisor with its control socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "c.sock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.socket))
        self.listener.listen()
        self.api = socket.create_server(("127.0.0.1", 0))
        self.process: Process | None = None

    def unit(self, name: str, *argv: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "argv": list(argv), "log": str(self.folder / f"{name}.log"), **more}

    def daemon(self, name: str, mode: str = "beats", **more: Any) -> dict[str, Any]:
        return self.unit(name, sys.executable, "-I", "-S", "-c", DAEMON, mode, **more)

    def start(self, *units: dict[str, Any]) -> None:
        path = self.folder / "units.json"
        path.write_text(json.dumps({"units": list(units)}))
        descriptors = (self.listener.fileno(), self.api.fileno())
        argv = [sys.executable, "-I", "-m", "godwit.lab.supervisor", str(path)]
        argv += ["--control-fd", str(descriptors[0]), "--fd", f"api={descriptors[1]}"]
        argv += ["--notify", str(self.folder / "n.sock")]
        self.process = spawn(argv, pass_fds=descriptors, stderr=self.folder / "log")

    def ask(self, op: str, **more: Any) -> dict[str, Any]:
        return ask(self.socket, op, **{"timeout": 8.0, **more})

    def view(self, unit: str) -> dict[str, Any]:
        return dict(self.ask("status")["units"][unit])

    def until(self, unit: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 10
        while not holds(view := self.view(unit)):
            assert time.monotonic() < deadline, f"{view}\n{(self.folder / 'log').read_text()}"
            time.sleep(0.01)
        return view

    def end(self) -> None:
        if self.process is not None:
            kill(self.process)
            os.waitpid(self.process.pid, 0)
            self.process = None


@pytest.fixture
def nest(tmp_path: Path) -> Iterator[Nest]:
    nest = Nest(tmp_path)
    pids: list[int] = []
    yield nest
    try:
        if nest.process is not None and is_alive(nest.process):
            pids = [pid for pid in nest.ask("pids").values() if pid]
    finally:
        nest.end()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        nest.listener.close()
        nest.api.close()


def test_a_killed_unit_is_back_at_once(nest: Nest) -> None:
    nest.start(nest.daemon("agent", watchdog_s=2.0))
    first = nest.ask("wait-ready")["units"]["agent"]
    time.sleep(1.05)  # it has lived for more than a second: no pause
    at = time.monotonic()
    os.kill(first["pid"], signal.SIGKILL)
    second = nest.until("agent", lambda v: v["ready"] and v["pid"] != first["pid"])
    assert time.monotonic() - at < 1.0
    assert second["starts"] == 2
    assert second["last_exit"] == -signal.SIGKILL


def test_sockets_are_inherited_by_name_and_nothing_else(nest: Nest) -> None:
    nest.start(nest.daemon("manager", sockets=["api"], watchdog_s=1.5))
    nest.ask("wait-ready")
    facts = json.loads((nest.folder / "manager.log").read_text())
    assert facts == {
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "api",
        "WATCHDOG_USEC": "1500000",
        "mine": True,
        "watch_mine": True,
        "fds": [0, 1, 2, 3],
    }


def test_the_listening_socket_outlives_the_unit(nest: Nest) -> None:
    nest.start(nest.daemon("manager", sockets=["api"]))
    pid = nest.ask("wait-ready")["units"]["manager"]["pid"]
    nest.ask("hold", unit="manager")
    os.kill(pid, signal.SIGKILL)
    nest.until("manager", lambda v: v["pid"] == 0)
    with socket.create_connection(nest.api.getsockname(), timeout=2):
        pass  # nobody serves it, but nobody is refused


def test_a_frozen_unit_is_killed_by_its_watchdog(nest: Nest) -> None:
    nest.start(nest.daemon("agent", watchdog_s=0.4))
    pid = nest.ask("wait-ready")["units"]["agent"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    view = nest.until("agent", lambda v: v["ready"] and v["pid"] != pid)
    assert view["watchdog_kills"] == 1


def test_a_unit_that_never_beats_is_killed_again_and_again(nest: Nest) -> None:
    nest.start(nest.daemon("agent", "silent", watchdog_s=0.3))
    assert nest.until("agent", lambda v: v["watchdog_kills"] >= 2)["starts"] >= 2


def test_a_held_unit_stays_frozen_and_stays_dead(nest: Nest) -> None:
    nest.start(nest.daemon("agent", watchdog_s=0.3))
    pid = nest.ask("wait-ready")["units"]["agent"]["pid"]
    nest.ask("hold", unit="agent")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.7)
    assert nest.view("agent")["pid"] == pid
    os.kill(pid, signal.SIGKILL)
    assert nest.until("agent", lambda v: v["pid"] == 0)["state"] == "held"
    time.sleep(0.3)
    assert nest.view("agent")["starts"] == 1
    view = nest.ask("release", unit="agent")["units"]["agent"]
    assert view["ready"]
    assert view["starts"] == 2


def test_restart_answers_when_the_next_one_is_ready(nest: Nest) -> None:
    nest.start(nest.daemon("agent", watchdog_s=2.0))
    first = nest.ask("wait-ready")["units"]["agent"]["pid"]
    answer = nest.ask("restart", unit="agent")["units"]["agent"]
    assert answer["ready"]
    assert answer["pid"] != first
    assert answer["last_exit"] == -signal.SIGTERM


def test_restart_kills_what_does_not_heed(nest: Nest) -> None:
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + DAEMON
    argv = (sys.executable, "-I", "-S", "-c", deaf, "beats")
    nest.start(nest.unit("agent", *argv, watchdog_s=2.0, stop_s=0.2))
    nest.ask("wait-ready")
    answer = nest.ask("restart", unit="agent")["units"]["agent"]
    assert answer["last_exit"] == -signal.SIGKILL
    assert answer["ready"]
    assert answer["watchdog_kills"] == 0


def test_one_that_keeps_dying_is_tried_ever_less_often(nest: Nest) -> None:
    nest.start(nest.unit("agent", "false", notify=False))
    nest.until("agent", lambda v: v["starts"] >= 4)
    log = (nest.folder / "log").read_text()
    times = [
        sum(float(x) * f for x, f in zip(m.split(":"), (3600, 60, 1), strict=True))
        for m in re.findall(r"^(\S+) supervisor: agent started", log, re.MULTILINE)
    ]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[0] >= 0.09
    assert gaps[2] > gaps[0] * 2


def test_a_program_that_is_missing_is_said_so(nest: Nest) -> None:
    nest.start(nest.unit("agent", "godwit-no-such-program", notify=False))
    nest.until("agent", lambda v: v["starts"] >= 2)
    assert "cannot run godwit-no-such-program" in (nest.folder / "agent.log").read_text()


def test_notifications_of_others_do_not_count(nest: Nest) -> None:
    nest.start(nest.unit("agent", "sleep", "1000", watchdog_s=None))
    nest.until("agent", lambda v: v["pid"] > 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"READY=1", str(nest.folder / "n.sock"))
    answer = nest.ask("wait-ready", timeout=0.2)
    assert answer == {"error": "not ready in time: agent"}


def test_stop_ends_the_units_and_nobody_else(nest: Nest) -> None:
    bystander = spawn(["sleep", "1000"])
    nest.start(nest.daemon("agent"), nest.daemon("guard"))
    pids = [v["pid"] for v in nest.ask("wait-ready")["units"].values()]
    assert nest.ask("stop") == {"stopping": True}
    assert nest.process is not None
    os.waitpid(nest.process.pid, 0)
    nest.process = None
    try:
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert is_alive(bystander)
    finally:
        kill(bystander)
        os.waitpid(bystander.pid, 0)


def test_unknown_words_are_answered_with_an_error(nest: Nest) -> None:
    nest.start(nest.daemon("agent"))
    assert "no-such" in nest.ask("no-such", unit="agent")["error"]
    assert "KeyError" in nest.ask("restart", unit="nobody")["error"]


def test_it_is_small(nest: Nest) -> None:
    nest.start(nest.daemon("agent", watchdog_s=2.0))
    nest.ask("wait-ready")
    assert nest.process is not None
    fields = Path(f"/proc/{nest.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", fields)
    assert found is not None
    assert int(found[1]) < 15 * 1024


@pytest.mark.parametrize(("deaths", "pause"), [(0, 0.0), (1, 0.1), (2, 0.2), (4, 0.8), (20, 5.0)])
def test_pauses(deaths: int, pause: float) -> None:
    assert restart_pause(deaths) == pytest.approx(pause)
