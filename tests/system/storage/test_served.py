"""Volumes behind real servers: nfs-ganesha and tgtd, on the storage node of a lab of their own.

What is asked of a directory of this machine and of an NFS export is one suite for both.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from godwit.host.ifctl import in_netns
from godwit.host.netns import opened_netns
from godwit.host.process import freeze, is_alive, thaw
from godwit.host.run import run, run_async
from godwit.lab import leaks, serving
from godwit.lab.down import down
from godwit.lab.handle import Lab
from godwit.lab.layout import CONTROL, QEMU_USER, Layout, StorageKind
from godwit.lab.options import Options
from godwit.lab.up import up
from godwit.model.errors import Conflict, NotFound, OperationFailed, Refused
from godwit.model.vm import Disk, DiskFormat
from godwit.model.volume import Volume
from godwit.qemu.launch import Binary
from godwit.storage import images, remote
from godwit.storage.convert import clone_image, convert
from godwit.storage.files import LOCAL, VolumeFiles
from godwit.storage.growth import grow
from godwit.storage.images import ImageInfo
from godwit.storage.imports import ImportLimits, import_image
from godwit.storage.nodes import BrokerDisk
from godwit.storage.paths import PathProbe, probe
from godwit.storage.places import Access, initiator_name, served_node
from godwit.storage.remote import Child, Server
from godwit.storage.served import NoFiles, ServedFiles
from godwit.storage.served_paths import ServedProber, list_luns
from godwit.storage.settle import settle_disk
from godwit.storage.vhdx_log import HEADER_BYTES, HEADERS, find_mark, with_checksum

T = TypeVar("T")
SBIN = "/usr/sbin:/usr/bin"
MIB = 1 << 20
SHARED = Path("/clusterstorage/shared")

pytestmark = pytest.mark.system


class Served:
    """A lab whose storage node serves; everything asked runs in its host's network."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._opened: list[ServedFiles] = []
        user = pwd.getpwnam(QEMU_USER)
        self.access = Access((user.pw_uid, user.pw_gid), initiator_name("test", "host1"))

    def volume(self, name: str) -> Volume:
        return next(one for one in serving.volumes(self.lab.layout) if one.name == name)

    async def probe(self, volume: Volume, timeout: float) -> PathProbe:
        return await probe(volume, timeout, root=Path("/"), host="host1", access=self.access)

    def files(self) -> ServedFiles:
        self._opened.append(ServedFiles(self.volume("shared"), self.access))
        return self._opened[-1]

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        async def whole() -> T:
            try:
                return await work()
            finally:
                while self._opened:
                    self._opened.pop().close()
                await asyncio.gather(*remote._REAPERS)

        with opened_netns(self.lab.layout.netns("host1")) as space:
            return in_netns(space, lambda: asyncio.run(whole()))


@contextmanager
def raised(storage: StorageKind) -> Iterator[Served]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for program, package in serving.PROGRAMS[storage]:
        if shutil.which(program, path=SBIN) is None:
            pytest.skip(f"{package} is not installed")
    root = Path(tempfile.mkdtemp(prefix="gwserved-"))
    root.chmod(0o755)
    name = "s" + uuid.uuid4().hex[:5]
    layout = Layout(name, 1, "", root, storage=storage)
    before = leaks.take(name)
    try:
        up(Options(layout, image=False, join=False, units={CONTROL: (), "host1": ()}))
        yield Served(Lab.load(name, root=root))
    finally:
        down(name, root=root)
        shutil.rmtree(root, ignore_errors=True)
    assert leaks.compare(before, leaks.take(name)) == []


@pytest.fixture(scope="module")
def nfs() -> Iterator[Served]:
    with raised("nfs") as served:
        yield served


@pytest.fixture(scope="module")
def iscsi() -> Iterator[Served]:
    with raised("iscsi") as served:
        yield served


@pytest.mark.parametrize("kind", ["directory", "nfs"])
def test_files_are_files_wherever_they_lie(kind: str, nfs: Served, tmp_path: Path) -> None:
    async def work() -> None:
        files: VolumeFiles = LOCAL if kind == "directory" else nfs.files()
        root = tmp_path if kind == "directory" else SHARED / "files"
        folder = root / "web" / "deep"
        await files.make_directories(folder)
        await files.make_directories(folder)
        assert await files.look(folder / "a") is None
        await files.create(folder / "a")
        with pytest.raises(FileExistsError):
            await files.create(folder / "a")
        for text in (b"old", b"new and longer"):
            await files.write(folder / "a", text, mode=0o600)
        facts = await files.look(folder / "a")
        assert facts is not None
        assert (facts.is_file, facts.size, facts.mode & 0o777) == (True, 14, 0o600)
        assert await files.read(folder / "a", 4, 3) == b"and"
        assert await files.read(folder / "a", 100, 3) == b""
        await files.sync(folder / "a")
        assert await files.names(folder) == ["a"]
        assert await files.names(root / "nothing") == []
        await files.remove_directory(folder)
        assert (await files.look(folder) or facts).is_directory, "it was not empty"
        big = tmp_path / "big"
        big.write_bytes(os.urandom(3 * MIB + 17))
        await files.bring(big, folder / "b")
        copy = await files.fetch(folder / "b", tmp_path / "copy")
        assert copy.read_bytes() == big.read_bytes()
        for name in ("a", "b", "c"):
            await files.remove(folder / name)
        await files.remove_directory(folder)
        assert await files.look(folder) is None

    nfs.run(work)


