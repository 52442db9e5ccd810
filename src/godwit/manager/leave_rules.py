"""What keeps a host from leaving the cluster; pure."""

from __future__ import annotations

from godwit.manager.snapshot import Snapshot
from godwit.model.errors import NotFound, Refused
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import Vm

_SHOWN = 5


def check_empty(snapshot: Snapshot, name: str) -> None:
    """NotFound for an unknown host; Refused while VMs need it, with each and why."""
    if name not in snapshot.hosts:
        raise NotFound(f"no host {name}", hint="look with: godwit host list")
    held = {
        vm: why
        for vm, spec in sorted(snapshot.vms.items())
        if (why := needs(spec, snapshot.owner(vm), name, local=snapshot.local_volumes))
    }
    if held:
        said = [f"{vm} {why}" for vm, why in held.items()]
        more = f" and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
        raise Refused(
            f"{name} is still needed: {'; '.join(said[:_SHOWN])}{more}",
            hint=f"move them away first, for instance with: godwit host drain {name}",
            vms=list(held),
        )


def needs(vm: Vm, owner: Owner, host: str, *, local: frozenset[str]) -> str:
    """Why this VM needs that host, in a few words; empty when it does not."""
    move = owner.migration
    if owner.host == host and owner.state in (OwnerState.RUNNING, OwnerState.STARTING):
        return "runs there"
    if move is not None and host in (move.source, move.destination):
        return f"is being moved by {move.id}"
    here = any(one.local or not one.volume or one.volume in local for one in vm.disks)
    if owner.host == host and here:
        return "has disks there"
    return ""
