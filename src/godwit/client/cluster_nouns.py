"""The cluster as a whole, as the client sees it. A room of `godwit.client.nouns`.

``sync_nouns.py`` mirrors this file; after a change here run ``scripts/client-sync``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from godwit.client.api import AsyncClient
    from godwit.model.cluster_status import ClusterStatus
    from godwit.model.settings import ClusterSettings
    from godwit.model.task import Task
    from godwit.model.trust import TokenView
    from godwit.model.validation import ValidationReport


class Cluster:
    """The cluster as a whole."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def status(self) -> ClusterStatus:
        """How the cluster stands: the store's quorum, its managers, each host in words."""
        from godwit.model.cluster_status import ClusterStatus

        return ClusterStatus.model_validate(await self._client.call("GET", "cluster"))

    async def create_token(self, *, ttl_s: float = 3600.0, host: str | None = None) -> TokenView:
        """A join token for one host, for ``ttl_s`` seconds; its text is in this answer only."""
        from godwit.model.trust import NewToken, TokenView

        asked = NewToken(ttl_s=ttl_s, host=host).model_dump(mode="json", exclude_none=True)
        return TokenView.model_validate(await self._client.call("POST", "cluster/tokens", asked))

    async def remove(self, name: str, *, store: bool = False) -> Task:
        """Take a host without VMs out of the cluster and revoke its certificates; ``store``: its
        member of the store has been taken out, too."""
        return await self._client.act("cluster.remove", name=name, store=store)

    async def settings(self) -> ClusterSettings:
        """How many moves may be under way at once, and the like."""
        from godwit.model.settings import ClusterSettings

        return ClusterSettings.model_validate(await self._client.row("cluster", "settings"))

    async def set(
        self,
        *,
        moves_per_host: int | None = None,
        moves_per_pair: int | None = None,
        moves_per_network: int | None = None,
        cpus_per_core: int | None = None,
        cpu_baseline: str | None = None,
    ) -> Task:
        """Change settings; what is not said stays. 0 is no limit."""
        return await self._client.act(
            "cluster.set",
            moves_per_host=moves_per_host,
            moves_per_pair=moves_per_pair,
            moves_per_network=moves_per_network,
            cpus_per_core=cpus_per_core,
            cpu_baseline=cpu_baseline,
        )

    async def update(
        self,
        *,
        command: str,
        hosts: Sequence[str] = (),
        timeout_s: float = 1800.0,
        reboots: bool = False,
        healthy_s: float = 600.0,
        allow_quick: bool = False,
        allow_shutdown: bool = False,
    ) -> Task:
        """Empty one host after the other, run the command there, bring its VMs back."""
        return await self._client.act(
            "cluster.update",
            command=command,
            hosts=hosts,
            timeout_s=timeout_s,
            reboots=reboots,
            healthy_s=healthy_s,
            allow_quick=allow_quick,
            allow_shutdown=allow_shutdown,
        )

    async def validate(self, *, live: bool = False, failover: str | None = None) -> Task:
        """Check everything and write a report; ``live`` also makes, moves and removes a VM.

        ``failover``: a host without VMs whose power is cut with that VM on it, and given back.
        Errors: Refused while others run there, NotFound when it has no power device.
        """
        return await self._client.act("cluster.validate", live=live, failover=failover)

    async def validation(self) -> ValidationReport:
        """The report of the last validation. Errors: NotFound when there was none."""
        from godwit.model.validation import ValidationReport

        return ValidationReport.model_validate(await self._client.row("cluster", "validation"))
