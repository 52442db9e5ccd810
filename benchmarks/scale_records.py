"""The records of a cluster of any size, as its daemons write them: `Cluster.of(hosts, vms)`.

Every value is one of the model's own records, made by the manager's own rules where there are
some (`define_vm`); what QEMU can do was asked of the QEMU of this machine. History is as long as a
leading manager keeps it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from godwit.manager.leadership import KEPT_EVENTS, KEPT_MIGRATIONS, KEPT_TASKS
from godwit.manager.snapshot import Snapshot
from godwit.manager.work.define import define_vm
from godwit.model import keys
from godwit.model.base import Record
from godwit.model.event import Event
from godwit.model.host import HostInfo, QemuFacts
from godwit.model.migration import (
    STAGES,
    Migration,
    MoveState,
    Outcome,
    Pass,
    Progress,
    Stage,
    StageTime,
)
from godwit.model.network import Network
from godwit.model.ownership import Owner, OwnerState
from godwit.model.requests import CreateVm, NewDisk
from godwit.model.task import Task, TaskState
from godwit.model.units import GIB, MIB
from godwit.model.vm import Boot, Vm, VmState, VmStatus
from godwit.model.volume import Volume, VolumeOnHost, VolumeState
from godwit.qemu.facts import facts_of
from godwit.qemu.launch import Binary
from godwit.qemu.pins import choose_pins
from godwit.store.records import encode

BEGAN = 1_790_000_000.0
STOPPED_EVERY = 20  # one VM in so many is stopped
HISTORY_PER_HOST = 10  # ended tasks and moves in the records, up to what a manager keeps
HOST_MEMORY = 256 * GIB
HOST_CPUS = 64


def qemu_facts(cache: Path) -> QemuFacts:
    """What this machine's QEMU can do, as an agent publishes it."""
    binary = Binary.named("qemu-system-x86_64", user="godwit-qemu")
    return asyncio.run(facts_of(binary, "tcg", cache=cache)).public(
        accelerator_reason="there is no /dev/kvm"
    )


@dataclass(frozen=True)
class Cluster:
    """Names and records; what is leased (`HostInfo` and VMs are not) is written by the hosts."""

    hosts: dict[str, HostInfo]
    vms: dict[str, Vm]
    owners: dict[str, Owner]
    statuses: dict[str, VmStatus]
    more: dict[str, Record] = field(default_factory=dict)  # key -> record

    @staticmethod
    def of(hosts: int, vms: int, *, qemu: QemuFacts, urls: dict[str, str]) -> Cluster:
        """``urls``: where the agent of each host answers; its keys are the names of the hosts."""
        dice = random.Random(1)
        names = list(urls)[:hosts]
        infos = {name: _host(name, number, qemu, urls) for number, name in enumerate(names)}
        lan = Network(name="lan", bridge="br-lan", uplink="lan")
        volume = Volume(name="shared", kind="dir", created_at=BEGAN, coordinator=names[0])
        known = Snapshot(networks={"lan": lan}, volumes={"shared": volume}, hosts=infos)
        specs = {f"vm{n:05d}": _vm(known, f"vm{n:05d}", qemu, dice) for n in range(vms)}
        owners, statuses = {}, {}
        for number, name in enumerate(specs):
            host = names[number % hosts]
            runs = number % STOPPED_EVERY != STOPPED_EVERY - 1
            epoch = 1 + number % 7
            state = OwnerState.RUNNING if runs else OwnerState.STOPPED
            owners[name] = Owner(host=host, epoch=epoch, state=state)
            if runs:
                since = BEGAN + number
                statuses[name] = VmStatus(
                    state=VmState.RUNNING, host=host, epoch=epoch, since=since
                )
        more: dict[str, Record] = {keys.network("lan"): lan, keys.volume("shared"): volume}
        seen = VolumeOnHost(
            state=VolumeState.DIRECT,
            capacity_bytes=100 << 40,
            used_bytes=31 << 40,
            since=BEGAN,
            identity="9f0e7a1c",
            defined_at=BEGAN,
        )
        more |= {keys.volume_state("shared", name): seen for name in names}
        more |= dict(_history(names, list(specs), dice))
        return Cluster(infos, specs, owners, statuses, more)

    def records(self) -> Iterator[tuple[str, bytes]]:
        """Key and stored form of every record that no lease holds."""
        for name, info in self.hosts.items():
            yield keys.host_info(name), encode(info)
        for key, record in self.more.items():
            yield key, encode(record)
        for name, vm in self.vms.items():
            yield keys.vm_spec(name), encode(vm)
            yield keys.vm_owner(name), encode(self.owners[name])
            if name in self.statuses:
                yield keys.vm_status(name), encode(self.statuses[name])

    @property
    def boot_ids(self) -> dict[str, str]:
        """The boot that each host is in."""
        return {name: info.boot_id for name, info in self.hosts.items()}


