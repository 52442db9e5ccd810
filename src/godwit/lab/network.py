"""The wires of a lab: namespaces, bridges in the switch, cables with limits; and how to cut one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

from godwit.host import links, netns
from godwit.host.config import parse_rate
from godwit.host.netns import in_netns, opened_netns
from godwit.host.shaping import shape
from godwit.lab.configs import BRIDGE
from godwit.lab.layout import CLIENT, MIG, NETS, SWITCH, Cable, Layout, Net
from godwit.model.errors import InvalidRequest

Cut = Literal["black-hole", "cable"]


def switch_lines(layout: Layout) -> list[str]:
    """What makes the switch: its bridges, and every cable plugged in; pure."""
    lines = [
        links.bridge(net.bridge, mac=links.stable_mac(f"{layout.name}/{net.name}")) for net in NETS
    ]
    for cable in layout.all_cables():
        there = layout.netns(cable.node)
        lines.append(links.veth(cable.switch_port, cable.net.port, peer_netns=there))
        lines += plug_lines(cable)
    return lines


def plug_lines(cable: Cable) -> list[str]:
    """What joins a cable to its bridge in the switch; pure."""
    return [links.attach(cable.switch_port, cable.net.bridge), links.up(cable.switch_port)]


def node_lines(layout: Layout, node: str) -> list[str]:
    """What a node does with its ends of the cables; pure."""
    lines = []
    for cable in layout.cables(node):
        port = cable.net.port
        lines.append(links.set_mac(port, links.stable_mac(f"{layout.name}/{node}/{port}")))
        if cable.cidr:
            lines.append(links.address(port, cable.cidr))
        else:
            mac = links.stable_mac(f"{layout.name}/{node}/{BRIDGE}")
            lines += [links.bridge(BRIDGE, mac=mac), links.attach(port, BRIDGE)]
        lines.append(links.up(port))
    return lines


def make_namespaces(layout: Layout) -> None:
    """Make the namespace of every place, with IPv6 chatter off."""
    for place in layout.places:
        name = layout.netns(place)
        netns.create(name)
        with opened_netns(name) as descriptor:
            in_netns(descriptor, _quiet)


def _quiet() -> None:
    # /proc/sys/net is that of the asking thread's namespace. A kernel without IPv6 has none.
    for which in ("default", "all"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6").write_text("1")


def wire(layout: Layout) -> None:
    """Make bridges and cables, and limit the migration network both ways."""
    links.apply(switch_lines(layout), netns=layout.netns(SWITCH))
    for node in (CLIENT, *layout.nodes, *layout.bmcs):
        links.apply(node_lines(layout, node), netns=layout.netns(node))
    if layout.rate:
        rate = parse_rate(layout.rate)
        for host in layout.host_names:
            # A queue limits what leaves it: one at each end of the cable.
            shape(MIG.port, rate, netns=layout.netns(host))
            shape(f"{host}-{MIG.name}", rate, netns=layout.netns(SWITCH))


def cut(layout: Layout, node: str, net: Net, *, how: Cut = "black-hole") -> None:
    """Cut a node from a network.

    ``black-hole`` takes the port out of the switch's bridge: the node's link stays up and what it
    sends vanishes, the harder case. ``cable`` sets the port down: the node sees its carrier go.
    """
    port = _cable(layout, node, net).switch_port
    line = links.detach(port) if how == "black-hole" else links.down(port)
    links.apply([line], netns=layout.netns(SWITCH))


def restore(layout: Layout, node: str, net: Net) -> None:
    """Undo a cut of either kind."""
    links.apply(plug_lines(_cable(layout, node, net)), netns=layout.netns(SWITCH))


def carriers(layout: Layout, node: str, *, up: bool) -> None:
    """Set all the switch's ports towards a node up or down, as its power does."""
    change = links.up if up else links.down
    lines = [change(cable.switch_port) for cable in layout.cables(node)]
    links.apply(lines, netns=layout.netns(SWITCH))


def plugged(layout: Layout) -> dict[str, dict[str, str]]:
    """For each node and network: ``up``, ``black-hole`` or ``down``."""
    seen = links.show(layout.netns(SWITCH))
    found: dict[str, dict[str, str]] = {}
    for cable in layout.all_cables():
        link = seen.get(cable.switch_port)
        if link is None or not link.is_up:
            state = "down"
        else:
            state = "up" if link.master == cable.net.bridge else "black-hole"
        found.setdefault(cable.node, {})[cable.net.name] = state
    return found


def _cable(layout: Layout, node: str, net: Net) -> Cable:
    for cable in layout.cables(node):
        if cable.net == net:
            return cable
    known = ", ".join(c.net.name for c in layout.cables(node))
    raise InvalidRequest(f"{node} is not on network {net.name}", hint=f"it is on: {known}")
