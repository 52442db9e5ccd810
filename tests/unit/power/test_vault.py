"""Sealed passwords: opened by the right key for the right host only."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from godwit.model.errors import OperationFailed, Refused
from godwit.power.vault import Vault, key_of


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    made = Vault(tmp_path / "state" / "secrets.key")
    made.create()
    return made


def test_what_was_sealed_is_opened_and_looks_like_nothing(vault: Vault) -> None:
    sealed = vault.seal("hunter2", about="the power device of host1")
    assert "hunter2" not in sealed
    assert sealed != vault.seal("hunter2", about="the power device of host1")
    assert key_of(sealed) == vault.key_id
    assert vault.open(sealed, about="the power device of host1") == "hunter2"


def test_a_password_cannot_be_moved_to_another_host_or_changed(vault: Vault) -> None:
    sealed = vault.seal("hunter2", about="host1")
    with pytest.raises(OperationFailed, match="changed since it was sealed"):
        vault.open(sealed, about="host2")
    head, _, body = sealed.rpartition(".")
    other = "A" if body[20] != "A" else "B"
    with pytest.raises(OperationFailed):
        vault.open(f"{head}.{body[:20]}{other}{body[21:]}", about="host1")
    for damaged in ("", "hunter2", "gw1", f"{head}.", f"{head}.!!"):
        with pytest.raises((OperationFailed, Refused)):
            vault.open(damaged, about="host1")


def test_another_key_says_which_is_missing(vault: Vault, tmp_path: Path) -> None:
    other = Vault(tmp_path / "other.key")
    other.create()
    sealed = vault.seal("x", about="host1")
    with pytest.raises(Refused, match=vault.key_id):
        other.open(sealed, about="host1")


def test_the_key_is_for_its_owner_alone_and_made_once(tmp_path: Path) -> None:
    path = tmp_path / "secrets.key"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: Vault(path).create(), range(8)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["secrets.key"]
    before = path.read_bytes()
    Vault(path).create()
    assert path.read_bytes() == before


def test_no_key_and_a_damaged_one_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no key"):
        Vault(None).seal("x", about="host1")
    missing = Vault(tmp_path / "secrets.key")
    assert not missing.present
    with pytest.raises(Refused) as caught:
        missing.seal("x", about="host1")
    assert "another manager" in caught.value.hint
    (tmp_path / "secrets.key").write_text("nonsense")
    with pytest.raises(OperationFailed, match="holds no key"):
        Vault(tmp_path / "secrets.key").seal("x", about="host1")
