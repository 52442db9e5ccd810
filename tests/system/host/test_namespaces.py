"""Hosts in namespaces of their own: what they see, and that nothing outlives them."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path

import pytest

from godwit.host import links, netns, process
from godwit.host import namespaces as nsp
from godwit.host.cgroup import open_cgroup
from godwit.host.errors import NamespaceError, ProcessGone, ProgramFailed
from godwit.host.process import Process

pytestmark = pytest.mark.system
SLEEP = ("sleep", "1000")


def plan(folder: Path, *, name: str = "host1", **changes: object) -> nsp.HostPlan:
    state, shared = folder / name / "state", folder / "shared"
    state.mkdir(parents=True, exist_ok=True)
    shared.mkdir(exist_ok=True)
    steps = nsp.root_steps(
        nsp.observe_layout(),
        read_only=nsp.python_paths(),
        writable={"/var/lib/godwit": str(state), "/clusterstorage": str(shared)},
    )
    values: dict[str, object] = {
        "argv": SLEEP,
        "hostname": name,
        "root": str(folder / name / "root"),
        "steps": steps,
    }
    return nsp.HostPlan(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path, mark: str) -> Path:
    # The mark in the path is what the leak check looks for in the table of mounts.
    path = tmp_path / mark
    path.mkdir()
    return path


def inside(host: Process, *argv: str) -> str:
    return nsp.enter(host, list(argv), timeout=20).decode().strip()


async def end(host: Process) -> None:
    process.kill(host)
    async with asyncio.timeout(5):
        await process.wait_exit(host)


def members(folder: Path) -> list[int]:
    """Processes whose mounts mention a folder: those of hosts built there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            if str(folder) in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("pivot", [True, False])
async def test_a_host_sees_only_its_own(folder: Path, pivot: bool) -> None:
    (folder / "secret").write_text("of the machine")
    host = nsp.launch(plan(folder, pivot=pivot))
    try:
        assert inside(host, "hostname") == "host1"
        assert inside(host, "ls", ".") == inside(host, "ls", "/")
        assert "tests" not in inside(host, "ls", "..")
        pids = inside(host, "sh", "-c", "echo /proc/[0-9]*").split()
        assert pids[0] == "/proc/1"
        assert len(pids) <= 3
        assert inside(host, "readlink", "/proc/1/exe").endswith("sleep")
        assert inside(host, "ls", "/tmp", "/run") == "/run:\n\n/tmp:"
        with pytest.raises(ProgramFailed):
            inside(host, "cat", str(folder / "secret"))
        with pytest.raises(ProgramFailed, match="Read-only"):
            inside(host, "touch", "/usr/x")
        with pytest.raises(ProgramFailed, match="Read-only"):
            inside(host, "touch", "/etc/x")
        assert inside(host, "ls", "/sys/class/net") == "lo"
        assert "UP" in inside(host, "ip", "-br", "link", "show", "lo")
        shown = inside(host, "cat", "/proc/self/mounts").splitlines()
        assert len(shown) < 60
        assert not [line for line in shown if " / ext4 " in line]
        inside(host, "sh", "-c", "echo x > /dev/null; head -c1 /dev/urandom > /dev/zero")
        assert (
            inside(host, sys.executable, "-c", "import godwit.host.run, pydantic; print(1)") == "1"
        )
    finally:
        await end(host)


async def test_state_and_shared_directories(folder: Path) -> None:
    one, two = nsp.launch(plan(folder)), nsp.launch(plan(folder, name="host2"))
    try:
        inside(one, "sh", "-c", "echo mine > /var/lib/godwit/x; echo ours > /clusterstorage/x")
        assert inside(two, "ls", "/var/lib/godwit") == ""
        assert inside(two, "cat", "/clusterstorage/x") == "ours"
        assert (folder / "host1/state/x").read_text() == "mine\n"
    finally:
        await end(one)
        await end(two)


async def test_one_host_cannot_reach_anothers_socket(folder: Path) -> None:
    one, two = nsp.launch(plan(folder)), nsp.launch(plan(folder, name="host2"))
    bind = "import socket,sys;s=socket.socket(socket.AF_UNIX);s.bind('/run/g.sock');s.listen()"
    call = "import socket,sys;s=socket.socket(socket.AF_UNIX);s.connect('/run/g.sock')"
    server = process.spawn(
        nsp.enter_argv(one.pid, [sys.executable, "-c", f"{bind};s.accept();s.accept()"])
    )
    try:
        async with asyncio.timeout(5):
            while not Path(f"/proc/{one.pid}/root/run/g.sock").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        inside(one, sys.executable, "-c", call)  # the check can succeed
        with pytest.raises(ProgramFailed, match="FileNotFoundError"):
            inside(two, sys.executable, "-c", call)
    finally:
        await end(one)
        await end(two)
        await process.wait_exit(server)


async def test_everything_dies_with_the_first_process(folder: Path, ns: str) -> None:
    host = nsp.launch(plan(folder))
    try:
        links.apply([links.veth("w0", "far0", peer_netns=host.pid)], netns=ns)
        assert "far0" in inside(host, "ip", "-br", "link")
        # A child that has left its session and its parent.
        inside(host, "sh", "-c", "setsid --fork sleep 1000 >/dev/null 2>&1")
        assert len(members(folder)) == 2
    finally:
        await end(host)
    assert members(folder) == []
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert list((folder / "host1/root").iterdir()) == []
    async with asyncio.timeout(5):  # the kernel takes the other end away a little later
        while "w0" in links.show(ns):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    with pytest.raises(ProcessGone):
        inside(host, "true")


