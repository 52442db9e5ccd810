"""The validation report: what was checked of the cluster, how it came out, what to do about it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from godwit.model.base import Name, Record

Category = Literal["inventory", "network", "storage", "system", "cluster"]
Result = Literal["pass", "warn", "fail"]
CATEGORIES: tuple[Category, ...] = ("inventory", "network", "storage", "system", "cluster")


class ValidationCheck(Record):
    """One check. One that did not pass says in ``hint`` what to do, and in ``hosts`` where."""

    category: Category
    name: str
    result: Result
    message: str
    hint: str = ""
    hosts: tuple[Name, ...] = ()


class HostRow(Record):
    """What the report's table of hosts says of one; versions as they are named there."""

    name: Name
    state: str
    cpu: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    kernel: str = ""
    system: str = ""
    qemu: str = ""
    accelerator: str = ""
    godwit: str = ""
    migration_address: str = ""
    mtu: int | None = None


class LinkRow(Record):
    """What was measured from one host to another over the migration network.

    ``largest_bytes`` is the largest IP packet that arrived in one piece; None: nothing did.
    ``bits_per_s`` None: not measured on this pair.
    """

    source: Name
    destination: Name
    largest_bytes: int | None = None
    bits_per_s: float | None = None
    clock_offset_s: float | None = None
    clock_error_s: float | None = None


class CanaryStep(Record):
    """One thing that was done to the canary VM, and how long it took."""

    name: str
    seconds: float
    message: str = ""


class Canary(Record):
    """What a live validation saw: a small VM that was made, moved and removed.

    ``blackout_ms``, ``total_ms`` are those of its live move; ``detection_s``, ``restart_s`` those
    of its failover, None where none was tried, with the reason in ``not_done``.
    """

    vm: Name
    source: Name | None = None
    destination: Name | None = None
    migration: str = ""
    blackout_ms: float | None = None
    total_ms: float | None = None
    detection_s: float | None = None
    restart_s: float | None = None
    steps: tuple[CanaryStep, ...] = ()
    not_done: tuple[str, ...] = ()
    failure: str = ""


class ValidationReport(Record):
    """All of it. Times are seconds since the epoch; ``result`` is the worst of the checks."""

    task: str
    by: str = ""
    version: str = ""
    started_at: float
    ended_at: float
    live: bool = False
    result: Result
    checks: tuple[ValidationCheck, ...]
    hosts: tuple[HostRow, ...] = ()
    links: tuple[LinkRow, ...] = ()
    canary: Canary | None = None

    def count(self, result: Result) -> int:
        """How many checks came out so."""
        return sum(check.result == result for check in self.checks)

    @property
    def failed(self) -> tuple[ValidationCheck, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.result == "fail")


class HostValidated(Record):
    """That a host's network and system were once checked, and nothing failed.

    ``task`` is the validation or the move that did it; ``peers`` the hosts it was checked with.
    """

    at: float
    task: str = ""
    peers: tuple[Name, ...] = Field(default=())


def worst(checks: tuple[ValidationCheck, ...]) -> Result:
    """``fail`` when one failed, else ``warn`` when one warned, else ``pass``."""
    results = {check.result for check in checks}
    if "fail" in results:
        return "fail"
    return "warn" if "warn" in results else "pass"
