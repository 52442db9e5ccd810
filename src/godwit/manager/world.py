"""What the manager's work rests on, in one place, so that tests can put another world there."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from godwit.manager.agents import Agents
from godwit.manager.authority import Authority
from godwit.manager.cache import Cache
from godwit.manager.capacity import FreeMemory
from godwit.manager.cutting import Cutter, Daemons
from godwit.model.errors import Conflict, GodwitError, OutcomeUnknown, Unavailable
from godwit.model.host import HostInfo
from godwit.model.vm import Pins
from godwit.model.world import Clock
from godwit.power.vault import Vault
from godwit.store.errors import StoreError, StoreOutcomeUnknown
from godwit.store.records import CasFailed, Records

# Picks what a new VM with that CPU model is pinned to, from what the hosts' QEMUs can do.
Pinner = Callable[[Sequence[HostInfo], str], Pins]


@dataclass(frozen=True, kw_only=True)
class World:
    """Records, their cache, the hosts, the time. ``worker`` names this manager process; ``vault``
    has the key that the cluster's managers seal secrets with."""

    records: Records
    cache: Cache
    agents: Agents
    clock: Clock
    pin: Pinner
    worker: str
    settle_s: float = 15.0  # how long a lost answer may take to show in the records
    look_s: float = 5.0  # how often a silent move is looked after
    lost_s: float = 60.0  # how long a move's source may be silent before nobody can tell
    vault: Vault = field(default_factory=lambda: Vault(None))
    authority: Authority | None = None  # where the CA's key is
    ca: bytes = b""  # the CA's certificate, PEM: for hosts that join
    locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    daemons: Daemons | None = None  # the fencing daemons of storage servers
    free: FreeMemory = field(init=False)
    cutter: Cutter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "free", FreeMemory(self.agents, now=self.clock.monotonic))
        object.__setattr__(self, "cutter", Cutter(self.cache, self.daemons, self.clock))

    def lock(self, name: str) -> asyncio.Lock:
        """One lock per name, as long as somebody holds on to it."""
        return self.locks.setdefault(name, asyncio.Lock())


def authority(world: World) -> Authority:
    """Who signs; Unavailable on a manager that does not keep the CA's key."""
    if world.authority is None:
        raise Unavailable(
            "this manager does not keep the cluster's CA",
            hint="ask the manager of the machine on which 'godwit cluster init' was run",
        )
    return world.authority


def new_id(prefix: str, now: float) -> str:
    """``t-68f0c2a91b3e7d``: sorts by time (in 1/65536 s), the last digits keep ids apart."""
    ticks = int(now * 65536)
    return f"{prefix}-{ticks:012x}{secrets.token_hex(1)}"


def as_godwit_error(error: Exception) -> GodwitError | None:
    """What a failure of the lower rooms means to people; None for what should not happen."""
    if isinstance(error, GodwitError):
        return error
    if isinstance(error, StoreOutcomeUnknown):
        return OutcomeUnknown(
            f"the store did not say whether it wrote: {error}", hint="look before trying again"
        )
    if isinstance(error, StoreError):
        return Unavailable(f"the store does not answer: {error}", hint=error.hint)
    if isinstance(error, CasFailed):
        return Conflict(
            f"somebody else changed {error} at the same moment", hint="look, and ask again"
        )
    return None
