"""Strangers' images, judged by their bytes alone: each refusal is one line that says why."""

from __future__ import annotations

import struct

import pytest

from godwit.model.errors import Refused
from godwit.storage import vhd
from godwit.storage.foreign import check_size, examine
from godwit.storage.formats import LARGEST_VIRTUAL, SourceFormat

from .crafted import MIB, dynamic_vhd, qcow2, reader, vhd_footer, vmdk, vmdk_descriptor


def judge(
    data: bytes,
    format: SourceFormat,  # noqa: A002
) -> int | None:
    size = len(data)
    return examine(format, reader(data), size, largest_virtual=LARGEST_VIRTUAL).virtual_size


@pytest.mark.parametrize(
    ("format", "data", "size"),
    [
        ("raw", bytes(MIB), MIB),
        ("raw", bytes(1000), 1024),
        ("qcow2", qcow2(), 4 * MIB),
        ("qcow2", qcow2(version=2), 4 * MIB),
        ("vhd-fixed", bytes(MIB) + vhd_footer(MIB), MIB),
        ("vhd", dynamic_vhd(MIB), MIB),
        ("vhdx", b"vhdxfile".ljust(MIB, b"\0"), None),
        ("vmdk", vmdk(vmdk_descriptor()), 4 * MIB),
        ("vmdk", vmdk(vmdk_descriptor("streamOptimized")), 4 * MIB),
    ],
)
def test_a_sound_image_is_taken(format: SourceFormat, data: bytes, size: int | None) -> None:  # noqa: A002
    assert judge(data, format) == size


HOSTILE: list[tuple[SourceFormat, bytes, str]] = [
    *((format_, b"", "the file is empty") for format_ in ("raw", "qcow2", "vhd", "vmdk")),
    ("raw", qcow2(), "it is a qcow2 image, not a raw disk"),
    ("raw", bytes(MIB) + vhd_footer(MIB), "it is a fixed VHD, not a raw disk"),
    ("raw", b"\x1f\x8b" + bytes(600), "it is packed with gzip, not a raw disk"),
    ("raw", bytes(64) + b"\x7f\x10\xda\xbe" + bytes(600), "it is VDI, not a raw disk"),
    ("qcow2", bytes(MIB), "it is not a qcow2 image: its first bytes are wrong"),
    ("qcow2", b"<!DOCTYPE html>", "it is HTML, not a qcow2 image"),
    ("vhd-fixed", bytes(MIB), "no footer at its end"),
    ("vhd-fixed", dynamic_vhd(MIB), "it is a dynamic VHD, not a fixed VHD"),
    ("vhd", bytes(MIB) + vhd_footer(MIB), "it is a fixed VHD, not a dynamic VHD"),
    # cut off
    ("qcow2", qcow2()[:50], "it is cut off: its header"),
    ("qcow2", qcow2()[:80], "it is cut off within its header"),
    ("qcow2", qcow2()[: 3 << 16], "it is cut off: its table of clusters"),
    ("qcow2", qcow2(l1_size=0xFFFFFFFF), "it is cut off: its table of clusters"),
    ("qcow2", qcow2(cluster_bits=62), "its clusters are absurd"),
    ("vhd", dynamic_vhd(MIB)[:-600], "it is cut off or damaged: its footer"),
    ("vhd-fixed", bytes(MIB - 512) + vhd_footer(MIB), f"claims to hold {MIB} bytes, the file has"),
    ("vhdx", b"vhdxfile" + bytes(1000), "it is cut off: its header section"),
    ("vmdk", vmdk()[:60], "it is cut off: its header"),
    ("vmdk", vmdk(vmdk_descriptor())[:600], "it is cut off: its descriptor"),
    # leads elsewhere
    ("qcow2", qcow2(backing=b"/etc/shadow"), r"another file \(backing file /etc/shadow\)"),
    ("qcow2", qcow2(version=2, backing=b"/etc/shadow"), r"\(backing file /etc/shadow\)"),
    ("qcow2", qcow2(backing=b'json:{"driver":"file"}'), r'backing file json:{"driver":"file"}'),
    ("qcow2", qcow2(external=True, data_file=b"/etc/shadow"), r"data file /etc/shadow"),
    ("qcow2", qcow2(external=True), r"data file that it does not name"),
    ("vhd", vhd_footer(MIB, kind=4) + bytes(MIB) + vhd_footer(MIB, kind=4), "leads to .*parent"),
    (
        "vmdk",
        vmdk_descriptor("monolithicFlat", 'RW 8192 FLAT "/etc/shadow" 0').encode(),
        r"extents /etc/shadow",
    ),
    ("vmdk", b"# Disk DescriptorFile", "extents that it does not name"),
    ("vmdk", b"COWD" + bytes(600), "of an old kind"),
    ("vmdk", vmdk(vmdk_descriptor(), capacity=0), "leads to another file"),
    ("vmdk", vmdk(vmdk_descriptor(parent="/etc/shadow")), r"parent /etc/shadow"),
    (
        "vmdk",
        vmdk(vmdk_descriptor("twoGbMaxExtentSparse")),
        r"in several files \(kind 'twoGbMaxExtentSparse'\)",
    ),
    (
        "vmdk",
        vmdk(vmdk_descriptor("monolithicSparse", 'RW 1 SPARSE "a"', 'RW 1 FLAT "/etc/shadow" 0')),
        "in several files",
    ),
    # absurd or unusable
    ("qcow2", qcow2(size=1 << 62), "it claims to hold 4611686018427387904 bytes"),
    ("qcow2", qcow2(size=0), "it holds no bytes at all"),
    ("qcow2", qcow2(crypt=2), "it is encrypted"),
    ("qcow2", qcow2(version=1), "qcow of version 1"),
    ("vhd", dynamic_vhd(1 << 60, entries=1), "it claims to hold"),
    ("vmdk", vmdk(capacity=1 << 60), "it claims to hold"),
]


