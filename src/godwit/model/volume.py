"""A volume: one name on every host for a place that holds disks, and what each host sees of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from godwit.model.base import Name, Record

VolumeKind = Literal["dir", "local", "nfs", "iscsi", "rbd"]
SERVED: frozenset[VolumeKind] = frozenset({"nfs", "iscsi", "rbd"})
"""Reached by QEMU itself over the storage network: no host has a directory of them."""

VolumeHealth = Literal["ok", "degraded", "unavailable"]


class VolumeState(StrEnum):
    """How a host reaches a volume; the words are those of Cluster Shared Volumes."""

    DIRECT = "direct"
    REDIRECTED = "redirected"  # through a peer; the guests notice nothing
    PAUSED = "paused"  # neither path answers, requests wait
    UNAVAILABLE = "unavailable"


class Beneath(Record):
    """What a volume stands on.

    ``dir``, ``local``: a directory; ``path`` is what lies beneath it, for people to see.
    ``nfs``: the directory ``export`` of ``server``.  ``iscsi``: the LUNs of ``target`` (its IQN)
    at ``portal`` (address, or address:port).  ``rbd``: the images of a Ceph ``pool`` (POOL, or
    POOL/NAMESPACE), as the Ceph client ``client``; hosts have its keyring, nobody else.
    """

    kind: VolumeKind = "dir"
    path: str = ""
    server: str = ""
    export: str = ""
    portal: str = ""
    target: str = ""
    pool: str = ""
    client: str = ""


class Volume(Beneath):
    """What hosts call ``/clusterstorage/<name>``: all of them, or one (``local``).

    A directory of theirs for ``dir`` and ``local``, only a name for what is served over the
    network. ``coordinator`` is the host that does the metadata work (create, grow, delete); it
    changes by compare-and-swap. ``fence_url``: where the daemon answers that shuts a lost host out
    of it (`godwit.iofence`), empty when there is none.
    """

    name: Name
    description: str = ""
    created_at: float = 0.0
    coordinator: Name | None = None
    fence_url: str = ""

    @property
    def beneath(self) -> Beneath:
        """What it stands on, whatever else changes."""
        return Beneath(**{name: getattr(self, name) for name in Beneath.model_fields})


class VolumeOnHost(Record):
    """What a host's agent last saw of a volume (``keys.volume_state``). Sizes in bytes.

    ``identity`` is written in the volume itself: hosts that differ do not see the same one.
    ``defined_at`` is ``created_at`` of the definition that was looked at, 0 when there was none.
    """

    state: VolumeState
    reason: str = ""
    capacity_bytes: int | None = None
    used_bytes: int | None = None
    since: float = 0.0
    identity: str = ""
    defined_at: float | None = None


class VolumeHostView(Record):
    """How one host reaches a volume, with the sentence that explains it."""

    state: VolumeState
    reason: str = ""


class VolumeView(Beneath):
    """One row of ``volume list -o json``; a size is null when no host has said it."""

    name: Name
    description: str = ""
    coordinator: Name | None = None
    capacity_bytes: int | None = None
    used_bytes: int | None = None
    health: VolumeHealth = "ok"
    hosts: dict[str, VolumeHostView] = Field(default_factory=dict)
    created_at: float = 0.0
    fence_url: str = ""
