"""What the root of a host holds, and in which order it is made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from godwit.host import namespaces as ns

LAYOUT = ns.Layout(
    directories=("/usr", "/etc"),
    symlinks=(("/bin", "usr/bin"),),
    devices=("null", "net/tun", "kvm", "userfaultfd"),
    cgroups=(("/sys/fs/cgroup/cpu/godwit/lab/h1", "/sys/fs/cgroup/cpu"),),
)


def test_system_directories_are_read_only() -> None:
    binds = {s["dst"]: s for s in ns.root_steps(LAYOUT) if s["op"] == "bind"}
    assert binds["/usr"]["ro"] is True
    assert binds["/etc"]["ro"] is True
    assert "ro" not in binds["/sys/fs/cgroup/cpu"]


def test_given_directories_come_after_what_would_hide_them() -> None:
    steps = ns.root_steps(
        LAYOUT,
        read_only=("/tmp/src",),
        writable={"/clusterstorage/a": "/x/a", "/clusterstorage": "/x", "/run/gw": "/y"},
    )
    order = [s["dst"] for s in steps]
    assert order.index("/tmp") < order.index("/tmp/src")
    assert order.index("/run") < order.index("/run/gw")
    assert order.index("/clusterstorage") < order.index("/clusterstorage/a")
    assert order.index("/sys") < order.index("/sys/fs/cgroup") < order.index("/sys/fs/cgroup/cpu")
    assert order.index("/dev") < order.index("/dev/null")


def test_device_modes() -> None:
    steps = ns.root_steps(LAYOUT, device_modes={"userfaultfd": "0666"})
    modes = {s["dst"]: s["mode"] for s in steps if s["op"] == "device"}
    assert modes == {
        "/dev/null": "0666",
        "/dev/net/tun": "0666",
        "/dev/kvm": "0600",
        "/dev/userfaultfd": "0666",
    }


def test_version_2_tree_is_bound_as_the_top() -> None:
    layout = ns.Layout((), (), (), (("/sys/fs/cgroup/godwit/h1", "/sys/fs/cgroup"),))
    on_it = [s for s in ns.root_steps(layout) if s["dst"] == "/sys/fs/cgroup"]
    assert on_it == [{"op": "bind", "src": "/sys/fs/cgroup/godwit/h1", "dst": "/sys/fs/cgroup"}]


def test_layout_of_a_tree(tmp_path: Path) -> None:
    for name in ("usr/bin", "etc", "dev/net", "sys/fs/cgroup/cpu/godwit/h1", "sys/fs/cgroup/pids"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    for name in ("null", "net/tun", "userfaultfd"):
        (tmp_path / "dev" / name).touch()
    found = ns.observe_layout(cgroup="godwit/h1", root=tmp_path)
    assert found.directories == ("/usr", "/etc")
    assert found.symlinks == (("/bin", "usr/bin"),)
    assert found.devices == ("null", "net/tun")
    assert [dst for _, dst in found.cgroups] == ["/sys/fs/cgroup/cpu"]
    assert "userfaultfd" in ns.observe_layout(devices=("userfaultfd",), root=tmp_path).devices
    assert ns.observe_layout(root=tmp_path).cgroups == ()


def test_outermost_paths() -> None:
    paths = ["/a/b", "/a", "/a/b/c", "/ab", "/usr", "/usr/lib/x", "/"]
    assert ns.outermost(paths, shown=("/usr",)) == ("/a", "/ab")


def test_python_paths_cover_interpreter_and_package() -> None:
    shown = [Path(p) for p in (*ns.python_paths(), "/usr")]
    for needed in (Path(sys.executable).resolve(), Path(ns.__file__).resolve()):
        assert any(p in needed.parents for p in shown)
    assert "/" not in ns.python_paths()


def test_enter_argv() -> None:
    assert ns.enter_argv(7, ["ps", "-e"])[-5:] == ["--root", "--wdns=/", "--", "ps", "-e"]


def test_plan_is_what_the_helper_reads() -> None:
    plan = ns.HostPlan(
        argv=("init",), hostname="h1", root="/r", steps=ns.root_steps(LAYOUT), netns="gw-lab-h1"
    )
    read = json.loads(plan.to_json())
    assert read["netns"] == "/run/netns/gw-lab-h1"
    assert read["env"]["PATH"].startswith("/usr/local/sbin")
    assert read["steps"][0] == {"op": "symlink", "src": "usr/bin", "dst": "/bin"}
