"""What whoever carries decisions out has to provide: the seam between this package and a manager.

The loop, once per event or at least every half second (two readings more than `Timings.gap_s` apart
make every count begin anew):

    snapshot = await actor.read()                      # everything, linearizably, one revision
    memory = listen(memory, snapshot, clock())         # every replica, leading or not
    if leading:
        place = PlannerPlace(rooms_of(snapshot), definitions)           # placing.py
        decision = decide(replace(snapshot, heard=memory), clock(), place=place)
        log(decision.sentence)
        for step in decision.steps: begin it, unless one with its key is under way
"""

from __future__ import annotations

from typing import Protocol

from godwit.cluster.facts import Attempt, Snapshot
from godwit.cluster.steps import (
    Alarm,
    Conclude,
    Fence,
    Kill,
    Note,
    PowerOn,
    Quarantine,
    Restore,
    Resume,
    Start,
    Stopped,
    Swap,
    Unplaceable,
)


class Actor(Protocol):
    """Carries steps out. Each of them may be asked for again, and may fail; the next reading tells.

    Promises the decisions rest on:

    - `read` times the *question* and the *answer* with the clock that ``now`` comes from, and says
      ``leader=False`` when it was not answered within `Timings.gap_s`.
    - `HostSeen.listed` and `VmSeen.processes` are answers to questions that were sent after the
      reading began; a host that did not answer is not listed. An agent names every QEMU it has,
      also one that is being started. A reading may leave hosts unasked, and nothing is done about
      their VMs then; but if any host answers that a VM of its own is missing, that reading has
      asked every host that renews: only so a loss of all power can be told from one reboot.
    - `Attempt` records are kept for as long as the host is silent, and ``failed`` stands for every
      outcome that is not known to be ``confirmed``.
    - A replica that has listened for less than `Timings.takeover_s` leads only when nobody else
      took the lead for two more seconds: whoever counted along is quicker.
    - An agent that comes back after its host booted leaves the records of VMs that ran before as
      they are: the cluster decides.
    - A VM is registered with its host's guard before its first ``cont``; and ``ha`` is switched on
      at the guard first and in the record after, switched off the other way round. Otherwise an
      armed guard would not keep the deadline for it.
    """

    async def read(self) -> Snapshot:
        """Everything, at one revision; ``heard`` is left to the caller."""
        ...

    async def fence(self, step: Fence) -> Attempt:
        """Ask its agent, cut off each of ``step.disks``, or switch it off and read that back."""
        ...

    async def restore(self, step: Restore) -> None:
        """Undo a cut that `fence` made or tried; drop the attempt when that is confirmed."""
        ...

    async def swap(self, step: Swap) -> bool:
        """One transaction with the comparisons that `Swap` names; False when one did not hold.

        The write is of ``ownership.fail_over`` or, to adopt, of ``ownership.swap``; with it goes
        what the move held: its reservation, and when the VM starts anew its record is closed.
        """
        ...

    async def start(self, step: Start) -> None:
        """The agent reads the record itself and starts no epoch that it has a note of."""
        ...

    async def resume(self, step: Resume) -> None:
        """The agent does by the record what a new life of it would; nothing while it moves it."""
        ...

    async def conclude(self, step: Conclude) -> None:
        """``ownership.finished`` against ``step.owner_revision``, with the move's own record."""
        ...

    async def power_on(self, step: PowerOn) -> None:
        """``ownership.power_on`` against ``step.owner_revision``; the time counts as a restart."""
        ...

    async def kill(self, step: Kill) -> None:
        """The agent reads the record itself and ends only what it does not name, or `Kill.own`."""
        ...

    async def stopped(self, step: Stopped) -> None:
        """``ownership.stopped`` against ``step.owner_revision``, with the reason in the status."""
        ...

    async def quarantine(self, step: Quarantine) -> None:
        """Write the mark if the host has none."""
        ...

    async def tell(self, step: Alarm | Note | Unplaceable) -> None:
        """Tell people, once while the key does not change; an alarm is an event of its own."""
        ...
