"""Builds the `demo` image: the distribution's kernel, busybox and a helper, as one initramfs.

Nothing is installed and nothing comes from anywhere but the distribution's package archive: the
kernel package is downloaded and unpacked, its needed modules are packed with the static busybox
and the helper (compiled from the recipe folder) into a cpio archive written here.

Layout, under ``<cache>/images/demo``: one folder per build, named after the hash of all inputs,
with ``vmlinuz``, ``initrd`` and ``image.json``; ``current`` links to the newest. A build appears by
one rename, so a reader never meets half of one; old builds stay, as running VMs may use them.

Standard library only: set-up calls this before anything else is there, and often.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-amd64", "linux-image-virtual")
# Measured under emulation: no crypto self-tests and no security modules save 0.9 s of a 3.9 s boot.
# The timer check is a guess at the hardware that a busy host makes fail (KVM guests skip it too).
# Freed pages become zero pages, which a migration does not carry: 60 MB to move instead of 102.
APPEND = "console=ttyS0 quiet panic=-1 no_timer_check cryptomgr.notests lsm= init_on_free=1"
MIN_MEMORY_BYTES = 128 << 20
SIGNATURE_MARK = b"~Module signature appended~\n"
GUEST_FOLDERS = ("bin", "dev", "etc", "lib/modules", "proc", "root", "run", "sys", "tmp", "var")
C_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-s")


class ImageError(RuntimeError):
    """The image cannot be built. `hint` says what to do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Run(Protocol):
    """Runs one program to its end and returns its standard output; raises when it fails."""

    def __call__(self, argv: list[str], *, cwd: Path | None = None) -> bytes: ...


@dataclass(frozen=True)
class DemoImage:
    """A built image. `recipe` is the hash of all inputs but the kernel's version."""

    name: str
    directory: Path
    kernel: str
    kernel_sha256: str
    kernel_package: str
    initrd: str
    initrd_sha256: str
    append: str
    min_memory_bytes: int
    recipe: str

    @property
    def kernel_path(self) -> Path:
        return self.directory / self.kernel

    @property
    def initrd_path(self) -> Path:
        return self.directory / self.initrd

    def intact(self) -> bool:
        """Do the files on disk hold what the description says?"""
        wanted = ((self.kernel_path, self.kernel_sha256), (self.initrd_path, self.initrd_sha256))
        return all(path.is_file() and _sha256(path) == digest for path, digest in wanted)


def cache_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Where built things are kept: the machine's cache for root, the user's own otherwise."""
    if chosen := environment.get("GODWIT_CACHE"):
        return Path(chosen)
    return Path("/var/cache/godwit") if os.geteuid() == 0 else Path.home() / ".cache/godwit"


def find_demo_image(cache: Path) -> DemoImage | None:
    """The newest image built, or None."""
    directory = cache / "images/demo/current"
    try:
        fields = json.loads((directory / "image.json").read_text())
        return DemoImage(**{**fields, "directory": directory.resolve()})
    except (OSError, ValueError, TypeError):
        return None


def ensure_demo_image(
    *,
    source: Path,
    cache: Path,
    run: Run,
    busybox: Path = Path("/bin/busybox"),
    refresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> DemoImage:
    """The demo image, built unless the cache has it for the same inputs.

    A newer kernel in the archive alone is no reason to build again; `refresh` makes it one. Leaves
    the cache as it was when it fails.
    """
    _check_busybox(busybox)
    recipe = recipe_hash(source, busybox)
    current = find_demo_image(cache)
    if current and current.recipe == recipe and current.intact() and not refresh:
        return current
    package, version = find_kernel_package(run)
    key = hashlib.sha256(f"{recipe} {package}={version}".encode()).hexdigest()[:16]
    home = cache / "images/demo"
    home.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=home))
    try:
        (scratch / "out").mkdir()
        scratch.chmod(0o755)  # apt's own user reads and writes here
        say(f"downloading {package} {version} (unpacked, not installed)")
        root = _unpack_kernel(package, scratch, run)
        say("compiling the helper")
        helper = _compile_helper(source / "gwguest", scratch, run)
        applets = run([str(busybox), "--list"]).decode().split()
        entries = guest_entries(
            source=source, kernel_root=root, busybox=busybox, applets=applets, helper=helper
        )
        _write(scratch / "out/initrd", newc_archive(entries))
        shutil.copyfile(_one(root.glob("boot/vmlinuz-*"), "kernel"), scratch / "out/vmlinuz")
        image = DemoImage(
            name="demo",
            directory=home / key,
            kernel="vmlinuz",
            kernel_sha256=_sha256(scratch / "out/vmlinuz"),
            kernel_package=f"{package}={version}",
            initrd="initrd",
            initrd_sha256=_sha256(scratch / "out/initrd"),
            append=APPEND,
            min_memory_bytes=MIN_MEMORY_BYTES,
            recipe=recipe,
        )
        _publish(image, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return image


def recipe_hash(source: Path, busybox: Path) -> str:
    """The hash of everything that shapes the image here: recipe files, busybox, this builder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        mode = "x" if path.stat().st_mode & 0o100 else "-"
        digest.update(f"{path.relative_to(source)} {mode} {_sha256(path)}\n".encode())
    for path in (busybox, Path(__file__)):
        digest.update(f"{_sha256(path)}\n".encode())
    return digest.hexdigest()


