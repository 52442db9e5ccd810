"""May a host's power be switched, or its device be set? Pure: one snapshot and one request."""

from __future__ import annotations

import re
from collections.abc import Iterable

from godwit.cluster.facts import Member
from godwit.cluster.quorum import without
from godwit.manager.snapshot import Snapshot
from godwit.model import requests as ask
from godwit.model.errors import InvalidRequest, NotFound, Refused
from godwit.model.host_requests import SECRET, PowerRequest
from godwit.model.power import PowerConfig
from godwit.power.vault import key_of

_FORCE = "move or stop them first; --force cuts the power all the same"
_HANDED_IN = re.compile(re.escape(SECRET) + r"[0-9a-f]{32}")


def admit_power(snapshot: Snapshot, request: PowerRequest) -> None:
    """Raises NotFound, InvalidRequest or Refused when it may not begin."""
    name = request.name
    if name not in snapshot.hosts and name not in snapshot.powers:
        raise NotFound(f"no host {name}", hint="look with: godwit host list")
    match request:
        case ask.SetHostPower():
            if not _HANDED_IN.fullmatch(request.password_file):
                # What stands there instead may be a password: it is not repeated.
                raise InvalidRequest(
                    "password_file names no secret that was handed in",
                    hint="hand it in first: POST /v1/secrets answers what to name",
                )
        case ask.SwitchHostOff() | ask.ResetHost():
            device_of(snapshot, name)
            if not request.force:
                refuse_with_vms(name, vms_at(snapshot, name))
        case _:
            device_of(snapshot, name)


def device_of(snapshot: Snapshot, host: str) -> PowerConfig:
    """How a host's power is switched; NotFound when nobody said so."""
    found = snapshot.powers.get(host)
    if found is None:
        raise NotFound(
            f"{host} has no power device",
            hint=f"say how it is reached: godwit host power set {host} --help",
        )
    return found


def vms_at(snapshot: Snapshot, host: str) -> list[str]:
    """The VMs that a cut of the power would end: those that run there or are arriving."""
    both = (*snapshot.running_on(host), *snapshot.arriving_at(host))
    return sorted({vm.name for vm in both})


def refuse_with_vms(host: str, names: list[str], *, hint: str = _FORCE) -> None:
    """Refused while there are any."""
    if names:
        raise Refused(f"{host} runs {', '.join(names)}", hint=hint)


def refuse_the_last(host: str, members: tuple[Member, ...], managers: Iterable[str]) -> None:
    """Refused where the store's majority, or the only manager, would go with the host.

    ``managers``: names of those alive. One that has its host's name runs there.
    """
    alive = set(managers)
    if why := without(members, host):
        raise Refused(
            f"{why}: nothing could be changed any more, and no VM would start elsewhere",
            hint="bring the others back first; --force cuts the power all the same",
        )
    if alive == {host}:
        raise Refused(
            f"the only manager runs on {host}: nobody could switch it on again, or start its VMs",
            hint="start another manager first; --force cuts the power all the same",
        )


def check_keys(snapshot: Snapshot, key_id: str) -> None:
    """Refused when another manager seals with another key: one of them has lost the cluster's."""
    for host, config in sorted(snapshot.powers.items()):
        sealed_with = key_of(config.password)
        if sealed_with != key_id:
            raise Refused(
                f"the password of {host}'s power device was sealed with the key {sealed_with},"
                f" this manager has {key_id}",
                hint="give all managers the same secrets.key, or remove that device first",
            )
