"""What labs have on this machine at a moment, so that two moments can be compared."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, fields
from pathlib import Path

from godwit.host import links, netns
from godwit.host.cgroup import CGROUP_ROOT
from godwit.lab.layout import GROUPS, NETS, RUN_ROOT, state_root


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Names of everything that a lab could leave behind, by kind."""

    namespaces: frozenset[str]
    links: frozenset[str]
    mounts: frozenset[str]
    processes: frozenset[str]
    sockets: frozenset[str]
    groups: frozenset[str]
    directories: frozenset[str]


def take(lab: str | None = None) -> Snapshot:
    """Look at what belongs to a lab, or to any (None)."""
    prefix = f"gw-{lab}-" if lab else "gw-"
    folders = [str(root / lab) if lab else str(root) for root in (RUN_ROOT, state_root())]
    spaces = frozenset(name for name in netns.names() if name.startswith(prefix))
    return Snapshot(
        namespaces=spaces,
        links=frozenset(name for name in links.show() if _ours(name)),
        mounts=frozenset(m for m in _mounts() if any(f in m for f in (*folders, f"/{prefix}"))),
        processes=_processes(lab, spaces, folders),
        sockets=frozenset(s for s in _sockets() if any(s.startswith(f) for f in folders)),
        groups=_groups(lab),
        directories=frozenset(f for f in folders if Path(f).exists()),
    )


def compare(before: Snapshot, after: Snapshot) -> list[str]:
    """What is there after and was not before, as lines for people."""
    found = []
    for kind in fields(Snapshot):
        new = getattr(after, kind.name) - getattr(before, kind.name)
        found += [f"{kind.name}: {name}" for name in sorted(new)]
    return found


def _ours(link: str) -> bool:
    """Whether a link of the real machine is called like one of a lab, or like a VM's tap."""
    ports = {net.port for net in NETS} | {net.bridge for net in NETS}
    ends = tuple(f"-{net.name}" for net in NETS)
    return link in ports or link.endswith(ends) or link.startswith("gw")


def _mounts() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines]


def _processes(lab: str | None, spaces: frozenset[str], folders: list[str]) -> frozenset[str]:
    """Processes in a lab's groups or namespaces, or that name its things."""
    group = f"/{GROUPS}/{lab}/" if lab else f"/{GROUPS}/"
    inodes = set()
    for space in spaces:
        with contextlib.suppress(OSError):
            inodes.add(Path(netns.netns_path(space)).stat().st_ino)
    found = set()
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            folder = Path("/proc") / entry
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            named = any(f in words for f in (*folders, *spaces))
            inside = group in (folder / "cgroup").read_text()
            visiting = (folder / "ns/net").stat().st_ino in inodes
            if named or inside or visiting:
                found.add(f"{entry} {words.strip()[:100]}")
    return frozenset(found)


def _sockets() -> list[str]:
    rows = Path("/proc/net/unix").read_text().splitlines()[1:]
    return [row.split(maxsplit=7)[7] for row in rows if len(row.split(maxsplit=7)) == 8]


def _groups(lab: str | None) -> frozenset[str]:
    below = f"{GROUPS}/{lab}" if lab else GROUPS
    trees = [CGROUP_ROOT, *(CGROUP_ROOT.iterdir() if CGROUP_ROOT.is_dir() else ())]
    return frozenset(str(tree / below) for tree in trees if (tree / below).is_dir())