def test_nothing_leads_out_of_the_export(nfs: Served) -> None:
    async def work() -> None:
        files = nfs.files()
        for path in ("/etc/passwd", "/clusterstorage/other/x", "/clusterstorage/shared/../x"):
            with pytest.raises(Refused):
                await files.look(Path(path))

    nfs.run(work)


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vhd-fixed", "vhdx"])
def test_images_are_made_checked_copied_and_grown(
    kind: DiskFormat, nfs: Served, tmp_path: Path
) -> None:
    async def work() -> None:
        files, path = nfs.files(), SHARED / "img" / f"disk.{kind}"
        await images.create_image(path, format=kind, size_bytes=8 * MIB, files=files)
        with pytest.raises(Conflict, match="exists already"):
            await images.create_image(path, format=kind, size_bytes=8 * MIB, files=files)
        facts = await files.look(path)
        assert facts is not None
        assert (facts.uid, facts.gid) == nfs.access.user, "QEMU has to open it"
        disk = Disk(
            id="d", volume="shared", path=str(path), size_bytes=8 * MIB, format=kind, serial="x",
            lun=0,
        )  # fmt: skip
        await images.check_image(disk, files=files)
        with pytest.raises(Refused, match="the record says"):
            await images.check_image(disk.but(size_bytes=16 * MIB), files=files)
        content = tmp_path / f"{kind}.raw"
        content.write_bytes(os.urandom(5 * MIB))
        far, back = SHARED / "img" / f"copy.{kind}", tmp_path / f"back.{kind}"
        await convert(
            content, source_format="raw", target=far, target_format=kind, target_files=files
        )
        await convert(far, source_format=kind, target=back, target_format="raw", source_files=files)
        assert back.read_bytes() == content.read_bytes()
        with pytest.raises(Conflict):
            await convert(
                content, source_format="raw", target=far, target_format=kind, target_files=files
            )
        grown = await grow(far, format=kind, size_bytes=9 * MIB, files=files)
        assert grown.virtual_size == 9 * MIB
        again = tmp_path / f"again.{kind}"
        await convert(
            far, source_format=kind, target=again, target_format="raw", source_files=files
        )
        assert again.read_bytes() == content.read_bytes() + bytes(4 * MIB)
        assert not (await images.check(far, format=kind, files=files)).damaged
        await files.remove(far)
        await files.remove(path)

    nfs.run(work)


def test_a_failed_copy_leaves_nothing(nfs: Served, tmp_path: Path) -> None:
    async def work() -> None:
        files, liar = nfs.files(), tmp_path / "liar"
        liar.write_bytes(b"no image at all" * 100)
        await files.make_directories(SHARED / "img")
        with pytest.raises(OperationFailed):
            await convert(
                liar,
                source_format="qcow2",
                target=SHARED / "img" / "x",
                target_format="raw",
                target_files=files,
            )
        assert await files.look(SHARED / "img" / "x") is None

    nfs.run(work)


def test_memory_goes_through_a_pipe_and_a_broken_one_is_told(nfs: Served) -> None:
    async def work() -> None:
        files, path = nfs.files(), SHARED / "web" / "saved-1.mem"
        content = os.urandom(2 * MIB)
        out = await files.write_through(path, owner=(0, 0))
        assert out.descriptor is not None
        writing = os.dup(out.descriptor)
        out.passed()
        await asyncio.to_thread(_write_all, writing, content)
        await out.done(timeout=20)
        back = await files.read_through(path)
        assert back.descriptor is not None
        reading = os.dup(back.descriptor)
        back.passed()
        assert await asyncio.to_thread(_read_all, reading) == content
        await back.done(timeout=20)
        missing = await files.read_through(SHARED / "web" / "nothing")
        with pytest.raises(FileNotFoundError):
            await missing.done(timeout=20)
        given_up = await files.write_through(path, owner=(0, 0))
        given_up.stop()
        await files.remove(path)

    nfs.run(work)


