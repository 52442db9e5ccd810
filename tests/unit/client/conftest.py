"""A fake cluster on a real socket, and the environment that leads to it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def _fake_api() -> Any:
    name = "godwit_tests_fake_api"
    if name not in sys.modules:
        path = Path(__file__).parent / "fake_api.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A running fake cluster; GODWIT_URL and its files point to it."""
    directory = tmp_path / "cluster"
    directory.mkdir()
    fake = _fake_api().FakeApi(directory)
    fake.start()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("GODWIT_CONTEXT", raising=False)
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    yield fake
    fake.close()
