"""Two agents' storage rooms on one machine, over one store, with real daemons between them.

What is not real: the wire between the agents (their calls are made directly, and can be made to
fail), and the VM's QEMU, for which a client of its broker stands.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.system.storage.broker.rig import NOBODY, PROGRAM, Client, make_image

from godwit.agent.desk import Desk, Slot
from godwit.agent.holds import LabHolds
from godwit.agent.volumes import Volumes
from godwit.host.cgroup import CGROUP_ROOT
from godwit.host.clock import RealClock
from godwit.host.config import AgentConfig, CgroupConfig, MigrationConfig, PathsConfig, TlsConfig
from godwit.host.process import freeze
from godwit.migration.peer import PeerSilent
from godwit.model import keys
from godwit.model.host import HostInfo, QemuFacts
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import Disk, Pins, Vm
from godwit.model.volume import VolumeOnHost
from godwit.qemu import tls
from godwit.qemu.launch import Binary
from godwit.storage import nodes
from godwit.storage.lending import ExportAnswer, ExportAsk, Exported, ExportedAsk, Withdrawn
from godwit.store.memory import MemoryStore
from godwit.store.records import Records, encode
from godwit.wire.ca import ClusterCa, write_qemu_credentials

SIZE = 64 << 20
HEAL_S = 0.5  # the real one takes patience
VM = "web"
SHARED = "shared"
GROUPS = f"godwit-redirect-{os.getpid()}"


class FakeMachine:
    """A QEMU that runs, or has stopped at an error."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.state = "running"

    async def status(self) -> Any:
        return SimpleNamespace(status=self.state, running=self.state == "running")

    async def cont(self) -> None:
        self.state = "running"

    async def close(self) -> None:
        """Nothing to close."""


class DirectPeer:
    """The agent of a host, called without a wire; ``silent`` is a host nobody hears of."""

    def __init__(self, world: World, host: str) -> None:
        self._world, self._host = world, host

    async def _desk(self) -> Desk:
        if self._host in self._world.silent:
            raise PeerSilent("no answer")
        return self._world.desks[self._host]

    async def export(self, ask: ExportAsk, *, timeout: float) -> ExportAnswer:
        return await (await self._desk()).exports.export(ask)

    async def withdraw(self, ask: Any, *, timeout: float) -> Withdrawn:
        return await (await self._desk()).exports.withdraw(ask)

    async def exported(self, ask: ExportedAsk, *, timeout: float) -> Exported:
        return await (await self._desk()).exports.exported(ask)