def _write_all(descriptor: int, content: bytes) -> None:
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def test_a_frozen_server_costs_only_the_time_out(nfs: Served) -> None:
    server = nfs.lab.process("storage", "nfs")

    async def work() -> None:
        volume, child = nfs.volume("shared"), Child(Server("10.94.0.1", "/shared", nfs.access.user))
        assert (await child.ask("look", name="x"))["capacity"] > 0
        found = await nfs.probe(volume, 5.0)
        assert found.ok
        assert found.capacity_bytes is not None
        freeze(server)
        try:
            began = time.monotonic()
            found = await nfs.probe(volume, 1.0)
            assert (found.ok, found.hung, found.capacity_bytes) == (False, True, None)
            assert "does not answer within 1 s" in found.reason
            hanging = child._process
            assert hanging is not None
            with pytest.raises(TimeoutError):
                await child.ask("look", name="x", timeout=1.0)
            assert time.monotonic() - began < 6.0
        finally:
            thaw(server)
        await asyncio.gather(*remote._REAPERS)
        assert not is_alive(hanging), "the one that hung was killed"
        assert (await child.ask("look", name="x"))["capacity"] > 0, "another one answers"
        child.close()
        assert (await nfs.probe(volume, 10.0)).ok

    nfs.run(work)


def test_one_prober_looks_again_and_again(nfs: Served) -> None:
    async def work() -> None:
        looks = ServedProber(nfs.volume("shared"), nfs.access, "host1")
        first = await looks.probe(5.0)
        began = time.monotonic()
        second = await looks.probe(5.0, identity=first.identity)
        assert (first.ok, second.ok, second.identity) == (True, True, first.identity)
        assert time.monotonic() - began < 1.0
        assert not (await looks.probe(5.0, identity="another")).ok
        await looks.close()

    nfs.run(work)
    assert (nfs.lab.layout.volume / ".godwit" / "alive-host1").stat().st_size == 4096


def test_what_is_not_there_is_told(nfs: Served) -> None:
    async def work() -> None:
        wrong = nfs.volume("shared").but(export="/nothing")
        found = await nfs.probe(wrong, 5.0)
        assert not found.ok
        assert found.reason.startswith("shared: ")
        away = nfs.volume("shared").but(server="10.94.0.99")
        assert not (await nfs.probe(away, 1.0)).ok
        here = Volume(name="nothing")
        assert not (await nfs.probe(here, 5.0)).ok
        assert (await nfs.probe(Volume(name="tmp"), 5.0)).ok

    nfs.run(work)


def test_luns_are_listed_measured_and_flushed(iscsi: Served) -> None:
    async def work() -> None:
        volume = iscsi.volume("luns")
        found = await list_luns(volume, iscsi.access)
        assert found == dict.fromkeys(range(1, serving.LUN_COUNT + 1), serving.LUN_BYTES)
        seen = await iscsi.probe(volume, 5.0)
        assert (seen.ok, seen.used_bytes) == (True, None)
        assert seen.capacity_bytes == serving.LUN_COUNT * serving.LUN_BYTES
        wrong = await iscsi.probe(volume.but(target="iqn.2026-11.example:no"), 5.0)
        assert not wrong.ok
        node = served_node(volume, "/clusterstorage/luns/lun-1", iscsi.access)
        disk = BrokerDisk(id="d", path="lun-1", format="raw", size_bytes=512, served=node)
        await settle_disk(disk, user=iscsi.access.user)
        with pytest.raises(OperationFailed, match="the sync of lun-1 failed"):
            await settle_disk(
                disk.but(served={**(node or {}), "target": "iqn.2026-11.example:no"}),
                user=iscsi.access.user,
            )
        with pytest.raises(Refused, match="of kind iscsi and holds no files"):
            await NoFiles(volume, iscsi.access).look(Path("/clusterstorage/luns/x"))

    iscsi.run(work)


def test_a_target_that_dies_is_told_of_its_luns_again(iscsi: Served) -> None:
    from godwit.lab.fault import kill_process

    kill_process(iscsi.lab, "storage", "tgtd")

    async def work() -> None:
        until = time.monotonic() + 20
        found: dict[int, int] = {}
        while len(found) < serving.LUN_COUNT and time.monotonic() < until:
            try:
                found = await list_luns(iscsi.volume("luns"), iscsi.access, timeout=2.0)
            except OSError:
                await asyncio.sleep(0.1)
        assert len(found) == serving.LUN_COUNT

    iscsi.run(work)


def test_a_synced_image_is_synced_on_the_server(nfs: Served) -> None:
    async def work() -> None:
        files, path = nfs.files(), SHARED / "sync.raw"
        await images.create_image(path, format="raw", size_bytes=MIB, files=files)
        node: dict[str, Any] | None = files.node(path)
        disk = BrokerDisk(id="d", path=str(path), format="raw", size_bytes=MIB, served=node)
        await settle_disk(disk, user=nfs.access.user)
        await files.remove(path)
        with pytest.raises(OperationFailed, match="the sync of"):
            await settle_disk(disk, user=nfs.access.user)

    nfs.run(work)


