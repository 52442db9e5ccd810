"""Linters run as tests: their findings are failures, in CI and on a developer's machine alike."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SOURCE = ROOT / "src" / "godwit"


@pytest.mark.parametrize(
    "argv",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["lint-imports", "--no-cache"],
    ],
    ids=lambda argv: " ".join(argv),
)
def test_linter_finds_nothing(argv: list[str]) -> None:
    done = subprocess.run(
        [BIN / argv[0], *argv[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _calls(path: Path) -> set[str]:
    """Dotted names that a module imports or calls."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    return found


RUNS_PROGRAMS = {
    "subprocess",
    "os.system",
    "os.popen",
    "os.execv",
    "os.execve",
    "os.execvp",
    "os.fork",
    "os.posix_spawn",
    "asyncio.create_subprocess_exec",
    "asyncio.create_subprocess_shell",
    "pty.spawn",
}
# PID 1 of a lab host does a service manager's part, before anything of ours may be imported.
MAY_RUN_PROGRAMS = ("host/", "lab/supervisor")


def test_only_the_host_room_runs_programs() -> None:
    guilty = {
        str(path.relative_to(SOURCE)): sorted(_calls(path) & RUNS_PROGRAMS)
        for path in SOURCE.rglob("*.py")
        if not str(path.relative_to(SOURCE)).startswith(MAY_RUN_PROGRAMS)
        and _calls(path) & RUNS_PROGRAMS
    }
    assert guilty == {}


def test_no_shell_anywhere() -> None:
    guilty = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword)
        and node.arg == "shell"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert guilty == []


def test_background_tasks_are_named() -> None:
    """A task without a name is a task nobody finds in a hang."""
    guilty = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "create_task"
                and not any(keyword.arg == "name" for keyword in node.keywords)
            ):
                guilty.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert guilty == []


def test_modules_fit_a_sitting() -> None:
    long = {
        str(path.relative_to(SOURCE)): lines
        for path in SOURCE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 450
    }
    assert long == {}
