"""How qemu-img is called and understood."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from godwit.host.errors import ProgramFailed, ProgramMissing, ProgramTimedOut
from godwit.model.errors import Conflict, NotFound, OperationFailed, Refused
from godwit.qemu.launch import Binary
from godwit.storage.files import DirectoryFiles
from godwit.storage.images import QEMU_IMG, named, parse_info
from godwit.storage.qemu_img import (
    INFO_LIMITS,
    OpenImage,
    ProgressReader,
    explain,
    failure,
    opened,
    qemu_img,
    work_limits,
)

FILE = {"driver": "file", "filename": "/proc/self/fd/7"}


def test_nothing_is_guessed_and_nothing_followed() -> None:
    image = OpenImage(Path("/v/a.qcow2"), "qcow2", 7)
    assert image.node() == {"driver": "qcow2", "file": FILE, "backing": None}
    assert json.loads(image.name().removeprefix("json:")) == image.node()
    assert OpenImage(Path("/a"), "vmdk", 7).node()["backing"] is None
    assert OpenImage(Path("/a"), "vhdx", 7).node() == {"driver": "vhdx", "file": FILE}


def test_a_fixed_vhd_is_raw_up_to_its_footer() -> None:
    image = OpenImage(Path("/v/a.vhd"), "vhd-fixed", 7, size=1024)
    assert image.node() == {"driver": "raw", "offset": 0, "size": 1024, "file": FILE}


def test_the_base_of_a_clone_is_named_outright() -> None:
    base = OpenImage(Path("/v/base.raw"), "raw", 8)
    image = OpenImage(Path("/v/a.qcow2"), "qcow2", 7, base=base)
    assert image.node()["backing"] == base.node()
    assert [one.descriptor for one in image.chain()] == [7, 8]


def test_without_locks_qemu_img_neither_asks_nor_takes_them() -> None:
    base = OpenImage(Path("/v/base.raw"), "raw", 8, locking=False)
    image = OpenImage(Path("/v/a.qcow2"), "qcow2", 7, base=base, locking=False)
    for node in (image.node(), image.node()["backing"]):
        assert node["file"]["locking"] == "off"
    path = Path("/clusterstorage/shared/web/disk0.qcow2")
    assert named(path, "qcow2", DirectoryFiles()) == ["-f", "qcow2", str(path)]
    (word,) = named(path, "qcow2", DirectoryFiles(locking=False))
    node = json.loads(word.removeprefix("json:"))
    assert node["driver"] == "qcow2"
    assert node["file"] == {"driver": "file", "filename": str(path), "locking": "off"}


def test_progress_survives_any_cut() -> None:
    values = (b"0.00", b"1.01", b"1.00", b"50.50", b"100.00")
    printed = b"".join(b"    (%s/100%%)\r" % value for value in values)
    for width in (1, 7, 16, 200):
        heard: list[float] = []
        reader = ProgressReader(heard.append)
        for start in range(0, len(printed), width):
            reader.feed(printed[start : start + width])
        assert heard == [0.0, pytest.approx(0.0101), 0.505, 1.0]


def test_words_of_qemu_img_for_people() -> None:
    image = OpenImage(Path("/v/a.qcow2"), "qcow2", 7)
    said = f"qemu-img: Could not open '{image.name()}': Image is corrupt\nmore\n"
    error = ProgramFailed(["qemu-img"], 1, said)
    assert explain(error, image) == "Could not open '/v/a.qcow2': Image is corrupt"
    other = ProgramFailed(["qemu-img"], 1, "qemu-img: Could not open 'json:{\"a\":{}}': no")
    assert explain(other, image) == "Could not open the image: no"
    at = ProgramFailed(["qemu-img"], 1, "qemu-img: /proc/self/fd/7: Permission denied\n")
    assert explain(at, image) == "/v/a.qcow2: Permission denied"


@pytest.mark.parametrize(
    ("status", "words"),
    [(-signal.SIGXFSZ, "larger"), (-signal.SIGXCPU, "processor"), (-9, "killed"), (5, "status 5")],
)
def test_an_end_without_words_is_explained(status: int, words: str) -> None:
    assert words in explain(ProgramFailed(["qemu-img"], status, ""))


def test_time_and_missing_program() -> None:
    assert explain(ProgramTimedOut(["qemu-img"], 60)) == "it took longer than 60 s"
    assert "not found" in explain(ProgramMissing(["qemu-img"]))


def test_a_lock_is_a_conflict() -> None:
    locked = "qemu-img: Could not open 'x': Failed to get shared \"write\" lock\nIs another ...\n"
    assert isinstance(failure("cannot copy", ProgramFailed(["q"], 1, locked)), Conflict)
    plain = failure("cannot copy", ProgramFailed(["q"], 1, "qemu-img: no space"))
    assert type(plain) is OperationFailed
    assert plain.message == "cannot copy: no space"


def test_what_is_not_a_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("pipe", Refused), (".", Refused), ("none", NotFound)):
        with pytest.raises(kind), opened(tmp_path / name):
            pass


def test_limits_grow_with_the_work() -> None:
    assert INFO_LIMITS.file_bytes == 0
    small, large = work_limits(0), work_limits(1 << 40, file_bytes=5)
    assert large.file_bytes == 5
    assert (small.cpu_seconds or 0) < (large.cpu_seconds or 0)


async def test_the_tool_gets_nothing_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GODWIT_SECRET", "x")
    tool = Binary("env")
    printed = await qemu_img(tool, [], images=[], limits=INFO_LIMITS, timeout=10)
    assert sorted(printed.decode().split()) == [
        "LC_ALL=C.UTF-8",
        "MALLOC_ARENA_MAX=2",
        "PATH=/usr/bin:/bin",
    ]
    assert QEMU_IMG.user is None


def test_what_info_printed() -> None:
    info = parse_info(
        b'{"format":"qcow2","virtual-size":512,"actual-size":9,"backing-filename":"/b",'
        b'"backing-filename-format":"raw","encrypted":true,'
        b'"format-specific":{"type":"qcow2","data":{"data-file":"/d"}}}'
    )
    assert (info.virtual_size, info.disk_size, info.backing) == (512, 9, "/b")
    assert (info.backing_format, info.data_file, info.encrypted) == ("raw", "/d", True)


def test_an_extent_elsewhere_is_a_data_file() -> None:
    printed = (
        b'{"format":"vmdk","virtual-size":512,"format-specific":{"type":"vmdk",'
        b'"data":{"extents":[{"filename":"/proc/self/fd/7"},{"filename":"/etc/shadow"}]}}}'
    )
    assert parse_info(printed, itself="/proc/self/fd/7").data_file == "/etc/shadow"
    own = printed.replace(b',{"filename":"/etc/shadow"}', b"")
    assert parse_info(own, itself="/proc/self/fd/7").data_file == ""
