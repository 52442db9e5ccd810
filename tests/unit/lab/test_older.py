"""Hosts of another version: where their agents are taken from, and when no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from godwit.lab import configs, older
from godwit.lab.layout import Layout
from godwit.model.errors import InvalidRequest


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree whose agent only says which one it is, and what it was given."""
    package = tmp_path / "tree" / "src" / "godwit"
    (package / "agent").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "agent" / "__init__.py").touch()
    (package / "agent" / "main.py").write_text(
        "import sys\nif __name__ == '__main__':\n    print('old', *sys.argv[1:])\n"
    )
    return tmp_path / "tree"


def test_a_tree_without_an_agent_is_refused(tree: Path, tmp_path: Path) -> None:
    assert older.checked_source(tree) == tree / "src" / "godwit"
    with pytest.raises(InvalidRequest, match="no source tree"):
        older.checked_source(tmp_path)


def test_only_agent_and_guard_are_taken_from_it() -> None:
    plain = (*configs.host_units("py"), configs.store_unit("py"))
    found = older.from_source(plain)
    assert [one.name for one in found] == [one.name for one in plain]
    assert found[2] == plain[2]
    for unit, before in zip(found[:2], plain[:2], strict=True):
        assert unit.argv[:3] == ("py", "-I", "-c")
        assert unit.argv[-3:] == before.argv[-3:]
        assert (unit.notify, unit.watchdog_s, unit.log) == (
            *(before.notify, before.watchdog_s, before.log),
        )


def test_what_is_started_is_the_trees_until_the_mark_is_gone(tree: Path, tmp_path: Path) -> None:
    layout = Layout("skew", 1, "", tmp_path / "labs")
    etc = layout.node_dir("host1") / "etc"
    etc.mkdir(parents=True)
    assert older.shown(layout) == ()
    older.keep(layout, tree)
    (step,) = older.shown(layout)
    assert step["ro"] is True
    mark = etc / "source"
    assert mark.read_text().strip() == step["dst"]
    mark.write_text(str(older.place(layout)))  # there is no host here that shows it elsewhere
    unit = older.from_source(configs.host_units(sys.executable))[1]
    argv = [str(mark) if word == str(configs.ETC / "source") else word for word in unit.argv]
    argv[-1] = str(tmp_path / "none.toml")
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"old --config {argv[-1]}\n"), done.stderr
    mark.unlink()
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode != 0  # ours: it reads its configuration
    assert "none.toml" in done.stderr
    assert "old" not in done.stdout
