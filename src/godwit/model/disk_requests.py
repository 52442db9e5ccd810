"""Requests about a VM's disks; `godwit.model.requests` has all of them together."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from godwit.model.base import Name, Value
from godwit.model.disks import BROKERED_ONLY
from godwit.model.vm import DiskFormat, DiskTier

LARGEST_DISK = 1 << 50


class NewDisk(Value):
    """A disk to create with a VM: ``VOLUME:SIZE[:FORMAT]``."""

    volume: Name
    size_bytes: int = Field(gt=0, le=LARGEST_DISK)
    format: DiskFormat = "qcow2"


class AddDisk(Value):
    """Give a VM one more disk, also while it runs.

    A new image (``volume`` and ``size_bytes``), an image that is there (``volume``, ``path`` below
    it and its ``format``), a LUN of an iscsi volume (``volume``, ``lun``), or a block device of the
    host (``device``, the same on every host). ``format`` defaults to qcow2 for a new image.
    ``passthrough``: the device is a SCSI LUN which answers the guest's commands itself; the LUN of
    a volume does so unless it goes through the storage broker.
    """

    kind: Literal["vm.disk.add"] = "vm.disk.add"
    name: Name
    volume: Name | None = None
    size_bytes: int | None = Field(default=None, gt=0, le=LARGEST_DISK)
    format: DiskFormat | None = None
    path: str | None = None
    lun: int | None = Field(default=None, ge=0, lt=16384)
    device: str | None = None
    tier: DiskTier = "auto"
    passthrough: bool = False

    @model_validator(mode="after")
    def _is_one_disk(self) -> Self:
        if self.device is not None:
            self._check_device(self.device)
        elif self.lun is not None:
            self._check_lun()
        elif self.volume is None:
            raise ValueError("name a volume (VOLUME:SIZE), or a block device with --device")
        elif self.path is None and self.size_bytes is None:
            raise ValueError("a new disk needs a size: VOLUME:SIZE[:FORMAT]")
        elif self.path is not None and self.format is None:
            raise ValueError("say the format of the image: it is never guessed")
        if self.passthrough and self.device is None:
            raise ValueError("only a block device can be passed through")
        if self.tier == "direct" and self.format in BROKERED_ONLY:
            raise ValueError(f"{self.format} always goes through the storage broker")
        return self

    def _check_lun(self) -> None:
        if self.volume is None:
            raise ValueError("say the volume that the LUN belongs to")
        if self.path is not None or self.size_bytes is not None:
            raise ValueError("a LUN has no image, and its own size")
        if self.format not in (None, "raw"):
            raise ValueError("a LUN is raw")

    def _check_device(self, device: str) -> None:
        if {self.lun, self.volume, self.path, self.size_bytes} != {None}:
            raise ValueError("a block device has no volume, image or size of its own")
        if not device.startswith("/dev/") or ".." in device.split("/") or "\0" in device:
            raise ValueError("a block device is named by its path, like /dev/disk/by-id/...")
        if self.format not in (None, "raw"):
            raise ValueError("a block device is raw")
        if self.passthrough and self.tier == "brokered":
            raise ValueError("a device that is passed through needs no storage broker")


class RemoveDisk(Value):
    """Take a disk from a VM and delete its image, unless ``keep``.

    While the VM runs a disk that the guest writes to is refused unless ``force``.
    """

    kind: Literal["vm.disk.remove"] = "vm.disk.remove"
    name: Name
    disk: Name
    force: bool = False
    keep: bool = False


class ResizeDisk(Value):
    """Let a disk grow to ``size_bytes``, also while its VM runs; none shrinks."""

    kind: Literal["vm.disk.resize"] = "vm.disk.resize"
    name: Name
    disk: Name
    size_bytes: int = Field(gt=0, le=LARGEST_DISK)


class MoveDisk(Value):
    """Move a disk to another volume (``to``), another ``format`` or both, also while its VM runs.

    The old image is deleted at the end unless ``keep``. ``max_bytes_per_s`` holds the copy back
    while the VM runs.
    """

    kind: Literal["vm.disk.move"] = "vm.disk.move"
    name: Name
    disk: Name
    to: Name | None = None
    format: DiskFormat | None = None
    keep: bool = False
    max_bytes_per_s: int | None = Field(default=None, ge=1 << 20, le=1 << 40)

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        if self.to is None and self.format is None:
            raise ValueError("say where to: another volume (--to), another format (--format)")
        return self


class ExportDisk(Value):
    """Write a copy of a stopped VM's disk to ``target``, a new file below /clusterstorage."""

    kind: Literal["vm.disk.export"] = "vm.disk.export"
    name: Name
    disk: Name
    target: str
    format: DiskFormat = "qcow2"
