"""What a validation says of a cluster. Pure: `ClusterFacts` in, a list of checks out.

Every check is there each time, by the same name, so that two reports can be compared. One that
cannot be decided because nobody could measure it warns; it never passes silently.
"""

from __future__ import annotations

from godwit.cluster.validation import inventory, membership, network, storage, system
from godwit.model.validation import ValidationCheck
from godwit.model.validation_facts import ClusterFacts


def judge(facts: ClusterFacts) -> tuple[ValidationCheck, ...]:
    """All checks, in the order of the report. Of partial facts only network and system."""
    if facts.partial:
        return (*network.checks(facts), *system.checks(facts))
    return (
        *inventory.checks(facts),
        *network.checks(facts),
        *storage.checks(facts),
        *system.checks(facts),
        *membership.checks(facts),
    )
