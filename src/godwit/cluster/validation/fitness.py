"""Which hosts VMs may move to and from live, by the checks of their network and system. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from godwit.model.validation import ValidationCheck

PAIR_CATEGORIES = ("network", "system")
"""What must not fail before a host's first live move."""


def fit_hosts(checks: Sequence[ValidationCheck], hosts: Sequence[str]) -> list[str]:
    """The hosts about whose network and system nothing failed.

    A failure that names no host is everybody's.
    """
    bad: set[str] = set()
    for check in checks:
        if check.result == "fail" and check.category in PAIR_CATEGORIES:
            bad.update(check.hosts or hosts)
    return [host for host in hosts if host not in bad]