def test_a_vhdx_there_is_mended(nfs: Served) -> None:
    """Marked as by a daemon that was killed before it wrote its log (`godwit.storage.vhdx_log`)."""

    async def work() -> None:
        files, path = nfs.files(), SHARED / "marked.vhdx"
        await images.create_image(path, format="vhdx", size_bytes=8 * MIB, files=files)
        node: dict[str, Any] | None = files.node(path)
        disk = BrokerDisk(id="d", path=str(path), format="vhdx", size_bytes=8 * MIB, served=node)

        async def headers() -> tuple[bytes, bytes]:
            first, second = [await files.read(path, at, HEADER_BYTES) for at in HEADERS]
            return first, second

        for at, head in zip(HEADERS, await headers(), strict=True):
            marked = head[:48] + uuid.uuid4().bytes + head[64:]
            await files.patch(path, at, with_checksum(marked))
        assert find_mark(*await headers()) is not None
        await settle_disk(disk, user=nfs.access.user)
        mended = await headers()
        assert find_mark(*mended) is None
        await settle_disk(disk, user=nfs.access.user)
        assert await headers() == mended
        assert not (await images.check(path, format="vhdx", files=files)).damaged

    nfs.run(work)


def test_the_servers_are_those_of_the_lab(nfs: Served) -> None:
    said = run(["ss", "-Hltn"], timeout=10, netns=nfs.lab.layout.netns("storage")).decode()
    assert ":2049" in said
    assert str(nfs.lab.layout.volume).startswith(str(nfs.lab.layout.state))


@pytest.mark.parametrize("kind", ["qcow2", "vhdx"])
def test_an_image_is_cloned_in_full_where_it_lies(
    kind: DiskFormat, nfs: Served, tmp_path: Path
) -> None:
    async def work() -> None:
        files, folder = nfs.files(), SHARED / "clones"
        await files.make_directories(folder)
        content = tmp_path / "content"
        content.write_bytes(os.urandom(5 * MIB))
        first, second = folder / f"first.{kind}", folder / f"second.{kind}"
        await convert(
            content, source_format="raw", target=first, target_format=kind, target_files=files
        )
        made = await clone_image(first, format=kind, target=second, target_format=kind, files=files)
        assert (made.backing, made.info.virtual_size) == (None, 5 * MIB)
        back = tmp_path / "back"
        await convert(
            second, source_format=kind, target=back, target_format="raw", source_files=files
        )
        assert back.read_bytes() == content.read_bytes()

    nfs.run(work)


def test_a_strangers_image_is_taken_in_from_a_server(nfs: Served, tmp_path: Path) -> None:
    """With the same mistrust as one from elsewhere, and never longer than it said it was."""
    tool = Binary("qemu-img", user=nfs.access.user)

    async def work() -> None:
        files, folder = nfs.files(), SHARED / "strangers"
        await files.make_directories(folder)
        content, bad = tmp_path / "content", tmp_path / "bad.qcow2"
        content.write_bytes(os.urandom(5 * MIB))
        sound = tmp_path / "sound.qcow2"
        await convert(content, source_format="raw", target=sound, target_format="qcow2")
        words = ("create", "-q", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw")
        await run_async(["qemu-img", *words, str(bad), "1M"], timeout=10.0)
        for one in (sound, bad):
            await files.bring(one, folder / one.name)

        async def take(name: str, limits: ImportLimits | None = None) -> ImageInfo:
            return await import_image(
                str(folder / name),
                source_format="qcow2",
                target=folder / "mine.vhdx",
                target_format="vhdx",
                tool=tool,
                owner=nfs.access.user,
                limits=limits,
                files=files,
                source_files=files,
                scratch=tmp_path,
            )

        with pytest.raises(Refused, match="another file"):
            await take(bad.name)
        with pytest.raises(NotFound, match="no file"):
            await take("nothing")
        with pytest.raises(Refused, match="at most 1048576 are taken"):
            await take(sound.name, ImportLimits(file_bytes=MIB))
        assert await files.look(folder / "mine.vhdx") is None
        assert (await take(sound.name)).virtual_size == 5 * MIB
        back = tmp_path / "back"
        await convert(
            folder / "mine.vhdx",
            source_format="vhdx",
            target=back,
            target_format="raw",
            source_files=files,
        )
        assert back.read_bytes() == content.read_bytes()
        assert sorted(one.name for one in tmp_path.iterdir()) == [
            "back", "bad.qcow2", "content", "sound.qcow2",
        ]  # fmt: skip

    nfs.run(work)