class World:
    """Hosts h1, h2, h3 that see one volume; VM ``web`` runs on h1."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = MemoryStore()
        self.records = Records(self.store)
        self.desks: dict[str, Desk] = {}
        self.silent: set[str] = set()
        self.clients: list[Client] = []
        self.ca = ClusterCa.create(cluster="a")
        (root / SHARED / VM).mkdir(parents=True)

    async def host(self, name: str) -> Desk:
        """Bring a host up; what another life of its agent left is taken over."""
        own = self.root / name
        if not own.exists():
            (own / "sees").mkdir(parents=True)
            (own / "sees" / SHARED).symlink_to(self.root / SHARED)
            write_qemu_credentials(own / "tls", self.ca, host=name, gid=NOBODY[1])
            tls.ensure_dh_params(own / "tls")
            own.chmod(0o755)
        paths = PathsConfig(run=own / "r", state=own / "s", volumes=self.root)
        for folder in (paths.run / "vms", paths.state / "vms"):
            folder.mkdir(parents=True, exist_ok=True)
        config = AgentConfig(
            host=name,
            paths=paths,
            tls=TlsConfig(migration_dir=own / "tls"),
            migration=MigrationConfig(address="127.0.0.1"),
            cgroup=CgroupConfig(root=f"{GROUPS}/{name}"),
        )
        config = replace(config, qemu=replace(config.qemu, user="nobody"))
        info = HostInfo(
            name=name,
            agent_url=f"https://{name}",
            cpus=1,
            memory_bytes=1 << 30,
            boot_id="b",
            qemu=QemuFacts(version=(10, 0, 2), accelerator="tcg"),
            migration_address="127.0.0.1",
            volumes=(SHARED,),
        )
        equipment: Any = SimpleNamespace(
            info=info, binary=Binary(path=str(PROGRAM), user=NOBODY), warnings=()
        )
        desk = Desk(
            config,
            equipment,
            records=self.records,
            clock=RealClock(),
            guard=SimpleNamespace(),  # type: ignore[arg-type]
            holds=LabHolds(enabled=False),
            peers=SimpleNamespace(to=lambda host, _url: DirectPeer(self, host), close=_nothing),  # type: ignore[arg-type]
        )
        desk.volumes = Volumes(desk, root=own / "sees")
        await self.store.put(keys.host_info(name), encode(info))
        for key in (keys.host_lease(name), keys.host_agent(name)):
            await self.store.put(key, b"{}")
        self.desks[name] = desk
        await desk.exports.adopt()
        desk.background(desk.volumes.serve(), "volumes")
        desk.background(desk.exports.serve(), "exports")
        desk.background(desk.redirects.serve(), "redirects")
        await self.until(lambda: not desk.volumes.lends(SHARED))
        await self.until(lambda: self.told(name, "direct"))
        watched = desk.volumes._watched[SHARED]
        watched.view = replace(watched.view, heal_s=HEAL_S)
        return desk

    async def run_vm(self, desk: Desk, *, image: str = "vhdx", epoch: int = 1) -> Client:
        """A VM on this host with a brokered disk; its client."""
        made = make_image(self.root / SHARED / VM, image, size=SIZE, owner=NOBODY)
        disk = Disk(
            id="disk0",
            volume=SHARED,
            path=made.path,
            size_bytes=SIZE,
            format=made.format,
            tier="brokered",
            serial="GW0",
            lun=0,
        )
        self.vm = Vm(
            name=VM,
            cpus=1,
            memory_bytes=64 << 20,
            disks=(disk,),
            pins=Pins(uuid="u", machine="q", cpu_model="c", accelerator="tcg"),
            created_at=0.0,
        )
        self.disk = made
        await self.owned(desk.host, epoch)
        await desk.brokers.start(self.vm, epoch=epoch)
        self.put_slot(desk, epoch)
        client = await Client.open(
            desk.brokers._sockets.path(VM), nodes.export_name(VM, "disk0"), reconnect_delay_s=600
        )
        self.clients.append(client)
        return client

    def put_slot(self, desk: Desk, epoch: int) -> Slot:
        machine: Any = FakeMachine(epoch)
        gate: Any = SimpleNamespace()
        slot = desk.slots[VM] = Slot(vm=self.vm, machine=machine, gate=gate)
        desk.brokers.wake(VM)
        desk.volumes.suspect(self.vm)
        return slot

    async def owned(self, host: str, epoch: int) -> None:
        """Write the owner record."""
        owner = Owner(host=host, epoch=epoch, state=OwnerState.RUNNING)
        await self.store.put(keys.vm_owner(VM), encode(owner))

    def sight(self, host: str) -> Path:
        """Where a host looks for the volume."""
        return self.root / host / "sees" / SHARED

    def cut(self, host: str) -> None:
        """The mount is gone, as after an unmount: an empty directory is in its place."""
        self.sight(host).unlink()
        self.sight(host).mkdir()

    def hang(self, host: str) -> None:
        """Whoever touches the volume waits in the kernel; so does the VM's daemon."""
        self.cut(host)
        (self.sight(host) / ".godwit").mkdir()
        os.mkfifo(self.sight(host) / ".godwit/volume-id")
        broker = self.desks[host].brokers.of(VM)
        assert broker is not None
        freeze(broker.record.process)

    def heal(self, host: str) -> None:
        """The volume is where it was."""
        shutil.rmtree(self.sight(host))
        self.sight(host).symlink_to(self.root / SHARED)

    async def state(self, host: str) -> VolumeOnHost | None:
        """What the host has told of the volume."""
        found = await self.records.get(keys.volume_state(SHARED, host), VolumeOnHost)
        return None if found is None else found.value

    async def told(self, host: str, state: str) -> bool:
        """Whether the host has told of this state."""
        found = await self.state(host)
        return found is not None and found.state.value == state

    async def said(self, host: str, words: str) -> bool:
        """Whether these words are in the reason that the host has told."""
        found = await self.state(host)
        return found is not None and words in found.reason

    async def until(self, wanted: Any, *, timeout: float = 15.0) -> None:
        """Wait until something is so; nothing announces it to a bystander."""
        async with asyncio.timeout(timeout):
            while True:
                answer = wanted()
                if await answer if asyncio.iscoroutine(answer) else answer:
                    return
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End everything; what daemons there were is gone."""
        for client in self.clients:
            await client.close()
        for desk in self.desks.values():
            desk.slots.clear()
            await desk.brokers.end(VM)
            for vm in tuple(desk.exports._exports):
                await desk.exports._end(vm)
        for desk in self.desks.values():
            # What was withdrawn in order ends a little later.
            await self.until(lambda d=desk: not list(d.config.paths.run.glob("lent/*/peer.json")))
            await desk.close()
        for pattern in (f"{GROUPS}/*", f"*/{GROUPS}/*", GROUPS, f"*/{GROUPS}"):
            for group in CGROUP_ROOT.glob(pattern):
                if group.is_dir():
                    group.rmdir()  # fails when something is left in it


async def _nothing() -> None:
    """Nothing to close."""
