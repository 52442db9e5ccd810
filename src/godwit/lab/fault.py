"""Faults to inject into a lab: cut wires, killed and frozen processes, held moves, lost power.

All of it happens from outside, as it would in a machine room; only hold points are inside, in the
agent, which has them in a lab alone. Signals go through a pidfd, to exactly the process meant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from godwit.host.cgroup import wait_until
from godwit.host.process import Process, freeze, is_stopped, kill, thaw
from godwit.lab import bmcs, network, nodes
from godwit.lab.handle import Lab
from godwit.lab.layout import NETS, STOR, net_named
from godwit.lab.network import Cut
from godwit.lab.record import exclusive
from godwit.model.errors import Conflict, NotFound, OperationFailed, Refused

HELD_S = 60.0
_ANSWER_S = 5.0
_STOPPED_S = 1.0


# Wires


def cut_network(lab: Lab, node: str, net: str, *, how: Cut = "black-hole") -> None:
    """Cut a node (or the client) from a network; see ``network.cut``.

    Refused for the storage network of a lab whose volume is a directory of this machine.
    """
    if net == STOR.name and lab.layout.storage == "dir":
        raise Refused(
            f"nothing travels over {net} here: the volume is a directory of this machine",
            hint="raise the lab without --storage dir",
        )
    network.cut(lab.layout, node, net_named(net), how=how)


def restore_network(lab: Lab, node: str, net: str) -> None:
    """Undo a cut; ``all`` restores every network of the node. Conflict when the node is off."""
    if node in lab.layout.nodes:
        lab.init(node)  # the wires of a node without power stay dead
    named = [net_named(net)] if net != "all" else [c.net for c in lab.layout.cables(node)]
    for one in named:
        network.restore(lab.layout, node, one)


# Processes


def kill_process(lab: Lab, where: str, what: str, *, hold: bool = False) -> Process:
    """SIGKILL; a daemon is started again by its supervisor unless ``hold``."""
    return _signal(lab, where, what, kill, hold=hold)


def freeze_process(lab: Lab, where: str, what: str, *, hold: bool = False) -> Process:
    """SIGSTOP; a daemon is killed by its watchdog and started again unless ``hold``.

    Returns when the process stands still. OperationFailed when it does not within a second.
    """
    target = _signal(lab, where, what, freeze, hold=hold)
    # A stop takes effect when the process is next scheduled; only a parent would get an event.
    if not wait_until(lambda: is_stopped(target), _STOPPED_S):
        raise OperationFailed(f"{what} on {where} does not stand still", hint="is it dead?")
    return target


def thaw_process(lab: Lab, where: str, what: str) -> None:
    """Undo ``freeze`` or a held ``kill``: SIGCONT, and its supervisor looks after it again."""
    with contextlib.suppress(NotFound):  # a held daemon may be dead
        thaw(lab.process(where, what))
    if what != bmcs.UNIT and what in lab.units(where):
        lab.tell(where, "release", unit=what)


def restart_daemon(lab: Lab, where: str, what: str) -> dict[str, Any]:
    """Restart in an orderly way and wait until it is ready; its view. A BMC has no other way up."""
    if what == bmcs.UNIT:
        return {"pid": bmcs.restart(lab.layout, lab.host(where)).pid}
    if what not in lab.units(where):
        known = ", ".join(lab.units(where))
        raise NotFound(f"{where} has no daemon {what}", hint=f"there are: {known}")
    answer: dict[str, Any] = lab.tell(where, "restart", unit=what)["units"][what]
    return answer


def _signal(
    lab: Lab, where: str, what: str, send: Callable[[Process], bool], *, hold: bool
) -> Process:
    target = lab.process(where, what)
    if hold:
        if what == bmcs.UNIT or what not in lab.units(where):
            raise Refused(f"nobody would start {what} again", hint="leave --hold out")
        # The other way round its supervisor might be quicker.
        lab.tell(where, "hold", unit=what)
    if not send(target):
        raise NotFound(f"{what} on {where} has just ended", hint="try again")
    return target


def frozen(lab: Lab, where: str, what: str) -> bool:
    """Whether a process stands still."""
    return is_stopped(lab.process(where, what))


# Held moves


def hold(lab: Lab, stage: str, host: str, *, role: str = "source") -> dict[str, Any]:
    """Hold every move that comes to a stage on a host; what is armed and held there."""
    answer: dict[str, Any] = lab.agent(host, "POST", "/v1/lab/hold", {"stage": stage, "role": role})
    return answer


def release(lab: Lab, host: str, stage: str | None = None) -> dict[str, Any]:
    """Let go of one stage of a host, or of all."""
    body = {"stage": stage} if stage else {}
    answer: dict[str, Any] = lab.agent(host, "POST", "/v1/lab/release", body)
    return answer


def held(
    lab: Lab, host: str, *, wait: str | None = None, role: str = "source", timeout: float = HELD_S
) -> dict[str, Any]:
    """What is armed and held; with ``wait`` not before a move is held at that stage."""
    query = {"wait": wait, "role": role, "timeout": f"{timeout:g}"} if wait else None
    answer: dict[str, Any] = lab.agent(
        host, "GET", "/v1/lab/holds", query=query, deadline_s=timeout + _ANSWER_S
    )
    return answer


# Power


def power_off(lab: Lab, node: str) -> Lab:
    """Cut a node's power: its wires go dead first, for nothing says farewell; then all ends."""
    with exclusive(lab.record.name):
        lab = lab.reload()
        first = lab.init(node)
        network.carriers(lab.layout, node, up=False)
        nodes.end(lab.layout, node, first)
        left = {name: at for name, at in lab.record.nodes.items() if name != node}
        lab.record.but(nodes=left).save(lab.layout.state_root)
    return lab.reload()


def power_on(lab: Lab, node: str, *, wait: bool = True) -> Lab:
    """Start a node that is off; with ``wait`` until its daemons are ready.

    Its disk is as it was, its /run is empty. The API of its manager has its old address.
    """
    with exclusive(lab.record.name), contextlib.ExitStack() as opened:
        lab = lab.reload()
        if lab.record.node(lab.node(node)) is not None:
            raise Conflict(f"{node} is on", hint=f"godwit lab fault power-off {node}")
        nodes.end(lab.layout, node, None)  # what a dead supervisor may have left
        api = None
        if node in lab.record.ports:
            api = opened.enter_context(_same_address(lab.record.ports[node]))
        network.carriers(lab.layout, node, up=True)
        binary = str(lab.record.qemu.get("binary", ""))
        first = nodes.start(lab.layout, node, api=api, qemu_binary=binary)
        made = {**lab.record.nodes, node: (first.pid, first.start_time)}
        lab.record.but(nodes=made).save(lab.layout.state_root)
    lab = lab.reload()
    if wait:
        lab.tell(node, "wait-ready")
    return lab


def _same_address(port: int) -> Any:
    try:
        return nodes.listener(port)
    except OSError as error:
        raise OperationFailed(
            f"port {port} on 127.0.0.1 is taken: {error.strerror}", hint="end what listens there"
        ) from error


NETWORK_NAMES = tuple(net.name for net in NETS)
