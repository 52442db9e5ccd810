"""What a lab has made so far, kept on the disk so that anybody can take it down.

Written before the first thing is made and after each node is launched. It is a help, not the
truth: names of namespaces and control groups alone are enough for ``lab down``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from godwit.host.files import load_json, save_json
from godwit.host.process import Process, is_alive
from godwit.lab.layout import Layout, StorageKind, StoreKind, state_root
from godwit.model.errors import Conflict, NotFound, OperationFailed


@dataclass(frozen=True, slots=True)
class LabRecord:
    """A lab as made: ``nodes`` are the first processes, ``ports`` are the API's on 127.0.0.1, by
    the node whose manager serves it.

    ``complete`` once everything was up. ``contexts_file`` is where its context was written.
    ``made_etc``: this lab made the machine's /etc/godwit, a mount point.
    """

    name: str
    hosts: int
    rate: str
    store: StoreKind
    run_root: str
    ports: dict[str, int] = field(default_factory=dict)
    managers: int = 0
    complete: bool = False
    contexts_file: str = ""
    made_etc: bool = False
    storage: StorageKind = "dir"
    volume_bytes: int = 0  # 0: no file system of its own
    qemu: dict[str, str | bool] = field(default_factory=dict)
    nodes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def layout(self, root: Path) -> Layout:
        """Where its things lie."""
        return Layout(
            self.name,
            self.hosts,
            self.rate,
            root,
            Path(self.run_root),
            storage=self.storage,
            store=self.store,
            managers=self.managers,
        )

    def but(self, **changes: Any) -> LabRecord:
        """A copy with changes."""
        return dataclasses.replace(self, **changes)

    def node(self, name: str) -> Process | None:
        """The first process of a node, if it lives."""
        found = self.nodes.get(name)
        process = Process(*found) if found else None
        return process if process is not None and is_alive(process) else None

    @property
    def urls(self) -> tuple[str, ...]:
        """The API of every manager, on the real machine."""
        return tuple(f"https://127.0.0.1:{port}" for port in self.ports.values())

    @property
    def url(self) -> str:
        """The API of the first manager."""
        return self.urls[0] if self.ports else "https://127.0.0.1:0"

    def save(self, root: Path) -> None:
        """Write it durably."""
        path = self.layout(root).record
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, dataclasses.asdict(self))


def load(name: str, *, root: Path | None = None) -> LabRecord:
    """The record of a lab; NotFound when there is none of that name."""
    found = peek(name, root=root)
    if found is None:
        known = ", ".join(names(root=root)) or "none"
        raise NotFound(f"there is no lab {name}", hint=f"godwit lab up --name {name}; up: {known}")
    return found


def peek(name: str, *, root: Path | None = None) -> LabRecord | None:
    """The record of a lab, None when there is none; OperationFailed when it is damaged."""
    path = (root or state_root()) / name / "lab.json"
    try:
        data = load_json(path)
        if data is None:
            return None
        if not isinstance(data, dict):
            raise TypeError("an object is expected")
        nodes = {node: (int(pid), int(at)) for node, (pid, at) in data.pop("nodes", {}).items()}
        return LabRecord(**data, nodes=nodes)
    except (ValueError, TypeError) as error:
        raise OperationFailed(
            f"{path}: {error}", hint="godwit lab down takes the lab away"
        ) from None


def names(*, root: Path | None = None) -> tuple[str, ...]:
    """The labs that have a record."""
    return tuple(sorted(path.parent.name for path in (root or state_root()).glob("*/lab.json")))


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Be the only one who changes a lab; Conflict when another command does at this moment.

    An abstract socket is the lock: it vanishes with its holder and leaves no file behind.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as holder:
        try:
            holder.bind(f"\0godwit-lab/{name}")
        except OSError:
            raise Conflict(
                f"another command works on lab {name} at this moment", hint="wait for it, or end it"
            ) from None
        yield
