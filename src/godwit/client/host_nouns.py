"""The machines that VMs run on, as the client sees them. A room of `godwit.client.nouns`.

``sync_nouns.py`` mirrors this file; after a change here run ``scripts/client-sync``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from godwit.client.api import AsyncClient
    from godwit.model.drain import DrainPlan
    from godwit.model.host import HostView
    from godwit.model.task import Task


class Hosts:
    """The machines that VMs run on."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[HostView]:
        """All hosts."""
        from godwit.model.host import HostView

        return [HostView.model_validate(row) for row in await self._client.rows("hosts")]

    async def get(self, name: str) -> HostView:
        """One host. Errors: NotFound."""
        from godwit.model.host import HostView

        return HostView.model_validate(await self._client.row("hosts", name))

    async def confirm_down(self, name: str) -> Task:
        """Say that a host which does not answer is off; only when you know it."""
        return await self._client.act("host.confirm-down", name=name)

    @overload
    async def drain(
        self,
        name: str,
        *,
        reason: str = "",
        allow_quick: bool = False,
        allow_shutdown: bool = False,
        force: bool = False,
        max_blackout_ms: float = 300.0,
        deadline_s: float = 600.0,
        dry_run: Literal[False] = False,
    ) -> Task: ...

    @overload
    async def drain(
        self,
        name: str,
        *,
        reason: str = "",
        allow_quick: bool = False,
        allow_shutdown: bool = False,
        force: bool = False,
        max_blackout_ms: float = 300.0,
        deadline_s: float = 600.0,
        dry_run: Literal[True],
    ) -> DrainPlan: ...

    async def drain(
        self,
        name: str,
        *,
        reason: str = "",
        allow_quick: bool = False,
        allow_shutdown: bool = False,
        force: bool = False,
        max_blackout_ms: float = 300.0,
        deadline_s: float = 600.0,
        dry_run: bool = False,
    ) -> Task | DrainPlan:
        """Move every VM off a host; ``dry_run`` answers with the plan."""
        fields: dict[str, Any] = {
            "name": name,
            "reason": reason,
            "allow_quick": allow_quick,
            "allow_shutdown": allow_shutdown,
            "force": force,
            "max_blackout_ms": max_blackout_ms,
            "deadline_s": deadline_s,
        }
        if dry_run:
            return await self._client.drain_plan("host.drain", **fields)
        return await self._client.act("host.drain", **fields)

    async def return_(self, name: str, *, bring_back: bool = False) -> Task:
        """Let a drained host take VMs again; ``bring_back``: those that were there."""
        return await self._client.act("host.return", name=name, bring_back=bring_back)

    @overload
    async def enter_maintenance(
        self,
        name: str,
        *,
        reason: str = "",
        allow_quick: bool = False,
        allow_shutdown: bool = False,
        force: bool = False,
        max_blackout_ms: float = 300.0,
        deadline_s: float = 600.0,
        dry_run: Literal[False] = False,
    ) -> Task: ...

    @overload
    async def enter_maintenance(
        self,
        name: str,
        *,
        reason: str = "",
        allow_quick: bool = False,
        allow_shutdown: bool = False,
        force: bool = False,
        max_blackout_ms: float = 300.0,
        deadline_s: float = 600.0,
        dry_run: Literal[True],
    ) -> DrainPlan: ...

    async def enter_maintenance(
        self,
        name: str,
        *,
        reason: str = "",
        allow_quick: bool = False,
        allow_shutdown: bool = False,
        force: bool = False,
        max_blackout_ms: float = 300.0,
        deadline_s: float = 600.0,
        dry_run: bool = False,
    ) -> Task | DrainPlan:
        """Empty a host so that it may be switched off; ``dry_run`` answers with the plan."""
        fields: dict[str, Any] = {
            "name": name,
            "reason": reason,
            "allow_quick": allow_quick,
            "allow_shutdown": allow_shutdown,
            "force": force,
            "max_blackout_ms": max_blackout_ms,
            "deadline_s": deadline_s,
        }
        if dry_run:
            return await self._client.drain_plan("host.maintenance.enter", **fields)
        return await self._client.act("host.maintenance.enter", **fields)

    async def exit_maintenance(self, name: str, *, bring_back: bool = False) -> Task:
        """End a maintenance; ``bring_back``: the VMs that were there."""
        return await self._client.act("host.maintenance.exit", name=name, bring_back=bring_back)
