"""Configuration as TOML text; pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def toml(tables: Mapping[str, Any]) -> str:
    """Plain values and (nested) tables as TOML."""
    lines: list[str] = []
    _table("", tables, lines)
    return "\n".join(lines) + "\n"


def _table(path: str, table: Mapping[str, Any], lines: list[str]) -> None:
    for key, value in table.items():
        if not isinstance(value, Mapping):
            # JSON's texts, numbers, booleans and lists are TOML's too.
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            inner = f"{path}.{key}" if path else key
            lines.append(f"[{inner}]")
            _table(inner, value, lines)
