"""Snapshots in a few words: three hosts that renew, and VMs on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from godwit.cluster import Memory, Placed, Snapshot
from godwit.cluster.facts import Heard, HostSeen, Member, Process, StoreSeen, VmSeen
from godwit.cluster.membership import Standing, standings
from godwit.model.membership import Renewal
from godwit.model.ownership import MoveIntent, MovePhase, Owner, OwnerState
from godwit.model.rules import Rules
from godwit.model.vm import Disk, Pins, Vm
from godwit.model.volume import Volume

NOW = 1000.0
THREE = tuple(Member(name=f"m{n}", host=f"h{n}") for n in (1, 2, 3))


def renewal(name: str, number: int = 7, **changes: Any) -> Renewal:
    """The last word of a host's guard."""
    given = {"guard": "armed", "watchdog": True, **changes}
    return Renewal(boot_id=f"{name}-a", number=number, **given)


def host(name: str, **changes: Any) -> HostSeen:
    """A host that renewed with revision 50."""
    given = {"boot_id": f"{name}-a", "renewal": renewal(name), "renewal_revision": 50, **changes}
    return HostSeen(name=name, **given)


def disk(name: str = "root", volume: str = "shared", **changes: Any) -> Disk:
    """A raw image."""
    given = {"path": f"/{name}", "size_bytes": 1, "format": "raw", "lun": 0, **changes}
    return Disk(id=name, volume=volume, serial=name, **given)


def definition(name: str, *, ha: bool = True, disks: tuple[Disk, ...] = (), **rules: Any) -> Vm:
    """A VM, ``rules`` are `Rules`."""
    return Vm(
        name=name,
        cpus=1,
        memory_bytes=1 << 30,
        disks=disks or (disk(),),
        ha=ha,
        rules=Rules(**rules),
        pins=Pins(uuid=name, machine="pc", cpu_model="x", accelerator="tcg"),
        created_at=0.0,
    )


def owner(where: str = "h1", epoch: int = 5, **changes: Any) -> Owner:
    """A record that says running."""
    return Owner(host=where, epoch=epoch, **{"state": OwnerState.RUNNING, **changes})


def intent(
    source: str = "h1", destination: str = "h2", phase: MovePhase = MovePhase.INTENT
) -> MoveIntent:
    """Of the move ``m1``."""
    return MoveIntent(id="m1", method="live", source=source, destination=destination, phase=phase)


def process(where: str = "h1", epoch: int = 5, state: Any = "running", **more: Any) -> Process:
    """A QEMU."""
    return Process(host=where, epoch=epoch, state=state, **more)


def vm(name: str = "web", record: Owner | None = None, **changes: Any) -> VmSeen:
    """A VM whose record has revision 70 and that runs where it says, unless ``processes`` says."""
    record = record or owner()
    running = record.state in (OwnerState.RUNNING, OwnerState.STARTING)
    here = (process(record.host or "", record.epoch),) if running else ()
    rules = {key: changes.pop(key) for key in list(changes) if key in Rules.model_fields}
    spec = definition(name, ha=changes.pop("ha", True), disks=changes.pop("disks", ()), **rules)
    given = {"owner_revision": 70, "processes": here, **changes}
    return VmSeen(vm=spec, owner=record, **given)


def cluster(
    *vms: VmSeen,
    silent: Mapping[str, float] | None = None,
    hosts: tuple[HostSeen, ...] = (),
    memory: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Snapshot:
    """Three hosts (or ``hosts``), asked and answered at `NOW`; ``silent``: host -> seconds.

    A host that was silent to the end does not answer and is not listed.
    """
    silent = silent or {}
    found = {h.name: h for h in hosts}
    for name in ("h1", "h2", "h3"):
        away = silent.get(name, 0.0) >= 14.4
        found.setdefault(name, host(name, answers=not away, listed=not away))
    heard = {
        name: Heard(
            seen.renewal,
            seen.renewal_revision,
            NOW - silent.get(name, 1),
            NOW - silent.get(name, 1),
        )
        for name, seen in found.items()
    }
    given = {
        "store": StoreSeen(asked_at=NOW, answered_at=NOW, members=THREE),
        "volumes": {"shared": Volume(name="shared"), "lun": Volume(name="lun", kind="iscsi")},
        "wall": 1e9,
        **changes,
    }
    return Snapshot(
        hosts=found,
        vms={one.name: one for one in vms},
        heard=Memory(hosts=heard, term=1, asked_at=NOW, **(memory or {})),
        **given,
    )


def states(snapshot: Snapshot) -> Mapping[str, Standing]:
    """All hosts' standings."""
    return standings(snapshot)


def without_processes(seen: VmSeen) -> VmSeen:
    """Nothing answers for it."""
    return replace(seen, processes=())


class Placing:
    """Places by name, first come; remembers what it was asked."""

    def __init__(self, *order: str, full: Mapping[str, str] | None = None) -> None:
        self.order = order or ("h1", "h2", "h3")
        self.full = full or {}
        self.asked: list[tuple[str, dict[str, str], dict[str, tuple[str, ...]]]] = []

    def __call__(
        self, vm: Vm, taken: Mapping[str, str], exclude: Mapping[str, tuple[str, ...]]
    ) -> Placed:
        self.asked.append((vm.name, dict(taken), dict(exclude)))
        rejected = {name: (why,) for name, why in self.full.items()}
        for name in self.order:
            if name not in exclude and name not in rejected:
                return Placed(host=name, rejected=rejected)
        return Placed(host=None, rejected=rejected)
