"""Labs come up and go down without a trace, whoever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from godwit.host import netns
from godwit.host.cgroup import detect
from godwit.host.process import Process, is_alive, kill, spawn
from godwit.host.run import with_netns
from godwit.lab import groups, leaks, record
from godwit.lab import up as up_module
from godwit.lab.down import down
from godwit.lab.handle import Lab
from godwit.lab.up import up
from godwit.model.errors import Conflict, NotFound, OperationFailed, Unavailable

from .conftest import small, stand_in

pytestmark = pytest.mark.system


def test_up_and_down_leave_nothing(make: Callable[..., Lab], name: str, root: Path) -> None:
    before = leaks.take(name)
    lab = make()
    view = lab.status()
    assert view["complete"]
    assert [host["state"] for host in view["hosts"]] == ["on", "on"]
    assert leaks.compare(before, leaks.take(name))
    said: list[str] = []
    assert down(name, root=root, say=said.append)
    assert leaks.compare(before, leaks.take(name)) == []
    assert said[0] == "ended bmc1, bmc2, control, host1, host2"
    assert not down(name, root=root)  # a second time there is nothing to do
    with pytest.raises(NotFound):
        Lab.load(name, root=root)


def test_a_planted_leak_is_seen(name: str, root: Path, clean: None) -> None:
    before = leaks.take(name)
    netns.create(f"gw-{name}-client")
    visitor = spawn(with_netns(["sleep", "1000"], f"gw-{name}-client"))
    group = groups.create(f"godwit-lab/{name}/host1")
    (root / name).mkdir(parents=True)
    try:
        seen = "\n".join(leaks.compare(before, leaks.take(name)))
        for kind in ("namespaces", "mounts", "processes", "groups", "directories"):
            assert f"{kind}: " in seen
        assert group
    finally:
        down(name, root=root)  # it takes these away as well, although there is no record
        os.waitpid(visitor.pid, 0)


def test_what_failed_is_undone_and_says_why(
    name: str, root: Path, clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up_module, "READY_S", 0.5)
    options = small(name, root)
    broken = replace(stand_in("agent"), argv=("sh", "-c", "echo no such bridge; exit 1"))
    units = {**options.units, "host2": (broken,)}
    before = leaks.take(name)
    said: list[str] = []
    with pytest.raises(OperationFailed, match=r"host2: not ready in time: agent; agent: no such"):
        up(replace(options, units=units), say=said.append)
    assert leaks.compare(before, leaks.take(name)) == []
    assert said[-2:] == ["✗ waiting for the daemons", "  what was made is gone again"]


def test_retain_keeps_what_failed(
    name: str, root: Path, clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up_module, "READY_S", 0.3)
    options = small(name, root, hosts=1)
    units = {**options.units, "host1": (replace(stand_in("agent"), argv=("false",)),)}
    with pytest.raises(OperationFailed):
        up(replace(options, units=units, retain=True))
    view = Lab.load(name, root=root).status()
    assert not view["complete"]
    assert view["hosts"][0]["state"] == "on"


def test_down_after_everything_was_killed(make: Callable[..., Lab], name: str, root: Path) -> None:
    lab = make()
    visitor = spawn(with_netns(["sleep", "1000"], lab.layout.netns("client")))
    # nodes, daemons, the watchdog of all hosts, a BMC for each; one may just be started anew
    until = time.monotonic() + 10
    everybody: list[Process] = []
    while len(everybody) != 3 + 6 + 1 + 2:
        everybody = [p for group in groups.of_lab(name) for p in groups.members(group)]
        assert time.monotonic() < until, everybody
    for process in everybody:
        kill(process)
    assert down(name, root=root)
    assert not [process for process in everybody if is_alive(process)]
    os.waitpid(visitor.pid, 0)
    assert not is_alive(visitor)


def test_down_of_what_stands_still(make: Callable[..., Lab], name: str, root: Path) -> None:
    """A frozen group keeps its processes from dying, on version 1."""
    if detect().version != 1:
        pytest.skip("version 2 lets frozen processes be killed")
    lab = make()
    frozen = lab.process("host1", "agent")
    lab.run("host1", ["mkdir", "/sys/fs/cgroup/freezer/vm"])
    number = lab.tell("host1", "pids")["agent"]
    lab.run("host1", ["sh", "-c", f"echo {number} > /sys/fs/cgroup/freezer/vm/cgroup.procs"])
    lab.run("host1", ["sh", "-c", "echo FROZEN > /sys/fs/cgroup/freezer/vm/freezer.state"])
    kill(frozen)
    time.sleep(0.1)
    assert is_alive(frozen)  # the difficulty is there
    assert down(name, root=root)
    assert not is_alive(frozen)


def test_down_without_a_record(make: Callable[..., Lab], name: str, root: Path) -> None:
    lab = make()
    lab.layout.record.write_text("{ damaged")
    with pytest.raises(OperationFailed, match=r"lab\.json"):
        Lab.load(name, root=root)
    assert down(name, root=root)


UP = """
import os, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.system.lab.conftest import small
from godwit.lab.up import up
count = 0
def say(line):
    global count
    print(line, flush=True)
    count += 1
    if count == int(sys.argv[4]):
        os.kill(os.getpid(), 9)
