"""The units under a real systemd: VMs outlive every one of them.

systemd is the first process of a host of its own, as in a lab: own root, processes, network and
control groups. What is installed is what `packaging/` has; only the paths of the programs differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from godwit.host.errors import ProgramFailed
from godwit.host.namespaces import (
    HostPlan,
    Step,
    enter,
    launch,
    observe_layout,
    python_paths,
    root_steps,
)
from godwit.host.process import Process, kill, wait_exit
from godwit.lab.image import cache_root, find_demo_image
from godwit.lab.publish import publish_image

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
SYSTEMD = Path("/lib/systemd/systemd")
TREES = Path("/sys/fs/cgroup")
UNITS = ("store", "manager", "guard", "agent")
DEVICES = {"kvm": "0666", "userfaultfd": "0666", "vhost-net": "0666"}

# No journal and no udev here; what belongs to the units themselves is untouched.
DROP_IN = """\
[Unit]
DefaultDependencies=no
[Service]
StandardOutput=append:/var/log/%n.log
StandardError=append:/var/log/%n.log
"""


class Systemd:
    """A host whose first process is systemd."""

    def __init__(
        self,
        root: Path,
        name: str = "host1",
        *,
        netns: str | None = None,
        shared: Path | None = None,
    ) -> None:
        self.root = root
        self.name = name
        self.netns = netns
        self.shared = shared
        self.group = f"godwit-systemd-{os.getpid()}-{name}"
        self.first: Process | None = None

    def start(self) -> None:
        etc = self.root / "etc"
        shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
        system = etc / "systemd" / "system"
        shutil.rmtree(system, ignore_errors=True)
        (system / "godwit-.service.d").mkdir(parents=True)
        (system / "godwit-.service.d" / "test.conf").write_text(DROP_IN)
        (system / "network-online.target").write_text("[Unit]\nDefaultDependencies=no\n")
        (system / "begin.target").write_text("[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\n")
        for name in UNITS:
            text = (ROOT / "packaging" / "systemd" / f"godwit-{name}.service").read_text()
            mine = text.replace("/usr/bin/godwit-", f"{BIN}/godwit-")
            (system / f"godwit-{name}.service").write_text(mine)
        shutil.rmtree(etc / "godwit", ignore_errors=True)
        users = ROOT / "packaging" / "sysusers.d" / "godwit.conf"
        subprocess.run(["systemd-sysusers", f"--root={self.root}", users], check=True)
        writable = {"/etc": etc}
        for name in ("/var/lib", "/var/log", "/clusterstorage"):
            writable[name] = self.root / name[1:]
            writable[name].mkdir(parents=True, exist_ok=True)
        writable["/clusterstorage/shared"] = self.shared
        images = self.root / "var/lib/godwit/images"
        images.mkdir(parents=True)
        image = find_demo_image(cache_root())
        assert image is not None, "scripts/setup has not been run"
        publish_image(image, images)
        entries = self._groups()
        paths = python_paths()
        steps: list[Step] = [
            {"op": "directory", "dst": str(above)}
            for path in paths
            for above in reversed(Path(path).parents[:-1])
        ]
        steps += root_steps(
            observe_layout(cgroup=self.group, devices=tuple(DEVICES)),
            read_only=paths,
            writable={name: str(path) for name, path in writable.items()},
            device_modes=DEVICES,
        )
        plan = HostPlan(
            argv=(str(SYSTEMD), "--system", "--unit=begin.target", "--log-target=console"),
            hostname=self.name,
            root=str(self.root / "root"),
            netns=self.netns,
            steps=tuple(steps),
            env={"container": "godwit-test", "LANG": "C.UTF-8"},
            cgroup_procs=entries,
        )
        log = self.root / "systemd.log"
        self.first = launch(plan, stdout=log, stderr=log)
        self.wait(lambda: self.run("systemctl", "is-system-running").strip() == "running")

    def _groups(self) -> tuple[str, ...]:
        """A group in every tree: systemd wants more of them than a lab."""
        made = []
        for tree in (TREES,) if (TREES / "cgroup.procs").exists() else sorted(TREES.iterdir()):
            if tree.is_symlink() or not (tree / "cgroup.procs").exists():
                continue
            (tree / self.group).mkdir(exist_ok=True)
            if (tree / "cpuset.cpus").exists():  # a new group of this tree has none
                for name in ("cpuset.cpus", "cpuset.mems"):
                    (tree / self.group / name).write_text((tree / name).read_text())
            made.append(str(tree / self.group / "cgroup.procs"))
        return tuple(made)

    def run(self, *argv: str, stdin: str = "") -> str:
        assert self.first is not None
        path = f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {"PATH": path, "LANG": "C.UTF-8"}
        try:
            out = enter(self.first, argv, timeout=120, env=environment, stdin=stdin.encode())
        except ProgramFailed as error:
            if argv[0] == "systemctl":
                return error.stderr
            raise
        return out.decode()

    def wait(self, condition: Any, *, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        files = [self.root / "systemd.log", *(self.root / "var/log").glob("godwit-*.log")]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in files)

    def main_pid(self, unit: str) -> int:
        return int(self.run("systemctl", "show", "-P", "MainPID", f"godwit-{unit}"))

    def close(self) -> None:
        if self.first is not None:
            kill(self.first)
            asyncio.run(asyncio.wait_for(wait_exit(self.first), 20))
        for tree in (TREES, *TREES.iterdir()):
            group = tree / self.group
            for path in sorted(group.rglob("*"), reverse=True) if group.is_dir() else ():
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
            with contextlib.suppress(OSError):
                group.rmdir()


@pytest.fixture(scope="module")
def able() -> None:
    if os.geteuid() != 0 or not SYSTEMD.exists():
        pytest.skip("needs root and systemd")
    if any(str(BIN).startswith(home) for home in ("/root/", "/home/")):
        pytest.skip("units may not see home directories, and this clone lies in one")


def _ip(*words: str, netns: str = "") -> None:
    where = ("-n", netns) if netns else ()
    subprocess.run(["ip", *where, *words], check=True)


@pytest.fixture(scope="module")
def wired() -> Iterator[dict[str, str]]:
    """A network namespace for each host: on the management network, and with `lan0`."""
    switch = f"gsd{os.getpid()}s"
    names = {f"host{number}": f"gsd{os.getpid()}h{number}" for number in (1, 2)}
    try:
        _ip("netns", "add", switch)
        for bridge in ("mgmt", "lan"):
            _ip("link", "add", bridge, "type", "bridge", netns=switch)
            _ip("link", "set", bridge, "up", netns=switch)
        for number, netns in enumerate(names.values(), start=1):
            _ip("netns", "add", netns)
            for bridge in ("mgmt", "lan"):
                port, inner = f"{bridge}{number}", f"{bridge}0"
                _ip(
                    *("link", "add", port, "type", "veth", "peer", "name", inner),
                    *("netns", netns),
                    netns=switch,
                )
                _ip("link", "set", port, "master", bridge, "up", netns=switch)
                _ip("link", "set", inner, "up", netns=netns)
            _ip("addr", "add", f"10.0.0.{10 + number}/24", "dev", "mgmt0", netns=netns)
        yield names
    finally:
        for netns in (switch, *names.values()):
            subprocess.run(["ip", "netns", "del", netns], check=False, capture_output=True)


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, able: None, wired: dict[str, str]
) -> Iterator[dict[str, Systemd]]:
    tmp_path = tmp_path_factory.mktemp("systemd")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with contextlib.ExitStack() as stack:
        hosts = {}
        for name, netns in wired.items():
            (tmp_path / name).mkdir()
            hosts[name] = Systemd(tmp_path / name, name, netns=netns, shared=shared)
            stack.callback(hosts[name].close)
            hosts[name].start()
        yield hosts


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each command of the tutorial's blocks that name a host, with that host."""
    for block in re.findall(r"^```sh\n# (host\d\n.*?)^```$", page.read_text(), re.M | re.S):
        name, *lines = block.splitlines()
        for line in lines:
            yield name, shlex.split(line)