# --- the kernel package ---


def find_kernel_package(run: Run) -> tuple[str, str]:
    """The real kernel package behind the distribution's metapackage, and its version."""
    for meta in KERNEL_PACKAGES:
        try:
            fields = control_fields(run(["apt-cache", "show", "--no-all-versions", meta]).decode())
            package = real_kernel(fields.get("Depends", ""))
            shown = run(["apt-cache", "show", "--no-all-versions", package]).decode()
            return package, control_fields(shown)["Version"]
        except Exception:  # noqa: S112 - whatever is wrong with this one, the next may do
            continue
    raise ImageError(
        f"no kernel package found (looked for {', '.join(KERNEL_PACKAGES)})",
        hint="run 'apt-get update', then try again",
    )


def control_fields(text: str) -> dict[str, str]:
    """The first stanza of a Debian control file; continuation lines are left out."""
    stanza = text.strip().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in stanza.splitlines() if re.match(r"[A-Za-z-]+:", line))
    return {key: value.strip() for key, value in pairs}


def real_kernel(depends: str) -> str:
    """The versioned kernel package among a metapackage's dependencies."""
    for name in re.findall(r"(?:^|[,|])\s*([a-z0-9.+-]+)", depends):
        if re.fullmatch(r"linux-image-(unsigned-)?[0-9].*", name):
            return str(name)
    raise ImageError(f"no kernel among the dependencies: {depends!r}")


def _unpack_kernel(package: str, scratch: Path, run: Run) -> Path:
    """Some distributions keep the modules in packages of their own: those come along."""
    depends = control_fields(run(["apt-cache", "show", "--no-all-versions", package]).decode())
    modules = re.findall(r"\blinux-modules-[0-9][a-z0-9.+-]*", depends.get("Depends", ""))
    run(["apt-get", "-qq", "download", package, *sorted(set(modules))], cwd=scratch)
    root = scratch / "root"
    for archive in sorted(scratch.glob("*.deb")):
        run(["dpkg-deb", "--extract", str(archive), str(root)])
    return root


def _compile_helper(source: Path, scratch: Path, run: Run) -> Path:
    helper = scratch / "gwguest"
    sources = [str(path) for path in sorted(source.glob("*.c"))]
    run(["gcc", *C_FLAGS, "-o", str(helper), *sources])
    return helper


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
    listing = _one(kernel_root.glob("**/lib/modules/*/modules.builtin"), "list of built-in modules")
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


# --- files ---


def _check_busybox(busybox: Path) -> None:
    """The guest has no libraries: a busybox that asks for a loader (PT_INTERP) cannot run there."""
    hint = "install busybox-static"
    if not busybox.is_file():
        raise ImageError(f"{busybox} is missing", hint=hint)
    with busybox.open("rb") as file:
        head = file.read(4096)
    (table,) = struct.unpack_from("<Q", head, 0x20)
    size, count = struct.unpack_from("<HH", head, 0x36)
    if any(struct.unpack_from("<I", head, table + i * size)[0] == 3 for i in range(count)):
        raise ImageError(f"{busybox} is not static", hint=hint)


def _publish(image: DemoImage, scratch: Path) -> None:
    fields = {k: v for k, v in asdict(image).items() if k != "directory"}
    _write(scratch / "out/image.json", (json.dumps(fields, indent=2) + "\n").encode())
    shutil.rmtree(image.directory, ignore_errors=True)
    (scratch / "out").rename(image.directory)
    link = scratch / "current"
    link.symlink_to(image.directory.name)
    link.rename(image.directory.parent / "current")


def _one(found: Iterable[Path], what: str) -> Path:
    paths = list(found)
    if len(paths) != 1:
        raise ImageError(f"expected one {what} in the kernel package, found {len(paths)}")
    return paths[0]


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o644)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
