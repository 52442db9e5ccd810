"""Which cluster is meant, and which token goes there."""

from __future__ import annotations

from pathlib import Path

import pytest

from godwit.client.settings import Target, contexts_file, forget_context, resolve, save_context
from godwit.model.errors import InvalidRequest, NotFound


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    file = contexts_file(environ)
    for name, port in (("other", 2), ("lab", 1)):
        url = f"https://127.0.0.1:{port}"
        target = Target(url=url, token_file=tmp_path / f"{name}.token", ca_file=tmp_path / "ca")
        save_context(name, target, file=file)
    return environ


def test_the_current_context_counts_when_nothing_is_said(environ: dict[str, str]) -> None:
    assert resolve(environ=environ).url == "https://127.0.0.1:1"
    assert resolve(context="other", environ=environ).url == "https://127.0.0.1:2"
    assert resolve(environ=environ | {"GODWIT_CONTEXT": "other"}).url == "https://127.0.0.1:2"


def test_the_environment_beats_the_file_and_arguments_beat_both(environ: dict[str, str]) -> None:
    there = environ | {"GODWIT_URL": "https://there:3/", "GODWIT_TOKEN_FILE": "/t"}
    assert resolve(environ=there) == Target(url="https://there:3", token_file=Path("/t"))
    assert resolve(url="https://here:4", environ=there).url == "https://here:4"
    assert resolve(context="lab", environ=there).url == "https://127.0.0.1:1"


def test_a_context_keeps_its_token_from_other_addresses(environ: dict[str, str]) -> None:
    stranger = resolve(url="https://evil:1", environ=environ)
    assert stranger.token_file is None
    both = resolve(url="https://evil:1", context="lab", environ=environ)
    assert (both.url, both.token_file) == ("https://evil:1", None)
    known = resolve(url="https://127.0.0.1:2/", environ=environ)
    assert known.token_file is not None
    assert known.token_file.name == "other.token"


def test_the_file_is_private_and_contexts_can_be_forgotten(environ: dict[str, str]) -> None:
    file = contexts_file(environ)
    assert file.stat().st_mode & 0o777 == 0o600
    forget_context("lab", file=file)
    assert resolve(environ=environ).url == "https://127.0.0.1:2"
    forget_context("other", file=file)
    assert not file.exists()


def test_what_is_wrong_is_said(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no context named nowhere"):
        resolve(context="nowhere", environ=environ)
    with pytest.raises(InvalidRequest, match="no cluster is chosen"):
        resolve(environ={"XDG_CONFIG_HOME": str(tmp_path / "none")})
    with pytest.raises(InvalidRequest, match="not the address"):
        resolve(url="host1", environ=environ)
    contexts_file(environ).write_text("current = ")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        resolve(environ=environ)


def test_tokens(tmp_path: Path) -> None:
    file = tmp_path / "token"
    target = Target(url="https://x", token_file=file)
    with pytest.raises(InvalidRequest, match="No such file"):
        target.token()
    for wrong in ("", "two words", "ünïcode"):
        file.write_text(wrong)
        with pytest.raises(InvalidRequest):
            target.token()
    file.write_text("abc\n")
    assert target.token() == "abc"
