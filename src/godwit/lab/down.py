"""Takes a lab away, whatever state it is in: half made, running, or killed in all its parts.

What is to go is found by name (control groups, namespaces, directories), so it works without a
record too. Every step is fine when there is nothing to do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from godwit.host import netns
from godwit.host.process import Process, identify, kill
from godwit.lab import groups, record, small_volume
from godwit.lab.layout import (
    CLIENT,
    CONTROL,
    RUN_ROOT,
    STORAGE,
    SWITCH,
    WATCHDOG,
    Layout,
    state_root,
)
from godwit.lab.record import LabRecord
from godwit.model.errors import GodwitError

_ETC = Path("/etc/godwit")


def down(
    name: str,
    *,
    root: Path | None = None,
    keep_logs: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> bool:
    """Take a lab away; False when nothing of it was there.

    Conflict when another command works on it. OperationFailed when something resists.
    """
    folder = root or state_root()
    with record.exclusive(name):
        return remove(name, root=folder, keep_logs=keep_logs, say=say)


def remove(
    name: str,
    *,
    root: Path,
    keep_logs: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> bool:
    """Like :func:`down`, for one who works on the lab already."""
    try:
        known = record.peek(name, root=root)
    except GodwitError:
        known = None  # damaged: names are enough
    layout = known.layout(root) if known else Layout(name, 0, state_root=root)
    ended = _end_nodes(layout, known)
    if ended:
        say(f"ended {', '.join(ended)}")
    spaces = namespaces(layout)
    visitors = _end_visitors(spaces)
    if visitors:
        say(f"ended {visitors} visiting processes")
    for space in spaces:
        netns.delete(space)
    if spaces:
        say(f"removed {len(spaces)} network namespaces")
    _forget_context(name, known)
    if small_volume.unmount(layout):
        say(f"unmounted {layout.volume}")
    logs = _keep_logs(layout) if keep_logs else None
    found = bool(ended or spaces or known)
    for path in (layout.run, layout.state):
        if path.exists():
            found = True
            shutil.rmtree(path)
            say(f"removed {path}")
    if logs is not None:
        say(f"kept the logs in {logs}")
    _give_back_etc(known, root)
    for path in (RUN_ROOT, root):
        with contextlib.suppress(OSError):
            path.rmdir()
    return found


def namespaces(layout: Layout) -> list[str]:
    """The network namespaces of a lab that exist, however many hosts it has."""
    found = []
    for name in netns.names():
        place = name.removeprefix(layout.prefix)
        numbered = place.removeprefix("host").removeprefix("bmc")
        ours = numbered != place and numbered.isdigit()
        if name != place and (ours or place in (CONTROL, CLIENT, STORAGE, SWITCH, "check")):
            found.append(name)
    return found


def _end_nodes(layout: Layout, known: LabRecord | None) -> list[str]:
    """The first process of a node takes all the others along; groups hold even what it lost."""
    present = groups.of_lab(layout.name)
    for group in present:
        groups.thaw(group)
    for node in known.nodes if known else ():
        first = known.node(node) if known else None
        if first is not None:
            kill(first)
    for group in present:
        groups.clear(group)
    groups.remove_parents(layout.name)
    return [name for group in present if (name := group.rpartition("/")[2]) != WATCHDOG]


def _end_visitors(spaces: list[str]) -> int:
    """Whoever was started in a namespace from outside, like a probe of the client."""
    wanted = set()
    for space in spaces:
        with contextlib.suppress(OSError):
            status = Path(netns.netns_path(space)).stat()
            wanted.add((status.st_dev, status.st_ino))
    visitors = _inside(wanted)
    for process in visitors:
        kill(process)
    return len(visitors)


def _inside(wanted: set[tuple[int, int]]) -> list[Process]:
    found = []
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{entry}/ns/net").stat()
            process = identify(int(entry))
            if (status.st_dev, status.st_ino) in wanted and process is not None:
                found.append(process)
    return found


def _forget_context(name: str, known: LabRecord | None) -> None:
    if known is None or not known.contexts_file:
        return
    from godwit.client.settings import forget_context, resolve

    file = Path(known.contexts_file)
    # Somebody may have given the name to another cluster since.
    with contextlib.suppress(GodwitError):
        environ = {"XDG_CONFIG_HOME": str(file.parents[1])}
        if file.exists() and resolve(context=name, environ=environ).url == known.url:
            forget_context(name, file=file)
    with contextlib.suppress(OSError):
        file.parent.rmdir()


def _keep_logs(layout: Layout) -> Path | None:
    source = layout.state / "logs"
    if not source.is_dir():
        return None
    target = layout.state_root / "kept-logs" / f"{layout.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)
    return target


def _give_back_etc(known: LabRecord | None, root: Path) -> None:
    """Remove the mount point that this lab made, unless another lab stands on it."""
    if known is None or not known.made_etc:
        return
    others = record.names(root=root)
    if others:
        with contextlib.suppress(GodwitError):
            heir = record.peek(others[0], root=root)
            if heir is not None:
                heir.but(made_etc=True).save(root)
        return
    with contextlib.suppress(OSError):
        _ETC.rmdir()
