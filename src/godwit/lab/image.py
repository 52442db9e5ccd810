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
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from godwit.lab import initramfs
from godwit.lab.initramfs import ImageError

KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-amd64", "linux-image-virtual")
# Measured under emulation: no crypto self-tests and no security modules save 0.5 s of a 3.2 s boot.
# The timer check is a guess at the hardware that a busy host makes fail (KVM guests skip it too).
# Freed pages become zero pages, which a migration does not carry: 60 MB to move instead of 102.
APPEND = "console=ttyS0 quiet panic=-1 no_timer_check cryptomgr.notests lsm= init_on_free=1"
MIN_MEMORY_BYTES = 128 << 20
BUSYBOX = Path("/bin/busybox")
C_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-s")


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


def up_to_date_image(*, source: Path, cache: Path, busybox: Path = BUSYBOX) -> DemoImage | None:
    """The cached image, when it is whole and made from these very inputs."""
    current = find_demo_image(cache)
    if not current or not busybox.is_file() or not current.intact():
        return None
    return current if current.recipe == recipe_hash(source, busybox) else None


def ensure_demo_image(
    *,
    source: Path,
    cache: Path,
    run: Run,
    busybox: Path = BUSYBOX,
    refresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> DemoImage:
    """The demo image, built unless the cache has it for the same inputs.

    A newer kernel in the archive alone is no reason to build again; `refresh` makes it one. Leaves
    the cache as it was when it fails.
    """
    _check_busybox(busybox)
    if (current := up_to_date_image(source=source, cache=cache, busybox=busybox)) and not refresh:
        return current
    recipe = recipe_hash(source, busybox)
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
        entries = initramfs.guest_entries(
            source=source, kernel_root=root, busybox=busybox, applets=applets, helper=helper
        )
        _write(scratch / "out/initrd", initramfs.newc_archive(entries))
        shutil.copyfile(
            initramfs.one(root.glob("boot/vmlinuz-*"), "kernel"), scratch / "out/vmlinuz"
        )
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
    """The hash of everything that shapes the image here: recipe files, busybox, the builder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        mode = "x" if path.stat().st_mode & 0o100 else "-"
        digest.update(f"{path.relative_to(source)} {mode} {_sha256(path)}\n".encode())
    for path in (busybox, Path(__file__), Path(initramfs.__file__)):
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


# --- files ---


def _check_busybox(busybox: Path) -> None:
    hint = "install busybox-static"
    if not busybox.is_file():
        raise ImageError(f"{busybox} is missing", hint=hint)
    if not initramfs.is_static(busybox.read_bytes()):
        raise ImageError(f"{busybox} is not static", hint=hint)


def _publish(image: DemoImage, scratch: Path) -> None:
    fields = {k: v for k, v in asdict(image).items() if k != "directory"}
    _write(scratch / "out/image.json", (json.dumps(fields, indent=2) + "\n").encode())
    shutil.rmtree(image.directory, ignore_errors=True)
    (scratch / "out").rename(image.directory)
    link = scratch / "current"
    link.symlink_to(image.directory.name)
    link.rename(image.directory.parent / "current")


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o644)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
