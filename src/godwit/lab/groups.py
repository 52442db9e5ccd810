"""The control group that holds all of a lab node: how it is made, emptied and removed.

It is the one thing that a node's processes cannot leave and that needs no record: the first
process enters it before anything else, so ``lab down`` finds all of a node there even when
everybody who knew about it was killed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from godwit.host.cgroup import CgroupFacts, detect
from godwit.host.errors import CgroupError
from godwit.host.process import Process, identify, kill
from godwit.lab.layout import GROUPS

_V1 = ("freezer", "cpu", "cpuacct", "memory")
_INIT = "init"  # version 2 forbids processes beside sub-groups that have controllers
_GONE_S = 10.0


def _trees(facts: CgroupFacts) -> tuple[Path, ...]:
    """The directories below which a group has its parts."""
    if facts.version == 2:
        return (facts.root,)
    # cpu and cpuacct are often one tree under two names.
    return tuple(sorted({(facts.root / c).resolve() for c in _V1 if (facts.root / c).is_dir()}))


def create(name: str) -> tuple[str, ...]:
    """Make the group of a node; the files its first process has to enter."""
    facts = detect()
    entries = []
    try:
        for tree in _trees(facts):
            group = tree / name / _INIT if facts.version == 2 else tree / name
            group.mkdir(parents=True, exist_ok=True)
            if facts.version == 2:
                _hand_down(tree, name)
            entries.append(str(group / "cgroup.procs"))
    except OSError as error:
        raise CgroupError(f"cannot create control group {name}: {error}") from error
    return tuple(entries)


def _hand_down(tree: Path, name: str) -> None:
    """Let the node's own top group have the controllers that its agent hands on (version 2)."""
    for group in reversed([tree / name, *(tree / name).parents]):
        if group == tree or tree in group.parents:
            for controller in ("cpu", "memory"):
                with contextlib.suppress(OSError):
                    (group / "cgroup.subtree_control").write_text(f"+{controller}")


def of_lab(lab: str) -> tuple[str, ...]:
    """The groups of a lab's nodes that exist, by name."""
    return tuple(f"{GROUPS}/{lab}/{node}" for node in _children(f"{GROUPS}/{lab}"))


def labs() -> tuple[str, ...]:
    """The names of all labs that have a group."""
    return _children(GROUPS)


def _children(name: str) -> tuple[str, ...]:
    tops = [tree / name for tree in _trees(detect())]
    found = {e.name for top in tops if top.is_dir() for e in top.iterdir() if e.is_dir()}
    return tuple(sorted(found))


def _below(name: str) -> Iterator[Path]:
    """Every directory of a group, inner ones first."""
    for tree in _trees(detect()):
        # Somebody else may be removing it at this moment; then what is gone is left out.
        for folder, _, _ in os.walk(tree / name, topdown=False):
            yield Path(folder)


def members(name: str) -> tuple[Process, ...]:
    """Every process of a group, as the real machine counts them."""
    numbers: set[int] = set()
    for group in _below(name):
        with contextlib.suppress(OSError):
            numbers |= {int(word) for word in (group / "cgroup.procs").read_text().split()}
    return tuple(p for number in sorted(numbers) if (p := identify(number)) is not None)


def thaw(name: str) -> None:
    """Let everything go on that stands still: version 1 keeps frozen processes even from dying."""
    for group in _below(name):
        for file, word in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            with contextlib.suppress(OSError):
                if (group / file).exists():
                    (group / file).write_text(word)


def clear(name: str) -> tuple[Process, ...]:
    """Kill whoever is in the group and remove it with all below; whom it killed.

    CgroupError when some do not die within seconds.
    """
    killed: dict[int, Process] = {}
    until = time.monotonic() + _GONE_S
    pause = 0.001
    while True:
        thaw(name)
        for process in members(name):
            killed[process.pid] = process
            kill(process)
        if _remove(name):
            return tuple(killed.values())
        if time.monotonic() > until:
            left = [process.pid for process in members(name)]
            raise CgroupError(f"control group {name} cannot be emptied: {left}")
        # Dying takes a moment, and version 1 has no event for the last one leaving.
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def _remove(name: str) -> bool:
    done = True
    for group in list(_below(name)):
        try:
            group.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            done = False
    return done


def remove_parents(lab: str) -> None:
    """Remove what held the groups of a lab's nodes, where it is empty."""
    for tree in _trees(detect()):
        for name in (f"{GROUPS}/{lab}", GROUPS):
            with contextlib.suppress(OSError):
                (tree / name).rmdir()
