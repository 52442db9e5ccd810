"""The process that touches a volume, so that the agent never has to: see `godwit.storage.paths`.

    python -I -m godwit.storage.path_child DIRECTORY NAME

It reads a line for each look (the identity the volume should have, or ``-``), answers ``begun``
and then one JSON object. Standard library only: it is started anew whenever a path hangs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import secrets
import sys

BLOCK = 4096
FULL = (errno.ENOSPC, errno.EDQUOT)


def look(root: str, name: str, identity: str) -> dict[str, object]:
    """Read and write a block in the volume's ``.godwit``; sizes, and which volume it is."""
    try:
        seen = os.statvfs(root)
        found = _identity(root, create=not identity)
        if identity and found != identity:
            what = "nothing known" if not found else f"volume {found[:8]}"
            return _no(f"{what} lies at {root} instead of volume {identity[:8]}: is it mounted?")
        _write_and_read(f"{root}/.godwit/alive-{name}")
    except OSError as error:
        if error.errno not in FULL:
            return _no(f"{root}: {error.strerror or error}")
        found = identity  # the path works, the volume is full
    capacity = seen.f_blocks * seen.f_frsize
    used = capacity - seen.f_bfree * seen.f_frsize
    return {"ok": True, "capacity": capacity, "used": used, "identity": found}


def _no(reason: str) -> dict[str, object]:
    return {"ok": False, "reason": reason}


def _identity(root: str, *, create: bool) -> str:
    path = f"{root}/.godwit/volume-id"
    for _ in range(2):
        try:
            with open(path) as stream:  # noqa: PTH123
                return stream.read().strip()
        except FileNotFoundError:
            if not create:
                return ""
        if not os.path.isdir(root):  # noqa: PTH112
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), root)
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{root}/.godwit")  # noqa: PTH102
        fresh = f"{path}.{secrets.token_hex(4)}"
        with open(fresh, "x") as stream:  # noqa: PTH123
            stream.write(secrets.token_hex(16) + "\n")
        try:  # whoever links first has named it
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
        finally:
            os.unlink(fresh)  # noqa: PTH108
    return ""


def _write_and_read(path: str) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without direct I/O
            raise
        descriptor = os.open(path, flags, 0o644)
    try:
        with mmap.mmap(-1, BLOCK) as block:  # direct I/O wants whole pages
            mark = secrets.token_hex(16).encode()
            block[: len(mark)] = mark
            os.pwrite(descriptor, block, 0)
            block[: len(mark)] = bytes(len(mark))
            os.preadv(descriptor, [block], 0)
            if block[: len(mark)] != mark:
                raise OSError(errno.EIO, "what was written is not what is read")
    finally:
        os.close(descriptor)


def main() -> None:
    """Until nobody asks any more."""
    root, name = sys.argv[1:3]
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        print("begun", flush=True)  # noqa: T201
        identity = line.strip()
        print(json.dumps(look(root, name, "" if identity == "-" else identity)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
