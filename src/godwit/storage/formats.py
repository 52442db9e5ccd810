"""What each disk format is to QEMU: its driver, its options, its limits, its first bytes. Pure.

    format     driver   grows  check  who opens it for a VM
    raw        raw      QEMU   -      QEMU
    qcow2      qcow2    QEMU   yes    QEMU
    vhd-fixed  vpc      we     -      QEMU, as raw up to the footer (see `payload`)
    vhd        vpc      we     -      the storage broker
    vhdx       vhdx     we     yes    the storage broker
    vmdk       vmdk     -      yes    nobody: it can only be imported

The format is always named to QEMU. Probing is off, because the first bytes of a raw disk belong to
its guest, who could make it look like an image that leads to a file of the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from godwit.model.disks import BROKERED_ONLY
from godwit.model.errors import InvalidRequest
from godwit.model.vm import DiskFormat

SECTOR: Final = 512
TIB: Final = 1 << 40
LARGEST_VIRTUAL: Final = 64 * TIB
"""The largest virtual size that is taken from a stranger; also what VHDX can hold."""

SourceFormat = DiskFormat | Literal["vmdk"]
"""What an import reads."""

HEAD_BYTES: Final = 4096
TAIL_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Format:
    """Facts about one format, as of QEMU 7.2 to 10.0. ``largest`` in bytes, None: QEMU says.

    ``grows``: by QEMU itself; the others do by `godwit.storage.growth`.
    """

    driver: str
    create: tuple[str, ...] = ()
    grows: bool = False
    has_check: bool = False
    can_lead: bool = False
    largest: int | None = None


FORMATS: Final[Mapping[SourceFormat, Format]] = {
    "raw": Format("raw", grows=True),
    # Lazy extras (refcounts, extended L2) stay off: old QEMUs must read it.
    "qcow2": Format(
        "qcow2",
        create=("compat=1.1", "lazy_refcounts=off"),
        grows=True,
        has_check=True,
        can_lead=True,
    ),
    # force_size: the size as it was asked for, not rounded to a geometry of cylinders.
    "vhd-fixed": Format("vpc", create=("subformat=fixed", "force_size=on"), largest=2040 << 30),
    "vhd": Format("vpc", create=("subformat=dynamic", "force_size=on"), largest=2040 << 30),
    "vhdx": Format("vhdx", create=("subformat=dynamic",), has_check=True, largest=64 * TIB),
    "vmdk": Format("vmdk", has_check=True, can_lead=True),
}

_NAMES: Final[Mapping[str, str]] = {
    "raw": "a raw disk",
    "qcow2": "a qcow2 image",
    "vhd-fixed": "a fixed VHD",
    "vhd": "a dynamic VHD",
    "vhdx": "a VHDX image",
    "vmdk": "a VMDK image",
}

_MAGICS: Final[tuple[tuple[bytes, SourceFormat], ...]] = (
    (b"QFI\xfb", "qcow2"),
    (b"vhdxfile", "vhdx"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
)
_STRANGERS: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"\x1f\x8b", "gzip"),
    (0, b"BZh", "bzip2"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (257, b"ustar", "tar (an OVA is one)"),
    (0, b"QED\0", "QED"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"<!DOCTYPE html", "HTML"),
)
_UNPACK: Final = frozenset({"gzip", "bzip2", "xz", "zstd", "zip", "7z", "tar (an OVA is one)"})

VHD_COOKIE: Final = b"conectix"
_VHD_TYPE: Final = slice(60, 64)


class HasSize(Protocol):
    """Whatever knows how many bytes the guest sees."""

    @property
    def virtual_size(self) -> int:
        """Bytes the guest sees."""
        ...


def name_of(format: SourceFormat) -> str:  # noqa: A002 - the word the field uses
    """The format in a sentence."""
    return _NAMES[format]


def migrates_itself(format: DiskFormat) -> bool:  # noqa: A002
    """Whether a VM with such a disk may move while QEMU itself holds the image open."""
    return format not in BROKERED_ONLY


def stored_size(format: DiskFormat, size_bytes: int) -> int:  # noqa: A002
    """Bytes the image really holds when so many are asked for: whole sectors.

    InvalidRequest when the format cannot hold as much.
    """
    size = -(-size_bytes // SECTOR) * SECTOR
    largest = FORMATS[format].largest
    if largest is not None and size > largest:
        raise InvalidRequest(
            f"{name_of(format)} holds at most {largest >> 30} GiB, not {size} bytes",
            hint="take qcow2, raw or vhdx" if format != "vhdx" else "take qcow2 or raw",
        )
    return size


def sniff(head: bytes, tail: bytes) -> SourceFormat | None:
    """The format that the first `HEAD_BYTES` and last `TAIL_BYTES` speak of, None for none.

    Only to refuse what was named wrongly, never to choose how something is opened. A VHD keeps its
    footer at the end; a dynamic one has a copy of it at the start.
    """
    for magic, format in _MAGICS:  # noqa: A001
        if head.startswith(magic):
            return format
    if head.startswith(VHD_COOKIE):
        return "vhd"
    if tail.startswith(VHD_COOKIE):
        return "vhd-fixed" if tail[_VHD_TYPE] == b"\0\0\0\x02" else "vhd"
    return None


def stranger(head: bytes) -> str:
    """What else the first bytes speak of that is no disk image here, empty for nothing known."""
    lowered = head[:16].lower()
    for offset, magic, name in _STRANGERS:
        if head[offset : offset + len(magic)] == magic or (
            name == "HTML" and lowered.startswith(magic.lower())
        ):
            return name
    return ""


def is_packed(name: str) -> bool:
    """Whether what `stranger` named has to be unpacked first."""
    return name in _UNPACK


def payload(format: DiskFormat, info: HasSize) -> tuple[int, int] | None:  # noqa: A002
    """Offset and length of the guest's bytes within the file, to be opened as ``raw``.

    None for a format that has to be opened by its own driver. A fixed VHD is the guest's bytes
    followed by a footer, which thus stays out of the guest's reach.
    """
    if format in ("vhd-fixed", "raw"):
        return 0, info.virtual_size
    return None
