"""Block devices of this host that a VM gets as they are.

QEMU runs as a user without rights, so a device becomes that user's while a VM has it. Only the
owner is changed, never the mode or the group; udev may set it back at a change of the device,
which QEMU, having it open, does not notice.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from godwit.model.errors import NotFound, OperationFailed, Refused


def grant_device(path: Path, user: tuple[int, int] | None) -> None:
    """Let QEMU's user (uid, gid; None = we ourselves) open the device.

    NotFound when it is not there, Refused when it is no block device or when this host uses it
    itself: a file system both mounted here and written by a guest is lost.
    """
    with _opened(path) as descriptor:
        if user is not None:
            os.fchown(descriptor, user[0], -1)


def take_back_device(path: Path) -> None:
    """The device is root's again; fine when it has gone."""
    try:
        with _opened(path) as descriptor:
            os.fchown(descriptor, 0, -1)
    except NotFound:
        return


def device_size(path: Path) -> int:
    """Bytes the device has; errors as with `grant_device`."""
    with _opened(path) as descriptor:
        return os.lseek(descriptor, 0, os.SEEK_END)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The device, open for reading; exclusively, which fails while it is mounted or in a volume
    group of this host, and does not disturb a QEMU that has it."""
    try:
        if not stat.S_ISBLK(path.stat().st_mode):
            raise Refused(f"{path} is no block device", hint="give an image by its volume instead")
        descriptor = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"there is no device {path}", hint="look: lsblk") from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Refused(
                f"this host uses {path} itself", hint="unmount it, or take it out of its group"
            ) from None
        raise OperationFailed(f"cannot open {path}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
