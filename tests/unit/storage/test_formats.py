"""What each format is to QEMU, and which bytes speak of it."""

from __future__ import annotations

from typing import get_args

import pytest

from godwit.model.errors import InvalidRequest
from godwit.model.vm import DiskFormat
from godwit.storage import formats
from godwit.storage.formats import FORMATS, SourceFormat, migrates_itself, sniff, stored_size
from godwit.storage.images import ImageInfo, create_options, unchecked

from .crafted import dynamic_vhd, qcow2, vhd_footer, vmdk

MIB = 1 << 20


def test_every_format_of_the_model_is_known() -> None:
    assert set(get_args(DiskFormat)) | {"vmdk"} == set(FORMATS)
    assert [migrates_itself(f) for f in ("raw", "qcow2", "vhd-fixed")] == [True] * 3
    assert [migrates_itself(f) for f in ("vhd", "vhdx")] == [False] * 2


def test_drivers_and_options() -> None:
    assert {name: one.driver for name, one in FORMATS.items()} == {
        "raw": "raw",
        "qcow2": "qcow2",
        "vhd-fixed": "vpc",
        "vhd": "vpc",
        "vhdx": "vhdx",
        "vmdk": "vmdk",
    }
    assert create_options("raw") == []
    assert create_options("qcow2") == ["-o", "compat=1.1,lazy_refcounts=off"]
    assert create_options("vhd-fixed") == ["-o", "subformat=fixed,force_size=on"]
    assert create_options("vhd") == ["-o", "subformat=dynamic,force_size=on"]


def test_a_format_without_a_check_says_so() -> None:
    report = unchecked("vhd")
    assert (report.checked, report.damaged) == (False, False)
    assert report.words == "not checked: a dynamic VHD has no check in QEMU"
    assert [name for name, one in FORMATS.items() if one.has_check] == ["qcow2", "vhdx", "vmdk"]


def test_sizes_are_whole_sectors_that_the_format_can_hold() -> None:
    assert stored_size("raw", 1) == 512
    assert stored_size("vhd", 513) == 1024
    assert stored_size("vhd", 2040 << 30) == 2040 << 30
    with pytest.raises(InvalidRequest, match="a dynamic VHD holds at most 2040 GiB") as caught:
        stored_size("vhd", (2040 << 30) + 1)
    assert "vhdx" in caught.value.hint
    with pytest.raises(InvalidRequest, match="65536 GiB"):
        stored_size("vhdx", 65 << 40)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (qcow2(), "qcow2"),
        (b"vhdxfile".ljust(MIB, b"\0"), "vhdx"),
        (vmdk(), "vmdk"),
        (b"# Disk DescriptorFile\n", "vmdk"),
        (bytes(MIB) + vhd_footer(MIB), "vhd-fixed"),
        (dynamic_vhd(MIB), "vhd"),
        (dynamic_vhd(MIB)[512:], "vhd"),
        (vhd_footer(MIB, kind=4), "vhd"),
        (bytes(MIB), None),
        (b"", None),
        (b"Q", None),
    ],
)
def test_first_and_last_bytes(data: bytes, found: SourceFormat | None) -> None:
    assert sniff(data[: formats.HEAD_BYTES], data[-formats.TAIL_BYTES :]) == found


def test_what_is_no_disk_image() -> None:
    assert formats.stranger(b"\x1f\x8b\x08") == "gzip"
    assert formats.is_packed(formats.stranger(bytes(257) + b"ustar\0"))
    assert formats.stranger(b"<!doctype HTML>\n<title>Not found</title>") == "HTML"
    assert formats.stranger(bytes(512)) == ""


def test_only_the_payload_of_a_fixed_vhd_is_the_guests() -> None:
    info = ImageInfo("vpc", 8 * MIB, 0)
    assert formats.payload("vhd-fixed", info) == (0, 8 * MIB)
    assert formats.payload("raw", info) == (0, 8 * MIB)
    assert [formats.payload(f, info) for f in ("qcow2", "vhd", "vhdx")] == [None] * 3
