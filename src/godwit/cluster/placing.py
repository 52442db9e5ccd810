"""The planner's placement as failover asks for it: today's rooms, and what was placed just now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from godwit.cluster.failover import Placed
from godwit.model.errors import Refused
from godwit.model.vm import Vm
from godwit.planner.placement import Need, Room, choose, reasons_against


class PlannerPlace:
    """A `godwit.cluster.failover.Place` on the rooms of one snapshot.

    ``vms``: all definitions; what a decision has placed already is promised in its room.
    """

    def __init__(self, rooms: Iterable[Room], vms: Mapping[str, Vm]) -> None:
        self._rooms = {room.info.name: room for room in rooms}
        self._vms = vms

    def __call__(
        self, vm: Vm, taken: Mapping[str, str], exclude: Mapping[str, tuple[str, ...]]
    ) -> Placed:
        """The planner's own reasons against a host stand for those of ``exclude``."""
        rooms = dict(self._rooms)
        for name, host in taken.items():
            if host in rooms and name in self._vms:
                rooms[host] = rooms[host].taking(Need.of(self._vms[name]))
        need = Need.of(vm)
        more = {
            host: reasons
            for host, reasons in exclude.items()
            if host in rooms and not reasons_against(rooms[host], need)
        }
        try:
            found = choose(rooms.values(), need, exclude=more)
        except Refused as refusal:
            rejected: Mapping[str, list[str]] = refusal.context.get("rejected", {})
            why = refusal.message.partition(": ")[2]
            words = {host: tuple(reasons) for host, reasons in rejected.items()}
            return Placed(host=None, why=why, rejected=words)
        return Placed(host=found.host, rejected=found.rejected)
