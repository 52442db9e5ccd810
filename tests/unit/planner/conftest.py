"""Lets the tests of this room import their kit by its plain name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "planner_kit" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "planner_kit", Path(__file__).parent / "planner_kit.py"
    )
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["planner_kit"] = _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
