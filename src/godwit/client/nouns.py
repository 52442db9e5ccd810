"""What there is in a cluster, as one class per noun: read it, act on it.

Reading gives typed records; an action sends one typed request and answers with its task at once
(``client.wait(task)`` waits for the end). Fields and units are those of ``godwit.model.requests``.
``sync_nouns.py`` mirrors this file; after a change here run ``scripts/client-sync``.
"""
# ruff: noqa: A002 - parameters are called as the fields of the requests

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload
from urllib.parse import quote

from godwit.client.cluster_nouns import Cluster as Cluster
from godwit.client.host_nouns import Hosts as Hosts
from godwit.client.task_nouns import Migrations as Migrations
from godwit.client.task_nouns import Tasks as Tasks
from godwit.client.volume_nouns import Volumes as Volumes

if TYPE_CHECKING:
    from godwit.client.api import AsyncClient
    from godwit.client.console import Console
    from godwit.model.create import CreatePlan
    from godwit.model.migration import MovePlan
    from godwit.model.network import NetworkView
    from godwit.model.requests import NewDisk
    from godwit.model.rules import OnShutdown
    from godwit.model.task import Task
    from godwit.model.vm import Checkpoint, DiskFormat, DiskTier, DiskView, VmView


class Vms:
    """Virtual machines."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, *, host: str | None = None, state: str | None = None) -> list[VmView]:
        """All VMs, or those on a host, in a state."""
        from godwit.model.vm import VmView

        rows = await self._client.rows("vms", host=host, state=state)
        return [VmView.model_validate(row) for row in rows]

    async def get(self, name: str) -> VmView:
        """One VM. Errors: NotFound."""
        from godwit.model.vm import VmView

        return VmView.model_validate(await self._client.row("vms", name))

    @overload
    async def create(
        self,
        name: str,
        *,
        memory_bytes: int,
        cpus: int = 1,
        cpu: str = "baseline",
        image: str | None = None,
        kernel: str | None = None,
        initrd: str | None = None,
        append: str = "",
        firmware: Literal["bios", "uefi"] = "bios",
        disks: Sequence[NewDisk | str] = (),
        iso: str | None = None,
        cloud_init: str | None = None,
        networks: Sequence[str] = (),
        host: str | None = None,
        ha: bool = False,
        guest_agent: bool = False,
        priority: int = 50,
        order: int = 0,
        apart: Sequence[str] = (),
        allow_hosts: Sequence[str] = (),
        restarts: int = 3,
        autostart: bool = False,
        on_shutdown: OnShutdown = "stop",
        dry_run: Literal[False] = False,
    ) -> Task: ...

    @overload
    async def create(
        self,
        name: str,
        *,
        memory_bytes: int,
        cpus: int = 1,
        cpu: str = "baseline",
        image: str | None = None,
        kernel: str | None = None,
        initrd: str | None = None,
        append: str = "",
        firmware: Literal["bios", "uefi"] = "bios",
        disks: Sequence[NewDisk | str] = (),
        iso: str | None = None,
        cloud_init: str | None = None,
        networks: Sequence[str] = (),
        host: str | None = None,
        ha: bool = False,
        guest_agent: bool = False,
        priority: int = 50,
        order: int = 0,
        apart: Sequence[str] = (),
        allow_hosts: Sequence[str] = (),
        restarts: int = 3,
        autostart: bool = False,
        on_shutdown: OnShutdown = "stop",
        dry_run: Literal[True],
    ) -> CreatePlan: ...

    async def create(
        self,
        name: str,
        *,
        memory_bytes: int,
        cpus: int = 1,
        cpu: str = "baseline",
        image: str | None = None,
        kernel: str | None = None,
        initrd: str | None = None,
        append: str = "",
        firmware: Literal["bios", "uefi"] = "bios",
        disks: Sequence[NewDisk | str] = (),
        iso: str | None = None,
        cloud_init: str | None = None,
        networks: Sequence[str] = (),
        host: str | None = None,
        ha: bool = False,
        guest_agent: bool = False,
        priority: int = 50,
        order: int = 0,
        apart: Sequence[str] = (),
        allow_hosts: Sequence[str] = (),
        restarts: int = 3,
        autostart: bool = False,
        on_shutdown: OnShutdown = "stop",
        dry_run: bool = False,
    ) -> Task | CreatePlan:
        """Define a VM; files here (``kernel``, ``initrd``, ``cloud_init``) are uploaded.

        ``dry_run`` answers with what it would be, and makes nothing.
        """
        from godwit.model.spelling import disk_fields

        fields: dict[str, Any] = {
            "name": name,
            "memory_bytes": memory_bytes,
            "cpus": cpus,
            "cpu": cpu,
            "image": image,
            "kernel": kernel,
            "initrd": initrd,
            "append": append,
            "firmware": firmware,
            "disks": [disk_fields(disk) for disk in disks],
            "iso": iso,
            "cloud_init": cloud_init,
            "networks": networks,
            "host": host,
            "ha": ha,
            "guest_agent": guest_agent,
            "priority": priority,
            "order": order,
            "apart": apart,
            "allow_hosts": allow_hosts,
            "restarts": restarts,
            "autostart": autostart,
            "on_shutdown": on_shutdown,
        }
        if dry_run:
            return await self._client.create_plan("vm.create", **fields)
        return await self._client.act("vm.create", **fields)

    async def set(
        self,
        name: str,
        *,
        ha: bool | None = None,
        priority: int | None = None,
        order: int | None = None,
        apart: Sequence[str] = (),
        no_apart: bool = False,
        allow_hosts: Sequence[str] = (),
        any_host: bool = False,
        restarts: int | None = None,
        autostart: bool | None = None,
        on_shutdown: OnShutdown | None = None,
    ) -> Task:
        """Change a VM's rules; what is not said stays."""
        plain = {"ha": ha, "priority": priority, "order": order, "restarts": restarts}
        return await self._client.act(
            "vm.set",
            name=name,
            apart=apart,
            no_apart=no_apart,
            allow_hosts=allow_hosts,
            any_host=any_host,
            autostart=autostart,
            on_shutdown=on_shutdown,
            **plain,
        )

    async def start(self, name: str, *, host: str | None = None) -> Task:
        """Power on (or go on from saved memory), on ``host`` or where it is placed."""
        return await self._client.act("vm.start", name=name, host=host)

    async def stop(self, name: str, *, force: bool = False, timeout_s: float = 60.0) -> Task:
        """Ask the guest to shut down; ``force`` cuts the power."""
        return await self._client.act("vm.stop", name=name, force=force, timeout_s=timeout_s)

    async def pause(self, name: str) -> Task:
        """Hold the CPUs."""
        return await self._client.act("vm.pause", name=name)

    async def resume(self, name: str) -> Task:
        """Let the CPUs of a paused VM run."""
        return await self._client.act("vm.resume", name=name)

    async def save(self, name: str) -> Task:
        """Write the memory to the VM's volume and power off."""
        return await self._client.act("vm.save", name=name)

    async def restore(self, name: str, *, host: str | None = None) -> Task:
        """Go on from the saved memory."""
        return await self._client.act("vm.restore", name=name, host=host)

    async def delete(self, name: str) -> Task:
        """Forget a stopped VM and delete its disks."""
        return await self._client.act("vm.delete", name=name)

    async def clone(
        self, name: str, target: str, *, linked: bool = False, append: str | None = None
    ) -> Task:
        """Make a second VM out of a stopped one; ``linked``: its images stand on the first's."""
        return await self._client.act(
            "vm.clone", name=name, target=target, linked=linked, append=append
        )

    async def disks(self, name: str) -> Sequence[DiskView]:
        """A VM's disks. Errors: NotFound."""
        from godwit.model.vm import DiskView

        path = f"vms/{quote(name, safe='')}/disks"
        return [DiskView.model_validate(row) for row in await self._client.rows(path)]

    async def add_disk(
        self,
        name: str,
        *,
        volume: str | None = None,
        size_bytes: int | None = None,
        format: DiskFormat | None = None,
        path: str | None = None,
        lun: int | None = None,
        device: str | None = None,
        tier: DiskTier = "auto",
        passthrough: bool = False,
    ) -> Task:
        """Give a VM one more disk, also while it runs: a new image (``volume``, ``size_bytes``),
        one that is there (``volume``, ``path``, ``format``), a LUN of an iscsi volume
        (``volume``, ``lun``), or a host's block ``device``."""
        return await self._client.act(
            "vm.disk.add",
            name=name,
            volume=volume,
            size_bytes=size_bytes,
            format=format,
            path=path,
            lun=lun,
            device=device,
            tier=tier,
            passthrough=passthrough,
        )

    async def remove_disk(
        self, name: str, disk: str, *, force: bool = False, keep: bool = False
    ) -> Task:
        """Take a disk from a VM and delete its image, unless ``keep``."""
        return await self._client.act(
            "vm.disk.remove", name=name, disk=disk, force=force, keep=keep
        )

    async def resize_disk(self, name: str, disk: str, size_bytes: int) -> Task:
        """Let a disk grow, also while its VM runs."""
        return await self._client.act("vm.disk.resize", name=name, disk=disk, size_bytes=size_bytes)

    async def move_disk(
        self,
        name: str,
        disk: str,
        *,
        to: str | None = None,
        format: DiskFormat | None = None,
        keep: bool = False,
        max_bytes_per_s: int | None = None,
    ) -> Task:
        """Move a disk to another volume (``to``) or format, also while its VM runs; its old image
        is deleted unless ``keep``. Stopped half-way with ``tasks.cancel``."""
        return await self._client.act(
            "vm.disk.move",
            name=name,
            disk=disk,
            to=to,
            format=format,
            keep=keep,
            max_bytes_per_s=max_bytes_per_s,
        )

    async def export_disk(
        self, name: str, disk: str, target: str, *, format: DiskFormat = "qcow2"
    ) -> Task:
        """Write a copy of a stopped VM's disk to a new file below /clusterstorage."""
        return await self._client.act(
            "vm.disk.export", name=name, disk=disk, target=target, format=format
        )

    async def checkpoints(self, name: str) -> Sequence[Checkpoint]:
        """A VM's checkpoints, oldest first. Errors: NotFound."""
        from godwit.model.vm import Checkpoint

        path = f"vms/{quote(name, safe='')}/checkpoints"
        return [Checkpoint.model_validate(row) for row in await self._client.rows(path)]

    async def create_checkpoint(self, name: str, checkpoint: str) -> Task:
        """Keep what a VM's disks hold at this instant, also while it runs."""
        return await self._client.act("vm.checkpoint.create", name=name, checkpoint=checkpoint)

    async def revert_checkpoint(self, name: str, checkpoint: str) -> Task:
        """Let a stopped VM's disks hold again what they held then."""
        return await self._client.act("vm.checkpoint.revert", name=name, checkpoint=checkpoint)

    async def delete_checkpoint(self, name: str, checkpoint: str) -> Task:
        """Forget a checkpoint; what the disks hold now stays."""
        return await self._client.act("vm.checkpoint.delete", name=name, checkpoint=checkpoint)

    @overload
    async def migrate(
        self,
        name: str,
        *,
        to: str | None = None,
        method: Literal["live", "quick"] = "live",
        max_blackout_ms: float = 300.0,
        deadline_s: float = 600.0,
        allow_postcopy: bool = False,
        allow_throttle: bool = False,
        allow_unvalidated: bool = False,
        dry_run: Literal[False] = False,
    ) -> Task: ...

    @overload
    async def migrate(
        self,
        name: str,
        *,
        to: str | None = None,
        method: Literal["live", "quick"] = "live",
        max_blackout_ms: float = 300.0,
        deadline_s: float = 600.0,
        allow_postcopy: bool = False,
        allow_throttle: bool = False,
        allow_unvalidated: bool = False,
        dry_run: Literal[True],
    ) -> MovePlan: ...

    async def migrate(
        self,
        name: str,
        *,
        to: str | None = None,
        method: Literal["live", "quick"] = "live",
        max_blackout_ms: float = 300.0,
        deadline_s: float = 600.0,
        allow_postcopy: bool = False,
        allow_throttle: bool = False,
        allow_unvalidated: bool = False,
        dry_run: bool = False,
    ) -> Task | MovePlan:
        """Move a running VM to ``to`` or where it is placed; ``dry_run`` answers with the plan."""
        fields: dict[str, Any] = {"name": name, "to": to, "method": method}
        fields |= {"max_blackout_ms": max_blackout_ms, "deadline_s": deadline_s}
        fields |= {"allow_postcopy": allow_postcopy, "allow_throttle": allow_throttle}
        fields["allow_unvalidated"] = allow_unvalidated
        if dry_run:
            return await self._client.plan("vm.migrate", **fields)
        return await self._client.act("vm.migrate", **fields)

    async def console(self, name: str) -> Console:
        """The VM's serial port, open; close it after use (``async with`` does)."""
        return await self._client.console(name)


class Networks:
    """Networks that VMs plug into."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[NetworkView]:
        """All networks."""
        from godwit.model.network import NetworkView

        return [NetworkView.model_validate(row) for row in await self._client.rows("networks")]

    async def get(self, name: str) -> NetworkView:
        """One network. Errors: NotFound."""
        from godwit.model.network import NetworkView

        return NetworkView.model_validate(await self._client.row("networks", name))

    async def create(
        self, name: str, *, mtu: int = 1500, subnet: str = "", uplink: str = ""
    ) -> Task:
        """Define a network; each host makes its bridge."""
        return await self._client.act(
            "network.create", name=name, mtu=mtu, subnet=subnet, uplink=uplink
        )

    async def delete(self, name: str) -> Task:
        """Remove a network that no VM uses."""
        return await self._client.act("network.delete", name=name)
