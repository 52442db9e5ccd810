"""Strangers' images with the real qemu-img: the good are taken as they are, the bad refused.

``canary`` stands for a secret of the host. Everybody may read it here, so that nothing but our own
refusal keeps it out of an image: `test_the_corpus_bites` shows that a plain qemu-img lets it in.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from godwit.host.errors import ProgramFailed
from godwit.host.run import run
from godwit.model.errors import Conflict, GodwitError, NotFound, OperationFailed, Refused
from godwit.model.vm import DiskFormat
from godwit.qemu.launch import Binary
from godwit.storage import imports
from godwit.storage.foreign import Claims
from godwit.storage.formats import FORMATS, SourceFormat
from godwit.storage.imports import ImportLimits, import_image

NOBODY = (65534, 65534)
MIB = 1 << 20
SIZE = 16 * MIB
TOOL = Binary("qemu-img", user=NOBODY)
SECRET = b"root:$6$canary-of-the-host$:19000:0:99999:7:::\n" * 40

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed"),
]


@dataclass(frozen=True)
class Bench:
    """Where strangers' files lie, the volume they go to, and the host's secret."""

    outside: Path
    volume: Path
    canary: Path
    content: bytes

    @property
    def target(self) -> Path:
        return self.volume / "disk"

    def make(self, name: str, format_: SourceFormat, *options: str) -> Path:
        """An image of the content, by a plain qemu-img."""
        raw, path = self.outside / "content", self.outside / name
        raw.write_bytes(self.content)
        driver = FORMATS[format_].driver
        chosen = [word for option in options for word in ("-o", option)]
        if not options and format_ in ("vhd", "vhd-fixed"):
            chosen = ["-o", ",".join(FORMATS[format_].create)]
        words = ["qemu-img", "convert", "-f", "raw", "-O", driver, *chosen, str(raw), str(path)]
        run(words, timeout=60)
        raw.unlink()
        path.chmod(0o644)
        return path

    async def take(
        self, path: Path | str, format_: SourceFormat, to: DiskFormat = "qcow2"
    ) -> bytes:
        """Import it and return the guest's bytes."""
        await import_image(
            str(path),
            source_format=format_,
            target=self.target,
            target_format=to,
            tool=TOOL,
        )
        out = self.outside / "out"
        driver = FORMATS[to].driver
        run(
            ["qemu-img", "convert", "-f", driver, "-O", "raw", str(self.target), str(out)],
            timeout=60,
        )
        return out.read_bytes()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="gwi-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        outside, volume, canary = root / "outside", root / "volume", root / "shadow"
        outside.mkdir()
        volume.mkdir(mode=0o700)
        canary.write_bytes(SECRET)
        canary.chmod(0o644)
        rng = random.Random(3)
        content = rng.randbytes(MIB) + bytes(9 * MIB) + rng.randbytes(6 * MIB)
        before = canary.stat()
        yield Bench(outside, volume, canary, content)
        after = canary.stat()
        assert canary.read_bytes() == SECRET
        assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns, after.st_mode) == (
            *(before.st_ino, before.st_mtime_ns, before.st_ctime_ns, before.st_mode),
        )
        for path in volume.iterdir():
            assert SECRET[:40] not in path.read_bytes(), path


SOURCES: list[SourceFormat] = ["raw", "qcow2", "vhd-fixed", "vhd", "vhdx", "vmdk"]


@pytest.mark.parametrize("format_", SOURCES)
async def test_a_good_image_is_taken(bench: Bench, format_: SourceFormat) -> None:
    path = bench.make("good", format_)
    before = path.read_bytes()
    heard: list[tuple[str, float]] = []
    info = await import_image(
        str(path),
        source_format=format_,
        target=bench.target,
        target_format="qcow2",
        tool=TOOL,
        progress=lambda stage, value: heard.append((stage, value)),
    )
    assert (info.format, info.virtual_size) == ("qcow2", SIZE)
    assert path.read_bytes() == before
    assert heard[0] == ("check", 1.0)
    assert heard[-1] == ("convert", 1.0)
    stat = bench.target.stat()
    assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o777) == (*NOBODY, 0o600)
    bench.target.unlink()
    assert await bench.take(path, format_) == bench.content


@pytest.mark.parametrize("to", ["raw", "vhd-fixed", "vhd", "vhdx"])
async def test_into_every_format(bench: Bench, to: DiskFormat) -> None:
    assert (await bench.take(bench.make("good", "vmdk"), "vmdk", to))[:SIZE] == bench.content


async def test_a_stream_optimized_vmdk_is_taken(bench: Bench) -> None:
    path = bench.make("good", "vmdk", "subformat=streamOptimized")
    assert await bench.take(path, "vmdk") == bench.content


