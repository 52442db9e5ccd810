"""A "host" of a lab: a process that is PID 1 of its own namespaces, over a root of its own.

:func:`root_steps` is pure and says what the root holds; :func:`launch` has ``nsinit`` do it.  The
host sees the machine's programs and libraries read-only, its own processes, devices, /run, /tmp
and state, and the directories it is given.  When its first process ends the kernel kills the
rest and its mounts vanish; nothing has to be cleaned up but the empty ``root`` directory, and a
named network namespace if one was given.

/etc is the machine's, read-only, except that /etc/godwit is the host's own if given (then the
machine's /etc must have that directory, for a read-only /etc cannot grow one).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from godwit.host.errors import NamespaceError, ProcessGone, ProgramMissing
from godwit.host.process import Process, Stream, is_alive, kill, spawn
from godwit.host.run import netns_path, run

Step = Mapping[str, str | bool]

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/boot")
_OPEN_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "net/tun")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Layout:
    """What of the machine a root is built from; see :func:`observe_layout`."""

    directories: tuple[str, ...]
    symlinks: tuple[tuple[str, str], ...]  # (path, target), like ("/bin", "usr/bin")
    devices: tuple[str, ...]
    cgroups: tuple[tuple[str, str], ...]  # (source, mount point) of the trees a host may write


def observe_layout(
    *, cgroup: str | None = None, devices: Sequence[str] = (), root: Path = Path("/")
) -> Layout:
    """Look at this machine.

    With ``cgroup`` (a name like ``godwit/lab/host1``, made already) a host sees only what lies
    below that group, as if it were the top; without, it gets no control groups.
    """
    directories, symlinks = [], []
    for name in _SYSTEM:
        path = root / name[1:]
        if path.is_symlink():
            symlinks.append((name, str(path.readlink())))
        elif path.is_dir():
            directories.append(name)
    wanted = (*_OPEN_DEVICES, "kvm", *devices)
    found = tuple(dict.fromkeys(d for d in wanted if (root / "dev" / d).exists()))
    groups: tuple[tuple[str, str], ...] = ()
    if cgroup is not None:
        groups = _cgroup_binds(root / "sys/fs/cgroup", cgroup)
    return Layout(tuple(directories), tuple(symlinks), found, groups)


def _cgroup_binds(tree: Path, name: str) -> tuple[tuple[str, str], ...]:
    if (tree / "cgroup.controllers").exists():
        return ((str(tree / name), "/sys/fs/cgroup"),)
    binds = [
        (str(entry / name), f"/sys/fs/cgroup/{entry.name}")
        for entry in sorted(tree.iterdir())
        if (entry / name).is_dir()
    ]
    return tuple(binds)


def python_paths() -> tuple[str, ...]:
    """Directories this interpreter and this package need, without those a root has anyway."""
    package = Path(__file__).resolve().parents[2]
    wanted = {package, Path(sys.prefix), Path(sys.base_prefix)}
    # A virtual environment's interpreter may be a chain of links through other prefixes.
    link = Path(sys.executable)
    while link.is_symlink():
        link = link.parent / link.readlink()
        wanted.add(link.parent.parent)
    wanted |= {path.resolve() for path in wanted}
    return outermost(map(str, wanted), shown=_SYSTEM)


def outermost(paths: Iterable[str], *, shown: Sequence[str] = ()) -> tuple[str, ...]:
    """The absolute paths that lie below no other one, nor at or below one of ``shown``; pure."""
    left = {Path(p) for p in paths} - {Path("/"), Path()}
    known = {Path(p) for p in shown}
    left = {p for p in left if p not in known and not known & set(p.parents)}
    return tuple(sorted(str(p) for p in left if not left & set(p.parents)))


def root_steps(
    layout: Layout,
    *,
    read_only: Sequence[str] = (),
    writable: Mapping[str, str] | None = None,
    device_modes: Mapping[str, str] | None = None,
) -> tuple[Step, ...]:
    """What the root of a host holds, in the order of making; pure.

    ``read_only``: paths shown where they are.  ``writable``: path inside -> directory of the
    machine (for example ``/var/lib/godwit``, ``/clusterstorage``).
    """
    modes = {**dict.fromkeys(_OPEN_DEVICES, "0666"), **(device_modes or {})}
    steps: list[Step] = [{"op": "symlink", "src": to, "dst": path} for path, to in layout.symlinks]
    steps += [{"op": "bind", "src": p, "dst": p, "ro": True} for p in layout.directories]
    steps += [
        {"op": "proc", "dst": "/proc"},
        {"op": "sysfs", "dst": "/sys"},
        {"op": "tmpfs", "dst": "/dev", "mode": "0755"},
        {"op": "tmpfs", "dst": "/dev/shm", "mode": "1777"},  # noqa: S108
        {"op": "devpts", "dst": "/dev/pts"},
        {"op": "symlink", "src": "pts/ptmx", "dst": "/dev/ptmx"},
        {"op": "symlink", "src": "/proc/self/fd", "dst": "/dev/fd"},
        {"op": "symlink", "src": "/proc/self/fd/0", "dst": "/dev/stdin"},
        {"op": "symlink", "src": "/proc/self/fd/1", "dst": "/dev/stdout"},
        {"op": "symlink", "src": "/proc/self/fd/2", "dst": "/dev/stderr"},
    ]
    steps += [
        {"op": "device", "src": f"/dev/{d}", "dst": f"/dev/{d}", "mode": modes.get(d, "0600")}
        for d in layout.devices
    ]
    if layout.cgroups and layout.cgroups[0][1] != "/sys/fs/cgroup":
        steps.append({"op": "tmpfs", "dst": "/sys/fs/cgroup", "mode": "0755"})
    steps += [{"op": "bind", "src": src, "dst": dst} for src, dst in layout.cgroups]
    steps += [
        {"op": "tmpfs", "dst": "/run", "mode": "0755"},
        {"op": "tmpfs", "dst": "/tmp", "mode": "1777"},  # noqa: S108
        {"op": "directory", "dst": "/root", "mode": "0700"},
        {"op": "directory", "dst": "/var/tmp", "mode": "1777"},  # noqa: S108
        {"op": "directory", "dst": "/var/log"},
        {"op": "symlink", "src": "/run", "dst": "/var/run"},
    ]
    # Outer directories first, else they would hide inner ones; after /tmp and /run, which may
    # hold them.
    shown: list[Step] = [{"op": "bind", "src": p, "dst": p, "ro": True} for p in read_only]
    shown += [{"op": "bind", "src": src, "dst": dst} for dst, src in (writable or {}).items()]
    return (*steps, *sorted(shown, key=lambda step: str(step["dst"]).count("/")))


@dataclass(frozen=True, slots=True)
class HostPlan:
    """A host to be launched.

    ``root`` is an empty directory to build on; ``netns`` names a network namespace to join (None:
    a new one); ``cgroup_procs`` are files the first process enters before anything else, so that
    whatever it starts can be found and killed through them.
    """

    argv: tuple[str, ...]
    hostname: str
    root: str
    steps: tuple[Step, ...]
    netns: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    cgroup_procs: tuple[str, ...] = ()
    pivot: bool = True  # False only shows the way taken where pivot_root is refused

    def to_json(self) -> bytes:
        """The form ``nsinit`` reads."""
        plan: dict[str, Any] = {
            "argv": list(self.argv),
            "hostname": self.hostname,
            "root": self.root,
            "steps": [dict(step) for step in self.steps],
            "netns": None if self.netns is None else netns_path(self.netns),
            "env": {"PATH": _PATH, "HOME": "/root", **self.env},
            "cwd": self.cwd,
            "cgroup_procs": list(self.cgroup_procs),
            "pivot": self.pivot,
        }
        return json.dumps(plan).encode()


def launch(
    plan: HostPlan,
    *,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    pass_fds: Sequence[int] = (),
    timeout: float = 20.0,
) -> Process:
    """Start a host and return its first process, as this process counts them.

    Returns when its root stands and its program was started.  On an error nothing is left.  The
    first process is no child of ours: its end is heard through ``process.wait_exit``.
    """
    Path(plan.root).mkdir(parents=True, exist_ok=True)
    helper = Path(__file__).with_name("nsinit.py")
    with contextlib.ExitStack() as opened:
        plan_fd = os.memfd_create("plan", 0)
        opened.callback(os.close, plan_fd)
        os.write(plan_fd, plan.to_json())
        os.lseek(plan_fd, 0, os.SEEK_SET)
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        opened.callback(os.close, read_end)
        try:
            starter = spawn(
                [sys.executable, "-I", "-S", str(helper), str(plan_fd), str(write_end)],
                pass_fds=(plan_fd, write_end, *pass_fds),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
        finally:
            os.close(write_end)
        reports = _read_reports(read_end, timeout)
        first = Process(reports["pid"], reports["start"]) if "pid" in reports else None
        if first is not None and "ready" in reports and "error" not in reports:
            os.waitpid(starter.pid, 0)
            return first
        # One of them may hang; the starter goes first, so that it starts nothing more.
        kill(starter)
        os.waitpid(starter.pid, 0)
        if first is not None:
            kill(first)
    reason = reports.get("error", "it ended or hung before its program started")
    raise NamespaceError(f"cannot start host {plan.hostname}: {reason}")


def _read_reports(descriptor: int, timeout: float) -> dict[str, Any]:
    """Everything the helper reported until it closed the pipe or the time was up."""
    until = time.monotonic() + timeout
    text = b""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while (left := until - time.monotonic()) > 0 and poller.poll(left * 1000):
        chunk = os.read(descriptor, 65536)
        if not chunk:
            break
        text += chunk
    else:
        return {**_parse_reports(text), "error": f"no answer within {timeout:g} s"}
    return _parse_reports(text)


def _parse_reports(text: bytes) -> dict[str, Any]:
    reports: dict[str, Any] = {}
    for line in text.splitlines():
        reports.update(json.loads(line))
    return reports


async def launch_async(plan: HostPlan, **streams: Any) -> Process:
    """Like :func:`launch`, without blocking the event loop."""
    return await asyncio.to_thread(lambda: launch(plan, **streams))


def enter_argv(pid: int, argv: Sequence[str]) -> list[str]:
    """The command that runs ``argv`` in all namespaces, and in the root, of a host."""
    return [
        *("nsenter", "--target", str(pid), "--mount", "--uts", "--ipc", "--net", "--pid"),
        # --wd would be looked up before entering, and leave the program outside of the root.
        *("--root", "--wdns=/", "--", *argv),
    ]


def _inside_env(env: Mapping[str, str] | None) -> dict[str, str]:
    return {"PATH": _PATH, "HOME": "/root", **(env or {})}


def _must_live(host: Process) -> None:
    if not is_alive(host):
        raise ProcessGone(f"the host's first process {host.pid} has ended")


def enter(
    host: Process,
    argv: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
) -> bytes:
    """Run a program inside a host and return its standard output."""
    _must_live(host)
    return run(enter_argv(host.pid, argv), timeout=timeout, env=_inside_env(env), input=stdin)


def enter_attached(
    host: Process, argv: Sequence[str], *, env: Mapping[str, str] | None = None
) -> int:
    """Run a program inside a host on our own terminal; returns its exit status."""
    _must_live(host)
    try:
        return subprocess.call(enter_argv(host.pid, argv), env=_inside_env(env))
    except FileNotFoundError as error:
        raise ProgramMissing(["nsenter"]) from error
