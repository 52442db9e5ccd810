"""The LUNs of an iSCSI target through libiscsi: for the helper process alone, as `libnfs` is."""

from __future__ import annotations

import ctypes
import errno
from typing import Any, Final

LIBRARIES: Final = ("libiscsi.so.7", "libiscsi.so.8", "libiscsi.so.9", "libiscsi.so.10")
_NORMAL: Final = 2  # ISCSI_SESSION_NORMAL
_NO_DIGEST: Final = 1  # ISCSI_HEADER_DIGEST_NONE_CRC32C
_LIST_BYTES: Final = 2064  # of REPORT LUNS: 256 of them, no VM has more disks
_TRIES: Final = 3  # a unit attention is told once for each cause
_DISK: Final = 0

_POINTER, _TEXT, _INT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int


def load() -> Any:
    """The library; OSError (ENOENT) with words for people when it is not there."""
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        for call in ("iscsi_create_context", "iscsi_reportluns_sync", "iscsi_readcapacity16_sync"):
            getattr(library, call).restype = _POINTER
        library.iscsi_inquiry_sync.restype = _POINTER
        library.iscsi_synchronizecache10_sync.restype = _POINTER
        library.iscsi_synchronizecache10_sync.argtypes = (_POINTER, *[_INT] * 5)
        library.iscsi_testunitready_sync.restype = _POINTER
        library.scsi_datain_unmarshall.restype = _POINTER
        library.scsi_datain_unmarshall.argtypes = (_POINTER,)
        library.scsi_free_scsi_task.argtypes = (_POINTER,)
        library.iscsi_get_error.restype = _TEXT
        library.iscsi_get_error.argtypes = (_POINTER,)
        library.iscsi_create_context.argtypes = (_TEXT,)
        library.iscsi_set_targetname.argtypes = (_POINTER, _TEXT)
        library.iscsi_set_session_type.argtypes = (_POINTER, _INT)
        library.iscsi_set_header_digest.argtypes = (_POINTER, _INT)
        library.iscsi_full_connect_sync.argtypes = (_POINTER, _TEXT, _INT)
        library.iscsi_logout_sync.argtypes = (_POINTER,)
        library.iscsi_reportluns_sync.argtypes = (_POINTER, _INT, _INT)
        library.iscsi_readcapacity16_sync.argtypes = (_POINTER, _INT)
        library.iscsi_testunitready_sync.argtypes = (_POINTER, _INT)
        library.iscsi_inquiry_sync.argtypes = (_POINTER, _INT, _INT, _INT, _INT)
        return library
    raise OSError(errno.ENOENT, f"the library {LIBRARIES[0]} is not installed")


class _LunList(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint32), ("luns", ctypes.c_uint16 * 256)]


class _Capacity(ctypes.Structure):
    _fields_ = [("last_block", ctypes.c_uint64), ("block_bytes", ctypes.c_uint32)]


class _Inquiry(ctypes.Structure):
    _fields_ = [("qualifier", ctypes.c_int), ("device_type", ctypes.c_int)]


class Target:
    """A session with a target. OSError when it refuses, with its words."""

    def __init__(self, portal: str, target: str, *, initiator: str) -> None:
        self._library = load()
        self._context = self._library.iscsi_create_context(initiator.encode())
        if not self._context:
            raise OSError(errno.ENOMEM, "libiscsi gives no context")
        self._library.iscsi_set_targetname(self._context, target.encode())
        self._library.iscsi_set_session_type(self._context, _NORMAL)
        self._library.iscsi_set_header_digest(self._context, _NO_DIGEST)
        if self._library.iscsi_full_connect_sync(self._context, portal.encode(), -1) != 0:
            raise self._failure()

    def disks(self) -> dict[int, int]:
        """The size in bytes of each LUN that is a disk and ready."""
        task = self._done("iscsi_reportluns_sync", 0, _LIST_BYTES)
        found = ctypes.cast(self._data(task), ctypes.POINTER(_LunList)).contents
        luns = [int(lun) for lun in found.luns[: min(found.count, 256)]]
        self._library.scsi_free_scsi_task(task)
        return {lun: size for lun in luns if (size := self._size(lun)) is not None}

    def _size(self, lun: int) -> int | None:
        task = self._done("iscsi_inquiry_sync", lun, 0, 0, 255)
        kind = ctypes.cast(self._data(task), ctypes.POINTER(_Inquiry)).contents
        is_disk = kind.qualifier == 0 and kind.device_type == _DISK
        self._library.scsi_free_scsi_task(task)
        if not is_disk:
            return None
        self._library.scsi_free_scsi_task(self._done("iscsi_testunitready_sync", lun))
        task = self._done("iscsi_readcapacity16_sync", lun)
        held = ctypes.cast(self._data(task), ctypes.POINTER(_Capacity)).contents
        size = (int(held.last_block) + 1) * int(held.block_bytes)
        self._library.scsi_free_scsi_task(task)
        return size

    def flush(self, lun: int) -> None:
        """Have the target put the whole LUN on its medium."""
        task = self._done("iscsi_synchronizecache10_sync", lun, 0, 0, 0, 0)
        self._library.scsi_free_scsi_task(task)

    def close(self) -> None:
        """Say farewell; the target forgets us either way."""
        self._library.iscsi_logout_sync(self._context)

    def _done(self, name: str, *arguments: int) -> Any:
        for _ in range(_TRIES):
            task = getattr(self._library, name)(self._context, *arguments)
            if not task:
                raise self._failure()
            if ctypes.cast(task, ctypes.POINTER(_INT)).contents.value == 0:  # SCSI's GOOD
                return task
            self._library.scsi_free_scsi_task(task)
        raise self._failure()

    def _data(self, task: Any) -> Any:
        data = self._library.scsi_datain_unmarshall(task)
        if not data:
            raise OSError(errno.EIO, "the target answers nonsense")
        return data

    def _failure(self) -> OSError:
        said = (self._library.iscsi_get_error(self._context) or b"").decode(errors="replace")
        return OSError(errno.EIO, said.strip() or "the target refuses")
