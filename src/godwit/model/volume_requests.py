"""Requests about volumes; `godwit.model.requests` has all of them together."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from godwit.model.base import Name, Value
from godwit.model.vm import DiskFormat
from godwit.model.volume import VolumeKind

SERVER_PATTERN = r"^([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:]{2,39})?$"
PORTAL_PATTERN = r"^([A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:]{2,39}\])?(:[0-9]{1,5})?$"


FENCE_PATTERN = (
    r"^(https://([A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:]{2,39}\])(:[0-9]{1,5})?)?$"
)
CEPH_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}"


class CreateVolume(Value):
    """Define a volume, called /clusterstorage/NAME on every host.

    ``path`` is what lies beneath a directory, for people to see. ``nfs`` needs ``server`` and the
    ``export`` there, ``iscsi`` the ``portal`` (HOST[:PORT]) and the ``target`` (its IQN), ``rbd``
    the Ceph ``pool`` (POOL or POOL/NAMESPACE) and ``client`` (NAME of client.NAME). ``fence_url``
    (nfs, iscsi) is where the server's fencing daemon answers.
    """

    kind: Literal["volume.create"] = "volume.create"
    name: Name
    type: VolumeKind = "dir"
    path: str = ""
    server: str = Field(default="", pattern=SERVER_PATTERN)
    export: str = Field(default="", pattern=r"^(/[^\x00-\x1f\x7f]*)?$", max_length=1024)
    portal: str = Field(default="", pattern=PORTAL_PATTERN)
    target: str = Field(default="", pattern=r"^([a-z]{3}\.[A-Za-z0-9.:_-]{1,219})?$")
    pool: str = Field(default="", pattern=rf"^({CEPH_NAME}(/{CEPH_NAME})?)?$")
    client: str = Field(default="", pattern=rf"^({CEPH_NAME})?$")
    fence_url: str = Field(default="", pattern=FENCE_PATTERN)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        served = {
            "nfs": ("server", "export"),
            "iscsi": ("portal", "target"),
            "rbd": ("pool", "client"),
        }
        for kind, fields in served.items():
            for field in fields:
                said = bool(getattr(self, field))
                if said and self.type != kind:
                    raise ValueError(f"only a volume of kind {kind} has a {field}")
                if not said and self.type == kind:
                    raise ValueError(f"a volume of kind {kind} needs --{field}")
        if self.type in served and self.path:
            raise ValueError("what lies beneath is the server's: leave --path out")
        if self.fence_url and self.type not in ("nfs", "iscsi"):
            raise ValueError("only a volume of kind nfs or iscsi has a fencing daemon")
        if ".." in self.export.split("/"):
            raise ValueError("the export is a plain path of the server")
        return self


class SetVolume(Value):
    """Change what is known of a volume. ``fence_url``: where the fencing daemon of its server
    answers, empty: nowhere."""

    kind: Literal["volume.set"] = "volume.set"
    name: Name
    fence_url: str | None = Field(default=None, pattern=FENCE_PATTERN)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.fence_url is None:
            raise ValueError("nothing is to be changed: say --fence-url")
        return self


class DeleteVolume(Value):
    """Forget a volume that no VM uses; the files in it stay."""

    kind: Literal["volume.delete"] = "volume.delete"
    name: Name


class RedirectVolume(Value):
    """Let a host's I/O on a volume go through another host, until it is restored.

    For work on that host's way to the storage. Only for VMs whose disks there are brokered.
    """

    kind: Literal["volume.redirect"] = "volume.redirect"
    name: Name
    host: Name


class RestoreVolume(Value):
    """Let a host use its own path to a volume again."""

    kind: Literal["volume.restore"] = "volume.restore"
    name: Name
    host: Name


class ImportDisk(Value):
    """Bring an image into a volume, from a file below /clusterstorage or an http(s) URL.

    ``format`` says what it is, ``target_format`` what it becomes; ``name`` is the new image's.
    """

    kind: Literal["volume.disk.import"] = "volume.disk.import"
    volume: Name
    name: Name
    source: str
    format: DiskFormat | Literal["vmdk"] = "qcow2"
    target_format: DiskFormat = "qcow2"
