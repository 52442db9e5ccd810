"""A lab's ``shared`` as a file system of its own, so that it can be full and grow: a tmpfs.

Without it ``shared`` is a directory of this machine's disk, and filling that would hurt everybody.
It is mounted on the real machine before the hosts begin, which get it bound as they get the
directory; what lies in it takes this machine's memory. QEMU opens images past the page cache, which
tmpfs allows from Linux 6.6 on.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from godwit.host.errors import HostError
from godwit.host.run import run
from godwit.lab.handle import Lab
from godwit.lab.layout import Layout
from godwit.model.errors import NotFound, OperationFailed, Refused
from godwit.model.units import format_size

SMALLEST = 16 << 20
FILLER = ".godwit-filler"
_RUN_S = 10.0
_BLOCK = 4096


def make(layout: Layout, size_bytes: int) -> None:
    """Mount it where the directory is. Refused when it would be of no use."""
    if size_bytes < SMALLEST:
        raise Refused(f"a volume of {size_bytes} bytes", hint=f"at least {SMALLEST >> 20}M")
    _mount("-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "godwit-lab", str(layout.volume))
    probe = layout.volume / ".godwit-probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Refused(
            "this kernel's tmpfs cannot be opened past the page cache, as QEMU opens images",
            hint="use Linux 6.6 or newer, or leave --volume-size out",
        ) from None
    finally:
        probe.unlink(missing_ok=True)


def unmount(layout: Layout) -> bool:
    """Take the mount away, after the hosts have ended; False when there is none."""
    if not layout.volume.is_mount():
        return False
    try:
        run(["umount", str(layout.volume)], timeout=_RUN_S)
    except HostError as error:
        raise OperationFailed(f"{layout.volume} stays mounted: {error}") from error
    return True


def fill(lab: Lab, volume: str, *, leave_bytes: int) -> int:
    """Leave this much free; the bytes that are free then."""
    place = _checked(lab, volume)
    free(lab, volume)
    at, step = 0, max(0, _free(place) - leave_bytes)
    with (place / FILLER).open("wb") as stream:
        while step >= _BLOCK and (left := _free(place) - leave_bytes) > 0:
            step = min(step, left)
            try:
                os.posix_fallocate(stream.fileno(), at, step)
            except OSError as error:  # a VM took some meanwhile
                if error.errno != errno.ENOSPC:
                    raise
                step //= 2
            else:
                at += step
    return _free(place)


def free(lab: Lab, volume: str) -> int:
    """Undo `fill`; the bytes that are free then."""
    place = _checked(lab, volume)
    (place / FILLER).unlink(missing_ok=True)
    return _free(place)


def grow(lab: Lab, volume: str, size_bytes: int) -> int:
    """Let the file system grow under its VMs; the bytes that are free then."""
    place = _checked(lab, volume)
    found = os.statvfs(place)
    if size_bytes <= found.f_blocks * found.f_frsize:
        have = format_size(found.f_blocks * found.f_frsize)
        raise Refused(f"{volume} has {have} already", hint="name a larger size")
    _mount("-o", f"remount,size={size_bytes}", str(place))
    return _free(place)


def _checked(lab: Lab, volume: str) -> Path:
    place = lab.layout.volume
    if volume != place.name:
        raise NotFound(f"the lab has no volume {volume}", hint=f"there is: {place.name}")
    if not place.is_mount():
        raise Refused(
            f"{volume} is a directory of this machine's disk, which would be filled with it",
            hint=f"raise the lab like this: godwit lab up --name {lab.record.name} "
            "--volume-size 512M",
        )
    return place


def _free(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def _mount(*words: str) -> None:
    try:
        run(["mount", *words], timeout=_RUN_S)
    except HostError as error:
        raise OperationFailed(f"the lab's volume cannot be mounted: {error}") from error
