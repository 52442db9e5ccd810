"""May a host be emptied or filled, may rules be set? Pure, like `godwit.manager.work.admit`."""

from __future__ import annotations

from godwit.manager.snapshot import Snapshot
from godwit.manager.views import host_state
from godwit.manager.work.lookup import known
from godwit.model.errors import InvalidRequest, Refused
from godwit.model.host import HostInfo, HostState
from godwit.model.marks import HostMark
from godwit.model.requests import (
    CreateVm,
    DrainHost,
    EnterMaintenance,
    ExitMaintenance,
    ReturnHost,
    SetCluster,
    SetVm,
    UpdateCluster,
)


def host_that_answers(snapshot: Snapshot, name: str) -> HostInfo:
    """A host that can be asked now, whatever its mark says; NotFound or Refused otherwise."""
    info = known(snapshot.hosts.get(name), "host", name)
    state, reason = host_state(leased=name in snapshot.leases, agent=name in snapshot.agents)
    if state is not HostState.UP:
        raise Refused(f"{name} is {state.value}: {reason}", hint="look: godwit host list")
    return info


def check_rules(snapshot: Snapshot, request: CreateVm | SetVm) -> None:
    """Rules name hosts that there are; a host that is asked for is one of them."""
    for name in request.allow_hosts:
        known(snapshot.hosts.get(name), "host", name)
    host = request.host if isinstance(request, CreateVm) else None
    if host is not None and request.allow_hosts and host not in request.allow_hosts:
        raise InvalidRequest(
            f"{request.name} is to start on {host}, and its rules do not allow {host}",
            hint=f"add it: --allow-host {host}",
        )


EmptyHost = DrainHost | EnterMaintenance
FillHost = ReturnHost | ExitMaintenance
Standing = (
    SetVm | SetCluster | UpdateCluster | DrainHost | EnterMaintenance | ReturnHost | ExitMaintenance
)


def admit_standing(snapshot: Snapshot, request: Standing) -> None:
    """What holds until it is changed again: rules, settings, marks."""
    if isinstance(request, SetVm):
        known(snapshot.vms.get(request.name), "vm", request.name)
        check_rules(snapshot, request)
    elif isinstance(request, UpdateCluster):
        for name in request.hosts:
            known(snapshot.hosts.get(name), "host", name)
    elif not isinstance(request, SetCluster):
        _admit_mark(snapshot, request)


def _admit_mark(
    snapshot: Snapshot, request: DrainHost | EnterMaintenance | ReturnHost | ExitMaintenance
) -> None:
    """A host is emptied while it answers, and returned from the mark that it carries."""
    name = request.name
    known(snapshot.hosts.get(name), "host", name)
    mark = snapshot.marks.get(name)
    if isinstance(request, DrainHost | EnterMaintenance):
        host_that_answers(snapshot, name)
        if mark is not None and mark.state == "maintenance":
            raise Refused(
                f"{name} is in maintenance already", hint=f"godwit host maintenance exit {name}"
            )
        return
    check_return(mark, request)
    if request.bring_back:
        host_that_answers(snapshot, name)


def check_return(mark: HostMark | None, request: ReturnHost | ExitMaintenance) -> HostMark:
    """The mark that is to go; Refused when it is none, or another one."""
    name = request.name
    if mark is None:
        raise Refused(f"{name} carries no mark: it takes VMs", hint="look: godwit host list")
    wanted = "exit" if mark.state == "maintenance" else "return"
    if wanted == "exit" and isinstance(request, ReturnHost):
        raise Refused(f"{name} is in maintenance", hint=f"godwit host maintenance exit {name}")
    if wanted == "return" and isinstance(request, ExitMaintenance):
        raise Refused(f"{name} is {mark.state}", hint=f"godwit host return {name}")
    return mark
