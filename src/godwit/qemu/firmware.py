"""This host's UEFI firmware: found by the descriptions that packages install, and opened for QEMU.

    /etc/qemu/firmware/*.json, /usr/share/qemu/firmware/*.json     QEMU's own interface for packages
         '-- the first that fits --> code (pflash0, only read) + template (each VM's variables)

A description fits when its firmware is for q35 and flash, without Secure Boot, which would need a
machine with SMM. QEMU gets the code as a descriptor, whose digest was taken through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from godwit.model.errors import Refused
from godwit.model.firmware import FirmwareImage, UefiFacts

FOLDERS: Final = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
MACHINE: Final = "pc-q35-9.0"
"""A machine as any of ours is called, to be matched with what a description is for."""
UNWANTED: Final = frozenset({"requires-smm", "secure-boot", "enrolled-keys"})
LARGEST: Final = 64 << 20
PACKAGE_HINT: Final = "install it there: scripts/setup, or apt-get install ovmf"

_Stamp = tuple[tuple[str, int, int], ...]


def fitting(description: Any) -> tuple[str, str] | None:
    """Paths of code and template, of a description that fits; None otherwise. Pure."""
    match description:
        case {
            "interface-types": [*interfaces],
            "mapping": {
                "device": "flash",
                "executable": {"filename": str(code), "format": "raw"},
                "nvram-template": {"filename": str(template), "format": "raw"},
            },
            "targets": [*targets],
        } if "uefi" in interfaces and any(_is_ours(target) for target in targets):
            features = description.get("features", ())
            return None if UNWANTED & set(features) else (code, template)
    return None


def _is_ours(target: Mapping[str, Any]) -> bool:
    machines = target.get("machines", ())
    return target.get("architecture") == "x86_64" and any(
        fnmatchcase(MACHINE, str(pattern)) for pattern in machines
    )


class FirmwareShelf:
    """What there is on this host now; a package may be upgraded while the agent runs."""

    def __init__(self, folders: tuple[Path, ...] = FOLDERS) -> None:
        self._folders = folders
        self._known: tuple[_Stamp, UefiFacts | None] | None = None

    def uefi(self) -> UefiFacts | None:
        """The firmware for VMs with UEFI; None when the host has none. Reads it when it is new."""
        paths = self._find()
        stamp = tuple(_stamp(Path(path)) for path in paths)
        if self._known is None or self._known[0] != stamp:
            found = None
            if paths:
                with contextlib.suppress(OSError, ValueError):
                    code, template = (_measured(Path(path)) for path in paths)
                    found = UefiFacts(code=code, template=template)
            self._known = stamp, found
        return self._known[1]

    def _find(self) -> tuple[str, ...]:
        # Of two descriptions of one name the first folder's counts: an administrator's word.
        files: dict[str, Path] = {}
        for folder in self._folders:
            for path in folder.glob("*.json"):
                files.setdefault(path.name, path)
        for _, path in sorted(files.items()):
            with contextlib.suppress(OSError, ValueError):
                found = fitting(json.loads(path.read_bytes()))
                if found is not None and all(Path(one).is_file() for one in found):
                    return found
        return ()


def _stamp(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path), found.st_mtime_ns, found.st_size


def _measured(path: Path) -> FirmwareImage:
    with path.open("rb") as stream:
        return _facts(path, stream.fileno())


def _facts(path: Path, descriptor: int) -> FirmwareImage:
    size = os.fstat(descriptor).st_size
    if size > LARGEST:
        raise ValueError(f"{path} is too large for firmware")
    digest = hashlib.sha256(os.pread(descriptor, size, 0)).hexdigest()
    return FirmwareImage(path=str(path), size_bytes=size, sha256=digest)


@contextlib.contextmanager
def opened_code(code: FirmwareImage) -> Iterator[int]:
    """The pinned code, open for reading; Refused when this host's is another."""
    try:
        descriptor = os.open(code.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(
            f"the UEFI firmware {code.path} cannot be read: {error.strerror}", hint=PACKAGE_HINT
        ) from error
    try:
        try:
            found = _facts(Path(code.path), descriptor)
        except (OSError, ValueError) as error:
            raise Refused(f"the UEFI firmware is unusable: {error}", hint=PACKAGE_HINT) from error
        if why := difference(code, found):
            raise Refused(f"the VM needs other UEFI firmware than is here: {why}", hint=SAME_HINT)
        yield descriptor
    finally:
        os.close(descriptor)


SAME_HINT: Final = "bring the hosts to one version of the firmware package (ovmf)"


def difference(wanted: FirmwareImage, found: FirmwareImage | None) -> str:
    """What keeps a VM with ``wanted`` from a host with ``found``; empty when nothing does. Pure."""
    if found is None:
        return "there is none"
    for word in ("path", "format", "size_bytes", "sha256"):
        want, have = getattr(wanted, word), getattr(found, word)
        if want != have:
            if word == "sha256":
                return f"its content is {have[:12]}, {want[:12]} is needed"
            return f"its {word.removesuffix('_bytes')} is {have}, {want} is needed"
    return ""
