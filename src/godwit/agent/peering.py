"""The other agents: one kept-open client per host, and the engine's ``Peer`` on top of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from godwit.migration.peer import (
    CheckAnswer,
    CheckAsk,
    PeerSilent,
    PeerState,
    PrepareAsk,
    Prepared,
    Recovered,
    TakenOver,
)
from godwit.model.base import Record
from godwit.model.errors import TooOld
from godwit.model.validation_facts import MeasureAsk, MeasurePorts
from godwit.storage.lending import (
    ExportAnswer,
    ExportAsk,
    Exported,
    ExportedAsk,
    WithdrawAsk,
    Withdrawn,
)
from godwit.wire.errors import PeerOutcomeUnknown, PeerRefused, PeerUnreachable
from godwit.wire.http import PeerClient
from godwit.wire.identity import HOST, Identity
from godwit.wire.tls import ClientTls, Expect

T = TypeVar("T", bound=Record)


class Peers:
    """Clients to the agents of other hosts, opened when first needed and kept."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._clients: dict[tuple[str, str], PeerClient] = {}

    def to(self, host: str, url: str) -> HttpPeer:
        """The agent of ``host`` at ``url``; its certificate must name that host."""
        client = self._clients.get((host, url))
        if client is None:
            tls = ClientTls.for_daemon(self._identity, Expect(HOST, host))
            client = self._clients[(host, url)] = PeerClient(url, tls=tls)
        return HttpPeer(client)

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.close()
        self._clients.clear()


class HttpPeer:
    """Implements ``godwit.migration.peer.Peer`` over the agents' HTTPS."""

    def __init__(self, client: PeerClient) -> None:
        self._client = client

    async def check(self, ask: CheckAsk, *, timeout: float) -> CheckAnswer:
        return await self._call("check", ask.model_dump(mode="json"), CheckAnswer, timeout)

    async def prepare(self, ask: PrepareAsk, *, timeout: float) -> Prepared:
        return await self._call("prepare", ask.model_dump(mode="json"), Prepared, timeout)

    async def ping(self, migration: str, *, oob: bool = False, timeout: float) -> PeerState:
        body = {"migration": migration, "oob": oob}
        return await self._call("ping", body, PeerState, timeout)

    async def released(self, migration: str, *, timeout: float) -> None:
        async with _silence(timeout):
            body = {"migration": migration}
            await self._client.post("/v1/peer/released", body, deadline_s=timeout)

    async def take_over(self, migration: str, vm: str, *, timeout: float) -> TakenOver:
        body = {"migration": migration, "vm": vm}
        return await self._call("take-over", body, TakenOver, timeout)

    async def abort(self, migration: str, reason: str, *, timeout: float) -> None:
        async with _silence(timeout):
            body = {"migration": migration, "reason": reason}
            await self._client.post("/v1/peer/abort", body, deadline_s=timeout)

    async def recover(self, migration: str, *, timeout: float) -> Recovered:
        return await self._call("recover", {"migration": migration}, Recovered, timeout)

    async def clock(self, *, timeout: float) -> float:
        async with _silence(timeout):
            answer = await self._client.get("/v1/clock", deadline_s=timeout)
            return float(answer["realtime"])

    async def measure(self, ask: MeasureAsk, *, timeout: float) -> MeasurePorts:
        """Have it listen on the migration network for one measurement."""
        return await self._call("measure", ask.model_dump(mode="json"), MeasurePorts, timeout)

    async def export(self, ask: ExportAsk, *, timeout: float) -> ExportAnswer:
        """Ask for exports of a VM's disks; errors as all the others."""
        return await self._call("export", ask.model_dump(mode="json"), ExportAnswer, timeout)

    async def withdraw(self, ask: WithdrawAsk, *, timeout: float) -> Withdrawn:
        """Have exports ended."""
        return await self._call("withdraw", ask.model_dump(mode="json"), Withdrawn, timeout)

    async def exported(self, ask: ExportedAsk, *, timeout: float) -> Exported:
        """Ask whether exports are still there."""
        return await self._call("exported", ask.model_dump(mode="json"), Exported, timeout)

    async def _call(self, verb: str, body: dict[str, Any], kind: type[T], timeout: float) -> T:
        async with _silence(timeout, verb):
            answer = await self._client.post(f"/v1/peer/{verb}", body, deadline_s=timeout)
            return kind.model_validate(answer)


@contextlib.asynccontextmanager
async def _silence(timeout: float, verb: str = "") -> AsyncIterator[None]:
    """No answer is ``PeerSilent``; a refusal is the peer's own error."""
    try:
        yield
    except PeerRefused as error:
        if verb and error.problem.code == "http-404":
            raise TooOld(
                f"its agent does not know what it is asked for ({verb}): it is of another version",
                hint="upgrade Godwit on the older of the two hosts",
            ) from error
        raise error.error from error
    except PeerUnreachable as error:
        raise PeerSilent(f"its agent cannot be reached ({error.message})") from error
    except PeerOutcomeUnknown as error:
        # Sent, and then: too late, or the connection broke because the agent there died.
        raise PeerSilent(error.message or f"no answer within {timeout:g} s") from error
