"""A shared volume: one name on every host. Issue B fills this room; here it is a directory."""

from __future__ import annotations

from typing import Literal

from godwit.model.base import Name, Record


class Volume(Record):
    """A directory that every host sees as ``/clusterstorage/<name>``."""

    name: Name
    kind: Literal["dir"] = "dir"


class VolumeView(Volume):
    """One row of ``volume list -o json``."""

    path: str
    hosts: tuple[str, ...] = ()
