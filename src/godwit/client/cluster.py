"""The cluster itself. Mirrored by ``scripts/client-sync`` like ``nouns.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from godwit.client.api import AsyncClient
    from godwit.model.task import Task
    from godwit.model.validation import ValidationReport


class Cluster:
    """The cluster as a whole."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def validate(self, *, live: bool = False) -> Task:
        """Check everything and write a report; ``live`` also makes, moves and removes a VM."""
        return await self._client.act("cluster.validate", live=live)

    async def validation(self) -> ValidationReport:
        """The report of the last validation. Errors: NotFound when there was none."""
        from godwit.model.validation import ValidationReport

        return ValidationReport.model_validate(await self._client.row("cluster", "validation"))
