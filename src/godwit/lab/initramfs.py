"""The demo guest's root as a cpio archive: folders, busybox, the helper, kernel modules in order.

Pure: files and bytes in, bytes out. Kernel packages carry no dependency list of their modules
(depmod makes it on installation), so the order comes from each module's own `.modinfo`.
"""

from __future__ import annotations

import lzma
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SIGNATURE_MARK = b"~Module signature appended~\n"
GUEST_FOLDERS = ("bin", "dev", "etc", "lib/modules", "proc", "root", "run", "sys", "tmp", "var")


class ImageError(RuntimeError):
    """The image cannot be built. `hint` says what to do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


# --- kernel modules ---


def modinfo(module: bytes) -> dict[str, str]:
    """The `.modinfo` section of a 64-bit little-endian kernel object."""
    if module[:6] != b"\x7fELF\x02\x01":
        raise ImageError("not a 64-bit kernel module")
    (table,) = struct.unpack_from("<Q", module, 0x28)
    size, count, names = struct.unpack_from("<HHH", module, 0x3A)
    # Of a section header: name, file offset, length.
    headers = [struct.unpack_from("<I20xQQ", module, table + i * size) for i in range(count)]
    strings = headers[names][1]
    for name, offset, length in headers:
        if module.startswith(b".modinfo\0", strings + name):
            pairs = module[offset : offset + length].decode(errors="replace").split("\0")
            return dict(p.split("=", 1) for p in reversed(pairs) if "=" in p)
    raise ImageError("a kernel module without a .modinfo section")


def load_order(
    wanted: Iterable[str], depends: Callable[[str], list[str]], builtin: frozenset[str]
) -> list[str]:
    """The modules to load, each after what it depends on; built-in ones are left out."""
    order: list[str] = []
    path: list[str] = []

    def visit(name: str) -> None:
        if name in order or name in builtin:
            return
        if name in path:
            raise ImageError(f"modules depend on each other: {' -> '.join([*path, name])}")
        path.append(name)
        for needed in depends(name):
            visit(needed)
        path.pop()
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def unsigned(module: bytes) -> bytes:
    """The module without its appended signature: checking each costs 15 ms under emulation.

    The kernel then marks itself tainted and loads them all the same.
    """
    if not module.endswith(SIGNATURE_MARK):
        return module
    end = len(module) - len(SIGNATURE_MARK)
    # Ahead of the mark: a 12-byte descriptor that ends in the signature's length, big-endian.
    (length,) = struct.unpack_from(">I", module, end - 4)
    return module[: end - 12 - int(length)]


def _module_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".ko")[0].replace("-", "_")


def needed_modules(kernel_root: Path, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
    """(name, uncompressed bytes) of the modules to load, in order."""
    listing = one(kernel_root.glob("**/lib/modules/*/modules.builtin"), "list of built-in modules")
    builtin = frozenset(_module_name(line) for line in listing.read_text().split())
    files = {_module_name(path.name): path for path in listing.parent.rglob("*.ko*")}
    loaded: dict[str, bytes] = {}

    def depends(name: str) -> list[str]:
        if name not in files:
            raise ImageError(f"the kernel has no module {name!r}")
        loaded[name] = _uncompressed(files[name])
        return [
            n.replace("-", "_") for n in modinfo(loaded[name]).get("depends", "").split(",") if n
        ]

    return [(name, unsigned(loaded[name])) for name in load_order(wanted, depends, builtin)]


def _uncompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".ko":
        return data
    raise ImageError(f"cannot unpack the kernel module {path.name}")


# --- the initramfs ---


@dataclass(frozen=True)
class Entry:
    """One file of the archive: a folder, a link (`data` is its target), a device or a file."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def guest_entries(
    *, source: Path, kernel_root: Path, busybox: Path, applets: list[str], helper: Path
) -> Iterator[Entry]:
    """Everything the guest's root holds, parents first."""
    for folder in GUEST_FOLDERS:
        for part in reversed([Path(folder), *Path(folder).parents][:-1]):
            yield Entry(str(part), stat.S_IFDIR | 0o755)
    # The kernel opens the console before anything can be mounted.
    yield Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield Entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    yield Entry("sbin", stat.S_IFLNK | 0o777, b"bin")
    yield Entry("init", stat.S_IFLNK | 0o777, b"bin/busybox")
    for applet in sorted(set(applets) - {"busybox"}):
        yield Entry(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    yield Entry("bin/gwguest", stat.S_IFREG | 0o755, helper.read_bytes())
    for path in sorted((source / "rootfs").rglob("*")):
        if path.is_file():
            mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            name = str(path.relative_to(source / "rootfs"))
            yield Entry(name, stat.S_IFREG | mode, path.read_bytes())
    lines = (source / "modules").read_text().splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    order = needed_modules(kernel_root, wanted)
    for name, data in order:
        yield Entry(f"lib/modules/{name}.ko", stat.S_IFREG | 0o644, data)
    listing = "".join(f"{name}.ko\n" for name, _ in order)
    yield Entry("etc/modules", stat.S_IFREG | 0o644, listing.encode())


def newc_archive(entries: Iterable[Entry]) -> bytes:
    """A cpio archive in the kernel's `newc` form: owned by root, without times, reproducible."""
    out = bytearray()
    trailer = Entry("TRAILER!!!", 0)
    for number, entry in enumerate((*entries, trailer), start=1):
        name = entry.path.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name))
        out += b"070701" + b"".join(b"%08X" % field for field in (*fields, 0))
        for part in (name, entry.data):
            out += part
            out += b"\0" * (-len(out) % 4)
    return bytes(out)


def is_static(program: bytes) -> bool:
    """Does this 64-bit program run without a loader (has it no PT_INTERP)? The guest has none."""
    (table,) = struct.unpack_from("<Q", program, 0x20)
    size, count = struct.unpack_from("<HH", program, 0x36)
    kinds = (struct.unpack_from("<I", program, table + i * size)[0] for i in range(count))
    return 3 not in kinds


def one(found: Iterable[Path], what: str) -> Path:
    """The only one of these paths."""
    paths = list(found)
    if len(paths) != 1:
        raise ImageError(f"expected one {what} in the kernel package, found {len(paths)}")
    return paths[0]
