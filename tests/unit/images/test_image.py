"""The demo image's builder: what it asks apt for, what makes it build again, how it fails."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from godwit.lab import image
from godwit.lab.image import ImageError, ensure_demo_image, find_demo_image, up_to_date_image

from .test_initramfs import kernel_object, program

META = """Package: linux-image-cloud-amd64
Version: 6.1.9-1
Depends: linux-image-6.1.0-9-cloud-amd64 (= 6.1.9-1)
Description: Linux for cloud (meta-package)
 This package depends on the latest one.
"""
REAL = """Package: linux-image-6.1.0-9-cloud-amd64
Version: {version}
Depends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120+deb11u2) | linux-initramfs-tool
"""


class Archive:
    """A package archive and a compiler, as the builder sees them; it notes what was run."""

    def __init__(self) -> None:
        self.version = "6.1.9-1"
        self.ran: list[list[str]] = []
        self.fails_at = ""

    def __call__(self, argv: list[str], *, cwd: Path | None = None) -> bytes:
        self.ran.append(argv)
        if argv[0] == self.fails_at:
            raise ImageError(f"{argv[0]} failed")
        match argv:
            case ["apt-cache", "show", _, "linux-image-cloud-amd64"]:
                return META.encode()
            case ["apt-cache", "show", _, "linux-image-6.1.0-9-cloud-amd64"]:
                return REAL.format(version=self.version).encode()
            case ["apt-get", "-qq", "download", package]:
                assert cwd is not None
                (cwd / f"{package}.deb").write_bytes(b"")
            case ["dpkg-deb", "--extract", _, root]:
                self.unpack(Path(root))
            case ["gcc", *_]:
                Path(argv[argv.index("-o") + 1]).write_bytes(b"helper")
            case [_, "--list"]:
                return b"sh\ninit\nbusybox\n"
            case _:
                raise AssertionError(f"not expected: {argv}")
        return b""

    def unpack(self, root: Path) -> None:
        modules = root / "lib/modules/6.1.0-9"
        (modules / "kernel").mkdir(parents=True)
        (modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio_balloon.ko\n")
        (modules / "kernel/virtio-ring.ko").write_bytes(kernel_object(depends=""))
        (modules / "kernel/virtio_net.ko").write_bytes(kernel_object(depends="virtio-ring"))
        (root / "boot").mkdir()
        (root / "boot/vmlinuz-6.1.0-9").write_bytes(b"kernel " + self.version.encode())

    def downloads(self) -> int:
        return sum(argv[0] == "apt-get" for argv in self.ran)


class Bench:
    """One recipe, one cache, one archive."""

    def __init__(self, folder: Path) -> None:
        self.source, self.cache, self.archive = folder / "recipe", folder / "cache", Archive()
        (self.source / "rootfs/etc").mkdir(parents=True)
        (self.source / "gwguest").mkdir()
        (self.source / "gwguest/main.c").write_text("int main(void) { return 0; }\n")
        (self.source / "rootfs/etc/rc").write_text("#!/bin/sh\n")
        (self.source / "modules").write_text("# wanted\nvirtio_net\nvirtio_balloon\n")
        self.busybox = folder / "busybox"
        self.busybox.write_bytes(program(1))

    def build(self, *, refresh: bool = False) -> image.DemoImage:
        return ensure_demo_image(
            source=self.source,
            cache=self.cache,
            run=self.archive,
            busybox=self.busybox,
            refresh=refresh,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_build_is_complete_and_described(bench: Bench) -> None:
    built = bench.build()
    assert built.kernel_path.read_bytes() == b"kernel 6.1.9-1"
    fields = json.loads((built.directory / "image.json").read_text())
    assert fields["name"] == "demo"
    assert fields["kernel_package"] == "linux-image-6.1.0-9-cloud-amd64=6.1.9-1"
    assert fields["append"].startswith("console=ttyS0 quiet")
    assert b"etc/modules\0" in built.initrd_path.read_bytes()
    assert b"virtio_ring.ko\nvirtio_net.ko\n" in built.initrd_path.read_bytes()
    assert find_demo_image(bench.cache) == built
    assert [p.name for p in (bench.cache / "images/demo").glob(".building-*")] == []


def test_the_same_inputs_are_not_built_twice(bench: Bench) -> None:
    first = bench.build()
    bench.archive.version = "6.1.10-1"
    assert bench.build() == first
    assert bench.archive.downloads() == 1


@pytest.mark.parametrize("changed", ["gwguest/main.c", "rootfs/etc/rc", "modules"])
def test_a_changed_recipe_is_built_anew_beside_the_old(bench: Bench, changed: str) -> None:
    first = bench.build()
    with (bench.source / changed).open("a") as file:
        file.write("\n")
    assert up_to_date_image(source=bench.source, cache=bench.cache, busybox=bench.busybox) is None
    second = bench.build()
    assert second.directory != first.directory
    assert first.intact()
    assert find_demo_image(bench.cache) == second


def test_mode_and_busybox_belong_to_the_recipe(bench: Bench) -> None:
    first = bench.build()
    (bench.source / "rootfs/etc/rc").chmod(0o755)
    second = bench.build()
    bench.busybox.write_bytes(program(1, 1))
    third = bench.build()
    assert len({first.recipe, second.recipe, third.recipe}) == 3


def test_refresh_takes_a_newer_kernel(bench: Bench) -> None:
    first = bench.build()
    bench.archive.version = "6.1.10-1"
    second = bench.build(refresh=True)
    assert second.kernel_path.read_bytes() == b"kernel 6.1.10-1"
    assert second.recipe == first.recipe
    assert second.directory != first.directory


def test_a_damaged_image_is_built_again(bench: Bench) -> None:
    built = bench.build()
    built.initrd_path.write_bytes(b"half")
    assert bench.build().intact()
    assert bench.archive.downloads() == 2


@pytest.mark.parametrize("step", ["apt-get", "dpkg-deb", "gcc"])
def test_a_failure_leaves_the_cache_as_it_was(bench: Bench, step: str) -> None:
    first = bench.build()
    before = sorted(p.name for p in (bench.cache / "images/demo").iterdir())
    bench.archive.fails_at = step
    with pytest.raises(ImageError, match=step):
        bench.build(refresh=True)
    assert sorted(p.name for p in (bench.cache / "images/demo").iterdir()) == before
    assert find_demo_image(bench.cache) == first


def test_a_busybox_that_needs_libraries_is_refused(bench: Bench) -> None:
    bench.busybox.write_bytes(program(1, 3))
    with pytest.raises(ImageError, match="not static") as caught:
        bench.build()
    assert caught.value.hint == "install busybox-static"


def test_no_kernel_in_the_lists_says_what_to_do(bench: Bench) -> None:
    bench.archive.fails_at = "apt-cache"
    with pytest.raises(ImageError) as caught:
        bench.build()
    assert "apt-get update" in caught.value.hint


def test_a_module_that_the_kernel_lacks_is_an_error(bench: Bench) -> None:
    (bench.source / "modules").write_text("virtio_nat\n")
    with pytest.raises(ImageError, match="virtio_nat"):
        bench.build()


@pytest.mark.parametrize(
    ("depends", "kernel"),
    [
        ("linux-image-6.1.0-9-cloud-amd64 (= 6.1.9-1)", "linux-image-6.1.0-9-cloud-amd64"),
        ("linux-base, linux-image-6.8.0-31-generic, other", "linux-image-6.8.0-31-generic"),
        ("linux-image-unsigned-6.8.0-31-generic | x", "linux-image-unsigned-6.8.0-31-generic"),
    ],
)
def test_the_real_kernel_is_found_behind_the_metapackage(depends: str, kernel: str) -> None:
    assert image.real_kernel(depends) == kernel


def test_the_layout_matches_between_guest_and_checker() -> None:
    """The C writer and the Python reader agree on the record's header."""
    source = Path(image.__file__).parents[3] / "images/demo/gwguest/disklog.c"
    text = source.read_text()
    assert '#define MAGIC "GODWITLG"' in text
    assert "uint64_t sequence, log_id, real_ns, monotonic_ns;" in text
    assert struct.calcsize("<8sIIQQQQ") == 48


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a compiler")
def test_the_helper_compiles_without_a_warning(tmp_path: Path) -> None:
    import subprocess

    folder = Path(image.__file__).parents[3] / "images/demo/gwguest"
    sources = [str(path) for path in sorted(folder.glob("*.c"))]
    argv = ["gcc", *image.C_FLAGS, "-o", str(tmp_path / "gwguest"), *sources]
    subprocess.run(argv, check=True, capture_output=True)
    assert image.initramfs.is_static((tmp_path / "gwguest").read_bytes())
