"""The failover cluster's decisions in virtual time: every scenario, and many random scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from .report import Say, Section, tell

REPOSITORY = Path(__file__).resolve().parents[3]
TESTS = "tests/golden/cluster"
SCRIPTS = 1000
LIMIT_S = 1800.0


def run(*, scripts: int = SCRIPTS, say: Say = tell) -> Section:
    """Scenarios with their planted faults, then ``scripts`` random ones."""
    section = Section("decisions")
    files = len(list((REPOSITORY / TESTS / "scenarios").glob("*.txt")))
    start = time.monotonic()
    passed, told = _pytest("--deselect", f"{TESTS}/test_random.py", TESTS)
    spent = round(time.monotonic() - start, 1)
    section.figures["scenarios"] = {"files": files, "seconds": spent, "told": told}
    section.judge("decisions: at least 100 scenarios come out as written", passed, files)
    start = time.monotonic()
    passed, told = _pytest("-n", "2", f"{TESTS}/test_random.py", examples=scripts)
    spent = round(time.monotonic() - start, 1)
    section.figures["random"] = {"scripts": scripts, "seconds": spent, "told": told}
    text = f"decisions: {scripts} random scripts of faults, no invariant broken, all well after"
    section.judge(text, passed, told)
    if not passed:
        say(told)
    return section


def _pytest(*words: str, examples: int = 1) -> tuple[bool, str]:
    """Whether it passed, and its last line (or the end of what failed)."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=REPOSITORY,
        env={**os.environ, "GODWIT_EXAMPLES": str(examples)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-500:]]
    good = done.returncode == 0 and re.search(r"\d+ passed", last[0]) is not None
    return good, last[0] if good else done.stdout[-4000:]
