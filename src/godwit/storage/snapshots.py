"""Snapshots inside qcow2 images that nobody has open: taken, dropped and gone back to.

Each is one change of the image's own tables, written so that a crash leaves the state before or
the state after, and at worst wasted space. Everything here may be done again. What a linked clone
stands on is not even opened.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from godwit.host.errors import HostError
from godwit.model.errors import Conflict, NotFound, OperationFailed
from godwit.model.vm import Disk
from godwit.storage.files import LOCAL, VolumeFiles
from godwit.storage.images import opened_image
from godwit.storage.qemu_img import INFO_TIMEOUT, QEMU_IMG, failure, opened, qemu_img

PREFIX: Final = "godwit-"
"""How our snapshots are called; those of others are left alone."""
WORK_TIMEOUT: Final = 3600.0
"""Seconds for one step: about 10 ms for each GiB that the image holds, more on slow storage."""


def tag_of(checkpoint: str, mark: str) -> str:
    """A checkpoint's name in images; ``mark`` tells it from an earlier one of that name."""
    return f"{PREFIX}{checkpoint}-{mark}"


def leftovers(tags: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Of the snapshots in an image those of ours that no record knows. Pure."""
    return tuple(tag for tag in tags if tag.startswith(PREFIX) and tag not in known)


async def list_tags(disk: Disk, files: VolumeFiles = LOCAL) -> tuple[str, ...]:
    """The snapshots in an image that nobody writes."""
    return tuple(str(one["name"]) for one in (await _info(disk, files)).get("snapshots", ()))


async def take_all(
    disks: Sequence[Disk], tag: str, *, known: Sequence[str], files: VolumeFiles = LOCAL
) -> None:
    """Take a snapshot of each image, all or none; what no record knows is dropped first.

    Conflict when one is in use. Those that have it already keep it.
    """
    done: list[Disk] = []
    try:
        for disk in disks:
            tags = await list_tags(disk, files)
            for left in leftovers(tags, [*known, tag]):
                await _step(disk, "-d", left, files)
            if tag not in tags:
                done.append(disk)
                await _step(disk, "-c", tag, files)
    except BaseException:
        for disk in done:
            await asyncio.shield(_forget(disk, tag, files))
        raise


async def drop_all(disks: Sequence[Disk], tag: str, *, files: VolumeFiles = LOCAL) -> None:
    """Drop a snapshot from each image; fine where it is not there."""
    for disk in disks:
        if tag in await list_tags(disk, files):
            await _step(disk, "-d", tag, files)


async def revert_all(
    disks: Sequence[Disk], tag: str, *, files: VolumeFiles = LOCAL
) -> dict[str, int]:
    """Let each image hold what it held then; the bytes each has now, by disk.

    NotFound, and nothing is changed, when one has no such snapshot; Conflict when one is in use.
    An error later leaves some of them reverted: do it again.
    """
    for disk in disks:
        if tag not in await list_tags(disk, files):
            raise NotFound(
                f"{disk.path} does not hold {tag}", hint="was the image replaced? put it back"
            )
    sizes: dict[str, int] = {}
    for disk in disks:
        try:
            await _step(disk, "-a", tag, files)
        except Conflict as error:
            if sizes:
                raise OperationFailed(error.message, hint="stop who uses it; ask again") from error
            raise
        sizes[disk.id] = int((await _info(disk, files))["virtual-size"])
    return sizes


async def _forget(disk: Disk, tag: str, files: VolumeFiles) -> None:
    try:
        await drop_all([disk], tag, files=files)
    except OperationFailed:
        return  # the next checkpoint of this VM drops it


async def _step(disk: Disk, option: str, tag: str, files: VolumeFiles) -> None:
    path = Path(disk.path)
    async with opened_image(path, format=disk.format, files=files) as image:
        words = ["snapshot", "-q", option, tag, image.name()]
        try:
            await qemu_img(QEMU_IMG, words, images=[image], limits=None, timeout=WORK_TIMEOUT)
        except HostError as error:
            raise failure(f"cannot change the snapshots of {path}", error, image) from error
    await asyncio.to_thread(_sync, path)


async def _info(disk: Disk, files: VolumeFiles) -> dict[str, Any]:
    path = Path(disk.path)
    async with opened_image(path, format=disk.format, files=files) as image:
        words = ["info", "--output=json", image.name()]
        try:
            printed = await qemu_img(
                QEMU_IMG, words, images=[image], limits=None, timeout=INFO_TIMEOUT
            )
        except HostError as error:
            raise failure(f"cannot read the image {path}", error, image) from error
    found: dict[str, Any] = json.loads(printed)
    return found


def _sync(path: Path) -> None:
    with opened(path) as descriptor:
        os.fsync(descriptor)