up(small(sys.argv[2], Path(sys.argv[3])), say=say)
"""


@pytest.mark.parametrize("lines", [2, 3])
def test_down_after_up_was_killed_half_way(name: str, root: Path, clean: None, lines: int) -> None:
    repository = str(Path(__file__).parents[3])
    argv = [sys.executable, "-c", UP, repository, name, str(root), str(lines)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(done.stdout.splitlines()) == lines
    assert leaks.take(name).namespaces
    assert down(name, root=root)


def test_two_labs_side_by_side(make: Callable[..., Lab], name: str, root: Path) -> None:
    one, other_name = make(), name + "-b"
    before = leaks.take(other_name)
    try:
        up(small(other_name, root))
        other = Lab.load(other_name, root=root)
        address = other.layout.address("host2", up_module.NETS[1])
        assert address == one.layout.address("host2", up_module.NETS[1])
        for lab in (one, other):
            lab.run("host1", ["sh", "-c", "echo $0 > /var/lib/godwit/x", lab.record.name])
        assert one.run("host1", ["cat", "/var/lib/godwit/x"]).decode().strip() == name
    finally:
        down(other_name, root=root)
    assert leaks.compare(before, leaks.take(other_name)) == []
    assert [host["state"] for host in one.status()["hosts"]] == ["on", "on"]
    assert one.run("host1", ["hostname"]) == b"host1\n"


def test_a_taken_name_is_refused_and_nothing_changes(
    make: Callable[..., Lab], name: str, root: Path
) -> None:
    make()
    before = leaks.take(name)
    with pytest.raises(Conflict, match="there is a lab"):
        up(small(name, root))
    assert leaks.take(name) == before


def test_only_one_command_at_a_time(name: str, root: Path, clean: None) -> None:
    with record.exclusive(name), pytest.raises(Conflict, match="another command"):
        down(name, root=root)


def test_a_dead_supervisor_takes_its_host_along_and_no_other(
    make: Callable[..., Lab], root: Path
) -> None:
    lab = make()
    inside = [groups.members(lab.layout.cgroup(host)) for host in ("host1", "host2")]
    lab.run("host1", ["sh", "-c", "setsid --fork sleep 1000 >/dev/null 2>&1"])
    kill(lab.init("host1"))
    until = time.monotonic() + 5
    while any(map(is_alive, inside[0])) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(is_alive, inside[0]))
    assert all(map(is_alive, inside[1]))
    states = [host["state"] for host in lab.status()["hosts"]]
    assert states == ["off", "on"]
    with pytest.raises(Unavailable, match="host1 is off"):
        lab.run("host1", ["true"])


def test_the_command_line(name: str, root: Path, make: Callable[..., Lab]) -> None:
    make()
    godwit = [str(Path(sys.executable).with_name("godwit")), "lab"]

    def ask(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*godwit, *words], input=stdin, capture_output=True, text=True, timeout=60, check=False
        )

    view = json.loads(ask("status", "--name", name, "-o", "json").stdout)
    assert view["name"] == name
    assert view["store"] == "sqlite"
    assert [host["name"] for host in view["hosts"]] == ["host1", "host2"]
    network = {"name": "lan", "subnet": "10.91.0.0/22", "client_address": "10.91.0.1"}
    assert view["networks"] == [network]
    assert view["manager_url"].startswith("https://127.0.0.1:")

    script = "cat; hostname; echo to err >&2; exit 7"
    done = ask("exec", "--name", name, "host1", "--", "sh", "-c", script, stdin="words\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "words\nhost1\n", "to err\n")
    done = ask("exec", "--name", name, "client", "--", "ip", "-br", "address", "show", "lan0")
    assert "10.91.0.1/22" in done.stdout
    here = ask("exec", "--name", name, "client", "--", "cat", __file__)
    assert here.stdout == Path(__file__).read_text()  # the client keeps the real file system
    assert ask("exec", "--name", name, "client", "--", "sh", "-c", "kill -9 $$").returncode == 137

    wrong = ask("exec", "--name", name, "host7", "--", "true")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[0] == "error: there is no 'host7' in this lab"
    assert ask("fault", "power-off", "host7", "--name", name).returncode == 3
    assert ask("status", "--name", "nobodys").returncode == 3
    assert ask("up", "--name", name).returncode == 4
    logs = ask("logs", "--name", name, "host1", "supervisor")
    assert "agent is ready" in logs.stdout
