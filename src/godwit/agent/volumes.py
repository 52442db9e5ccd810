"""This host's paths to the volumes: looked at, believed, and told to the store.

One task per volume looks at it: often while a VM here uses it, seldom otherwise. What a look means
is decided in `godwit.storage.path_state`; what follows for VMs is the business of
`godwit.agent.redirects`, which is woken by every change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from godwit.host.files import load_json, write_durable
from godwit.model import keys
from godwit.model.disks import volume_of
from godwit.model.errors import GodwitError, NotFound, Refused
from godwit.model.vm import Vm
from godwit.model.volume import Volume, VolumeOnHost, VolumeState
from godwit.storage.path_state import PathStep, PathView, step, volume_state
from godwit.storage.paths import Prober, prober
from godwit.store.errors import StoreError
from godwit.store.records import encode

if TYPE_CHECKING:
    from godwit.agent.desk import Desk

USED_S, IDLE_S = 0.4, 10.0
"""Seconds between two looks while a VM here uses the volume, and otherwise."""
ANSWER_S = 1.0
"""Seconds a look may take; a guest waits for it when its path hangs."""
AGAIN_S = 0.05
RELIST_S, LIST_S = 2.0, 2.0
TELL_S = 10.0
"""Seconds between two sayings of sizes that changed a little."""
PLANNED = "redirected.json"
_log = logging.getLogger("agent")


@dataclass
class Watched:
    """One volume as this host sees it."""

    volume: Volume
    prober: Prober
    view: PathView = field(default_factory=PathView)
    identity: str = ""
    ours: bool = False  # this host itself has seen that identity, now or in an earlier life
    capacity: int | None = None
    used: int | None = None
    told: VolumeOnHost | None = None
    told_at: float = 0.0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[asyncio.Future[None]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class Volumes:
    """All volumes of this host. Belongs to the agent's event loop."""

    def __init__(self, desk: Desk, *, root: Path | None = None) -> None:
        self._desk = desk
        self._root = root or desk.config.paths.volumes
        self._watched: dict[str, Watched] = {}
        self._planned: set[str] = self._load_planned()
        self.changed = asyncio.Event()

    # What others ask.

    def _current(self, name: str) -> Watched | None:
        """What is watched, unless the volume has been defined anew since: that is another one."""
        found = self._watched.get(name)
        if found is None or found.volume.beneath != self._desk.catalog.get(name).beneath:
            return None
        return found

    def usable(self, volume: str) -> bool:
        """Whether I/O on this volume belongs on this host's own path; one unknown is believed."""
        found = self._current(volume)
        return volume not in self._planned and (found is None or found.view.usable)

    def lost(self, volume: str) -> str:
        """Why this host itself cannot touch the volume; empty when it can."""
        found = self._current(volume)
        return "" if found is None or found.view.usable else found.view.reason or "lost"

    def why(self, volume: str) -> str:
        """What is wrong with the path to a volume, in words."""
        if lost := self.lost(volume):
            return f"the path to {volume} is lost ({lost})"
        return f"{volume} is redirected by request" if volume in self._planned else ""

    def identity(self, volume: str) -> str:
        """What the volume calls itself; empty when nobody knows."""
        found = self._watched.get(volume)
        return found.identity if found is not None else ""

    def lends(self, volume: str) -> str:
        """Why this host cannot lend its path to another; empty when it can."""
        found = self._watched.get(volume)
        if found is None:
            return f"{self._desk.host} does not see {volume}"
        if volume in self._planned:
            return f"{volume} is redirected on {self._desk.host} by request"
        if found.view.step is not PathStep.DIRECT:
            return f"its path to {volume}: {found.view.reason or found.view.step.value}"
        return ""

    async def look(self, volume: str) -> None:
        """Return after one more look at the volume."""
        found = self._watched.get(volume)
        if found is None:
            return
        seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        found.asked.append(seen)
        found.wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * ANSWER_S):
                await seen

    def wake(self) -> None:
        """Look at all volumes at once."""
        for one in self._watched.values():
            one.wake.set()

    def suspect(self, vm: Vm) -> None:
        """Look at a VM's volumes at once: its I/O failed, or begins."""
        for disk in vm.written:
            if disk.volume in self._watched:
                self._watched[disk.volume].wake.set()

    def plan(self, name: str, *, redirected: bool) -> None:
        """Say whether the volume's I/O goes through a peer by request; survives a restart.

        NotFound for a volume that this host does not see; Refused while a VM here has a disk on
        it that cannot be redirected.
        """
        if name not in self._watched:
            raise NotFound(f"{self._desk.host} does not see the volume {name}", hint="which has?")
        if redirected and (fixed := self._desk.redirects.fixed(name)):
            raise Refused(
                f"{', '.join(fixed)}: QEMU itself has a disk on {name} open, which nobody can "
                "redirect",
                hint="move them to another host, or let their disks be brokered",
            )
        (self._planned.add if redirected else self._planned.discard)(name)
        write_durable(self._planned_path, json.dumps(sorted(self._planned)).encode())
        self._watched[name].wake.set()
        self.changed.set()

    def state(self, name: str) -> tuple[VolumeState, str]:
        """What is told of the volume now."""
        found = self._watched[name]
        ways = self._desk.redirects.ways(name)
        return volume_state(found.view, ways, planned=name in self._planned)

    @property
    def _planned_path(self) -> Path:
        return self._desk.config.paths.state / PLANNED

    def _load_planned(self) -> set[str]:
        with contextlib.suppress(ValueError):
            content = load_json(self._planned_path)
            if isinstance(content, list):
                return {str(name) for name in content}
        return set()

    # Following.

    async def serve(self) -> None:
        """Follow the catalog for ever; directories come and go without a word."""
        while True:
            try:
                await self.sync()
            except TimeoutError:
                _log.warning("volumes: listing them hangs")
            await self._desk.clock.sleep(RELIST_S)

    async def sync(self) -> None:
        """Follow what there is, and what this host sees without anybody having defined it."""
        desk = self._desk
        names = await self._names()
        # A directory that is gone is a volume still while a VM here lives from it.
        names |= {name for name in self._watched if desk.redirects.uses(name)}
        wanted = {name: desk.catalog.get(name) for name in names}
        for name, volume in wanted.items():
            known = self._watched.get(name)
            if known is None:
                await self._begin(volume)
            elif known.volume.beneath != volume.beneath:
                await self._end(name)
                await self._begin(volume)
            elif known.volume != volume:  # the same place, perhaps by another definition
                known.volume = volume
                known.wake.set()
        for name in self._watched.keys() - wanted.keys():
            await self._end(name)
            with contextlib.suppress(StoreError):
                await desk.records.store.delete(keys.volume_state(name, desk.host))

    async def _names(self) -> set[str]:
        """The catalog's; it lists directories, one of which may hang: then TimeoutError."""
        async with asyncio.timeout(LIST_S):
            return set(await self._desk.catalog.names())

    async def _begin(self, volume: Volume) -> None:
        desk = self._desk
        try:
            access = desk.catalog.access
            looks = prober(volume, root=self._root, host=desk.host, access=access)
        except GodwitError as error:
            _log.warning("volume %s: %s", volume.name, error.message)
            return
        one = self._watched[volume.name] = Watched(volume, looks)
        one.task = desk.background(self._follow(one), f"volume {volume.name}")

    async def _end(self, name: str) -> None:
        one = self._watched.pop(name)
        if one.task is not None:
            one.task.cancel()
            await asyncio.gather(one.task, return_exceptions=True)
        await one.prober.close()

    async def _follow(self, one: Watched) -> None:
        desk, name = self._desk, one.volume.name
        try:
            while True:
                if not one.identity:
                    one.identity, one.ours = await self._known_identity(one)
                before, asked = one.view, one.asked
                one.asked = []
                seen = await one.prober.probe(ANSWER_S, identity=one.identity)
                longest_s = desk.config.storage.longest_heal_s
                now = desk.clock.monotonic()
                one.view = step(before, seen, now=now, longest_heal_s=longest_s)
                if seen.ok:
                    one.identity, one.ours = seen.identity, True
                    one.capacity, one.used = seen.capacity_bytes, seen.used_bytes
                if one.view.step is not before.step:
                    _log.info("volume %s: %s %s", name, one.view.step.value, one.view.reason)
                if one.view.usable is not before.usable:
                    self.changed.set()
                for waiter in asked:
                    if not waiter.done():
                        waiter.set_result(None)
                await self.tell(name)
                await self._pause(one)
        finally:
            await asyncio.shield(one.prober.close())

    async def _pause(self, one: Watched) -> None:
        used = (
            self._desk.redirects.uses(one.volume.name)
            or len(self._desk.exports) > 0
            or not one.view.usable
        )
        seconds = AGAIN_S if one.view.hurried else USED_S if used else IDLE_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await one.wake.wait()
        one.wake.clear()

    async def _known_identity(self, one: Watched) -> tuple[str, bool]:
        """What hosts have said before of which volume this is, and whether we did: ourselves, else
        any that shares."""
        name, host = one.volume.name, self._desk.host
        prefix = keys.volume_state(name, "")
        try:
            found = await self._desk.records.list(prefix, VolumeOnHost)
        except StoreError:
            return "", False
        said = {key.removeprefix(prefix): record.value.identity for key, record in found.items()}
        ours = said.get(host, "")
        shared = one.volume.kind != "local"
        return ours or next((i for _, i in sorted(said.items()) if shared and i), ""), bool(ours)

    # Telling.

    async def tell(self, name: str) -> None:
        """Publish what is seen of a volume when it is news."""
        one, desk = self._watched.get(name), self._desk
        if one is None or one.view.step is PathStep.NEW:
            return
        state, reason = self.state(name)
        before, now = one.told, desk.clock.monotonic()
        defined_at = one.volume.created_at
        same = before is not None and (before.state, before.reason, before.defined_at) == (
            state,
            reason,
            defined_at,
        )
        sizes = before is not None and (before.capacity_bytes, before.used_bytes) == (
            one.capacity,
            one.used,
        )
        if same and (sizes or now - one.told_at < TELL_S):
            return
        since = before.since if before is not None and before.state is state else None
        seen = VolumeOnHost(
            state=state,
            reason=reason,
            capacity_bytes=one.capacity,
            used_bytes=one.used,
            since=desk.clock.realtime() if since is None else since,
            identity=one.identity if one.ours else "",
            defined_at=defined_at,
        )
        try:
            await desk.records.store.put(
                keys.volume_state(name, desk.host), encode(seen), timeout=2.0
            )
        except StoreError as error:
            _log.warning("volume %s: %s", name, error)
            return
        one.told, one.told_at = seen, now

    async def ways_changed(self) -> None:
        """The VMs' ways have changed: tell what it means for their volumes."""
        for name in tuple(self._watched):
            await self.tell(name)


def volumes_of(vm: Vm) -> list[str]:
    """The volumes that a VM has something on."""
    boot = (volume_of(path) for path in (vm.boot.kernel, vm.boot.initrd) if path)
    found = {disk.volume for disk in vm.written} | set(boot)
    return sorted(name for name in found if name)