@pytest.mark.parametrize(("format", "data", "words"), HOSTILE)
def test_a_hostile_image_is_refused_in_one_line(
    format: SourceFormat,  # noqa: A002
    data: bytes,
    words: str,
) -> None:
    with pytest.raises(Refused, match=words) as caught:
        judge(data, format)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300
    assert caught.value.hint


def test_names_cannot_forge_the_message() -> None:
    with pytest.raises(Refused) as caught:
        judge(qcow2(backing=b"a\n\x1b[2Jall is well\xff" + b"x" * 900), "qcow2")
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()


def test_limits_are_the_callers() -> None:
    data = qcow2(size=2 * MIB)
    with pytest.raises(Refused, match="at most 1048576 are taken"):
        examine("qcow2", reader(data), len(data), largest_virtual=MIB)
    check_size(MIB, largest_virtual=MIB)


@pytest.mark.parametrize(
    ("creator", "geometry", "size"),
    [
        (b"qem2", (10, 4, 17), 4 * MIB),
        (b"win ", (10, 4, 17), 4 * MIB),
        (b"vpc ", (10, 4, 17), 10 * 4 * 17 * 512),
        (b"qemu", (10, 4, 17), 10 * 4 * 17 * 512),
        (b"vpc ", (65535, 16, 255), 4 * MIB),
    ],
)
def test_makers_of_vhd_mean_different_sizes(
    creator: bytes, geometry: tuple[int, int, int], size: int
) -> None:
    footer = vhd.parse_footer(vhd_footer(4 * MIB, creator=creator, geometry=geometry))
    assert footer is not None
    assert (footer.kind, footer.virtual_size) == ("fixed", size)


def test_a_footer_that_does_not_add_up_is_none() -> None:
    good = vhd_footer(MIB)
    assert vhd.parse_footer(good) is not None
    for place in (8, 48, 60, 64, 511):
        bad = bytearray(good)
        bad[place] ^= 1
        assert vhd.parse_footer(bytes(bad)) is None
    assert vhd.parse_footer(good[:500]) is None


def blocks_of(data: bytes, *, size: int = 4 * MIB) -> None:
    footer = vhd.parse_footer(data[:512])
    assert footer is not None
    vhd.check_blocks(footer, reader(data), size)


def test_blocks_of_a_dynamic_vhd_lie_within_the_file() -> None:
    blocks_of(dynamic_vhd(4 * MIB, blocks=(8,)))
    with pytest.raises(Refused, match="past the end"):
        blocks_of(dynamic_vhd(4 * MIB, blocks=(8, 5000)))
    # The last sector that still fits, and the first that does not.
    last = (4 * MIB - 2 * MIB - 512) // 512
    blocks_of(dynamic_vhd(4 * MIB, blocks=(last,)))
    with pytest.raises(Refused, match="past the end"):
        blocks_of(dynamic_vhd(4 * MIB, blocks=(last + 1,)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (dynamic_vhd(MIB, entries=0xFFFFFFFF), "absurd"),
        (dynamic_vhd(MIB, block=3 * MIB), "absurd"),
        (dynamic_vhd(64 * MIB, entries=2), "too short"),
        (dynamic_vhd(64 * MIB)[:1580], "cut off"),
        (dynamic_vhd(MIB)[:512] + bytes(2048), "header is missing"),
    ],
)
def test_an_absurd_block_table(data: bytes, words: str) -> None:
    with pytest.raises(Refused, match=words):
        blocks_of(data)


def test_the_makers_here_are_right_about_the_footer() -> None:
    # Offsets of the specification, written out once more.
    footer = vhd_footer(7 * MIB, kind=3)
    assert struct.unpack(">Q", footer[48:56]) == (7 * MIB,)
    assert struct.unpack(">I", footer[60:64]) == (3,)
