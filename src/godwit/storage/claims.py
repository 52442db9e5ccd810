"""New files: a name is claimed first, so that nothing is ever overwritten or left half made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from godwit.model.errors import Conflict, OperationFailed
from godwit.storage.files import FILE_MODE, LOCAL, VolumeFiles


@dataclass(frozen=True, slots=True)
class Claim:
    """A new file that is ours: ``word`` names it to qemu-img, ``descriptor`` is -1 if served."""

    path: Path
    word: str
    descriptor: int
    files: VolumeFiles

    def descriptors(self) -> tuple[int, ...]:
        """What qemu-img has to inherit."""
        return () if self.descriptor < 0 else (self.descriptor,)

    def give(self, owner: tuple[int, int]) -> None:
        """Change the owner; what is served belongs to whom the server says."""
        if self.descriptor >= 0:
            os.fchown(self.descriptor, *owner)


@contextlib.asynccontextmanager
async def claimed(
    path: Path, *, owner: tuple[int, int] | None, files: VolumeFiles = LOCAL
) -> AsyncIterator[Claim]:
    """A new file of this name, open for writing, and durable once the block has ended well.

    Conflict when the name is taken: nothing is ever overwritten. On a failure nothing stays.
    """
    descriptor = -1
    try:
        # Claimed by us first: qemu-img would overwrite what is there.
        if files.node(path) is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(path, flags, FILE_MODE)
        else:
            await files.create(path)
    except FileExistsError:
        raise Conflict(f"{path} exists already", hint="choose another name") from None
    except OSError as error:
        raise OperationFailed(f"cannot create {path}: {error.strerror}") from error
    try:
        if owner is not None and descriptor >= 0:
            os.fchown(descriptor, *owner)
        word = files.word(path) if descriptor < 0 else f"/proc/self/fd/{descriptor}"
        yield Claim(path, word, descriptor, files)
        # The kernel, or the server, may have gigabytes to write.
        await files.sync(path)
    except BaseException:
        with contextlib.suppress(OSError):
            await files.remove(path)
        raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)
