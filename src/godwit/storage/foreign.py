"""Judges an image that a stranger made, by its bytes, before any program of QEMU opens it. Pure.

An image can name other files (a backing file, a data file, extents), and whoever opens it reads
them: that is how a host's secrets get into a guest. So what leads anywhere is refused here, from
the header itself, whatever a given version of QEMU would do about it. So is what is not of the
format it is said to be, what was cut off, and what claims an absurd size.

Every refusal is one line. Nothing here trusts a length that the image states.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from godwit.model.errors import Refused
from godwit.storage import vhd
from godwit.storage.formats import (
    HEAD_BYTES,
    SECTOR,
    TAIL_BYTES,
    SourceFormat,
    is_packed,
    name_of,
    sniff,
    stranger,
)
from godwit.storage.vhd import Read

_WHOLE: Final = "is the file whole? fetch it again"
_FLATTEN: Final = "flatten it where it comes from: qemu-img convert"

_QCOW2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_QCOW2_V3: Final = struct.Struct(">QQQII")
_QCOW2_DATA_FILE: Final = 0x44415441
_QCOW2_EXTERNAL_DATA: Final = 1 << 2
_LONGEST_NAME: Final = 1023
_MOST_EXTENSIONS: Final = 64

_VMDK: Final = struct.Struct("<4sIIQQQQIQQQ")
_VMDK_AT_END: Final = 0xFFFFFFFFFFFFFFFF
_VMDK_KINDS: Final = frozenset({"monolithicsparse", "streamoptimized"})
_LARGEST_DESCRIPTOR: Final = 1 << 20
_VMDK_EXTENT: Final = re.compile(rb"^\s*(?:RW|RDONLY|NOACCESS)\s+\d+\s+(\S+)", re.M)
_VMDK_FIELD: Final = re.compile(rb"^\s*([A-Za-z]+)\s*=\s*\"?([^\"\r\n]*)\"?", re.M)


@dataclass(frozen=True, slots=True)
class Claims:
    """What an image says of itself. ``virtual_size`` in bytes, None when only QEMU can tell."""

    format: SourceFormat
    virtual_size: int | None


def examine(
    format: SourceFormat,  # noqa: A002 - the word the field uses
    read: Read,
    file_size: int,
    *,
    largest_virtual: int,
) -> Claims:
    """What the image claims; Refused, with the reason, when it must not be opened.

    ``read`` gives (offset, length) of the file, whose length is ``file_size`` bytes.
    """
    if file_size == 0:
        raise Refused("the file is empty", hint=_WHOLE)
    _is_what_it_is_said_to_be(format, read, file_size)
    look = {
        "raw": _raw,
        "qcow2": _qcow2,
        "vhd-fixed": _vhd_fixed,
        "vhd": _vhd,
        "vhdx": _vhdx,
        "vmdk": _vmdk,
    }[format]
    size = look(read, file_size)
    if size is not None:
        check_size(size, largest_virtual=largest_virtual)
    return Claims(format, size)


def check_size(size: int, *, largest_virtual: int) -> None:
    """Refused unless a disk of this virtual size may be taken."""
    if size <= 0:
        raise Refused("it holds no bytes at all", hint="is it the right file?")
    if size > largest_virtual:
        raise Refused(
            f"it claims to hold {size} bytes, at most {largest_virtual} are taken",
            hint="is it the right file?",
        )


def _is_what_it_is_said_to_be(
    format: SourceFormat,  # noqa: A002
    read: Read,
    file_size: int,
) -> None:
    head = read(0, HEAD_BYTES)
    found = sniff(head, read(max(0, file_size - TAIL_BYTES), TAIL_BYTES))
    if found == format or (found is None and format == "raw" and not stranger(head)):
        return
    if found is not None:
        raise Refused(f"it is {name_of(found)}, not {name_of(format)}", hint="name its format")
    other = stranger(head)
    if is_packed(other):
        raise Refused(f"it is packed with {other}, not {name_of(format)}", hint="unpack it first")
    if other:
        raise Refused(f"it is {other}, not {name_of(format)}", hint="bring it to a known format")
    if format in ("vhd", "vhd-fixed"):
        raise Refused(f"it is not {name_of(format)}: there is no footer at its end", hint=_WHOLE)
    raise Refused(f"it is not {name_of(format)}: its first bytes are wrong", hint=_WHOLE)


def _raw(_read: Read, file_size: int) -> int:
    return -(-file_size // SECTOR) * SECTOR


def _need(offset: int, length: int, file_size: int, what: str) -> None:
    if offset + length > file_size:
        raise Refused(f"it is cut off: its {what} lies past the end of the file", hint=_WHOLE)


def _leads(what: str, name: bytes) -> Refused:
    shown = ascii(name[:200].decode(errors="replace")).strip("'\"")
    return Refused(f"it leads to another file ({what} {shown})", hint=_FLATTEN)


def _qcow2(read: Read, file_size: int) -> int:
    head = read(0, _QCOW2.size)
    _need(0, _QCOW2.size, len(head), "header")
    (_, version, backing, backing_length, cluster_bits, size, crypt, l1_size, l1, refcounts,
     refcount_clusters, _, _) = _QCOW2.unpack(head)  # fmt: skip
    if version not in (2, 3):
        raise Refused(f"it is qcow of version {version}; 2 and 3 are taken", hint=_FLATTEN)
    if not 9 <= cluster_bits <= 21:
        raise Refused(f"its clusters are absurd (2^{cluster_bits} bytes)", hint=_WHOLE)
    if backing or backing_length:
        raise _leads("backing file", read(backing, min(backing_length, _LONGEST_NAME)))
    if version == 3:
        _qcow2_features(read)
    if crypt:
        raise Refused("it is encrypted", hint="decrypt it where it comes from: qemu-img convert")
    _need(l1, l1_size * 8, file_size, "table of clusters")
    _need(refcounts, refcount_clusters << cluster_bits, file_size, "table of reference counts")
    return int(size)


def _qcow2_features(read: Read) -> None:
    """Refused when the data is in a file of its own, whether by feature bit or by name."""
    extra = read(_QCOW2.size, _QCOW2_V3.size)
    if len(extra) < _QCOW2_V3.size:
        raise Refused("it is cut off within its header", hint=_WHOLE)
    incompatible, _, _, _, at = _QCOW2_V3.unpack(extra)
    if incompatible & _QCOW2_EXTERNAL_DATA:
        raise _leads("data file", _qcow2_data_file(read, at))


def _qcow2_data_file(read: Read, at: int) -> bytes:
    for _ in range(_MOST_EXTENSIONS):
        start = read(at, 8)
        if len(start) < 8:
            break
        kind, length = struct.unpack(">II", start)
        if kind == _QCOW2_DATA_FILE:
            return read(at + 8, min(length, _LONGEST_NAME))
        if kind == 0:
            break
        at += 8 + -(-length // 8) * 8
    return b"that it does not name"


def _footer(sector: bytes) -> vhd.Footer:
    footer = vhd.parse_footer(sector)
    if footer is None:
        raise Refused("it is cut off or damaged: its footer does not add up", hint=_WHOLE)
    if footer.kind == "differencing":
        raise _leads("parent", b"of a differencing disk")
    return footer


def _vhd_fixed(read: Read, file_size: int) -> int:
    footer = _footer(read(max(0, file_size - vhd.FOOTER_BYTES), vhd.FOOTER_BYTES))
    if footer.virtual_size + vhd.FOOTER_BYTES > file_size:
        raise Refused(
            f"it claims to hold {footer.virtual_size} bytes, the file has {file_size}", hint=_WHOLE
        )
    return footer.virtual_size


def _vhd(read: Read, file_size: int) -> int:
    # QEMU believes the copy at the start, so both have to agree.
    first = _footer(read(0, vhd.FOOTER_BYTES))
    last = _footer(read(max(0, file_size - vhd.FOOTER_BYTES), vhd.FOOTER_BYTES))
    if first != last or first.kind != "dynamic":
        raise Refused("its footer and the copy of it at the start differ", hint=_WHOLE)
    return first.virtual_size


def _vhdx(_read: Read, file_size: int) -> None:
    # Identifier, two headers and two region tables fill the first MiB. The rest is QEMU's to
    # judge: it refuses a parent, and blocks past the end.
    _need(0, 1 << 20, file_size, "header section")


def _vmdk(read: Read, file_size: int) -> int:
    head = read(0, _VMDK.size)
    if not head.startswith(b"KDMV"):
        # A descriptor in text is nothing but names of other files.
        extent = _VMDK_EXTENT.search(read(0, _LARGEST_DESCRIPTOR))
        if head.startswith(b"COWD"):
            raise Refused("it is a VMDK of an old kind (COWD)", hint=_FLATTEN)
        raise _leads("extents", _quoted(extent))
    _need(0, _VMDK.size, len(head), "header")
    _, version, _, capacity, _, at, length, _, _, directory, _ = _VMDK.unpack(head)
    if version not in (1, 2, 3):
        raise Refused(f"it is VMDK of version {version}; 1 to 3 are taken", hint=_FLATTEN)
    if not capacity:
        raise _leads("extents", b"of its descriptor")
    if at:
        _need(at * SECTOR, length * SECTOR, file_size, "descriptor")
        _vmdk_descriptor(read(at * SECTOR, min(length * SECTOR, _LARGEST_DESCRIPTOR)))
    if directory != _VMDK_AT_END:
        _need(directory * SECTOR, 4, file_size, "table of grains")
    return int(capacity * SECTOR)


def _vmdk_descriptor(text: bytes) -> None:
    text = text.split(b"\0", 1)[0]
    fields = {key.lower(): value for key, value in _VMDK_FIELD.findall(text)}
    parent = fields.get(b"parentfilenamehint", b"")
    if parent or fields.get(b"parentcid", b"ffffffff").lower() != b"ffffffff":
        raise _leads("parent", parent or b"that it does not name")
    kind = fields.get(b"createtype", b"monolithicSparse").decode(errors="replace")
    extents = _VMDK_EXTENT.findall(text)
    if kind.lower() not in _VMDK_KINDS or len(extents) > 1:
        raise Refused(f"it is a VMDK in several files (kind {kind!a})", hint=_FLATTEN)


def _quoted(extent: re.Match[bytes] | None) -> bytes:
    if extent is None:
        return b"that it does not name"
    line = extent.string[extent.start() : extent.start() + 300].split(b"\n", 1)[0]
    pieces = line.split(b'"')
    return bytes(pieces[1]) if len(pieces) > 2 else bytes(line)
