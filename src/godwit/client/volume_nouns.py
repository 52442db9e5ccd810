"""Places that hold disks, as the client sees them. A room of `godwit.client.nouns`.

``sync_nouns.py`` mirrors this file; after a change here run ``scripts/client-sync``.
"""
# ruff: noqa: A002 - parameters are called as the fields of the requests

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from godwit.client.api import AsyncClient
    from godwit.model.task import Task
    from godwit.model.vm import DiskFormat
    from godwit.model.volume import VolumeKind, VolumeView


class Volumes:
    """Places that hold disks."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[VolumeView]:
        """All volumes."""
        from godwit.model.volume import VolumeView

        return [VolumeView.model_validate(row) for row in await self._client.rows("volumes")]

    async def get(self, name: str) -> VolumeView:
        """One volume. Errors: NotFound."""
        from godwit.model.volume import VolumeView

        return VolumeView.model_validate(await self._client.row("volumes", name))

    async def create(
        self,
        name: str,
        *,
        type: VolumeKind = "dir",
        path: str = "",
        server: str = "",
        export: str = "",
        portal: str = "",
        target: str = "",
        pool: str = "",
        client: str = "",
        fence_url: str = "",
    ) -> Task:
        """Define a volume: a directory (``dir`` of many hosts, ``local`` of one), or served."""
        at = {"server": server, "export": export, "portal": portal, "target": target}
        return await self._client.act(
            "volume.create",
            name=name,
            type=type,
            path=path,
            pool=pool,
            client=client,
            fence_url=fence_url,
            **at,
        )

    async def set(self, name: str, *, fence_url: str | None = None) -> Task:
        """Say where the fencing daemon of the volume's server answers; empty: nowhere."""
        return await self._client.act("volume.set", name=name, fence_url=fence_url)

    async def delete(self, name: str) -> Task:
        """Forget a volume that no VM uses; its files stay."""
        return await self._client.act("volume.delete", name=name)

    async def redirect(self, name: str, *, host: str) -> Task:
        """Let a host's I/O on a volume go through another host, until it is restored."""
        return await self._client.act("volume.redirect", name=name, host=host)

    async def restore(self, name: str, *, host: str) -> Task:
        """Let a host use its own path to a volume again."""
        return await self._client.act("volume.restore", name=name, host=host)

    async def import_disk(
        self,
        volume: str,
        name: str,
        source: str,
        *,
        format: DiskFormat | Literal["vmdk"] = "qcow2",
        target_format: DiskFormat = "qcow2",
    ) -> Task:
        """Bring an image into a volume from a file or URL; the task's result says its path."""
        return await self._client.act(
            "volume.disk.import",
            volume=volume,
            name=name,
            source=source,
            format=format,
            target_format=target_format,
        )
