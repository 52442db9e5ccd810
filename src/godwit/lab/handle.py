"""A lab that is there: where its processes are, how to ask them, how to run things inside.

Used by the lab's commands and by tests. A ``Lab`` reads its record once; load it anew after a
node was powered off and on by somebody else.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.host.files import load_json
from godwit.host.namespaces import enter, enter_attached
from godwit.host.process import Process, identify, spawn
from godwit.host.run import run, with_netns
from godwit.lab import bmcs, control, daemons, keeping, record
from godwit.lab.configs import RUN
from godwit.lab.layout import (
    CLIENT,
    CLIENT_NUMBER,
    CONTROL,
    LAN,
    OPERATOR,
    STORAGE,
    SWITCH,
    Layout,
    state_root,
)
from godwit.lab.record import LabRecord
from godwit.model.errors import (
    GodwitError,
    InvalidRequest,
    NotFound,
    OperationFailed,
    Unavailable,
)
from godwit.store.api import MemberView
from godwit.store.client import StoreClient

_OF_VMS = {
    "qemu:": ("vms", "runtime.json"),
    "broker:": ("vms", "broker.json"),
    "lent:": ("lent", "peer.json"),
}
"""What runs for a VM, and where below /run/godwit its record lies."""


@dataclass(frozen=True, slots=True)
class Lab:
    """One lab by its record."""

    record: LabRecord
    layout: Layout

    @classmethod
    def load(cls, name: str = "lab", *, root: Path | None = None) -> Lab:
        """The lab of that name; NotFound."""
        folder = root or state_root()
        found = record.load(name, root=folder)
        return cls(found, found.layout(folder))

    def reload(self) -> Lab:
        """The same lab as it is now."""
        return Lab.load(self.record.name, root=self.layout.state_root)

    # Places and processes

    def node(self, name: str) -> str:
        """A node's name itself; NotFound names those there are."""
        if name not in self.layout.nodes:
            known = ", ".join(self.layout.nodes)
            raise NotFound(f"lab {self.record.name} has no {name}", hint=f"there are: {known}")
        return name

    def host(self, name: str) -> str:
        """A host's name itself; NotFound names those there are."""
        if name not in self.layout.host_names:
            known = ", ".join(self.layout.host_names)
            raise NotFound(f"lab {self.record.name} has no host {name}", hint=f"hosts: {known}")
        return name

    def init(self, node: str) -> Process:
        """The first process of a node; Unavailable when the node is off."""
        found = self.record.node(self.node(node))
        if found is None:
            raise Unavailable(f"{node} is off", hint=f"godwit lab fault power-on {node}")
        return found

    def tell(self, node: str, op: str, **more: Any) -> dict[str, Any]:
        """Ask a node's supervisor (see ``supervisor``); its refusals are raised."""
        return control.tell(self.layout.control_socket(self.node(node)), op, **more)

    def root_of(self, node: str) -> Path:
        """A node's root as the real machine reaches it."""
        return Path(f"/proc/{self.init(node).pid}/root")

    def units(self, node: str) -> tuple[str, ...]:
        """The daemons of a node."""
        return daemons.names(self.layout, node)

    def process(self, where: str, what: str) -> Process:
        """A process of a node as the real machine counts it.

        ``what`` is a unit (agent, guard, manager, store, etcd), ``bmc`` (a host's, also while it is
        off), ``qemu:VM``, ``broker:VM`` (its storage broker) or ``lent:VM`` (what exports its disks
        to another host). NotFound when it is not there, or not running at this moment.
        """
        if what == bmcs.UNIT and where in self.layout.host_names:
            return bmcs.process(self.layout, where)
        init = self.init(where)
        kind, colon, vm = what.partition(":")
        if kind + colon in _OF_VMS:
            inner = self._recorded(where, vm, *_OF_VMS[kind + colon])
        elif what in self.units(where):
            inner = int(self.tell(where, "pids").get(what, 0))
        else:
            of_vms = () if where in (CONTROL, STORAGE) else tuple(f"{one}VM" for one in _OF_VMS)
            known = ", ".join((*self.units(where), *of_vms))
            raise NotFound(f"{where} has no process {what}", hint=f"there are: {known}")
        found = outer(init.pid, inner) if inner else None
        if found is None:
            raise NotFound(f"{what} does not run on {where}", hint="look with: godwit lab status")
        return found

    def _recorded(self, where: str, vm: str, folder: str, record: str) -> int:
        """The pid that a record of the VM names, 0 when there is none."""
        path = self.root_of(self.host(where)) / str(RUN)[1:] / folder / vm / record
        found = load_json(path)
        return int(found["pid"]) if isinstance(found, dict) else 0

    # Running things

    def run(
        self, where: str, argv: Sequence[str], *, timeout: float = 30.0, stdin: bytes | None = None
    ) -> bytes:
        """Run a program there to its end; its standard output. Errors as ``godwit.host.run``."""
        if where in (CLIENT, SWITCH, *self.layout.bmcs):
            return run(argv, timeout=timeout, input=stdin, netns=self.layout.netns(where))
        return enter(self.init(where), argv, timeout=timeout, stdin=stdin)

    def run_attached(self, where: str, argv: Sequence[str]) -> int:
        """Run a program there on our own terminal; its exit status (128 + signal when killed)."""
        if where in (CLIENT, SWITCH, *self.layout.bmcs):
            status = _attached(with_netns(argv, self.layout.netns(where)))
        else:
            status = enter_attached(self.init(where), argv)
        return 128 - status if status < 0 else status

    def agent(
        self,
        host: str,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: dict[str, str] | None = None,
        deadline_s: float = 10.0,
    ) -> Any:
        """Ask a host's agent as the lab's manager; from inside, so that no cut matters."""
        from godwit.lab.agentcall import call

        self.init(self.host(host))
        return call(
            self.layout.agent_url(host),
            method,
            path,
            host=host,
            netns=self.layout.netns(host),
            identity=self.layout.pki / OPERATOR,
            body=body,
            query=query,
            deadline_s=deadline_s,
        )

    def store_client(self, *, timeout: float = 5.0) -> StoreClient:
        """The store, for a root on the real machine; no cut network keeps it away."""
        root = "" if self.layout.store_members else str(self.root_of(CONTROL))
        return keeping.client(self.layout, control_root=root, timeout=timeout)

    # For people

    def status(self) -> dict[str, Any]:
        """What ``lab status -o json`` prints."""
        from godwit.lab.network import plugged

        try:
            wires = plugged(self.layout)
        except OperationFailed:
            wires = {}
        nodes = {node: self._node_view(node, wires.get(node, {})) for node in self.layout.nodes}
        members = self._members()
        return {
            "name": self.record.name,
            "store": self.record.store,
            "store_members": members,
            "quorum": keeping.quorum(self.layout, members),
            "complete": self.record.complete,
            "migration_rate": self.record.rate,
            "hosts": [nodes[host] for host in self.layout.host_names],
            "networks": [
                {
                    "name": LAN.name,
                    "subnet": LAN.subnet,
                    "client_address": LAN.address(CLIENT_NUMBER),
                }
            ],
            "manager_url": self.record.url,
            "manager_urls": list(self.record.urls),
            "control": nodes[CONTROL],
            "storage": self.layout.storage,
            "storage_node": nodes.get(STORAGE),
            "directory": str(self.layout.state),
            "token_file": str(self.layout.token),
            "ca_file": str(self.layout.state / "ca.pem"),
        }

    def _members(self) -> list[dict[str, Any]]:
        if not self.layout.store_members:
            return []

        async def look() -> Sequence[MemberView]:
            store = self.store_client()
            try:
                return await keeping.look(store)
            finally:
                await store.aclose()

        try:
            views: Sequence[MemberView] = asyncio.run(look())
        except (GodwitError, OSError):  # half of it is taken away already
            views = ()
        return keeping.members_view(self.layout, views)

    def _node_view(self, node: str, wires: dict[str, str]) -> dict[str, Any]:
        first = self.record.node(node)
        view: dict[str, Any] = {"name": node, "state": "off" if first is None else "on"}
        if node in self.layout.host_names:
            view["bmc"] = self._bmc_view(node)
        addresses = {c.net.name: c.cidr.partition("/")[0] for c in self.layout.cables(node)}
        view["addresses"] = {name: address for name, address in addresses.items() if address}
        view["networks"] = wires
        view["pid"] = first.pid if first else None
        view["units"] = {}
        if first is not None:
            try:
                view["units"] = self.tell(node, "status")["units"]
            except Unavailable:
                view["state"] = "unresponsive"
        return view

    def _bmc_view(self, host: str) -> dict[str, Any]:
        try:
            pid: int | None = bmcs.process(self.layout, host).pid
        except NotFound:
            pid = None
        return {"url": bmcs.url(self.layout, host), "pid": pid}


