"""Find what a request names, or say where to look."""

from __future__ import annotations

from typing import TypeVar

from godwit.model.errors import NotFound

_T = TypeVar("_T")


def known(found: _T | None, kind: str, name: str) -> _T:
    """The object, or NotFound with where to look."""
    if found is None:
        raise NotFound(f"no {kind} {name}", hint=f"look with: godwit {kind} list")
    return found
