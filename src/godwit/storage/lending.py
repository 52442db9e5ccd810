"""One host lends another its path to a VM's images: what they say, and whom to ask. Pure.

    owner H                                       peer P
    | (its daemon has ended, or never ran)         |
    | export(vm, epoch, turn, disks) ------------> |  reads the owner record, exports, answers where
    | exported(vm, epoch) -----------------------> |  any time: is it there, is your path good
    | (its daemon has ended, or all is flushed)    |
    | withdraw(vm, epoch, turn) -----------------> |  when it answers, no write of it can land

``turn`` counts what an owner says of a VM within an epoch: a message that was late is known by it,
so that an export asked for long ago does not come up after it was withdrawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from godwit.model.base import Name, Record
from godwit.model.volume import VolumeOnHost, VolumeState
from godwit.storage.nodes import BrokerDisk


class ExportAsk(Record):
    """Export these disks to me, who own the VM at this epoch."""

    vm: Name
    host: Name
    epoch: int
    turn: int
    disks: tuple[BrokerDisk, ...]


class ExportAnswer(Record):
    """Where they are; ``exports`` maps a disk to the name of its export."""

    address: str
    port: int
    tls_hostname: str = ""
    boot_id: str = ""
    exports: dict[str, str]


class WithdrawAsk(Record):
    """I want no export of this VM any more."""

    vm: Name
    host: Name
    epoch: int
    turn: int


class Withdrawn(Record):
    """Nothing of it can land any more. ``killed``: it was not closed in order; sync the images."""

    killed: bool = False


class ExportedAsk(Record):
    """Is what you export of this VM still there?"""

    vm: Name
    host: Name
    epoch: int
    volumes: tuple[str, ...] = ()


class Exported(Record):
    """``alive``: the export serves; ``direct``: this host's own path is good; else ``reason``."""

    alive: bool
    direct: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host that might lend its path: what it says of each volume, and what it has to do."""

    host: str
    up: bool
    volumes: Mapping[str, VolumeOnHost]
    load: int = 0
    address: bool = True  # it has one on the network that exports use


def rank(
    candidates: Collection[Candidate],
    needed: Mapping[str, str],
    *,
    here: str,
    not_these: Collection[str] = (),
) -> tuple[list[str], str]:
    """The hosts that can lend their path to all of ``needed``, the idlest first.

    ``needed`` maps a volume to its identity as this host knows it, empty when it does not. With
    no host, the sentence says why of each.
    """
    reasons: dict[str, str] = {}
    fit: list[Candidate] = []
    for one in candidates:
        if one.host == here:
            continue
        why = _against(one, needed, not_these)
        if why:
            reasons[one.host] = why
        else:
            fit.append(one)
    order = [one.host for one in sorted(fit, key=lambda one: (one.load, one.host))]
    if order:
        return order, ""
    said = "; ".join(f"{host}: {why}" for host, why in sorted(reasons.items()))
    return [], said or "there is no other host"


def _against(one: Candidate, needed: Mapping[str, str], not_these: Collection[str]) -> str:
    if one.host in not_these:
        return "it has just failed at it"
    if not one.up:
        return "it is not up"
    if not one.address:
        return "it has no address for it"
    for volume in sorted(needed):
        seen = one.volumes.get(volume)
        if seen is None:
            return f"it does not see {volume}"
        if seen.state is not VolumeState.DIRECT:
            return f"{volume} is {seen.state.value} there"
        if needed[volume] and seen.identity and seen.identity != needed[volume]:
            return f"what it sees as {volume} is another volume"
    return ""
