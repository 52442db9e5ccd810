"""The code of an earlier commit reads what this one writes, and this one what that writes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from tests.faults.kit import skew

from .wire_kinds import GOLDEN, RELEASE, all_kinds

# Reads every example that it has a kind for, and says it again as it would write it.
_READER = """
import importlib, json, pathlib, sys
sys.path.insert(0, sys.argv[1])
said = {}
for name, (module, kind, text) in json.load(sys.stdin).items():
    try:
        record = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError):
        continue
    try:
        said[name] = record.model_validate_json(text).model_dump_json(exclude_none=True)
    except ValueError as error:
        said[name] = f"!{error}"
import godwit.model.host as host
print(json.dumps({"from": host.__file__, "said": said}))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What the earlier commit says to each of today's examples."""
    asked = {
        name: (kind.__module__, kind.__qualname__, (GOLDEN / RELEASE / f"{name}.json").read_text())
        for name, kind in all_kinds().items()
    }
    try:
        with skew.old_source() as tree:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _READER, str(tree / "src")],
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                check=True,
                timeout=60.0,
            )
            found: dict[str, Any] = json.loads(done.stdout)
            assert found["from"].startswith(str(tree))
    except skew.NoHistory as problem:
        pytest.skip(str(problem))
    said: dict[str, str] = found["said"]
    return said


def test_it_reads_every_record_that_it_has_a_kind_for(answers: dict[str, str]) -> None:
    assert {name: said for name, said in answers.items() if said.startswith("!")} == {}
    assert {"Vm", "Owner", "HostInfo", "Migration", "PrepareAsk", "Prepared"} <= answers.keys()


def test_it_loses_what_it_does_not_know_which_is_why_levels_are_told(
    answers: dict[str, str],
) -> None:
    assert "level" not in json.loads(answers["HostInfo"])
    assert "unlock" not in json.loads(answers["Owner"])


def test_what_it_writes_is_read(answers: dict[str, str]) -> None:
    kinds = all_kinds()
    for name, said in answers.items():
        kinds[name].model_validate_json(said)
    assert kinds["HostInfo"].model_validate_json(answers["HostInfo"]).level == 0  # type: ignore[attr-defined]
