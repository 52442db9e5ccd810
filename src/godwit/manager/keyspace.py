"""What lies where in the store, read backwards: from a key to the kind of record it holds."""

from __future__ import annotations

from dataclasses import dataclass

from godwit.model import keys
from godwit.model.base import Record
from godwit.model.event import Event
from godwit.model.host import ConfirmedDown, HostInfo
from godwit.model.marks import HostMark
from godwit.model.membership import Renewal
from godwit.model.migration import Migration
from godwit.model.network import Network
from godwit.model.ownership import Owner, Restarts
from godwit.model.power import PowerConfig
from godwit.model.settings import ClusterSettings
from godwit.model.task import Task
from godwit.model.validation import HostValidated
from godwit.model.vm import Vm, VmStatus
from godwit.model.volume import Volume, VolumeOnHost

# Manager replicas alive, each under its own lease; see godwit.manager.leadership.
MEMBERS = keys.ROOT + "manager/members/"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record belongs in the snapshot; ``kind`` None = only its presence counts."""

    room: str
    name: str
    kind: type[Record] | None


_NESTED: dict[str, dict[str, tuple[str, type[Record] | None]]] = {
    keys.VMS: {
        "spec": ("vms", Vm),
        "owner": ("owners", Owner),
        "status": ("statuses", VmStatus),
        "restarts": ("restarts", Restarts),
    },
    keys.HOSTS: {
        "info": ("hosts", HostInfo),
        "lease": ("leases", None),
        "agent": ("agents", None),
        "power": ("powers", PowerConfig),
        "mark": ("marks", HostMark),
        "validated": ("validated", HostValidated),
        "renewal": ("renewals", Renewal),
        "confirmed-down": ("confirmed_down", ConfirmedDown),
    },
}
# Names of two parts: "VOLUME/HOST".
_PAIRS: dict[str, tuple[str, type[Record]]] = {
    keys.VOLUME_STATES: ("volume_states", VolumeOnHost),
}
_FLAT: dict[str, tuple[str, type[Record] | None]] = {
    keys.NETWORKS: ("networks", Network),
    keys.VOLUMES: ("volumes", Volume),
    keys.MIGRATIONS: ("migrations", Migration),
    keys.TASKS: ("tasks", Task),
    keys.EVENTS: ("events", Event),
    MEMBERS: ("members", None),
}


def place_of(key: str) -> Place | None:
    """The place of a key; None for keys the manager does not read."""
    if key == keys.CLUSTER:
        return Place("settings", "cluster", ClusterSettings)
    for prefix, leaves in _NESTED.items():
        if key.startswith(prefix):
            name, _, leaf = key.removeprefix(prefix).partition("/")
            found = leaves.get(leaf)
            return Place(found[0], name, found[1]) if found else None
    for prefix, (room, record) in _PAIRS.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            return Place(room, name, record) if all(name.partition("/")) else None
    for prefix, (room, kind) in _FLAT.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            return Place(room, name, kind) if name and "/" not in name else None
    return None
