"""Which firmware a host has: by the packages' descriptions, and never one that was not measured."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from godwit.model.errors import Refused
from godwit.model.firmware import FirmwareImage
from godwit.qemu.firmware import FirmwareShelf, difference, fitting, opened_code

PLAIN: dict[str, Any] = {
    "interface-types": ["uefi"],
    "mapping": {
        "device": "flash",
        "executable": {"filename": "/fw/code.fd", "format": "raw"},
        "nvram-template": {"filename": "/fw/vars.fd", "format": "raw"},
    },
    "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
    "features": ["acpi-s3"],
}


def _changed(where: str, value: object) -> dict[str, Any]:
    found = copy.deepcopy(PLAIN)
    *way, last = where.split("/")
    inner = found
    for word in way:
        inner = inner[word]
    inner[last] = value
    return found


def test_a_plain_description_fits() -> None:
    assert fitting(PLAIN) == ("/fw/code.fd", "/fw/vars.fd")


@pytest.mark.parametrize(
    "other",
    [
        _changed("interface-types", ["bios"]),
        _changed("mapping/device", "memory"),
        _changed("mapping/executable/format", "qcow2"),
        _changed("mapping/nvram-template", None),
        _changed("targets", [{"architecture": "aarch64", "machines": ["virt-*"]}]),
        _changed("targets", [{"architecture": "x86_64", "machines": ["pc-i440fx-*"]}]),
        _changed("features", ["requires-smm", "secure-boot"]),
        [],
        "text",
        {},
    ],
)
def test_others_do_not(other: object) -> None:
    assert fitting(other) is None


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """An administrator's folder, empty, and a package's, with firmware that fits."""
    ours, theirs = tmp_path / "etc", tmp_path / "usr"
    for folder in (ours, theirs):
        folder.mkdir()
    for name in ("code", "vars"):
        (tmp_path / f"{name}.fd").write_bytes(name.encode() * 100)
    found = _changed("mapping/executable/filename", str(tmp_path / "code.fd"))
    found["mapping"]["nvram-template"]["filename"] = str(tmp_path / "vars.fd")
    (theirs / "60-plain.json").write_text(json.dumps(found))
    return ours, theirs


def test_what_is_found_is_measured(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[1] / "10-broken.json").write_text("{")
    (folders[1] / "20-secure.json").write_text(json.dumps(_changed("features", ["requires-smm"])))
    (folders[1] / "30-gone.json").write_text(json.dumps(PLAIN))  # its files are not there
    found = FirmwareShelf(folders).uefi()
    assert found is not None
    assert found.code == FirmwareImage(
        path=str(tmp_path / "code.fd"),
        size_bytes=400,
        sha256=hashlib.sha256(b"code" * 100).hexdigest(),
    )
    assert found.template.size_bytes == 400


def test_an_upgrade_is_seen_and_an_administrator_has_the_last_word(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    shelf = FirmwareShelf(folders)
    before = shelf.uefi()
    assert before is not None
    assert shelf.uefi() is before
    (tmp_path / "code.fd").write_bytes(b"newer!")
    after = shelf.uefi()
    assert after is not None
    assert after.code.size_bytes == 6
    (folders[0] / "60-plain.json").write_text("{}")  # hides the package's
    assert shelf.uefi() is None


def test_a_host_without_any() -> None:
    assert FirmwareShelf((Path("/nowhere"),)).uefi() is None


def test_what_is_opened_is_what_was_measured(folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = FirmwareShelf(folders).uefi()
    assert found is not None
    with opened_code(found.code) as descriptor:
        assert os.pread(descriptor, 4, 0) == b"code"
        with pytest.raises(OSError, match="Bad file"):
            os.write(descriptor, b"x")
    (tmp_path / "code.fd").write_bytes(b"CODE" * 100)
    with pytest.raises(Refused, match="its content is"), opened_code(found.code):
        pass
    (tmp_path / "code.fd").unlink()
    with pytest.raises(Refused, match="cannot be read"), opened_code(found.code):
        pass


def test_a_difference_is_named() -> None:
    one = FirmwareImage(path="/a", size_bytes=1, sha256="a" * 64)
    assert difference(one, one) == ""
    assert difference(one, None) == "there is none"
    assert difference(one, one.but(path="/b")) == "its path is /b, /a is needed"
    assert difference(one, one.but(size_bytes=2)) == "its size is 2, 1 is needed"
    assert "bbbbbbbbbbbb, aaaaaaaaaaaa is needed" in difference(one, one.but(sha256="b" * 64))
