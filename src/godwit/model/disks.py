"""Which way a disk's I/O goes, and what its image is called: pure rules that all rooms share.

    direct    QEMU opens the image or device itself
    brokered  QEMU -> the VM's storage broker -> image, device or a peer

QEMU's own drivers for dynamic VHD and VHDX cache metadata and refuse to be migrated, so those
two formats are always brokered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from godwit.model.vm import Disk, DiskFormat

FORMATS: tuple[DiskFormat, ...] = ("raw", "qcow2", "vhd-fixed", "vhd", "vhdx")
DEFAULT_FORMAT: DiskFormat = "qcow2"
BROKERED_ONLY: frozenset[DiskFormat] = frozenset({"vhd", "vhdx"})
CLUSTER_STORAGE = "/clusterstorage"
USER_DATA = f"{CLUSTER_STORAGE}/shared/.godwit/user-data/"
SEED = "seed0"
"""The id of the CD with a VM's user data."""
VARIABLES = "vars0"
"""The id of the image with a VM's UEFI variables; no disk is called like this."""
_HEX = frozenset("0123456789abcdef")

_SUFFIXES: dict[DiskFormat, str] = {
    "raw": ".raw",
    "qcow2": ".qcow2",
    "vhd-fixed": ".vhd",
    "vhd": ".vhd",
    "vhdx": ".vhdx",
}


def tier_of(disk: Disk) -> Literal["direct", "brokered"]:
    """The way the disk's I/O goes, whatever was asked for."""
    if disk.format in BROKERED_ONLY or disk.tier == "brokered":
        return "brokered"
    return "direct"


def suffix_of(format: DiskFormat) -> str:  # noqa: A002 - the word the field uses
    """What an image's file name ends in, with its dot."""
    return _SUFFIXES[format]


def image_path(volume: str, vm: str, name: str, format: DiskFormat) -> str:  # noqa: A002
    """Where a VM's own image of that name lies, on every host."""
    return f"{CLUSTER_STORAGE}/{volume}/{vm}/{name}{suffix_of(format)}"


def imported_path(volume: str, name: str, format: DiskFormat) -> str:  # noqa: A002
    """Where an imported image waits for its VM; no VM can be called like this directory."""
    return f"{CLUSTER_STORAGE}/{volume}/.godwit/images/{name}{suffix_of(format)}"


def lun_path(volume: str, lun: int) -> str:
    """What a LUN of an iscsi volume is called on every host."""
    return f"{CLUSTER_STORAGE}/{volume}/lun-{lun}"


def iso_path(text: str) -> tuple[str, str]:
    """Volume and whole path of ``VOLUME:PATH``; both empty when it leads out of its volume."""
    volume, _, below = text.partition(":")
    path = f"{CLUSTER_STORAGE}/{volume}/{below}"
    return (volume, path) if below and volume_of(path) == volume else ("", "")


def seed_path(vm: str) -> str:
    """Where the CD with a VM's user data lies."""
    return f"{CLUSTER_STORAGE}/shared/{vm}/{SEED}.iso"


def is_user_data(path: str) -> bool:
    """Whether this is a path under which user data is kept: by its hash, for root alone."""
    digest = path.removeprefix(USER_DATA)
    return path.startswith(USER_DATA) and len(digest) == 64 and not set(digest) - _HEX


def volume_of(path: str) -> str | None:
    """The volume a plain absolute path lies in; None when it lies in none or leads elsewhere."""
    parts = path.split("/")
    plain = len(parts) > 3 and all(part not in ("", ".", "..") for part in parts[1:])
    if not plain or path != f"/{'/'.join(parts[1:])}":
        return None
    return parts[2] if f"/{parts[1]}" == CLUSTER_STORAGE else None
