"""The machines that VMs run on, as the client sees them. A room of `godwit.client.nouns`.

``sync_nouns.py`` mirrors this file; after a change here run ``scripts/client-sync``.
"""
# ruff: noqa: A002 - parameters are called as the fields of the requests

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from godwit.client.api import AsyncClient
    from godwit.model.drain import DrainPlan
    from godwit.model.host import HostView
    from godwit.model.power import PowerKind, PowerView
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

    async def power(self, name: str) -> PowerView:
        """How a host's power is switched. Errors: NotFound."""
        from godwit.model.power import PowerView

        return PowerView.model_validate(await self._client.row(f"hosts/{name}", "power"))

    async def set_power(
        self,
        name: str,
        *,
        type: PowerKind,
        address: str,
        password_file: str,
        user: str = "",
        fingerprint: str = "",
        ca: str = "",
        system: str = "",
        agent: str = "",
        options: Sequence[str] = (),
    ) -> Task:
        """Say how a host's power is switched; ``password_file`` and ``ca`` are files here."""
        return await self._client.act(
            "host.power.set",
            name=name,
            type=type,
            address=address,
            password_file=password_file,
            user=user,
            fingerprint=fingerprint,
            ca=ca,
            system=system,
            agent=agent,
            options=options,
        )

    async def remove_power(self, name: str) -> Task:
        """Forget a host's power device, and its password."""
        return await self._client.act("host.power.remove", name=name)

    async def test_power(self, name: str) -> Task:
        """Ask a host's power device for the host's state; the task's result has it."""
        return await self._client.act("host.power.test", name=name)

    async def on_power(self, name: str, *, timeout_s: float = 60.0) -> Task:
        """Switch a host on."""
        return await self._client.act("host.power.on", name=name, timeout_s=timeout_s)

    async def off_power(self, name: str, *, force: bool = False, timeout_s: float = 60.0) -> Task:
        """Cut a host's power, with proof; ``force``: even while VMs run there."""
        return await self._client.act("host.power.off", name=name, force=force, timeout_s=timeout_s)

    async def reset_power(self, name: str, *, force: bool = False, timeout_s: float = 60.0) -> Task:
        """Off with proof, then on."""
        return await self._client.act(
            "host.power.reset", name=name, force=force, timeout_s=timeout_s
        )

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