@pytest.fixture(scope="module")
def said(two: dict[str, Systemd]) -> dict[str, str]:
    """What the tutorial's commands answered, each carried out in order on the host it names."""
    page = ROOT / "docs" / "tutorial" / "deploy-a-cluster.md"
    token, out = "", {}
    for name, words in commands(page):
        line = " ".join(words)
        if words[:2] == ["godwit", "vm"]:
            _wait_for_hosts(two["host1"])
        stdin = token if words[:3] == ["godwit", "cluster", "join"] else ""
        out[line] = _patiently(two[name], words, stdin=stdin)
        if words[:4] == ["godwit", "cluster", "token", "create"]:
            token = out[line]
        if words[0] == "systemctl":
            for unit in words[3:]:
                state = two[name].run("systemctl", "is-active", unit).strip()
                assert state == "active", two[name].logs()
    return out


def _patiently(host: Systemd, words: list[str], *, stdin: str) -> str:
    """Again, as a person would, where the answer is "try later": this machine may be busy."""
    for _ in range(10):
        try:
            return host.run(*words, stdin=stdin)
        except ProgramFailed as error:
            if "try later" not in error.stderr:
                raise
    return host.run(*words, stdin=stdin)


def _rows(host: Systemd, noun: str) -> list[dict[str, Any]]:
    return json.loads(host.run("godwit", noun, "list", "-o", "json"))  # type: ignore[no-any-return]