async def test_joining_a_named_network_namespace(folder: Path, ns: str) -> None:
    links.apply([links.bridge("br0", mac="02:00:00:00:00:07")], netns=ns)
    host = nsp.launch(plan(folder, netns=ns))
    try:
        assert inside(host, "cat", "/sys/class/net/br0/address") == "02:00:00:00:00:07"
    finally:
        await end(host)
    assert "br0" in links.show(ns)


async def test_its_own_control_groups(folder: Path) -> None:
    top = open_cgroup(f"godwit-test-{os.getpid()}/host1")
    top.create()
    name = top.name
    procs = tuple(str(p / "cgroup.procs") for p in Path("/sys/fs/cgroup").glob(f"*/{name}"))
    steps = nsp.root_steps(nsp.observe_layout(cgroup=name), read_only=nsp.python_paths())
    host = nsp.launch(plan(folder, steps=steps, cgroup_procs=procs))
    try:
        assert top.pids() == (host.pid,)
        code = (
            "from godwit.host.cgroup import open_cgroup;import os,json;"
            "g=open_cgroup('godwit/h1/web');g.create();g.add_process(os.getpid());"
            "g.set_quota(0.5);print(json.dumps([g.version,list(g.pids())==[os.getpid()],g.quota()]))"
        )
        assert json.loads(inside(host, sys.executable, "-c", code)) == [top.version, True, 0.5]
        made = [str(p) for p in Path("/sys/fs/cgroup").glob(f"cpu/{name}/godwit/h1/web")]
        assert len(made) == 1
        inside(
            host,
            sys.executable,
            "-c",
            "from godwit.host.cgroup import open_cgroup as o;o('godwit/h1/web').remove()",
        )
        inside(host, "sh", "-c", "for d in /sys/fs/cgroup/*/godwit; do rmdir $d/h1 $d; done")
        assert inside(host, "sh", "-c", "ls -d /sys/fs/cgroup/*/godwit-test* || true") == ""
        top.kill_all()
        assert not process.is_alive(host)
    finally:
        await end(host)
        top.remove()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"argv": ("godwit-no-such-program",)}, "No such file"),
        ({"steps": ({"op": "bind", "src": "/does/not/exist", "dst": "/x"},)}, "/does/not/exist"),
        ({"netns": "godwit-no-such-namespace"}, "godwit-no-such-namespace"),
        ({"cgroup_procs": ("/does/not/exist",)}, "/does/not/exist"),
        ({"cwd": "/does/not/exist"}, "/does/not/exist"),
    ],
)
async def test_failed_start_says_why_and_leaves_nothing(
    folder: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(NamespaceError, match=said):
        nsp.launch(plan(folder, **changes))
    assert members(folder) == []


async def test_descriptors_and_output_are_passed_on(folder: Path) -> None:
    read_end, write_end = os.pipe()
    log = folder / "log"
    host = nsp.launch(
        plan(
            folder,
            argv=(
                "sh",
                "-c",
                f"echo to the log; echo there > /proc/self/fd/{write_end}; sleep 1000",
            ),
        ),
        pass_fds=[write_end],
        stdout=log,
    )
    os.close(write_end)
    assert os.read(read_end, 100) == b"there\n"
    await end(host)
    assert os.read(read_end, 100) == b""  # no one else holds the other end
    os.close(read_end)
    assert log.read_text() == "to the log\n"


NESTED = """
import json, os
from godwit.host import namespaces as n, process
steps = n.root_steps(n.observe_layout(), read_only=n.python_paths())
host = n.launch(n.HostPlan(argv=("sleep", "1000"), hostname="deep", root="/run/root", steps=steps))
look = "hostname; echo /proc/[0-9]*; ls /; cat /proc/self/mounts"
told = n.enter(host, ["sh", "-c", look], timeout=9)
left = os.listdir("/run/root"), open("/proc/1/mounts").read()
process.kill(host)
print(json.dumps([told.decode(), *left]))
"""


@pytest.mark.parametrize("jail", ["", "/jail"])
async def test_where_mounts_are_shared_and_in_a_chroot(folder: Path, jail: str) -> None:
    # A host stands in for a machine whose mounts are shared, as systemd's are.  Below /jail lies
    # what a freshly unpacked system is: a plain directory, no mount point.
    base = plan(folder)
    below = [{**step, "dst": f"/jail{step['dst']}"} for step in base.steps]
    outer = nsp.launch(plan(folder, steps=(*base.steps, *below)))
    try:
        inside(outer, "mount", "--make-rshared", "/")
        enter = ("chroot", jail) if jail else ()
        text = inside(outer, *enter, sys.executable, "-c", NESTED)
        told, left, mounts = json.loads(text)
        lines = told.splitlines()
        assert lines[0] == "deep"
        assert lines[1].startswith("/proc/1 ")
        assert "jail" not in told
        assert left == []
        assert "/run/root" not in mounts
    finally:
        await end(outer)


async def test_starting_a_host_is_quick(folder: Path) -> None:
    spent, entered = [], []
    for _ in range(5):
        start = time.perf_counter()
        host = nsp.launch(plan(folder))
        spent.append((time.perf_counter() - start) * 1000)
        start = time.perf_counter()
        inside(host, "true")
        entered.append((time.perf_counter() - start) * 1000)
        await end(host)
    start_ms, enter_ms = statistics.median(spent), statistics.median(entered)
    print(f"host start {start_ms:.0f} ms, enter {enter_ms:.1f} ms")
    assert start_ms < 1000


async def test_terminal_command_gives_its_status(folder: Path) -> None:
    host = nsp.launch(plan(folder))
    try:
        assert nsp.enter_attached(host, ["sh", "-c", "exit 3"]) == 3
    finally:
        await end(host)


async def test_named_namespaces_are_listed(ns: str) -> None:
    assert ns in netns.names()