async def test_compressed_clusters_are_taken(bench: Bench) -> None:
    path = bench.make("plain", "qcow2")
    words = ["qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2"]
    run([*words, str(path), str(bench.outside / "small")], timeout=60)
    (bench.outside / "small").chmod(0o644)
    assert await bench.take(bench.outside / "small", "qcow2") == bench.content


# --- the hostile corpus ---

Plant = Callable[[Bench], tuple[Path, SourceFormat]]


def _file(bench: Bench, data: bytes) -> Path:
    path = bench.outside / "evil"
    path.write_bytes(data)
    path.chmod(0o644)
    return path


def _patched(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(data)
    return path


def _truncated(path: Path, share: float) -> Path:
    os.truncate(path, int(path.stat().st_size * share))
    return path


def empty(bench: Bench) -> tuple[Path, SourceFormat]:
    return _file(bench, b""), "raw"


def wrong_magic(bench: Bench) -> tuple[Path, SourceFormat]:
    return _patched(bench.make("evil", "qcow2"), 0, b"QFI\xfa"), "qcow2"


def qcow2_called_raw(bench: Bench) -> tuple[Path, SourceFormat]:
    return backing(bench)[0], "raw"


def web_page(bench: Bench) -> tuple[Path, SourceFormat]:
    return _file(bench, b"<!DOCTYPE html><title>404</title>".ljust(4096)), "qcow2"


def truncated_qcow2(bench: Bench) -> tuple[Path, SourceFormat]:
    return _truncated(bench.make("evil", "qcow2"), 0.6), "qcow2"


def truncated_qcow2_header(bench: Bench) -> tuple[Path, SourceFormat]:
    path = bench.make("evil", "qcow2")
    os.truncate(path, 60)
    return path, "qcow2"


def backing(bench: Bench) -> tuple[Path, SourceFormat]:
    path = bench.outside / "evil"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(bench.canary)]
    run([*words, str(path), str(MIB)], timeout=20)
    path.chmod(0o644)
    return path, "qcow2"


def json_backing(bench: Bench) -> tuple[Path, SourceFormat]:
    path = bench.outside / "evil"
    name = f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{bench.canary}"}}}}'
    words = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name]
    run([*words, str(path), str(MIB)], timeout=20)
    path.chmod(0o644)
    return path, "qcow2"


def nbd_backing(bench: Bench) -> tuple[Path, SourceFormat]:
    path = bench.outside / "evil"
    words = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw"]
    run([*words, "-b", "nbd://127.0.0.1:1/x", str(path), str(MIB)], timeout=20)
    path.chmod(0o644)
    return path, "qcow2"


def data_file(bench: Bench) -> tuple[Path, SourceFormat]:
    """The data file is the canary: its name is written over that of the real one."""
    path, name = bench.outside / "evil", bench.outside / "d"
    long = str(name).ljust(len(str(bench.canary)), "x")
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o"]
    run([*words, f"data_file={long},data_file_raw=on", str(path), str(MIB)], timeout=20)
    data = path.read_bytes()
    assert long.encode() in data
    canary = str(bench.canary).encode().ljust(len(long), b"\0")
    path.write_bytes(data.replace(long.encode(), canary))
    path.chmod(0o644)
    return path, "qcow2"


def vmdk_flat(bench: Bench) -> tuple[Path, SourceFormat]:
    text = (
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 3 FLAT "{bench.canary}" 0\n'
        'ddb.adapterType = "ide"\n'
    )
    return _file(bench, text.encode()), "vmdk"


def vmdk_embedded(bench: Bench) -> tuple[Path, SourceFormat]:
    """A sparse VMDK of no capacity: QEMU then takes the descriptor inside for the image."""
    path = bench.make("evil", "vmdk")
    text = (
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 3 FLAT "{bench.canary}" 0\n'
    )
    at = struct.unpack("<Q", path.read_bytes()[28:36])[0] * 512
    _patched(path, at, text.encode().ljust(1024, b"\0"))
    return _patched(path, 12, bytes(8)), "vmdk"


def vmdk_parent(bench: Bench) -> tuple[Path, SourceFormat]:
    path = bench.make("evil", "vmdk")
    text = (
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=0badcafe\n"
        f'createType="monolithicSparse"\nparentFileNameHint="{bench.canary}"\n'
        'RW 32768 SPARSE "evil"\n'
    )
    at = struct.unpack("<Q", path.read_bytes()[28:36])[0] * 512
    return _patched(path, at, text.encode().ljust(1024, b"\0")), "vmdk"


def vhd_absurd(bench: Bench) -> tuple[Path, SourceFormat]:
    path = bench.make("evil", "vhd")
    footer = bytearray(path.read_bytes()[:512])
    footer[48:56] = struct.pack(">Q", 1 << 60)
    footer[64:68] = bytes(4)
    footer[64:68] = struct.pack(">I", ~sum(footer) & 0xFFFFFFFF)
    return _patched(_patched(path, 0, bytes(footer)), -512, bytes(footer)), "vhd"


