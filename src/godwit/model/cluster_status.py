"""How the cluster stands, as ``cluster status`` shows it: in figures and in words."""

from __future__ import annotations

from typing import Literal

from godwit.model.base import Name, Record
from godwit.model.host import HostState


class MemberStanding(Record):
    """One member of the store, asked by itself. ``alone``: it answers, and follows no leader."""

    endpoint: str
    state: Literal["leader", "follower", "alone", "silent"]
    problem: str = ""


class StoreStanding(Record):
    """The store: its members, how many answer, how many have to (``needed``)."""

    members: tuple[MemberStanding, ...]
    answering: int
    needed: int
    words: str


class ManagerStanding(Record):
    """A manager that is alive; ``next`` says what has to be done about it, if anything has."""

    name: str
    leads: bool
    version: str = ""
    level: int = 0
    next: str = ""


class HostStanding(Record):
    """A host: its state, what that means, and what happens next (empty: nothing has to).

    ``version``, ``level``: of Godwit there, see `model.skew`; empty and 0 when it does not tell.
    """

    name: Name
    state: HostState
    vms: int
    words: str
    next: str = ""
    certificate_until: float | None = None
    version: str = ""
    level: int = 0


class ClusterStatus(Record):
    """Everything together; ``words`` says whether anything has to be done."""

    name: str
    ca_fingerprint: str
    words: str
    store: StoreStanding
    managers: tuple[ManagerStanding, ...]
    hosts: tuple[HostStanding, ...]
    level: int = 0  # that all of them have
    unreadable: tuple[str, ...] = ()  # records that are of a newer version than who answers
