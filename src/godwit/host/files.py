"""Files that survive a power cut, and locks that vanish with their holder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from godwit.host.errors import LockHeld


def sync_directory(path: Path) -> None:
    """Make entries of a directory durable (new names, renames, removals)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durable(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file as a whole: after this returns the new content survives a power cut.

    A reader, or a crash at any moment, sees the old content or the new, never a mixture.  On an
    error the old file stands and nothing else stays behind.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    sync_directory(path.parent)


def remove_durable(path: Path) -> None:
    """Remove a file if it is there; after this returns the removal survives a power cut."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def load_json(path: Path) -> object | None:
    """Content of a JSON file, None when there is no such file; ValueError when it is damaged."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return json.loads(text)  # type: ignore[no-any-return]
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def save_json(path: Path, value: object, mode: int = 0o600) -> None:
    """Write a value as JSON, durably and as a whole."""
    write_durable(path, json.dumps(value, separators=(",", ":")).encode() + b"\n", mode)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a file for a while; it vanishes with this process.

    The file stays afterwards, because removing it would race with the next holder.  Raises
    LockHeld when another process has it and ``wait`` is false.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise LockHeld(f"{path} is locked by another process") from error
        yield
    finally:
        os.close(descriptor)