def host_names(count: int) -> list[str]:
    """The names of the hosts."""
    return [f"host{number:04d}" for number in range(count)]


def _host(name: str, number: int, qemu: QemuFacts, urls: dict[str, str]) -> HostInfo:
    third, fourth = divmod(number, 250)
    return HostInfo(
        name=name,
        agent_url=urls[name],
        cpus=HOST_CPUS,
        cpu_vendor="GenuineIntel",
        cpu_model_name="Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz",
        memory_bytes=HOST_MEMORY,
        boot_id=str(UUID(int=number + (1 << 96), version=4)),
        kernel="6.12.48+deb13-amd64",
        qemu=qemu,
        migration_address=f"10.93.{third}.{fourth + 1}",
        migration_subnet="10.93.0.0/16",
        migration_rate_bits=25_000_000_000,
        networks={"lan": 1500},
        volumes=("shared",),
        cgroup="v2",
        userfaultfd=True,
        version="0.1.0",
        started_at=BEGAN + number,
    )


def _vm(known: Snapshot, name: str, qemu: QemuFacts, dice: random.Random) -> Vm:
    uuid = str(UUID(int=dice.getrandbits(128), version=4))
    request = CreateVm(
        name=name,
        memory_bytes=dice.choice((1, 2, 4, 8)) * GIB,
        cpus=dice.choice((1, 2, 4)),
        image="demo",
        disks=(NewDisk(volume="shared", size_bytes=20 * GIB),),
        networks=("lan",),
        ha=True,
    )
    root = "/clusterstorage/shared/.godwit/boot/"
    boot = Boot(
        image="demo",
        kernel=root + "1a7ac0c40b10b98353b6f85fa9a0d4f2703287979567e19629d35ad2d777d124",
        initrd=root + "d149837d2595f4bb6bdd7c1b35db3e8eddafe14ca1522eab1762d5f27ace97d3",
        append="console=ttyS0 quiet",
    )
    pins = choose_pins({"host0000": qemu}, uuid=uuid)
    return define_vm(known, request, pins=pins, boot=boot, now=BEGAN)


def _history(hosts: list[str], vms: list[str], dice: random.Random) -> Iterator[tuple[str, Record]]:
    """Ended moves with their tasks, and the event log."""
    share = HISTORY_PER_HOST * len(hosts)
    for number in range(min(KEPT_MIGRATIONS, KEPT_TASKS, share)):
        source, destination = dice.sample(hosts, 2)
        move = _move(f"m-{number:012x}00", dice.choice(vms), source, destination, BEGAN + number)
        yield keys.migration(move.id), move
        request = {"kind": "vm.migrate", "name": move.vm, "to": destination, "method": "live"}
        task = Task(
            id=f"t-{number:012x}00",
            request=request,
            subject=f"vm/{move.vm}",
            state=TaskState.COMPLETED,
            reason=move.reason,
            by="admin through cli/0.1",
            created_at=BEGAN + number,
            started_at=BEGAN + number,
            ended_at=move.ended_at,
            progress={"migration": move.id},
            result={"vm": move.vm, "migration": move.id},
            worker="manager/1badcafe",
        )
        yield keys.task(task.id), task
    for number in range(min(KEPT_EVENTS, 10 * share)):
        vm, host = dice.choice(vms), dice.choice(hosts)
        event = Event(
            id=f"{number:016x}-0000",
            time=BEGAN + number,
            kind="vm.started",
            subject=f"vm/{vm}",
            message=f"{vm} runs on {host}",
        )
        yield keys.event(event.id), event


def _move(name: str, vm: str, source: str, destination: str, at: float) -> Migration:
    times = tuple(
        StageTime(name=stage, start_s=0.2 * index, duration_ms=200.0)
        for index, stage in enumerate(STAGES)
    )
    passes = tuple(
        Pass(number=number, bytes=(400 >> number) * MIB, duration_ms=300.0, dirty_bytes_per_s=1e7)
        for number in range(4)
    )
    return Migration(
        id=name,
        vm=vm,
        source=source,
        destination=destination,
        state=MoveState.COMPLETED,
        outcome=Outcome.COMPLETED,
        reason=f"{vm} runs on {destination}",
        accepted_at=at,
        ended_at=at + 1.4,
        progress=Progress(stage=Stage.ANNOUNCE, percent=100.0, bytes_transferred=750 * MIB),
        stages=times,
        passes=passes,
        bytes_transferred=750 * MIB,
        total_ms=1400.0,
        blackout_ms=41.0,
        log=tuple(f"{stage.value}: as planned" for stage in STAGES),
    )
