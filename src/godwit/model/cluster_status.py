"""How the cluster stands, as ``cluster status`` shows it: in figures and in words."""

from __future__ import annotations

from typing import Literal

from godwit.model.base import Name, Value
from godwit.model.host import HostState


class MemberStanding(Value):
    """One member of the store, asked by itself. ``alone``: it answers, and follows no leader."""

    endpoint: str
    state: Literal["leader", "follower", "alone", "silent"]
    problem: str = ""


class StoreStanding(Value):
    """The store: its members, how many answer, how many have to (``needed``)."""

    members: tuple[MemberStanding, ...]
    answering: int
    needed: int
    words: str


class ManagerStanding(Value):
    """A manager that is alive."""

    name: str
    leads: bool


class HostStanding(Value):
    """A host: its state, what that means, and what happens next (empty: nothing has to)."""

    name: Name
    state: HostState
    vms: int
    words: str
    next: str = ""
    certificate_until: float | None = None


class ClusterStatus(Value):
    """Everything together; ``words`` says whether anything has to be done."""

    name: str
    ca_fingerprint: str
    words: str
    store: StoreStanding
    managers: tuple[ManagerStanding, ...]
    hosts: tuple[HostStanding, ...]
