"""Hosts whose agent and guard are of another version: from a source tree of their own.

The tree's package is copied into the lab and shown inside every host. A file beside a host's
configuration says that its agent and guard are to be taken from there; they look when they start.
So a host is upgraded, as a real one is, by putting the new version in place and starting both
again; its QEMUs run on. What an old agent starts as a program of its own (a storage path's child)
is already of the new version, as after the upgrade of a package.
"""

from __future__ import annotations

import compileall
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from godwit.host.namespaces import Step
from godwit.lab.configs import ETC, Unit
from godwit.lab.layout import Layout
from godwit.model.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from godwit.lab.handle import Lab

UNITS: Final = ("guard", "agent")  # the guard first, for the agent looks for it
_INSIDE: Final = Path("/run/godwit-source")
_MARK: Final = "source"
_NOT_OF_A_HOST: Final = ("lab", "cli", "client", "manager")  # agents and guards import none of it
_RUN: Final = (
    "import pathlib, runpy, sys; "
    "mark = pathlib.Path(sys.argv.pop(1)); "
    "sys.path[:0] = [mark.read_text().strip()] if mark.exists() else []; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def checked_source(tree: Path) -> Path:
    """The package of a source tree; InvalidRequest when there is none."""
    package = tree / "src" / "godwit"
    if not (package / "agent" / "main.py").is_file():
        raise InvalidRequest(
            f"{tree} is no source tree of Godwit", hint="git archive COMMIT | tar -x -C DIR"
        )
    return package


def place(layout: Layout) -> Path:
    """Where a lab keeps the tree; there only if it was raised with one."""
    return layout.state / "source"


def keep(layout: Layout, tree: Path) -> None:
    """Copy the package into the lab, and mark every host."""
    target = place(layout) / "godwit"
    left_out = shutil.ignore_patterns("__pycache__", *_NOT_OF_A_HOST)
    shutil.copytree(checked_source(tree), target, ignore=left_out)
    # Hosts see it read-only: without byte code every daemon would compile it anew.
    compileall.compile_dir(target, quiet=2)
    for host in layout.host_names:
        _mark(layout, host).write_text(f"{_INSIDE}\n")


def shown(layout: Layout) -> tuple[Step, ...]:
    """What a host sees of it."""
    if not place(layout).is_dir():
        return ()
    return ({"op": "bind", "src": str(place(layout)), "dst": str(_INSIDE), "ro": True},)


def from_source(units: Iterable[Unit]) -> tuple[Unit, ...]:
    """The units of a host, its agent and guard taken from the tree as long as the mark is there."""
    return tuple(_wrapped(unit) if unit.name in UNITS else unit for unit in units)


def _wrapped(unit: Unit) -> Unit:
    python, isolated, _, module, *rest = unit.argv  # PYTHON -I -m MODULE ...
    return replace(unit, argv=(python, isolated, "-c", _RUN, str(ETC / _MARK), module, *rest))


def upgrade(lab: Lab, host: str) -> None:
    """Start the host's guard and agent again, of this version; NotFound when they are already."""
    mark = _mark(lab.layout, lab.host(host))
    if not mark.exists():
        raise NotFound(f"{host} has this version", hint="a lab up with --agent-source has another")
    mark.unlink()
    for unit in UNITS:
        lab.tell(host, "restart", unit=unit)


def is_older(lab: Lab, host: str) -> bool:
    """Whether the host's agent and guard are of the tree."""
    return _mark(lab.layout, lab.host(host)).exists()


def _mark(layout: Layout, host: str) -> Path:
    return layout.node_dir(host) / "etc" / _MARK
