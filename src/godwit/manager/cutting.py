"""The first rung: storage servers' fencing daemons are asked to shut a lost host out.

Every manager asks each daemon every few seconds what it guards and who is cut off, so that it is
known beforehand whether the rung is there, and so that whoever comes to lead takes back what
another one cut off. What a daemon said counts for `FRESH_S`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from pydantic import ValidationError

from godwit.cluster.facts import Attempt, Rung
from godwit.cluster.steps import Fence
from godwit.manager.agents import translated
from godwit.manager.cache import Cache
from godwit.manager.snapshot import Snapshot
from godwit.model.errors import GodwitError, NotFound, Refused, Unavailable
from godwit.model.fencing import CutAsk, CutDone, FenceStatus, PlaceSeen, place_of
from godwit.model.volume import SERVED, Volume
from godwit.model.world import Clock
from godwit.wire.http import PeerClient
from godwit.wire.identity import STORAGE, Identity
from godwit.wire.tls import ClientTls, Expect

ASK_S: Final = 5.0
FRESH_S: Final = 20.0
ANSWER_S: Final = 4.0
CUT_S: Final = 12.0  # longer than a daemon waits for its server
_LOG = logging.getLogger("godwit.manager")


class Daemons(Protocol):
    """How fencing daemons are reached; tests put others there."""

    async def call(
        self, url: str, method: str, path: str, body: Mapping[str, Any] | None, *, deadline_s: float
    ) -> Any:
        """The JSON that a daemon answers. Raises only Godwit errors."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...


class HttpDaemons:
    """Implements `Daemons` over mutual TLS: only a certificate for storage counts there."""

    def __init__(self, identity: Identity) -> None:
        self._tls = ClientTls.for_daemon(identity, Expect(STORAGE))
        self._clients: dict[str, PeerClient] = {}

    async def call(
        self, url: str, method: str, path: str, body: Mapping[str, Any] | None, *, deadline_s: float
    ) -> Any:
        if url not in self._clients:
            try:
                self._clients[url] = PeerClient(url, tls=self._tls)
            except ValueError as error:
                raise Unavailable(f"{url} is no address of a daemon", hint=str(error)) from None
        client = self._clients[url]
        with translated(url, who=f"the fencing daemon at {url}"):
            given = None if body is None else dict(body)
            answer = await client.request(method, path, json=given, deadline_s=deadline_s)
            return answer.json()

    async def aclose(self) -> None:
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.close(at_once=True)


@dataclass(frozen=True)
class _Heard:
    """What a daemon last said and when; why it did not the last time it was asked."""

    status: FenceStatus | None
    at: float
    problem: str = ""


