"""The directories beneath a lab's volumes: those that all hosts share, and each host's own."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable
from pathlib import Path

from godwit.lab import small_volume
from godwit.lab.layout import QEMU_USER, Layout


def make(layout: Layout, *, shared: Iterable[str], own: Iterable[str], size_bytes: int) -> None:
    """Make them for QEMU's user; ``size_bytes`` is that of the volume ``shared``, 0 for none."""
    for name in ("shared", *shared):
        volume = layout.volume.with_name(name)
        volume.mkdir(parents=True)
        if volume == layout.volume and size_bytes:
            small_volume.make(layout, size_bytes)
        _give_to_qemu(volume)
    names = tuple(own)
    for node in layout.host_names:
        for name in names:
            volume = layout.node_dir(node) / "volumes" / name
            volume.mkdir(parents=True)
            _give_to_qemu(volume)


def _give_to_qemu(path: Path) -> None:
    account = pwd.getpwnam(QEMU_USER)
    os.chown(path, account.pw_uid, account.pw_gid)
