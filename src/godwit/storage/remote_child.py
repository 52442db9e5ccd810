"""The helper process that talks to a storage server for a daemon, and may be killed at any time.

    daemon --{"op": ..., ...}--> child --libnfs, libiscsi, statvfs--> server or kernel
           <--{"ok": ...} or {"errno": ..., "error": ...}--

One JSON object a line, on standard input and output, one after the other. With ``--once OP`` a
single operation, whose bulk of data goes through standard input or output; what went wrong is one
such line on standard error then. The child becomes the user it is told (QEMU's) before it talks to
anybody, and dies with its daemon. Only the standard library is imported.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import errno
import json
import os
import signal
import stat
import sys
from collections.abc import Callable
from typing import Any

from godwit.storage.libiscsi import Target
from godwit.storage.libnfs import Export
from godwit.storage.librbd import Pool

PIECE = 1 << 20
BLOCK = 4096
_PR_SET_PDEATHSIG = 1
_POOLS: dict[tuple[str, ...], Pool] = {}

Operation = Callable[[dict[str, Any]], Any]


def _operations(export: Export | None) -> dict[str, Operation]:
    """What may be asked for."""
    found: dict[str, Operation] = {
        "ready": lambda _ask: None,
        "directory": lambda ask: _directory(ask["path"]),
        "flush-lun": _flush_lun,
        "rbd-size": lambda ask: _in_pool(ask, lambda pool: pool.size(ask["image"])),
        "rbd-space": lambda ask: _in_pool(ask, lambda pool: pool.space()),
        "luns": lambda ask: _luns(ask["portal"], ask["target"], ask["initiator"]),
        # Of a file of this host, on a path that may hang.
        "read": lambda ask: _read_here(ask["path"], ask["offset"], ask["length"]),
        "patch": lambda ask: _patch_here(
            ask["path"], base64.b64decode(ask["content"]), ask["offset"]
        ),
    }
    if export is not None:
        found |= {
            "stat": lambda ask: _stat(export, ask["path"]),
            "look": lambda ask: _look(export, ask["name"]),
            "names": lambda ask: _absent_is([], lambda: export.names(ask["path"])),
            "make-directories": lambda ask: export.make_directories(ask["path"], ask["mode"]),
            "create": lambda ask: export.create(ask["path"], ask["mode"]),
            "remove": lambda ask: _absent_is(None, lambda: export.remove(ask["path"])),
            "remove-directory": lambda ask: _remove_directory(export, ask["path"]),
            "rename": lambda ask: export.rename(ask["path"], ask["to"]),
            "sync": lambda ask: export.sync(ask["path"]),
            "read": lambda ask: _read(export, ask["path"], ask["offset"], ask["length"]),
            "write": lambda ask: _write(
                export, ask["path"], base64.b64decode(ask["content"]), ask["mode"]
            ),
            "patch": lambda ask: _patch(
                export, ask["path"], base64.b64decode(ask["content"]), ask["offset"]
            ),
        }
    return found


def _directory(path: str) -> dict[str, int]:
    if not stat.S_ISDIR(os.stat(path).st_mode):  # noqa: PTH116 - the child imports little
        raise NotADirectoryError(errno.ENOTDIR, "it is no directory")
    found = os.statvfs(path)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    return {"capacity": found.f_blocks * found.f_frsize, "used": used}


def _read_here(path: str, offset: int, length: int) -> str:
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123 - the child imports little
        pieces = []
        while length > 0 and (piece := os.pread(stream.fileno(), length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
    return base64.b64encode(b"".join(pieces)).decode()


def _patch_here(path: str, content: bytes, offset: int) -> None:
    with open(path, "rb+", buffering=0) as stream:  # noqa: PTH123
        while content:
            done = os.pwrite(stream.fileno(), content, offset)
            content, offset = content[done:], offset + done
        os.fsync(stream.fileno())


def _luns(portal: str, target: str, initiator: str) -> dict[str, int]:
    session = Target(portal, target, initiator=initiator)
    try:
        return {str(lun): size for lun, size in session.disks().items()}
    finally:
        session.close()


def _in_pool(ask: dict[str, Any], work: Callable[[Pool], Any]) -> Any:
    where = {word: str(ask[word]) for word in ("client", "conf", "namespace")}
    key = (str(ask["pool"]), *where.values())
    try:
        # A session is kept: hosts look at a volume in use more than twice a second.
        if key not in _POOLS:
            _POOLS[key] = Pool(key[0], **where)
        return work(_POOLS[key])
    except OSError:
        if key in _POOLS:
            _POOLS.pop(key).close()
        raise


def _flush_lun(ask: dict[str, Any]) -> None:
    session = Target(ask["portal"], ask["target"], initiator=ask["initiator"])
    try:
        session.flush(ask["lun"])
    finally:
        session.close()


def _look(export: Export, name: str) -> dict[str, int]:
    """Sizes, after a block was really written, committed and read back; a full one works too."""
    path, mark = f"/.godwit/alive-{name}", os.urandom(16).hex().encode()
    block = mark + bytes(BLOCK - len(mark))
    try:
        try:
            export.create(path, 0o644)
        except FileNotFoundError:
            export.make_directories("/.godwit", 0o755)
            export.create(path, 0o644)
        except FileExistsError:
            pass
        with export.opened(path, os.O_RDWR) as handle:
            export.write(handle, 0, block)
            export.flush(handle)
            if export.read(handle, 0, BLOCK) != block:
                raise OSError(errno.EIO, "what was written is not what is read")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    return export.space()


def _absent_is(value: Any, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except FileNotFoundError:
        return value


def _stat(export: Export, path: str) -> dict[str, int] | None:
    found: dict[str, int] | None = _absent_is(None, lambda: export.stat(path))
    return found


def _remove_directory(export: Export, path: str) -> None:
    try:
        export.remove_directory(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _read(export: Export, path: str, offset: int, length: int) -> str:
    with export.opened(path, os.O_RDONLY) as handle:
        return base64.b64encode(export.read(handle, offset, length)).decode()


def _write(export: Export, path: str, content: bytes, mode: int) -> None:
    """The whole file under a passing name first: a reader sees the old one or the new one."""
    passing = f"{path}.new"
    _absent_is(None, lambda: export.remove(passing))
    export.create(passing, mode)
    with export.opened(passing, os.O_WRONLY) as handle:
        export.write(handle, 0, content)
        export.flush(handle)
    export.rename(passing, path)


def _patch(export: Export, path: str, content: bytes, offset: int) -> None:
    with export.opened(path, os.O_WRONLY) as handle:
        export.write(handle, offset, content)
        export.flush(handle)


def _push(export: Export, path: str, mode: int) -> None:
    """Standard input becomes a new file, whole and on the medium when this returns."""
    export.create(path, mode)
    with export.opened(path, os.O_WRONLY) as handle:
        offset = 0
        with open(0, "rb", closefd=False) as source:
            while piece := source.read(PIECE):
                export.write(handle, offset, piece)
                offset += len(piece)
        export.flush(handle)


def _pull(export: Export, path: str) -> None:
    """The file goes to standard output."""
    with export.opened(path, os.O_RDONLY) as handle:
        offset = 0
        with open(1, "wb", closefd=False) as target:
            while piece := export.read(handle, offset, PIECE):
                target.write(piece)
                offset += len(piece)


def _become(user: str) -> None:
    parent = os.getppid()
    if user:
        uid, gid = (int(word) for word in user.split(":"))
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    # After the change of user, which would undo it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def _failure(error: OSError) -> str:
    text = (error.strerror or str(error)).replace("\n", " ")
    return json.dumps({"errno": error.errno or errno.EIO, "error": text[:400]})


def _serve(server: str, path: str) -> None:
    export: Export | None = None
    for line in sys.stdin:
        try:
            ask = json.loads(line)
            if server and export is None and ask["op"] != "ready":
                export = Export(server, path)
            answer = json.dumps({"ok": _operations(export)[ask["op"]](ask)})
        except OSError as error:
            answer = _failure(error)
        print(answer, flush=True)  # noqa: T201 - our protocol


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="godwit-remote-child")
    parser.add_argument("--user", default="", help="become UID:GID")
    parser.add_argument("--server", default="")
    parser.add_argument("--export", default="")
    parser.add_argument("--once", choices=("push", "pull"))
    parser.add_argument("--path", default="")
    given = parser.parse_args()
    _become(given.user)
    if not given.once:
        _serve(given.server, given.export)
        return
    try:
        export = Export(given.server, given.export)
        if given.once == "push":
            _push(export, given.path, 0o600)
        else:
            _pull(export, given.path)
    except OSError as error:
        print(_failure(error), file=sys.stderr)  # noqa: T201
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
