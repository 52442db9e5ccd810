"""UEFI firmware, instead of the BIOS that comes with QEMU: what is known and pinned of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from godwit.model.base import Record

FirmwareKind = Literal["bios", "uefi"]


class FirmwareImage(Record):
    """A file of the host's firmware package; hosts are compared by all of this."""

    path: str
    format: Literal["raw"] = "raw"
    size_bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class UefiFacts(Record):
    """The UEFI firmware of a host: its code, and the file that each VM's variables begin as."""

    code: FirmwareImage
    template: FirmwareImage
