"""Runs the full counts of an issue's proof and writes raw figures; called by ``scripts/prove``.

Which sections there are stands in ``proofs``. Each is a part of its own with a lab of its own; what
it found is written at once, so that ``--only`` can repeat one of them and keep the others, as long
as the commit is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.faults.kit.report import Section, tell
from tests.faults.proofs import failover, moves, storage
from tests.faults.proofs.setting import REPOSITORY, Work

from godwit.host.facts import memory_facts

PROOFS = REPOSITORY / "docs" / "proof"
ISSUES = {"A": moves.SECTIONS, "B": storage.SECTIONS, "C": failover.SECTIONS}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip()


def _facts() -> dict[str, Any]:
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True)
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpus": os.cpu_count(),
        "cpu": model[0] if model else platform.machine(),
        "memory_bytes": memory_facts().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu.stdout.splitlines()[0] if qemu.stdout else "missing",
        "load_at_start": os.getloadavg()[0],
    }


def _before(proof: Path, issue: str) -> dict[str, Any]:
    """The sections of earlier runs, each with the commit that it is of."""
    try:
        kept = json.loads(proof.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    found = {name: part for name, part in kept["sections"].items() if name in ISSUES[issue]}
    return {name: {"commit": kept["commit"], **part} for name, part in found.items()}


def _write(issue: str, commit: str, facts: dict[str, Any], done: dict[str, Any]) -> None:
    sections = ISSUES[issue]
    proof = {
        "issue": issue,
        "commit": commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": facts,
        "complete": {part["commit"] for part in done.values()} == {commit}
        and set(done) == set(sections),
        "criteria": [c for name in sections if name in done for c in done[name]["criteria"]],
        "sections": {name: done[name] for name in sections if name in done},
    }
    path = _proof(issue)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(proof, indent=1, default=str) + "\n")
    fresh.replace(path)


def _proof(issue: str) -> Path:
    return PROOFS / f"{issue}.json"


def _carry_out(name: str, work: Work) -> dict[str, Any]:
    """A section to its end; what it stumbles over is a criterion that does not hold."""
    start = time.monotonic()
    tell(f"== {name}")
    try:
        section = work()
    except Exception as error:
        traceback.print_exc()
        section = Section(name)
        section.judge(f"{name}: carried out", False, f"{type(error).__name__}: {error}")
    spent = round(time.monotonic() - start, 1)
    for criterion in section.criteria:
        tell(f"{'✓' if criterion.passed else '✗'} {criterion.text}")
        if not criterion.passed:
            tell(f"    {json.dumps(criterion.figure, default=str)[:600]}")
    tell(f"== {name}: {spent:.0f} s")
    return {
        "seconds": spent,
        "figures": section.figures,
        "criteria": [criterion.as_json() for criterion in section.criteria],
    }


def main() -> int:
    """1 when a criterion does not hold; a run with ``--only`` judges those sections alone."""
    parser = argparse.ArgumentParser(prog="scripts/prove", description=__doc__)
    parser.add_argument("issue", choices=sorted(ISSUES))
    parser.add_argument("--only", default="", help="some of the issue's sections: NAME,NAME")
    given = parser.parse_args()
    sections = ISSUES[given.issue]
    names = [name for name in given.only.split(",") if name] or list(sections)
    if unknown := set(names) - set(sections):
        parser.error(f"no section {sorted(unknown)[0]}; there are: {', '.join(sections)}")
    # The figures themselves lie in docs/proof: writing them changes nothing that was measured.
    changed = _git("status", "--porcelain", "--", ".", ":!docs/proof")
    commit = _git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    facts = _facts()
    done = _before(_proof(given.issue), given.issue) if given.only else {}
    start = time.monotonic()
    for name in names:
        done[name] = {"commit": commit, **_carry_out(name, sections[name])}
        _write(given.issue, commit, facts, done)
    bad = [c["text"] for name in names for c in done[name]["criteria"] if not c["pass"]]
    tell(f"{len(names)} sections in {time.monotonic() - start:.0f} s, {len(bad)} criteria fail")
    tell(f"written: {_proof(given.issue).relative_to(REPOSITORY)}")
    return 1 if bad else 0


if __name__ == "__main__":
    if shutil.which("qemu-system-x86_64") is None or os.geteuid() != 0:
        sys.exit("root and QEMU are needed: run scripts/setup")
    sys.exit(main())
