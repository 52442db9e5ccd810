"""Starts and ends the nodes of a lab: each a private root, PID, mount and network namespace."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

from godwit.host.namespaces import HostPlan, Step, launch, observe_layout, python_paths, root_steps
from godwit.host.process import Process, kill, open_pidfd, spawn
from godwit.host.sockets import bind_packets, bind_unix
from godwit.lab import groups, older, serving
from godwit.lab.configs import API, ETC, LOGS, RUN, STATE
from godwit.lab.layout import CONTROL, STORAGE, Layout
from godwit.model.errors import OperationFailed

# Beside what every host sees: for QEMU, which runs as a user of its own.
_DEVICES = {"kvm": "0666", "userfaultfd": "0666", "vhost-net": "0666"}
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_END_S = 10.0


def listener(port: int = 0) -> socket.socket:
    """The API's socket, on the real machine's loopback; port 0 is any free one."""
    return socket.create_server(("127.0.0.1", port), backlog=128)


def plan(
    layout: Layout, node: str, *, control_fd: int, fds: Mapping[str, int], qemu_binary: str = ""
) -> HostPlan:
    """How a node is launched: what its root holds, and its supervisor. Makes its group."""
    group = layout.cgroup(node)
    entries = groups.create(group)
    folder = layout.node_dir(node)
    writable = {str(STATE): str(folder / "state"), str(LOGS): str(layout.logs(node))}
    shown: list[Step] = [
        {"op": "directory", "dst": str(RUN)},
        # To write, for certificates are renewed there.
        {"op": "bind", "src": str(folder / "etc"), "dst": str(ETC)},
        {"op": "bind", "src": str(layout.boot_id(node)), "dst": _BOOT_ID, "ro": True},
    ]
    if node == STORAGE:
        writable |= serving.places(layout)
        shown += [{"op": "directory", "dst": path} for path in serving.DIRECTORIES]
        if (names := serving.hosts_file(layout)) is not None:
            shown.append({"op": "bind", "src": str(names), "dst": "/etc/hosts", "ro": True})
    elif node != CONTROL:
        if layout.storage != "nfs":
            writable["/clusterstorage/shared"] = str(layout.volume)
        for path in (*layout.more_volumes(), *layout.own_volumes(node)):
            writable[f"/clusterstorage/{path.name}"] = str(path)
        images = str(STATE / "images")
        shown.append({"op": "bind", "src": str(layout.images), "dst": images, "ro": True})
        shown += older.shown(layout)
        if layout.watchdog(node).is_socket():
            device = str(layout.watchdog(node))
            shown.append({"op": "bind", "src": device, "dst": "/dev/watchdog"})
    steps = root_steps(
        observe_layout(cgroup=group, devices=tuple(_DEVICES)),
        read_only=(*python_paths(), *_prefix_of(qemu_binary)),
        writable=writable,
        device_modes=_DEVICES,
    )
    given = [word for name, number in fds.items() for word in ("--fd", f"{name}={number}")]
    return HostPlan(
        argv=(
            *(sys.executable, "-I", "-m", "godwit.lab.supervisor", str(ETC / "units.json")),
            *("--control-fd", str(control_fd), *given, "--node", f"{layout.name}/{node}"),
        ),
        hostname=node,
        root=str(folder / "root"),
        steps=(*steps, *shown),
        netns=layout.netns(node),
        env={"LANG": "C.UTF-8"},
        cgroup_procs=entries,
    )


def _prefix_of(binary: str) -> tuple[str, ...]:
    """What to show for a QEMU beside the installed one: all of it, for it looks beside itself."""
    path = Path(binary)
    if not path.is_absolute() or path.is_relative_to("/usr"):
        return ()
    return (str(path.parents[2] if path.parts[-3:-1] == ("usr", "bin") else path.parent),)


def start(
    layout: Layout, node: str, *, api: socket.socket | None = None, qemu_binary: str = ""
) -> Process:
    """Launch a node whose directories, wires and files are there; its first process.

    ``qemu_binary``: the QEMU of its configuration, which has to be visible inside.
    """
    path = layout.control_socket(node)
    path.unlink(missing_ok=True)
    # Nodes share a kernel, and yet each power-on is a boot of its own to everybody who asks.
    layout.boot_id(node).write_text(f"{uuid.uuid4()}\n")
    with bind_unix(path) as control:
        fds = {API: api.fileno()} if api is not None else {}
        wanted = plan(layout, node, control_fd=control.fileno(), fds=fds, qemu_binary=qemu_binary)
        return launch(
            wanted,
            stdout=layout.logs(node) / "supervisor.log",
            stderr=layout.logs(node) / "supervisor.log",
            pass_fds=(control.fileno(), *fds.values()),
        )


def start_watchdog(layout: Layout) -> None:
    """Start what every host of a lab sees as its watchdog; OperationFailed when that fails."""
    entries = groups.create(layout.watchdog_group)
    layout.watchdog_log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        words, descriptors = [], []
        for host in layout.host_names:
            listener = opened.enter_context(bind_packets(layout.watchdog(host)))
            words += ["--fd", f"{host}={listener.fileno()}"]
            descriptors.append(listener.fileno())
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        opened.callback(os.close, read_end)
        process = spawn(
            [
                # So that it is nobody's child when this command ends.
                *("setsid", "--fork", sys.executable, "-I", "-m", "godwit.lab.watchdog"),
                *("--name", layout.name, "--root", str(layout.state_root), *words),
                *(word for entry in entries for word in ("--enter", entry)),
                *("--ready-fd", str(write_end)),
            ],
            stderr=layout.watchdog_log,
            pass_fds=(*descriptors, write_end),
        )
        os.close(write_end)
        os.waitpid(process.pid, 0)
        if not _said_ready(read_end):
            raise OperationFailed(
                "the watchdogs do not start",
                hint=f"look: godwit lab up --retain, then {layout.watchdog_log}",
            )


def _said_ready(descriptor: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(_END_S * 1000)) and os.read(descriptor, 16) == b"ready"


def make_directories(layout: Layout, node: str) -> None:
    """The directories that a node is launched on; fine when they are there."""
    folder = layout.node_dir(node)
    for path in (folder / "root", folder / "etc", folder / "state", layout.logs(node)):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "etc").chmod(0o755)


def end(layout: Layout, node: str, first: Process | None) -> None:
    """Kill a node with everything inside, at once, as if its power were cut."""
    groups.thaw(layout.cgroup(node))
    if first is not None:
        kill(first)
        _await_end(first)
    groups.clear(layout.cgroup(node))
    layout.control_socket(node).unlink(missing_ok=True)


def _await_end(process: Process) -> None:
    try:
        descriptor = open_pidfd(process)
    except OperationFailed:
        return
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        if not poller.poll(_END_S * 1000):
            raise OperationFailed(
                f"process {process.pid} does not end", hint="look: cat /proc/PID/stack"
            )
    finally:
        os.close(descriptor)
