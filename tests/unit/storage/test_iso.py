"""The small ISO images we write ourselves, read back by the rules of ECMA-119."""

from __future__ import annotations

import hashlib
import struct

import pytest

from godwit.storage.iso import BLOCK, write_iso

FILES = {"user-data": b"#cloud-config\n" + b"x" * 5000, "meta-data": b"instance-id: 1\n", "e": b""}


def listed(image: bytes, descriptor: int, coding: str) -> dict[str, bytes]:
    """The files that a reader finds by one of the descriptors."""
    head = image[descriptor * BLOCK : (descriptor + 1) * BLOCK]
    assert head[1:7] == b"CD001\x01"
    block, size = (struct.unpack_from("<I", head, 156 + at)[0] for at in (2, 10))
    directory, found, at = image[block * BLOCK : block * BLOCK + size], {}, 0
    while directory[at]:
        record = directory[at : at + directory[at]]
        extent, length = (
            struct.unpack_from("<I", record, 2)[0],
            struct.unpack_from("<I", record, 10)[0],
        )
        assert struct.unpack_from(">I", record, 6)[0] == extent, "said both ways round"
        name = record[33 : 33 + record[32]]
        if name not in (b"\0", b"\1"):
            found[name.decode(coding)] = image[extent * BLOCK : extent * BLOCK + length]
        at += directory[at]
    return found


def test_what_was_put_in_is_found() -> None:
    image = write_iso("cidata", FILES, at=1e9)
    assert len(image) % BLOCK == 0
    assert struct.unpack_from("<I", image, 16 * BLOCK + 80)[0] == len(image) // BLOCK
    assert image[16 * BLOCK + 40 :].startswith(b"cidata ")
    assert listed(image, 17, "utf-16-be") == FILES
    plain = {f"{name.upper()};1": data for name, data in FILES.items()}
    assert listed(image, 16, "ascii") == plain
    assert image[18 * BLOCK] == 255


def test_the_bytes_are_those_that_other_readers_were_shown() -> None:
    """Read by pycdlib 1.22 and libblkid 2.38 without a complaint; look again when it changes."""
    image = write_iso("cidata", {"user-data": b"#cloud-config\n", "meta-data": b"a: 1\n"}, at=1e9)
    assert (
        hashlib.sha256(image).hexdigest()
        == "6ae6caf05e9f3dcd0952f103bf6406a19f40591d2abe4b8b4e416a28a7377fe5"
    )


def test_what_cannot_be() -> None:
    for label, files in (("x" * 16, {}), ("a", {"a/b": b""}), ("a", {"x" * 61: b""})):
        with pytest.raises(ValueError, match="at most"):
            write_iso(label, files, at=0.0)
    with pytest.raises(ValueError, match="too many"):
        write_iso("a", {f"{n}" * 25: b"" for n in range(10, 60)}, at=0.0)