def test_the_tutorial_does_what_it_says(two: dict[str, Systemd], said: dict[str, str]) -> None:
    assert len(said) >= 15
    assert "store: one store on one machine" in said["godwit cluster status"]
    moved = said["godwit vm migrate web --to host2"]
    assert moved.startswith("web: host1 → host2 (live), completed")
    [vm] = _rows(two["host1"], "vm")
    assert (vm["state"], vm["host"], vm["ha"]) == ("running", "host2", False)
    # These hosts have neither a watchdog nor a power device.
    with pytest.raises(ProgramFailed) as refused:
        two["host1"].run("godwit", "vm", "set", "web", "--ha", "on")
    assert "has no watchdog" in refused.value.stderr or "unarmed" in refused.value.stderr
    status = json.loads(two["host1"].run("godwit", "cluster", "status", "-o", "json"))
    assert [one["state"] for one in status["hosts"]] == ["up", "up"]
    # Secrets belong to whom the units run as.
    keys = ("/etc/godwit/ca/ca-key.pem", "/etc/godwit/tls/key.pem")
    assert two["host1"].run("stat", "-c", "%U %a", *keys).split("\n")[:2] == [
        "godwit 600",
        "root 600",
    ]


def test_vms_outlive_every_unit(two: dict[str, Systemd], said: dict[str, str]) -> None:
    first, host = two["host1"], two["host2"]
    runtime = "/run/godwit/vms/web/runtime.json"
    pid = json.loads(host.run("cat", runtime))["pid"]

    def unharmed() -> bool:
        found = json.loads(host.run("cat", runtime))
        alive = host.run("cat", f"/proc/{pid}/comm").startswith("qemu")
        return found["pid"] == pid and alive

    for where, unit in ((host, "agent"), (host, "guard"), (first, "manager"), (first, "store")):
        before = where.main_pid(unit)
        where.run("systemctl", "restart", f"godwit-{unit}")
        assert where.main_pid(unit) not in (0, before)
        assert unharmed(), where.logs()
    _wait_for_hosts(first)
    first.wait(lambda: [row["state"] for row in _rows(first, "vm")] == ["running"])
    # One that does not answer is replaced by its watchdog, and nobody else is touched.
    before = host.main_pid("agent")
    host.run("kill", "-STOP", str(before))
    host.wait(lambda: host.main_pid("agent") not in (0, before))
    first.wait(lambda: [row["state"] for row in _rows(first, "vm")] == ["running"])
    assert unharmed(), host.logs()


def _wait_for_hosts(host: Systemd) -> None:
    def up() -> bool:
        rows = json.loads(host.run("godwit", "host", "list", "-o", "json"))
        return [(row["state"], "lan" in row["networks"]) for row in rows] == [("up", True)] * 2

    host.wait(up)
