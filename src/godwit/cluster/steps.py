"""What a decision asks for: steps are data. Who acts keeps one of each `key` under way at a time.

A step is asked for again by each decision until the facts have changed; carrying it out twice is
harmless. Steps are listed in the order in which they are to be begun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from godwit.cluster.facts import Rung
from godwit.cluster.membership import Standing


@dataclass(frozen=True, kw_only=True)
class Fence:
    """Make sure that ``vm`` (empty: all of ``host``) does not run there.

    `Rung.AGENT`: ask its agent to end it, as owner, as long as the record is that of the decision.
    ``disks``: ids, each of which has to confirm. The result comes back as an `Attempt` with
    ``heard`` copied from here.
    """

    host: str
    rung: Rung
    vm: str = ""
    disks: tuple[str, ...] = ()
    heard: tuple[str, int] = ("", 0)
    owner_revision: int = 0  # of the record of the decision; for the agent's rung
    why: str = ""

    @property
    def key(self) -> str:
        """What is under way at most once."""
        return f"fence {self.host} {self.rung.value} {self.vm}"


@dataclass(frozen=True, kw_only=True)
class Restore:
    """Let a host that is back reach a VM's disks again, and forget the `Attempt`.

    Only while the owner's record still has ``owner_revision`` (0: there is none), and only the
    ``cuts`` that the decision saw (`Attempt.cut`): one that was asked for since is another one.
    """

    host: str
    vm: str
    owner_revision: int
    cuts: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What is under way at most once."""
        return f"restore {self.host} {self.vm}"


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One transaction: the owner becomes ``to`` at ``epoch``.

    It compares the owner's ``owner_revision``; that ``to`` holds a lease; that this manager leads;
    and, unless ``renewal_revision`` is None (the old host itself says that nothing runs), that the
    old host's renewal key still has that mod revision (0: that it is absent). ``adopt``: ``to``
    holds the whole VM and goes on with it (`ownership.swap`); otherwise it starts from its disks
    (`ownership.fail_over`) and the time is added to the VM's restarts in the same transaction,
    when ``counts``. ``unlock``: images are opened with ``locking=off``, for a dead host's lock may
    stay.
    """

    vm: str
    source: str
    to: str
    epoch: int
    owner_revision: int
    renewal_revision: int | None
    proof: str
    adopt: bool = False
    counts: bool = True
    unlock: bool = False

    @property
    def key(self) -> str:
        """What is under way at most once."""
        return f"swap {self.vm}"


@dataclass(frozen=True, kw_only=True)
class Start:
    """Ask the owner's agent to start the VM at the epoch of its record, if it runs not yet."""

    vm: str
    host: str
    epoch: int

    @property
    def key(self) -> str:
        """What is under way at most once."""
        return f"start {self.vm} {self.epoch}"


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Ask the source's agent to take up a move that no engine of its drives any more.

    It reads the record itself: before the swap the move is called off and its copy runs on, after
    it the destination is waited for and its own copy ended.
    """

    vm: str
    host: str
    migration: str
    why: str

    @property
    def key(self) -> str:
        """What is under way at most once."""
        return f"resume {self.vm}"


@dataclass(frozen=True, kw_only=True)
class Conclude:
    """Free the record of a move whose destination has the VM, in place of a source that is gone.

    Only while the owner's record still has ``owner_revision``.
    """

    vm: str
    migration: str
    owner_revision: int
    why: str

    @property
    def key(self) -> str:
        """What is under way at most once."""
        return f"conclude {self.vm}"


@dataclass(frozen=True, kw_only=True)
class PowerOn:
    """Switch a stopped VM on again."""

    vm: str
    host: str
    owner_revision: int
    why: str

    @property
    def key(self) -> str:
        """What is under way at most once."""
        return f"power-on {self.vm}"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Ask a host's agent to end a QEMU that the record does not name.

    ``own`` not 0: the owner's own QEMU, which cannot go on; ended while the owner's record still
    has this revision.
    """

    vm: str
    host: str
    epoch: int
    why: str
    own: int = 0

    @property
    def key(self) -> str:
        """What is under way at most once."""
        return f"kill {self.vm} {self.host} {self.epoch}"


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """Record a VM as stopped: it does not run, and nothing is to start it."""

    vm: str
    owner_revision: int
    why: str

    @property
    def key(self) -> str:
        """What is under way at most once."""
        return f"stopped {self.vm}"


@dataclass(frozen=True, kw_only=True)
class Quarantine:
    """Mark a host: no new VMs. Only while it has no other mark."""

    host: str
    why: str

    @property
    def key(self) -> str:
        """What is under way at most once."""
        return f"quarantine {self.host}"


@dataclass(frozen=True, kw_only=True)
class Unplaceable:
    """No host can take the VM now. ``why`` is the smallest reason, ``rejected`` has all."""

    vm: str
    why: str
    rejected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What is told at most once while it does not change."""
        return f"unplaceable {self.vm} {self.why}"


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A person has to know, or to act: told once while it does not change."""

    subject: str
    why: str

    @property
    def key(self) -> str:
        """What is told at most once while it does not change."""
        return f"alarm {self.subject} {self.why}"


@dataclass(frozen=True, kw_only=True)
class Note:
    """Why nothing is done about something: shown, and told once while it does not change."""

    subject: str
    why: str

    @property
    def key(self) -> str:
        """What is told at most once while it does not change."""
        return f"note {self.subject} {self.why}"


Step = (
    Fence | Restore | Swap | Start | Resume | Conclude | PowerOn | Kill | Stopped | Quarantine
    | Unplaceable | Alarm | Note
)  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """The steps, the sentence that explains them, and each host's state in words."""

    steps: tuple[Step, ...]
    sentence: str
    hosts: Mapping[str, Standing] = field(default_factory=dict)
