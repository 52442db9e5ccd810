"""Images of a Ceph pool through librados and librbd: for the helper process alone.

The key comes from the keyring that the host's configuration names; it never passes through here.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any, Final

RADOS: Final = "librados.so.2"
RBD: Final = "librbd.so.1"
PATIENCE_S: Final = 10
"""Seconds after which librados itself gives up; whoever asked may have done so before."""

DIRECTORY: Final = b"rbd_directory"
"""The object that lists a pool's images."""
EXCLUSIVE_LOCK: Final = 1 << 2
"""The feature with which the one client that writes holds a lock, and everything built on it."""

_POINTER, _TEXT, _U64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64


class _Space(ctypes.Structure):
    _fields_ = [(name, _U64) for name in ("kb", "kb_used", "kb_avail", "objects")]


def load() -> tuple[Any, Any]:
    """Both libraries; OSError (ENOENT) with words for people when one is not there."""
    try:
        rados, rbd = ctypes.CDLL(RADOS), ctypes.CDLL(RBD)
    except OSError:
        raise OSError(errno.ENOENT, f"the libraries {RADOS} and {RBD} are not installed") from None
    out = ctypes.POINTER(_POINTER)
    rados.rados_create.argtypes = (out, _TEXT)
    rados.rados_conf_read_file.argtypes = (_POINTER, _TEXT)
    rados.rados_conf_set.argtypes = (_POINTER, _TEXT, _TEXT)
    rados.rados_connect.argtypes = (_POINTER,)
    rados.rados_shutdown.argtypes = (_POINTER,)
    rados.rados_shutdown.restype = None
    rados.rados_cluster_stat.argtypes = (_POINTER, ctypes.POINTER(_Space))
    rados.rados_ioctx_create.argtypes = (_POINTER, _TEXT, out)
    rados.rados_ioctx_destroy.argtypes = (_POINTER,)
    rados.rados_ioctx_destroy.restype = None
    rados.rados_ioctx_set_namespace.argtypes = (_POINTER, _TEXT)
    rados.rados_ioctx_set_namespace.restype = None
    rados.rados_stat.argtypes = (_POINTER, _TEXT, ctypes.POINTER(_U64), ctypes.POINTER(_U64))
    rbd.rbd_open_read_only.argtypes = (_POINTER, _TEXT, out, _TEXT)
    rbd.rbd_get_size.argtypes = (_POINTER, ctypes.POINTER(_U64))
    rbd.rbd_get_features.argtypes = (_POINTER, ctypes.POINTER(_U64))
    rbd.rbd_close.argtypes = (_POINTER,)
    return rados, rbd


class Pool:
    """A pool, or a namespace of one, as the Ceph client ``client``. OSError when Ceph refuses."""

    def __init__(self, pool: str, *, client: str, conf: str, namespace: str = "") -> None:
        self._rados, self._rbd = load()
        self._cluster, self._io = _POINTER(), _POINTER()
        self._checked(
            self._rados.rados_create(ctypes.byref(self._cluster), client.encode()),
            f"there is no Ceph client {client}",
        )
        try:
            read = self._rados.rados_conf_read_file(self._cluster, conf.encode())
            self._checked(read, f"{conf} cannot be read")
            for option in ("client_mount_timeout", "rados_osd_op_timeout", "rados_mon_op_timeout"):
                self._rados.rados_conf_set(self._cluster, option.encode(), str(PATIENCE_S).encode())
            self._checked(
                self._rados.rados_connect(self._cluster), f"Ceph does not let client.{client} in"
            )
            made = self._rados.rados_ioctx_create(
                self._cluster, pool.encode(), ctypes.byref(self._io)
            )
            self._checked(made, f"the pool {pool} cannot be used")
            if namespace:
                self._rados.rados_ioctx_set_namespace(self._io, namespace.encode())
        except BaseException:
            self.close()
            raise

    def size(self, image: str) -> int:
        """Bytes of an image, by a read of what Ceph keeps about it.

        OSError for one with an exclusive lock: the source of a move is killed while it holds that,
        and the destination's writes then wait half a minute until Ceph breaks it.
        """
        opened, size, features = _POINTER(), _U64(), _U64()
        self._checked(
            self._rbd.rbd_open_read_only(self._io, image.encode(), ctypes.byref(opened), None),
            f"the image {image} cannot be opened",
        )
        try:
            self._checked(
                self._rbd.rbd_get_size(opened, ctypes.byref(size)), f"{image} has no size"
            )
            self._checked(
                self._rbd.rbd_get_features(opened, ctypes.byref(features)),
                f"{image} does not tell its features",
            )
        finally:
            self._rbd.rbd_close(opened)
        if features.value & EXCLUSIVE_LOCK:
            raise OSError(
                errno.EOPNOTSUPP,
                f"the image {image} has an exclusive lock, with which no VM can move: rbd feature "
                f"disable {image} object-map fast-diff exclusive-lock",
            )
        return int(size.value)

    def space(self) -> dict[str, int]:
        """What the whole cluster holds, in bytes; replicas count each.

        The monitors say so; that one of the pool's OSDs answers, too, is asked for first.
        """
        found, size, changed = _Space(), _U64(), _U64()
        asked = self._rados.rados_stat(
            self._io, DIRECTORY, ctypes.byref(size), ctypes.byref(changed)
        )
        if asked != -errno.ENOENT:  # an empty pool has no directory, and its OSD said so
            self._checked(asked, "the pool does not answer")
        self._checked(
            self._rados.rados_cluster_stat(self._cluster, ctypes.byref(found)),
            "Ceph does not say how much room there is",
        )
        return {"capacity": int(found.kb) << 10, "used": int(found.kb_used) << 10}

    def close(self) -> None:
        """Let go of the cluster. Idempotent."""
        if self._io:
            self._rados.rados_ioctx_destroy(self._io)
            self._io = _POINTER()
        if self._cluster:
            self._rados.rados_shutdown(self._cluster)
            self._cluster = _POINTER()

    @staticmethod
    def _checked(code: int, what: str) -> None:
        if code < 0:
            raise OSError(-code, f"{what}: {os.strerror(-code)}")
