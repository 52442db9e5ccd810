"""Every test here must leave the machine as it was: links, namespaces, mounts, groups, children."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from godwit.host import links, netns
from godwit.host.cgroup import CGROUP_ROOT

GROUP_ROOT = f"godwit-test-{os.getpid()}"


@pytest.fixture(autouse=True)
def root_only() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


def _children() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(path.parent.name))
    return found


def _descriptors() -> set[str]:
    """Each with what it is of, so that a leak is named."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.add(f"{path.name} {path.readlink()}")
    return found


def _snapshot(mark: str) -> dict[str, set[Any]]:
    """What a test could leave behind; other people's namespaces and links do not count."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    groups = {str(p) for p in CGROUP_ROOT.glob(f"*/{GROUP_ROOT}/*") if p.is_dir()}
    return {
        "children": _children(),
        "links": {n for n in links.show() if n.startswith(mark)},
        "namespaces": {n for n in netns.names() if n.startswith(mark)},
        "mounts": {m for m in mounts if mark in m},
        "groups": groups,
        "descriptors": _descriptors(),
    }


@pytest.fixture
def mark() -> str:
    """Start of every name a test gives, short enough for links."""
    return "gt" + uuid.uuid4().hex[:6]


def _left(before: dict[str, set[Any]], mark: str) -> dict[str, set[Any]]:
    """What is there now and was not before; what an earlier test lets go of late is no fault."""
    return {kind: now - before[kind] for kind, now in _snapshot(mark).items() if now - before[kind]}


@pytest.fixture(autouse=True)
def nothing_left_behind(mark: str, root_only: None) -> Iterator[None]:
    gc.collect()  # what an earlier test in this process left for it is not ours to be counted
    before = _snapshot(mark)
    yield
    until = time.monotonic() + 3
    # The kernel takes the links of a dead namespace away a little later.
    while (left := _left(before, mark)) and time.monotonic() < until:
        time.sleep(0.02)
    assert left == {}


@pytest.fixture
def ns(mark: str) -> Iterator[str]:
    """A named network namespace."""
    name = f"{mark}-a"
    netns.create(name)
    yield name
    netns.delete(name)


@pytest.fixture
def ns2(mark: str) -> Iterator[str]:
    """Another one."""
    name = f"{mark}-b"
    netns.create(name)
    yield name
    netns.delete(name)


@pytest.fixture(scope="session", autouse=True)
def no_parent_groups_left() -> Iterator[None]:
    yield
    for path in CGROUP_ROOT.glob(f"*/{GROUP_ROOT}"):
        path.rmdir()
