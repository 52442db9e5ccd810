"""One lab for all fault tests; what they do to it is what this directory is about."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .kit.cells import VM
from .kit.cluster import Cluster


@pytest.fixture(scope="session")
def seed() -> int:
    """What the sampled tests sample by; printed, so that a run can be repeated."""
    return int(os.environ.get("GODWIT_SEED", "1"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A lab of two hosts with the VM ``web``; it must leave nothing behind."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    raised = Cluster.up("faults")
    try:
        raised.make(VM, host="host1")
        yield raised
    finally:
        left = raised.close()
    assert left == []