class Cutter:
    """Cuts hosts off, for one manager; belongs to its event loop. Without ``daemons`` nothing can
    be cut off."""

    def __init__(self, cache: Cache, daemons: Daemons | None, clock: Clock) -> None:
        self._cache = cache
        self._daemons = daemons
        self._clock = clock
        self._heard: dict[str, _Heard] = {}

    async def run(self) -> None:
        """Ask for ever; the daemons announce nothing."""
        await self._cache.ready.wait()
        while True:
            urls = {one.fence_url for one in self._cache.snapshot.volumes.values()} - {""}
            for gone in self._heard.keys() - urls:
                del self._heard[gone]
            await asyncio.gather(*(self.ask(url) for url in urls))
            await self._clock.sleep(ASK_S)

    async def ask(self, url: str) -> None:
        """Hear from one daemon what it guards, and whom it has shut out."""
        now, before = self._clock.monotonic(), self._heard.get(url)
        try:
            answer = await self._call(url, "GET", "/v1/status", None, deadline_s=ANSWER_S)
            self._heard[url] = _Heard(FenceStatus.model_validate(answer), now)
        except (GodwitError, ValidationError) as error:
            status, at = (None, now) if before is None else (before.status, before.at)
            self._heard[url] = _Heard(status, at, str(error))
            if before is None or before.problem != str(error):
                _LOG.warning("a fencing daemon has not answered: %s", error)

    def keeps_out(self, url: str) -> tuple[str, ...]:
        """Hosts that a daemon keeps out, as it last said."""
        heard = self._heard.get(url)
        cuts = heard.status.cuts if heard and heard.status else ()
        return tuple(sorted({cut.host for cut in cuts}))

    # Whether the rung is there.

    def uncuttable(self, records: Snapshot) -> dict[str, str]:
        """Volumes from which nobody can be cut off now, with the reason."""
        found = {name: self.problem(volume) for name, volume in records.volumes.items()}
        return {name: why for name, why in found.items() if why}

    def unbound(self, records: Snapshot) -> dict[tuple[str, str], str]:
        """(volume, host) that the volume's daemon cannot cut off, as it does not know it."""
        found = {}
        for name, volume in records.volumes.items():
            place = self._place(volume)
            for host in records.hosts if place is not None else ():
                if place is not None and host not in place.hosts:
                    why = f"the fencing daemon of {name} does not know from where {host} comes"
                    found[name, host] = why
        return found

    def problem(self, volume: Volume) -> str:
        """Why nobody can be cut off from a volume; empty when they can."""
        if volume.kind not in SERVED:
            return ""  # that a directory cannot is said by the ladder itself
        if not place_of(volume):
            return f"nothing is known that cuts a host off {volume.name}"
        if not volume.fence_url:
            return f"{volume.name} names no fencing daemon"
        heard = self._heard.get(volume.fence_url)
        if heard is None or heard.status is None:
            why = heard.problem if heard else "not asked yet"
            return f"the fencing daemon of {volume.name} was not heard yet: {why}"
        silent = self._clock.monotonic() - heard.at
        if heard.problem and silent > 2 * ASK_S:
            return f"the fencing daemon of {volume.name} does not answer: {heard.problem}"
        if silent > FRESH_S:
            return f"the fencing daemon of {volume.name} is silent for {silent:.0f} s"
        place = self._place(volume)
        if place is None:
            return f"the fencing daemon of {volume.name} guards no {place_of(volume)}"
        return f"{volume.name}: {place.why}" if place.why else ""

    def _place(self, volume: Volume) -> PlaceSeen | None:
        heard, wanted = self._heard.get(volume.fence_url), place_of(volume)
        if heard is None or heard.status is None:
            return None
        return next((one for one in heard.status.places if one.place == wanted), None)

    # See `godwit.manager.failover.acting.Cut`.

    async def cut(self, step: Fence) -> frozenset[str]:
        """Ask for each volume of the VM, side by side; the disks of which all confirmed."""
        records = self._cache.snapshot
        vm = records.vms.get(step.vm)
        disks = {disk.id: disk for disk in vm.written} if vm else {}
        if vm is None or not step.disks or set(step.disks) - disks.keys():
            raise Refused(f"{step.vm} has other disks by now", hint="it is decided anew")
        volumes = {disks[one].volume for one in step.disks}
        asked = [self._cut_off(records.volumes.get(name), name, step) for name in sorted(volumes)]
        for done in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(done, BaseException):
                raise done
        return frozenset(step.disks)

    async def _cut_off(self, volume: Volume | None, name: str, step: Fence) -> None:
        if volume is None or not volume.fence_url or not place_of(volume):
            raise Refused(f"nothing is known that cuts a host off {name}", hint="see the ladder")
        boot_id, revision = step.heard
        ask = CutAsk(
            place=place_of(volume), host=step.host, vm=step.vm, boot_id=boot_id, revision=revision
        )
        url = volume.fence_url
        body = ask.model_dump(mode="json")
        answer = await self._call(url, "POST", "/v1/cuts", body, deadline_s=CUT_S)
        done = CutDone.model_validate(answer).cut
        if (done.place, done.host, done.vm) != (ask.place, ask.host, ask.vm):
            raise Unavailable(f"the fencing daemon at {url} confirms something else", hint="look")

    async def lift(self, cuts: tuple[str, ...]) -> None:
        """Each by the number that was told of."""
        for cut in cuts:
            url, _, number = cut.rpartition(" ")
            try:
                await self._call(url, "DELETE", f"/v1/cuts/{int(number)}", None, deadline_s=CUT_S)
            except NotFound:
                _LOG.info("%s stands no more", cut)
            await self.ask(url)

    def attempts(self) -> tuple[Attempt, ...]:
        """They are proof of nothing by themselves: only a confirmation to who asked is."""
        found = []
        for url, heard in self._heard.items():
            for cut in heard.status.cuts if heard.status else ():
                found.append(
                    Attempt(
                        host=cut.host,
                        rung=Rung.STORAGE,
                        vm=cut.vm,
                        heard=(cut.boot_id, cut.revision),
                        outcome="confirmed",
                        cut=f"{url} {cut.id}",
                    )
                )
        return tuple(found)

    async def aclose(self) -> None:
        """Close all connections."""
        if self._daemons is not None:
            await self._daemons.aclose()

    async def _call(
        self, url: str, method: str, path: str, body: Mapping[str, Any] | None, *, deadline_s: float
    ) -> Any:
        if self._daemons is None:
            raise Unavailable("this manager reaches no fencing daemons", hint="see its log")
        return await self._daemons.call(url, method, path, body, deadline_s=deadline_s)
