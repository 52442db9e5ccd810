"""What a lab is to be like."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from godwit.lab.configs import Unit
from godwit.lab.layout import (
    Layout,
    StorageKind,
    StoreKind,
    checked_hosts,
    checked_managers,
    checked_name,
    state_root,
)
from godwit.model.base import check_name
from godwit.model.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Options:
    """What a lab is to be like. ``qemu`` goes into the hosts' configuration. ``units`` replaces the
    daemons of a node (tests use stand-ins); without ``join`` nobody waits for hosts to join the
    cluster, and no context is written."""

    layout: Layout
    volume_bytes: int = 0  # 0: ``shared`` is a plain directory
    retain: bool = False
    qemu: dict[str, str | bool] = field(default_factory=dict)
    image: bool = True
    join: bool = True
    units: dict[str, tuple[Unit, ...]] = field(default_factory=dict)
    contexts_file: Path | None = None
    volumes: tuple[str, ...] = ()  # directories that every host sees beside ``shared``
    own_volumes: tuple[str, ...] = ()  # directories of which each host has its own
    watchdog: bool = True  # each host has one
    agent_source: Path | None = None  # a source tree that agents and guards are taken from


def with_defaults(
    name: str,
    hosts: int,
    *,
    rate: str,
    store: StoreKind = "sqlite",
    managers: int = 0,
    retain: bool = False,
    storage: StorageKind | None = None,
    volumes: Iterable[str] = (),
    volume_bytes: int = 0,
    own_volumes: Iterable[str] = (),
    image_locks: bool = True,
    agent_source: Path | None = None,
) -> Options:
    """The options of the command line.

    ``storage`` None: the volume ``shared`` is served, so that a cut path is a cut path; but one
    with a size of its own is a directory.
    """
    if storage is None:
        storage = "dir" if volume_bytes else "nfs"
    layout = Layout(
        checked_name(name),
        checked_hosts(hosts),
        rate,
        state_root(),
        storage=storage,
        store=store,
        managers=checked_managers(managers, hosts),
    )
    if volume_bytes and storage != "dir":
        raise InvalidRequest("only a directory has a size of its own", hint="leave --storage out")
    more, own = (
        tuple(dict.fromkeys(check_name(one, what="name of a volume") for one in names))
        for names in (volumes, own_volumes)
    )
    if "shared" in (*more, *own) or set(more) & set(own):
        raise InvalidRequest("a volume is named twice, or shared", hint="every lab has that one")
    return replace(
        Options(layout),
        retain=retain,
        qemu={} if image_locks else {"image_locks": False},
        volumes=more,
        volume_bytes=volume_bytes,
        own_volumes=own,
        agent_source=agent_source,
    )
