"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# Tests share their machine, with each other and with strangers: a slow example is no fault.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
