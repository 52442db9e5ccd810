"""How many wrong edits of the failover cluster's decisions its tests see: a mutation run.

mutmut makes one small change at a time in ``src/godwit/cluster`` (a comparison, a figure, a word of
a sentence) and runs the tests that touch the changed function. Decorated functions, among them
properties, and what stands outside of functions it leaves alone. It works in a folder of its own
with only what those decisions import. The validation report, and the few lines that ask the
planner, are not part of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .report import Say, Section, tell

REPOSITORY = Path(__file__).resolve().parents[3]
LIMIT_S = 900.0
SHARE = 0.90
TESTS = ("membership", "quorum", "fencing", "failover", "resolver", "decide")
PARTS = (
    "src/godwit/__init__.py",
    "src/godwit/model",
    "src/godwit/cluster",
    "tests/unit/cluster/conftest.py",
    "tests/unit/cluster/cluster_builders.py",
    *(f"tests/unit/cluster/test_{name}.py" for name in TESTS),
)
SETTINGS = """\
[project]
name = "godwit"
version = "0"

[tool.pytest.ini_options]
addopts = ["--import-mode=importlib", "-p", "no:cacheprovider"]
pythonpath = ["src"]

[tool.mutmut]
source_paths = ["src/"]
only_mutate = ["src/godwit/cluster/*.py"]
do_not_mutate = ["src/godwit/cluster/validation/*.py", "src/godwit/cluster/placing.py"]
pytest_add_cli_args_test_selection = ["tests/unit/cluster"]
track_dependencies = false
"""


def run(*, say: Say = tell) -> Section:
    """Two changes at a time, at most 15 minutes. What was not reached counts as not seen."""
    section = Section("mutation")
    folder = Path(tempfile.mkdtemp(prefix="godwit-mutation-", dir="/var/tmp"))
    try:
        _lay_out(folder)
        start = time.monotonic()
        complete = _mutate(folder, say)
        section.figures = {"seconds": round(time.monotonic() - start, 1), **_counts(folder)}
        section.figures["survivors"] = _survivors(folder)
    finally:
        shutil.rmtree(folder)
    total, killed = section.figures["total"], section.figures["killed"]
    section.judge(f"mutation: all changes tried within {LIMIT_S:.0f} s", complete, complete)
    share = killed / total if total else 0.0
    text = f"mutation: at least {SHARE:.0%} of the changes are seen"
    section.judge(text, total > 1000 and share >= SHARE, f"{killed} of {total}, {share:.1%}")
    return section


def _lay_out(folder: Path) -> None:
    for name in PARTS:
        source, target = REPOSITORY / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (folder / "pyproject.toml").write_text(SETTINGS)


def _mutmut(folder: Path, *words: str, timeout: float) -> subprocess.CompletedProcess[str]:
    argv = [str(Path(sys.executable).parent / "mutmut"), *words]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        argv, cwd=folder, env=clean, capture_output=True, text=True, timeout=timeout, check=False
    )


def _mutate(folder: Path, say: Say) -> bool:
    try:
        done = _mutmut(folder, "run", "--max-children", "2", timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        say("  mutation: stopped at the limit")
        return False
    if done.returncode != 0:
        say((done.stdout + done.stderr)[-2000:])
    return done.returncode == 0


def _counts(folder: Path) -> dict[str, int]:
    _mutmut(folder, "export-cicd-stats", timeout=60)
    kept = folder / "mutants" / "mutmut-cicd-stats.json"
    found: dict[str, int] = json.loads(kept.read_text()) if kept.exists() else {}
    return {"total": 0, "killed": 0, **found}


def _survivors(folder: Path) -> list[str]:
    said = _mutmut(folder, "results", timeout=60).stdout
    return sorted(line.strip() for line in said.splitlines() if "survived" in line)[:200]
