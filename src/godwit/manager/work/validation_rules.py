"""May a validation do what was asked of it? Pure: one snapshot and one request."""

from __future__ import annotations

from godwit.manager.snapshot import Snapshot
from godwit.manager.views import host_state
from godwit.manager.work.lookup import known
from godwit.manager.work.power_rules import device_of, refuse_with_vms, vms_at
from godwit.model.errors import InvalidRequest, Refused
from godwit.model.host import HostState
from godwit.model.requests import ValidateCluster


def admit_validation(snapshot: Snapshot, request: ValidateCluster) -> None:
    """Raises InvalidRequest, NotFound or Refused when the host that it names is not one to lose.

    A validation that names none only looks, but for a VM of its own.
    """
    host = request.failover
    if host is None:
        return
    if not request.live:
        raise InvalidRequest("a failover is part of a live validation", hint="add --live")
    known(snapshot.hosts.get(host), "host", host)
    device_of(snapshot, host)
    if not is_up(snapshot, host) or host in snapshot.marks:
        raise Refused(f"{host} takes no VMs now", hint=f"see why: godwit host show {host}")
    refuse_with_vms(host, vms_at(snapshot, host), hint="move or stop them first")


def is_up(snapshot: Snapshot, host: str) -> bool:
    """Its guard and its agent both hold their leases; a mark it may have."""
    state, _ = host_state(leased=host in snapshot.leases, agent=host in snapshot.agents)
    return state is HostState.UP
