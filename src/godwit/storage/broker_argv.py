"""The command line of a storage daemon: pure, one golden file per kind in ``tests/golden/broker``.

Everything that is known at the start stands on the command line, gates included, because the
daemon accepts the first client only after it has worked through all of it: a QEMU that
reconnects finds its export there, or else would wait out a second of back-off.

qemu-storage-daemon 10.0 has no ``--sandbox``. It runs as an unprivileged user without
capabilities, in a control group of its own, with nothing of our environment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from godwit.storage import nodes
from godwit.storage.broker_record import Served
from godwit.storage.gate import GateState
from godwit.storage.nodes import Aio, BrokerDisk, Node

PROGRAM: Final = "qemu-storage-daemon"

Option = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Plugs:
    """What the daemon inherits: two listening sockets, its monitor's and its NBD server's."""

    monitor: int
    clients: int

    def descriptors(self) -> tuple[int, int]:
        """Everything the new process has to inherit."""
        return self.monitor, self.clients


def broker_argv(
    vm: str,
    served: Iterable[Served],
    plugs: Plugs,
    *,
    aio: Aio = "threads",
    latch: Node | None = None,
    locking: bool = True,
) -> list[str]:
    """Options of the VM's broker, without the program's name.

    A gate that is ``opening`` is open when the daemon answers; any other is closed. It waits at
    ``latch``, when there is one, before it opens anything.
    """
    all_served = tuple(served)
    options: list[Option] = [*_monitor(plugs)]
    if latch is not None:
        options.append(("--blockdev", _json(latch)))
    directories = {s.peer.tls_dir for s in all_served if s.peer is not None and s.peer.tls_dir}
    # One host has one directory of certificates.
    for directory in sorted(directories)[:1]:
        options.append(("--object", _json(nodes.tls_object("client", directory))))
    for one in all_served:
        options += _nodes(one, aio, locking)
    options.append(("--nbd-server", f"addr.type=fd,addr.str={plugs.clients}"))
    for one in all_served:
        options.append(("--export", _json(disk_export(vm, one.disk))))
    return [word for option in options for word in option]


def peer_argv(plugs: Plugs, *, tls_dir: str) -> list[str]:
    """Options of a daemon that exports a VM's disks to other hosts; exports come later."""
    options: list[Option] = [*_monitor(plugs)]
    server = f"addr.type=fd,addr.str={plugs.clients}"
    if tls_dir:
        options.append(("--object", _json(nodes.tls_object("server", tls_dir))))
        server += f",tls-creds={nodes.PEER_TLS}"
    options.append(("--nbd-server", server))
    return [word for option in options for word in option]


def disk_export(vm: str, disk: BrokerDisk) -> Node:
    """The export of a disk to its own QEMU."""
    name = nodes.export_name(vm, disk.id)
    return nodes.export(disk, name=name, node=nodes.export_node_name(disk.id))


def _monitor(plugs: Plugs) -> Iterator[Option]:
    yield "--chardev", f"socket,id=qmp,fd={plugs.monitor},server=on,wait=off"
    yield "--monitor", "chardev=qmp"


def _nodes(one: Served, aio: Aio, locking: bool) -> Iterator[Option]:
    disk, over = one.disk, nodes.failing_node_name(one.disk.id)
    for node in nodes.placeholder_nodes(disk):
        yield "--blockdev", _json(node)
    if one.gate.state is GateState.OPENING:
        target = target_node(one, aio=aio, locking=locking)
        over = target["node-name"]
        yield "--blockdev", _json(target)
    yield "--blockdev", _json(nodes.export_node(disk, over=over))


def target_node(one: Served, *, aio: Aio, locking: bool = True) -> Node:
    """The node an open gate leads to."""
    if one.peer is not None:
        return nodes.peer_node(one.disk, one.peer)
    return nodes.image_node(one.disk, aio=aio, locking=locking)


def _json(value: Node) -> str:
    return json.dumps(value, separators=(",", ":"))
