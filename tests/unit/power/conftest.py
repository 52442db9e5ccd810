"""A BMC for each test; see ``bmc_rig``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def _load(name: str) -> Any:
    """A helper module beside this file; tests import it by its plain name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec
        assert spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


rig = _load("bmc_rig")


@pytest.fixture
def bmc(tmp_path: Path) -> Iterator[Any]:
    made = rig.Bmc(tmp_path)
    yield made
    made.wake()
    made.stop()
