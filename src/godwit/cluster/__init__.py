"""The failover cluster's decisions, all of them pure: facts in, steps and a sentence out.

    facts       the snapshot and the timings           steps       what a decision may ask for
    membership  host states, counting a silence        quorum      what the store can bear
    fencing     the ladder: what counts as proof       failover    the VMs of a lost host
    moves       a lost host in the middle of a move    resolver    records against reality
    coldstart   after a loss of all power              baseline    the CPU model of new VMs
    states      host states as data, for the reference
    placing     the planner, as `decide` asks for it   validation  the report on a cluster's fitness
    validation  what a report says of hosts, networks, storage and the store (a face of its own)

`listen` and `decide` are the whole face; `seam.Actor` is what a manager provides to act on them,
and shows the loop.
"""

from godwit.cluster.decide import decide, listen, remember
from godwit.cluster.facts import Memory, Snapshot, Timings
from godwit.cluster.failover import Place, Placed
from godwit.cluster.steps import Decision

__all__ = [
    "Decision",
    "Memory",
    "Place",
    "Placed",
    "Snapshot",
    "Timings",
    "decide",
    "listen",
    "remember",
]
