"""Runs as a program of its own: becomes the first process of a new "host" and execs what it runs.

Started by ``namespaces.launch`` by its path, with ``python -I -S``, so it imports nothing of this
package and starts in milliseconds.  Arguments: a descriptor to read the plan (JSON) from, and one
to report on.  Reports are lines of JSON: ``{"pid": N, "start": TICKS}``, as the starter counts
processes, and either ``{"error": "..."}`` or ``{"ready": true}`` just before the exec, which
closes the pipe.

Mounts are made private before the first one is changed, so nothing reaches the machine and all of
it vanishes with the last process inside.  Where pivot_root is refused (the starter lives in a
chroot, or on an initramfs), the new root is moved over the old one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import signal
import socket
import stat
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 0x1000, 0x2000, 0x4000, 0x40000
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x8000000, 0x20000000, 0x40000000
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
_KEEP = {"ro": MS_RDONLY, "nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _raw(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        _raw(source), _raw(target), _raw(kind), ctypes.c_ulong(flags), _raw(data) if data else None
    )
    _check(result, f"mount {source or kind} on {target}")


def _mounts_below(path: str) -> list[tuple[str, int]]:
    """Mount points at and below a path with the flags they have, outermost first."""
    found = []
    with open("/proc/self/mountinfo", "rb") as lines:  # noqa: PTH123
        for line in lines:
            fields = line.split()
            # The kernel writes blanks and backslashes of a path as octal escapes.
            raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), fields[4])
            point = os.fsdecode(raw)
            if point == path or point.startswith(path.rstrip("/") + "/"):
                flags = sum(_KEEP.get(word, 0) for word in fields[5].decode().split(","))
                found.append((point, flags))
    return found


def _make_read_only(path: str) -> None:
    # Remounting changes one mount; those bound along below it are changed one by one.
    for point, flags in _mounts_below(path):
        mount(None, point, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)


def _prepare_target(target: str, *, directory: bool) -> None:
    if directory:
        os.makedirs(target, mode=0o755, exist_ok=True)  # noqa: PTH103
        return
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)  # noqa: PTH103, PTH120
    if not os.path.exists(target):  # noqa: PTH110 - it may lie where nothing can be written
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))


def _bind(step: dict[str, Any], target: str) -> None:
    source = step["src"]
    _prepare_target(target, directory=os.path.isdir(source))  # noqa: PTH112
    mount(source, target, None, MS_BIND | MS_REC)
    if step.get("ro"):
        _make_read_only(target)


def _tmpfs(step: dict[str, Any], target: str) -> None:
    _prepare_target(target, directory=True)
    mount("tmpfs", target, "tmpfs", MS_NOSUID, f"mode={step.get('mode', '0755')}")


def _proc(step: dict[str, Any], target: str) -> None:
    _prepare_target(target, directory=True)
    mount("proc", target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def _sysfs(step: dict[str, Any], target: str) -> None:
    # A fresh sysfs shows the links of the new network namespace; a bind would show the old ones.
    _prepare_target(target, directory=True)
    mount("sysfs", target, "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def _devpts(step: dict[str, Any], target: str) -> None:
    _prepare_target(target, directory=True)
    mount("devpts", target, "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")


def _device(step: dict[str, Any], target: str) -> None:
    # A node of its own may get a mode of its own.  Where nodes may not be made (inside some
    # containers) the machine's is bound, with the machine's mode.
    source = step["src"]
    info = os.stat(source)  # noqa: PTH116
    _prepare_target(os.path.dirname(target), directory=True)  # noqa: PTH120
    try:
        os.mknod(target, stat.S_IFCHR | 0o600, info.st_rdev)
        os.chmod(target, int(step.get("mode", "0600"), 8))  # noqa: PTH101
    except PermissionError:
        _bind({"src": source}, target)


def _symlink(step: dict[str, Any], target: str) -> None:
    _prepare_target(os.path.dirname(target), directory=True)  # noqa: PTH120
    os.symlink(step["src"], target)  # noqa: PTH211


def _directory(step: dict[str, Any], target: str) -> None:
    _prepare_target(target, directory=True)
    os.chmod(target, int(step.get("mode", "0755"), 8))  # noqa: PTH101


STEPS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "bind": _bind,
    "tmpfs": _tmpfs,
    "proc": _proc,
    "sysfs": _sysfs,
    "devpts": _devpts,
    "device": _device,
    "symlink": _symlink,
    "directory": _directory,
}


def _leave_shared_mounts() -> None:
    """Make all mounts private, also when our root is a directory inside the real root."""
    ours = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    own_namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    # Entering the mount namespace we are in leads out of a chroot, to its real root.
    _check(_libc.setns(own_namespace, CLONE_NEWNS), "setns")
    os.close(own_namespace)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    os.fchdir(ours)
    os.close(ours)
    os.chroot(".")
    os.chdir("/")


def _unmount_all_but(root: str) -> None:
    """Take away what the new root does not stand on; it holds its own copies of what it shows."""
    inside = root.rstrip("/") + "/"
    for point, _ in reversed(_mounts_below("/")):
        below = (point + "/").startswith(inside)
        above = inside.startswith(point.rstrip("/") + "/")
        if not below and not above:
            _libc.umount2(_raw(point), MNT_DETACH)


def _enter_root(root: str, *, pivot: bool) -> None:
    """Make a prepared directory our root and forget the old one."""
    os.chdir(root)
    if pivot:
        number = SYS_PIVOT_ROOT.get(os.uname().machine)
        done = -1 if number is None else _libc.syscall(ctypes.c_long(number), b".", b".")
        if done == 0:
            # The old root now lies over the new one; without it the new one shows.
            _check(_libc.umount2(b".", MNT_DETACH), "umount of the old root")
            os.chdir("/")
            return
        if number is not None and ctypes.get_errno() != errno.EINVAL:
            _check(done, "pivot_root")
    _unmount_all_but(root)
    mount(".", "/", None, MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sH22x", b"lo", 0x1 | 0x8 | 0x40))


def _become_host(plan: dict[str, Any]) -> None:
    root = plan["root"]
    _leave_shared_mounts()
    os.umask(0o022)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "mode=0755")
    for step in plan["steps"]:
        STEPS[step["op"]](step, root.rstrip("/") + step["dst"])
    _enter_root(root, pivot=plan["pivot"])
    socket.sethostname(plan["hostname"])
    _loopback_up()


def _inner(plan: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    os.setsid()
    _become_host(plan)
    os.chdir(plan["cwd"])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    report({"ready": True})
    os.execvpe(plan["argv"][0], plan["argv"], plan["env"])  # noqa: S606


def _start_time(pid: int) -> int:
    """Start of a child in clock ticks since boot, so that its number cannot be mistaken later."""
    with open(f"/proc/{pid}/stat", "rb") as stream:  # noqa: PTH123
        return int(stream.read().rpartition(b")")[2].split()[19])


def main() -> None:
    """Read the plan, make the namespaces, report the first process's number, become it."""
    plan_fd, report_fd = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(report_fd, False)

    def report(value: dict[str, Any]) -> None:
        os.write(report_fd, json.dumps(value).encode() + b"\n")

    try:
        with os.fdopen(plan_fd, "rb") as stream:
            plan = json.loads(stream.read())
        for path in plan["cgroup_procs"]:
            with open(path, "w") as stream_out:  # noqa: PTH123
                stream_out.write("0")
        flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC
        if plan["netns"]:
            descriptor = os.open(plan["netns"], os.O_RDONLY | os.O_CLOEXEC)
            _check(_libc.setns(descriptor, CLONE_NEWNET), f"setns {plan['netns']}")
            os.close(descriptor)
        else:
            flags |= CLONE_NEWNET
        _check(_libc.unshare(flags), "unshare")
        pid = os.fork()
        if pid:
            report({"pid": pid, "start": _start_time(pid)})
            os._exit(0)
        _inner(plan, report)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1].name
        report({"error": f"{where}: {error}"})
        os._exit(1)


if __name__ == "__main__":
    main()