def vhd_truncated(bench: Bench) -> tuple[Path, SourceFormat]:
    return _truncated(bench.make("evil", "vhd"), 0.7), "vhd"


def vhd_block_past_the_end(bench: Bench) -> tuple[Path, SourceFormat]:
    """The middle is missing and the footer in its place, so that only the table tells."""
    path = bench.make("evil", "vhd")
    data = path.read_bytes()
    return _file(bench, data[: len(data) // 2] + data[-512:]), "vhd"


def vhd_fixed_truncated(bench: Bench) -> tuple[Path, SourceFormat]:
    path = bench.make("evil", "vhd-fixed")
    data = path.read_bytes()
    return _file(bench, data[: len(data) // 2] + data[-512:]), "vhd-fixed"


def vhdx_truncated(bench: Bench) -> tuple[Path, SourceFormat]:
    return _truncated(bench.make("evil", "vhdx"), 0.7), "vhdx"


def vhdx_header_only(bench: Bench) -> tuple[Path, SourceFormat]:
    return _file(bench, b"vhdxfile".ljust(4096, b"\0")), "vhdx"


def qcow2_absurd(bench: Bench) -> tuple[Path, SourceFormat]:
    return _patched(bench.make("evil", "qcow2"), 24, struct.pack(">Q", 1 << 62)), "qcow2"


def qcow2_huge_table(bench: Bench) -> tuple[Path, SourceFormat]:
    return _patched(bench.make("evil", "qcow2"), 36, b"\x7f\xff\xff\xff"), "qcow2"


def qcow2_loop(bench: Bench) -> tuple[Path, SourceFormat]:
    """All its tables lie on its header."""
    path = bench.make("evil", "qcow2")
    return _patched(_patched(path, 40, bytes(8)), 48, bytes(8)), "qcow2"


CORPUS: list[tuple[Plant, str]] = [
    (empty, "the file is empty"),
    (wrong_magic, "its first bytes are wrong"),
    (qcow2_called_raw, "it is a qcow2 image, not a raw disk"),
    (web_page, "it is HTML"),
    (truncated_qcow2, "damaged"),
    (truncated_qcow2_header, "cut off"),
    (backing, "leads to another file"),
    (json_backing, "leads to another file"),
    (nbd_backing, "leads to another file"),
    (data_file, "leads to another file"),
    (vmdk_flat, "leads to another file"),
    (vmdk_embedded, "leads to another file"),
    (vmdk_parent, "leads to another file"),
    (vhd_absurd, "claims to hold 1152921504606846976 bytes"),
    (vhd_truncated, "cut off or damaged"),
    (vhd_block_past_the_end, "past the end of the file"),
    (vhd_fixed_truncated, "claims to hold"),
    (vhdx_truncated, "is not taken"),
    (vhdx_header_only, "cut off"),
    (qcow2_absurd, "claims to hold 4611686018427387904 bytes"),
    (qcow2_huge_table, "cut off"),
    (qcow2_loop, "is not taken"),
]


@pytest.mark.parametrize(
    ("plant", "words"), CORPUS, ids=lambda value: getattr(value, "__name__", "")
)
async def test_a_hostile_image_is_refused(bench: Bench, plant: Plant, words: str) -> None:
    path, format_ = plant(bench)
    before = path.read_bytes()
    with pytest.raises(Refused, match=words) as caught:
        await bench.take(path, format_)
    assert caught.value.message.startswith(f"{path} is not taken: ")
    assert "\n" not in caught.value.message
    assert "/proc/self" not in caught.value.message
    assert 'json:{"driver":"qcow2"' not in caught.value.message
    assert caught.value.hint
    assert list(bench.volume.iterdir()) == []
    assert path.read_bytes() == before


@pytest.mark.parametrize("plant", [backing, json_backing, data_file, vmdk_flat])
def test_the_corpus_bites(bench: Bench, plant: Plant) -> None:
    """A plain qemu-img follows these into the host's files: the refusals are not idle."""
    path, format_ = plant(bench)
    out = bench.outside / "out"
    driver = FORMATS[format_].driver
    run(["qemu-img", "convert", "-f", driver, "-O", "raw", str(path), str(out)], timeout=20)
    assert SECRET[:40] in out.read_bytes()


@pytest.mark.parametrize("plant", [backing, json_backing, data_file, vmdk_flat, vmdk_embedded])
async def test_a_second_wall_stands_behind_the_first(
    bench: Bench, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a header were misread here, what qemu-img is told does not lead anywhere."""
    path, format_ = plant(bench)

    def misread(*_: object) -> Claims:
        return Claims(format_, None)

    monkeypatch.setattr(imports, "_examined", misread)
    with contextlib.suppress(GodwitError):
        await bench.take(path, format_)
    for made in bench.volume.iterdir():
        out = bench.outside / "raw"
        run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(made), str(out)], timeout=20)
        assert SECRET[:40] not in out.read_bytes()


async def test_the_limit_of_the_caller_counts(bench: Bench) -> None:
    path = bench.make("good", "vhdx")
    for limits in (ImportLimits(virtual_bytes=MIB), ImportLimits(file_bytes=MIB)):
        with pytest.raises(Refused, match="at most 1048576 are taken"):
            await import_image(
                str(path),
                source_format="vhdx",
                target=bench.target,
                target_format="raw",
                tool=TOOL,
                limits=limits,
            )
    assert list(bench.volume.iterdir()) == []


async def test_what_only_root_may_read_is_not_imported(bench: Bench) -> None:
    hidden = bench.outside / "private"
    hidden.mkdir(mode=0o700)
    path = bench.make("good", "raw")
    path.chmod(0o600)
    inside = hidden / "good"
    inside.write_bytes(bench.content)
    inside.chmod(0o644)
    link = bench.outside / "link"
    link.symlink_to("/etc/shadow")
    for one in (path, inside, link):
        with pytest.raises(Refused, match="may not be read by the user"):
            await bench.take(one, "raw")
    with pytest.raises(Refused, match="is not a file"):
        await bench.take("/dev/zero", "raw")
    with pytest.raises(Refused, match="not an absolute path"):
        await bench.take("nbd:127.0.0.1:1", "raw")
    with pytest.raises(NotFound):
        await bench.take("/no/such/file", "raw")
    assert list(bench.volume.iterdir()) == []


async def test_a_source_that_changes_meanwhile_is_not_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.make("good", "raw")
    honest = imports._judged

    async def swap(*given: object) -> object:
        image = await honest(*given)  # type: ignore[arg-type]
        _patched(path, 4096, b"\1")
        return image

    monkeypatch.setattr(imports, "_judged", swap)
    with pytest.raises(Refused, match="changed while it was read"):
        await bench.take(path, "raw")
    assert list(bench.volume.iterdir()) == []


async def test_nothing_is_overwritten(bench: Bench) -> None:
    path = bench.make("good", "raw")
    bench.target.write_bytes(b"precious")
    with pytest.raises(Conflict, match="exists already"):
        await bench.take(path, "raw")
    assert bench.target.read_bytes() == b"precious"
    bench.target.unlink()
    bench.target.symlink_to(bench.canary)
    with pytest.raises(Conflict, match="exists already"):
        await bench.take(path, "raw")
    bench.target.unlink()


# --- from an address ---


class Quiet(SimpleHTTPRequestHandler):
    """Serves a directory and says nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def web(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = partial(Quiet, directory=str(bench.outside))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


async def test_from_an_address(bench: Bench, web: str) -> None:
    bench.make("good.vhdx", "vhdx")
    heard: list[str] = []
    await import_image(
        f"{web}/good.vhdx?token=secret",
        source_format="vhdx",
        target=bench.target,
        target_format="vhd-fixed",
        tool=TOOL,
        progress=lambda stage, _: heard.append(stage),
    )
    assert list(dict.fromkeys(heard)) == ["fetch", "check", "convert"]
    assert bench.target.read_bytes()[:SIZE] == bench.content
    assert list(bench.volume.iterdir()) == [bench.target]


async def test_a_hostile_image_from_an_address(bench: Bench, web: str) -> None:
    backing(bench)
    with pytest.raises(Refused, match=rf"{web}/evil is not taken: it leads to another file"):
        await bench.take(f"{web}/evil?token=secret", "qcow2")
    with pytest.raises(OperationFailed, match="404"):
        await bench.take(f"{web}/none", "qcow2")
    assert list(bench.volume.iterdir()) == []


async def test_the_tool_runs_without_privileges(bench: Bench) -> None:
    """A program in the place of qemu-img sees what one taken over by an image could do."""
    path = bench.make("good", "raw")
    spy = bench.outside / "spy"
    spy.write_text("#!/bin/sh\nid -u >&2\nulimit -c >&2\ncat /etc/shadow >&2\nexit 1\n")
    spy.chmod(0o755)
    with pytest.raises(Refused) as caught:
        await import_image(
            str(path),
            source_format="raw",
            target=bench.target,
            target_format="raw",
            tool=Binary(str(spy), user=NOBODY),
        )
    failed = caught.value.__cause__.__cause__ if caught.value.__cause__ else None
    assert isinstance(failed, ProgramFailed)
    assert failed.stderr.split("\n")[:2] == ["65534", "0"]
    assert "Permission denied" in failed.stderr
