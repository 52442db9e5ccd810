"""The guest's archive: cpio as the kernel reads it, module order, what a module says of itself."""

from __future__ import annotations

import random
import stat
import struct

import pytest

from godwit.lab.initramfs import (
    SIGNATURE_MARK,
    Entry,
    ImageError,
    is_static,
    load_order,
    modinfo,
    newc_archive,
    unsigned,
)


def kernel_object(**fields: str) -> bytes:
    """A minimal ELF64 with a name table and a .modinfo section."""
    names = b"\0.shstrtab\0.modinfo\0"
    info = b"".join(f"{key}={value}".encode() + b"\0" for key, value in fields.items())
    header = 64
    table = header + len(names) + len(info)
    elf = bytearray(header)
    elf[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", elf, 0x28, table)
    struct.pack_into("<HHH", elf, 0x3A, 64, 3, 1)

    def section(name: int, offset: int, length: int) -> bytes:
        return struct.pack("<I20xQQ24x", name, offset, length)

    sections = section(0, 0, 0) + section(1, header, len(names))
    sections += section(11, header + len(names), len(info))
    return bytes(elf) + names + info + sections


def parse_newc(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """An independent reader of the form, by the kernel's documentation."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + i * 8 : at + 14 + i * 8], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        major, minor = fields[9:11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        start = (at + 110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[start : start + size], (major, minor))
        at = (start + size + 3) // 4 * 4


def test_archive_holds_what_was_put_in() -> None:
    entries = [
        Entry("etc", stat.S_IFDIR | 0o755),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("init", stat.S_IFLNK | 0o777, b"bin/busybox"),
        *(Entry(f"f{n}", stat.S_IFREG | 0o644, bytes(n)) for n in range(6)),
    ]
    archive = newc_archive(entries)
    assert parse_newc(archive) == {e.path: (e.mode, e.data, e.device) for e in entries}
    assert newc_archive(entries) == archive


def test_modinfo_reads_dependencies() -> None:
    data = kernel_object(name="sd_mod", depends="scsi_mod,t10-pi", license="GPL")
    assert modinfo(data)["depends"] == "scsi_mod,t10-pi"
    with pytest.raises(ImageError):
        modinfo(b"MZ not a module")


def test_signature_is_cut_off_and_nothing_else() -> None:
    module = kernel_object(name="x", depends="")
    signature = bytes(range(200))
    signed = module + signature + bytes(8) + struct.pack(">I", len(signature)) + SIGNATURE_MARK
    assert unsigned(signed) == module
    assert unsigned(module) == module


GRAPH = {
    "virtio": ["virtio_ring"],
    "virtio_ring": [],
    "virtio_pci": ["virtio", "virtio_ring", "legacy"],
    "legacy": [],
    "virtio_net": ["net_failover", "virtio"],
    "net_failover": ["failover"],
    "failover": [],
}


@pytest.mark.parametrize("seed", range(20))
def test_every_module_comes_after_what_it_needs(seed: int) -> None:
    wanted = list(GRAPH)
    random.Random(seed).shuffle(wanted)
    order = load_order(wanted, GRAPH.__getitem__, frozenset())
    assert sorted(order) == sorted(GRAPH)
    for name in order:
        assert all(order.index(needed) < order.index(name) for needed in GRAPH[name])


def test_built_in_modules_are_left_out_with_what_only_they_need() -> None:
    order = load_order(["virtio_net"], GRAPH.__getitem__, frozenset({"virtio", "failover"}))
    assert order == ["net_failover", "virtio_net"]


def test_a_circle_is_an_error_that_names_it() -> None:
    circle = {"a": ["b"], "b": ["a"]}
    with pytest.raises(ImageError, match="a -> b -> a"):
        load_order(["a"], circle.__getitem__, frozenset())


def program(*segments: int) -> bytes:
    head = bytearray(64)
    struct.pack_into("<Q", head, 0x20, 64)
    struct.pack_into("<HH", head, 0x36, 56, len(segments))
    return bytes(head) + b"".join(struct.pack("<I52x", kind) for kind in segments)


def test_static_means_no_loader_is_asked_for() -> None:
    assert is_static(program(1, 1, 2))
    assert not is_static(program(1, 3, 1))
