"""Batch lines, frames and requests are exact, and nothing can be smuggled into them."""

from __future__ import annotations

import struct

import pytest

from godwit.host import links, shaping
from godwit.host.announce import rarp_frame
from godwit.host.errors import HostError, LinkCommandFailed, ProgramFailed
from godwit.host.ifctl import mac_bytes, request
from godwit.host.taps import host_side_mac

MAC = "52:54:00:12:34:56"


def test_bridge_line() -> None:
    assert links.bridge("br-lan", mtu=9000, mac="02:00:00:00:00:01") == (
        "link add name br-lan mtu 9000 address 02:00:00:00:00:01 up type bridge "
        "stp_state 0 forward_delay 0 mcast_snooping 0"
    )
    assert "address" not in links.bridge("br-lan")


def test_veth_lines() -> None:
    assert links.veth("a", "b", mtu=1400, peer_netns="sw") == (
        "link add name a mtu 1400 type veth peer name b mtu 1400 netns sw"
    )
    assert links.veth("a", "b", peer_netns=12).endswith("peer name b mtu 1500 netns 12")
    assert links.veth("a", "b").endswith("peer name b mtu 1500")


def test_other_lines() -> None:
    assert links.move("a", "sw") == "link set dev a netns sw"
    assert links.attach("a", "br0") == "link set dev a master br0"
    assert links.detach("a") == "link set dev a nomaster"
    assert links.address("a", "10.92.0.11/24") == "address add 10.92.0.11/24 dev a"
    assert links.address("a", "fd00::1/64") == "address add fd00::1/64 dev a"
    assert links.route("default", "10.0.0.1") == "route add default via 10.0.0.1"
    assert links.flush_addresses("a") == "address flush dev a"


@pytest.mark.parametrize("name", ["", "a b", "a\nlink del dev eth0", "x" * 16, "a/b", "-ö"])
def test_bad_names_are_refused(name: str) -> None:
    for make in (links.up, links.down, links.delete, links.bridge, links.flush_addresses):
        with pytest.raises(HostError):
            make(name)


def test_bad_values_are_refused() -> None:
    with pytest.raises(HostError):
        links.set_mtu("a", 10)
    with pytest.raises(HostError):
        links.move("a", "12")  # a digit string would be taken for a process
    with pytest.raises(ValueError, match="not an Ethernet address"):
        links.set_mac("a", "52:54:00")
    with pytest.raises(ValueError, match="does not appear to be"):
        links.address("a", "10.0.0.300/24")


def test_undo_deletes_what_was_added_last_first() -> None:
    lines = [links.bridge("br0"), links.veth("a", "b"), links.attach("a", "br0"), links.up("a")]
    assert links.undo_lines(lines) == ["link del dev a", "link del dev br0"]


def test_failed_line_is_named() -> None:
    lines = [links.up("a"), links.up("b")]
    error = ProgramFailed(["ip"], 1, 'Cannot find device "b"\nCommand failed -:2\n')
    found = links._explain(lines, error)
    assert isinstance(found, LinkCommandFailed)
    assert (found.line, found.reason) == ("link set dev b up", 'Cannot find device "b"')
    other = ProgramFailed(["ip"], 1, "nsenter: cannot open /run/netns/x")
    assert links._explain(lines, other) is other


def test_answers_of_a_batch_follow_each_other() -> None:
    assert links._answers(b'[{"a":1}]\n[]\n\n[2]\n') == [[{"a": 1}], [], [2]]


def test_stable_mac_is_local_unicast_and_stable() -> None:
    one = links.stable_mac("lab/host1/br-lan")
    assert one == links.stable_mac("lab/host1/br-lan") != links.stable_mac("lab/host2/br-lan")
    assert mac_bytes(one)[0] & 0b11 == 0b10


def test_rarp_frame_byte_for_byte() -> None:
    mac = bytes.fromhex("525400123456")
    assert rarp_frame(MAC) == (
        b"\xff\xff\xff\xff\xff\xff" + mac + b"\x80\x35"
        b"\x00\x01\x08\x00\x06\x04\x00\x03" + mac + b"\0\0\0\0" + mac + b"\0\0\0\0" + b"\0" * 18
    )
    assert len(rarp_frame(MAC)) == 60


def test_ifreq_and_tap_address() -> None:
    made = request("tap0", struct.pack("i", 7))
    assert len(made) == 40
    assert made[:5] == b"tap0\0"
    assert struct.unpack_from("i", made, 16) == (7,)
    assert host_side_mac(MAC) == "fe:54:00:12:34:56"
    for bad in ("", "x" * 16):
        with pytest.raises(HostError):
            request(bad)


def test_shaping_command_and_bucket() -> None:
    argv = shaping.shape_argv("mig0", 1_000_000_000)
    assert " ".join(argv) == (
        "tc qdisc replace dev mig0 root tbf rate 1000000000bit burst 125000 latency 20ms"
    )
    assert shaping.burst_bytes(10_000_000) == 70_000
    with pytest.raises(HostError):
        shaping.shape_argv("mig0", 100)


def test_shaping_read_back() -> None:
    row = {"kind": "tbf", "root": True, "options": {"rate": 125000000, "burst": 125000}}
    found = shaping.parse_shaping([row])
    assert found == shaping.Shaping(rate_bits=1_000_000_000, burst_bytes=125000)
    assert shaping.parse_shaping([{"kind": "noqueue", "root": True, "options": {}}]) is None