def place(layout: Layout, where: str) -> str:
    """A WHERE itself; InvalidRequest names those there are."""
    if where not in layout.places:
        known = ", ".join(layout.places)
        raise InvalidRequest(f"there is no {where!r} in this lab", hint=f"WHERE is one of: {known}")
    return where


def outer(init: int, inner: int) -> Process | None:
    """The process that has number ``inner`` in the PID namespace of ``init``; None when none."""
    try:
        ours = os.readlink(f"/proc/{init}/ns/pid")  # noqa: PTH115
    except OSError:
        return None
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if not entry.isdigit():
            continue
        try:
            if os.readlink(f"/proc/{entry}/ns/pid") != ours:  # noqa: PTH115
                continue
            numbers = _inner_numbers(Path(f"/proc/{entry}/status").read_text())
        except OSError:
            continue
        if numbers and numbers[-1] == inner:
            return identify(int(entry))
    return None


def is_first(pid: int) -> bool:
    """Whether a process is number 1 of a PID namespace below ours."""
    try:
        numbers = _inner_numbers(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return False
    return len(numbers) > 1 and numbers[-1] == 1


def _inner_numbers(status: str) -> list[int]:
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return [int(word) for word in line.split()[1:]]
    return []


def _attached(argv: Sequence[str]) -> int:
    process = spawn(argv, stdin=0, stdout=1, stderr=2, new_session=False, env=os.environ)
    while True:
        try:
            _, raw = os.waitpid(process.pid, 0)
        except KeyboardInterrupt:
            continue  # it got the same signal, and decides
        return os.waitstatus_to_exitcode(raw)
