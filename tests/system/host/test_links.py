"""Links, taps, shaping and announcements in real namespaces."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import threading
import time

import pytest

from godwit.host import announce, links, netns, shaping, taps
from godwit.host.errors import HostError, LinkCommandFailed, ProgramFailed
from godwit.host.ifctl import LinkControl

pytestmark = pytest.mark.system
MAC = "52:54:00:12:34:56"


def wire(a: str, b: str, name: str = "w0") -> None:
    """A bridge in namespace a with one port that leads to b."""
    links.apply(
        [
            links.bridge("br0", mac=links.stable_mac(a)),
            links.veth(name, "far0", peer_netns=b),
            links.attach(name, "br0"),
            links.up(name),
            links.address("br0", "10.9.0.1/24"),
        ],
        netns=a,
    )
    links.apply([links.address("far0", "10.9.0.2/24"), links.up("far0")], netns=b)


def test_batch_across_namespaces(ns: str, ns2: str) -> None:
    wire(ns, ns2)
    found = links.show(ns)
    assert (found["br0"].kind, found["br0"].is_up) == ("bridge", True)
    assert (found["w0"].kind, found["w0"].master) == ("veth", "br0")
    assert found["br0"].mac == links.stable_mac(ns)
    with netns.opened_netns(ns) as a, netns.opened_netns(ns2) as b:
        server = netns.socket_in_netns(a, kind=socket.SOCK_DGRAM)
        client = netns.socket_in_netns(b, kind=socket.SOCK_DGRAM)
        with server, client:
            server.bind(("10.9.0.1", 7))
            server.settimeout(2)
            client.sendto(b"hello", ("10.9.0.1", 7))
            assert server.recvfrom(10) == (b"hello", ("10.9.0.2", client.getsockname()[1]))
    assert links.show(ns)["w0"].rx_bytes > 0


def test_failed_line_stops_the_batch_and_undo_cleans_up(ns: str) -> None:
    lines = [links.bridge("br0"), links.up("nosuch"), links.bridge("br1")]
    with pytest.raises(LinkCommandFailed) as caught:
        links.apply(lines, netns=ns)
    assert caught.value.line == "link set dev nosuch up"
    assert "nosuch" in caught.value.reason
    assert set(links.show(ns)) & {"br0", "br1"} == {"br0"}
    links.apply(links.undo_lines(lines[:1]), netns=ns)
    assert "br0" not in links.show(ns)


async def test_async_batch_and_unknown_namespace(ns: str) -> None:
    await links.apply_async([links.bridge("br0", mtu=1400)], netns=ns)
    assert links.show(ns)["br0"].mtu == 1400
    with pytest.raises(ProgramFailed):
        await links.apply_async([links.up("lo")], netns=ns + "-missing")


def test_tap_lives_as_long_as_its_descriptor(ns: str) -> None:
    with netns.opened_netns(ns) as fd, LinkControl(fd) as control:
        with taps.open_tap("tap0", mtu=1400, vm_mac=MAC, netns_fd=fd) as tap:
            assert len(tap.fds) == 1
            assert control.exists("tap0")
            assert not control.is_up("tap0")
            assert control.mtu("tap0") == 1400
            assert control.mac("tap0") == "fe:54:00:12:34:56"
            assert links.show(ns)["tap0"].kind == "tun"
            with pytest.raises(HostError):
                taps.open_tap("tap0", netns_fd=fd)
            copy = os.dup(tap.fds[0])
        assert control.exists("tap0")
        os.close(copy)
        assert not control.exists("tap0")


def test_somebody_elses_tap_is_left_alone(ns: str) -> None:
    netns.run_in_netns(ns, ["ip", "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr"], timeout=5)
    with netns.opened_netns(ns) as fd, pytest.raises(HostError, match="tap0"):
        taps.open_tap("tap0", netns_fd=fd)
    assert "tap0" in links.show(ns)


def test_tap_with_queues(ns: str) -> None:
    with netns.opened_netns(ns) as fd:
        with taps.open_tap("tap0", queues=3, netns_fd=fd) as tap:
            assert len(set(tap.fds)) == 3
        with LinkControl(fd) as control:
            assert not control.exists("tap0")


def test_no_ipv6_chatter_from_a_tap(ns: str) -> None:
    with (
        netns.opened_netns(ns) as fd,
        LinkControl(fd) as control,
        taps.open_tap("tap0", netns_fd=fd) as tap,
    ):
        control.up("tap0")
        with pytest.raises(BlockingIOError):
            os.read(tap.fds[0], 2048)
        shown = netns.run_in_netns(ns, ["ip", "-6", "address", "show", "tap0"], timeout=5)
        assert shown == b""


def test_bridge_port_and_up_down_are_quick(ns: str, record_property: pytest.RecordProperty) -> None:
    links.apply([links.bridge("br0", mac=links.stable_mac(ns))], netns=ns)
    spent: dict[str, list[float]] = {"attach": [], "up": [], "down": [], "detach": []}
    with (
        netns.opened_netns(ns) as fd,
        LinkControl(fd) as control,
        taps.open_tap("tap0", vm_mac=MAC, netns_fd=fd),
    ):
        for _ in range(20):
            for what, act in (
                ("attach", lambda: control.attach("br0", "tap0")),
                ("up", lambda: control.up("tap0")),
                ("down", lambda: control.down("tap0")),
                ("detach", lambda: control.detach("br0", "tap0")),
            ):
                start = time.perf_counter()
                act()
                spent[what].append((time.perf_counter() - start) * 1000)
                shown = control.is_up("tap0")
                assert shown == (what == "up")
        control.attach("br0", "tap0")
        assert links.show(ns)["tap0"].master == "br0"
        control.detach("br0", "tap0")
        assert links.show(ns)["tap0"].master is None
        control.detach("br0", "tap0")  # already out: fine
        with pytest.raises(OSError, match="nosuch"):
            control.attach("nosuch", "tap0")
    medians = {what: statistics.median(times) for what, times in spent.items()}
    for what, value in medians.items():
        record_property(f"{what}_ms", round(value, 4))
    print({k: round(v, 4) for k, v in medians.items()})
    assert sum(medians.values()) < 20  # a program would take longer; the report has the figures


def test_attach_twice_is_fine_but_not_to_another_bridge(mark: str) -> None:
    # In the machine's own namespace, for whose links /sys is true.
    one, two = f"{mark}1", f"{mark}2"
    links.apply([links.bridge(one), links.bridge(two)])
    try:
        with LinkControl() as control, taps.open_tap(f"{mark}t"):
            control.attach(one, f"{mark}t")
            control.attach(one, f"{mark}t")
            with pytest.raises(OSError, match=two):
                control.attach(two, f"{mark}t")
            assert links.show()[f"{mark}t"].master == one
            assert links.counters(f"{mark}t").tx_packets >= 0
    finally:
        links.apply([links.delete(one), links.delete(two)])


def test_rarp_reaches_the_wire_and_teaches_the_bridge(ns: str, ns2: str) -> None:
    wire(ns, ns2)
    with netns.opened_netns(ns) as a, netns.opened_netns(ns2) as b:
        ear = netns.socket_in_netns(a, socket.AF_PACKET, socket.SOCK_RAW, 0)
        with ear, announce.Announcer(b) as announcer:
            ear.bind(("br0", announce.ETHERTYPE_RARP))
            ear.settimeout(2)
            announcer.send("far0", MAC)
            assert ear.recv(100) == announce.rarp_frame(MAC)
    table = netns.run_in_netns(ns, ["bridge", "fdb", "show", "br", "br0"], timeout=5).decode()
    assert f"{MAC} dev w0 master br0" in table


def test_announcing_on_a_bridge_leaves_through_its_ports(ns: str, ns2: str) -> None:
    wire(ns, ns2)
    with (
        netns.opened_netns(ns) as a,
        netns.opened_netns(ns2) as b,
        netns.socket_in_netns(b, socket.AF_PACKET, socket.SOCK_RAW, 0) as ear,
        announce.Announcer(a) as announcer,
    ):
        ear.bind(("far0", announce.ETHERTYPE_RARP))
        ear.settimeout(2)
        announcer.send("br0", MAC)
        assert ear.recv(100) == announce.rarp_frame(MAC)


def _throughput_bits(a: int, b: int, seconds: float) -> float:
    """TCP from namespace b to a for a while, in bits per second of payload."""
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(netns.socket_in_netns(a))
        server.bind(("10.9.0.1", 0))
        server.listen()
        client = opened.enter_context(netns.socket_in_netns(b))
        client.connect(server.getsockname())
        receiver, _ = server.accept()
        opened.enter_context(receiver)
        stop = time.monotonic() + seconds

        def send() -> None:
            block = bytes(65536)
            while time.monotonic() < stop:
                client.sendall(block)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        start = time.monotonic()
        sender.start()
        total = 0
        while data := receiver.recv(1 << 20):
            total += len(data)
        sender.join()
        return total * 8 / (time.monotonic() - start)


@pytest.mark.parametrize("rate", [100_000_000, 1_000_000_000])
def test_shaped_link_carries_its_rate(ns: str, ns2: str, rate: int) -> None:
    wire(ns, ns2)
    assert shaping.shaping("far0", netns=ns2) is None
    made = shaping.shape("far0", rate, netns=ns2)
    assert made.rate_bits == rate
    assert shaping.shape("far0", rate, netns=ns2) == made  # again: replaces
    with netns.opened_netns(ns) as a, netns.opened_netns(ns2) as b:
        got = _throughput_bits(a, b, 0.7)
    print(f"{rate} bit/s shaped: {got / rate:.3f} of it as payload")
    assert 0.8 < got / rate < 1.02
    shaping.unshape("far0", netns=ns2)
    shaping.unshape("far0", netns=ns2)
    assert shaping.shaping("far0", netns=ns2) is None


def test_namespace_errors(ns: str) -> None:
    with pytest.raises(HostError):
        netns.create(ns)
    netns.delete(ns + "-missing")
    with pytest.raises(HostError):
        netns.open_netns(ns + "-missing")
