"""Which daemons run on which node of a lab, and the files that they read; pure but for writing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from godwit.lab import configs, keeping, serving
from godwit.lab.configs import Unit
from godwit.lab.layout import CONTROL, STORAGE, Layout


def units(layout: Layout, node: str, python: str) -> tuple[Unit, ...]:
    """The daemons of a node; the store first, for everybody looks for it."""
    if node == STORAGE:
        return serving.units(layout.storage, python)
    found = keeping.unit(layout, node)
    if node == CONTROL:
        found += () if layout.store_members else (configs.store_unit(python),)
    else:
        found += configs.host_units(python)
    return found + ((configs.manager_unit(python),) if node in layout.manager_nodes else ())


def names(layout: Layout, node: str) -> tuple[str, ...]:
    """The daemons of a node by name."""
    return tuple(unit.name for unit in units(layout, node, "python"))


def write_files(
    layout: Layout, node: str, *, qemu: Mapping[str, str | bool], earlier: bool = False
) -> None:
    """What a node's daemons find below /etc/godwit, but for their identities.

    ``earlier``: agents and guards are of an earlier version.
    """
    if node == STORAGE:
        serving.write_files(layout)
        return
    files: dict[str, dict[str, Any]] = {}
    if node != CONTROL:
        files["host.toml"] = configs.agent_config(layout, node, qemu=qemu, earlier=earlier)
    elif not layout.store_members:
        files["store.toml"] = configs.store_config(layout)
    if node in layout.manager_nodes:
        files["manager.toml"] = configs.manager_config(layout, node)
    etc = layout.node_dir(node) / "etc"
    for name, tables in files.items():
        Path(etc / name).write_text(configs.toml(tables))
