"""The live way: memory is copied while the VM runs, then the last pages, then the proof.

The policy decides, this module acts: it reads samples, sets what the policy asks for, and takes
the VM through ``pre-switchover`` (the last moment to say no) to ``completed``, the proof point.
With post-copy the proof is another one; see ``postcopy``.
"""

from __future__ import annotations

import asyncio

from godwit.migration import policy, postcopy
from godwit.migration.handover import OwnerLink
from godwit.migration.holdback import HoldBack, NoHoldBack
from godwit.migration.move import Move, MoveStopped, fail
from godwit.migration.peer import PeerSilent, PrepareAsk, Prepared
from godwit.migration.stream import (
    ENDED,
    TLS_OBJECT,
    Reading,
    Stream,
    end_stream,
    wait_status,
)
from godwit.migration.world import LEASE_MARGIN_S, PRE_SWITCHOVER_S
from godwit.model.errors import GodwitError
from godwit.model.migration import Progress, Stage
from godwit.model.ownership import MovePhase
from godwit.model.units import format_size
from godwit.qmp import EventStream, MonitorError
from godwit.store.errors import StoreError
from godwit.store.records import CasFailed

DISK_PERCENT = 90.0
"""How much of a move its disks are, when they come along."""
COMMIT_S = 2.0
DEVICE_S = 3.0
"""Seconds between ``migrate-continue`` and ``completed`` before the stream is cut."""


class LiveWay:
    """Pre-copy, and post-copy when the policy asks for it."""

    def __init__(self, move: Move, link: OwnerLink) -> None:
        self.move = move
        self.link = link
        self.stream = Stream(move.world.machine.monitor)
        self.postcopy = False
        self._events: EventStream | None = None
        self._started = False
        self._can_hold_back = False
        self._disk_bytes: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self._overhead_ms = policy.overhead(move.world.past_overhead_ms)

    def ask(self) -> PrepareAsk:
        """The same VM, paused, listening on the migration network."""
        order = self.move.order
        return PrepareAsk(
            migration=order.id,
            vm=self.move.vm,
            epoch=0,
            source=order.source,
            method="live",
            postcopy=order.limits.allow_postcopy,
            tls=self.move.world.migration_tls_dir is not None,
        )

    async def make_ready(self) -> None:
        """Set every capability and parameter of this side, for they are sticky."""
        move, world = self.move, self.move.world
        wanted = {"events", "return-path", "pause-before-switchover", "validate-uuid"}
        if move.order.limits.allow_postcopy:
            wanted.add("postcopy-ram")
        if world.migration_tls_dir is not None:
            await self.stream.use_tls(world.migration_tls_dir, endpoint="client")
        await self.stream.set_capabilities(wanted)
        known = await self.stream.parameters()
        first = policy.start(move.order.limits, overhead_ms=self._overhead_ms, now=0.0)
        settings: dict[str, object] = {
            "max_bandwidth": 0,  # the link itself is the limit; QEMU's default is 128 MiB/s
            "downtime_limit": round(first.knobs.limit_ms),
            "tls_creds": TLS_OBJECT if world.migration_tls_dir is not None else "",
        }
        self._can_hold_back = "avail-switchover-bandwidth" in known
        if self._can_hold_back:  # 0, where the link's speed is not known: as it measures itself
            settings["avail_switchover_bandwidth"] = world.info.migration_rate_bits // 8
        await self.stream.set_parameters(**settings)

    async def transfer(self, prepared: Prepared) -> None:
        """Copy until what is left fits into the pause, then commit; see the module."""
        move = self.move
        if self.move.world.migration_tls_dir is not None:
            await self.stream.set_parameters(tls_hostname=prepared.tls_hostname)
        await self._carry_disks(prepared)
        self._events = move.world.machine.monitor.events("MIGRATION")
        self._started = True
        try:
            await move.until_stopped(
                self._connect(prepared.uri_host, prepared.uri_port), what="connect"
            )
        except (OSError, TimeoutError) as error:
            raise fail(
                f"{move.order.destination} cannot be reached on the migration network: "
                f"{error or 'no answer'}"
            ) from None
        await move.enter(Stage.PRECOPY, "copying memory while the VM runs")
        await move.hold("precopy")
        await self._copy(self._events)
        await self._switch_over(self._events)

    async def _carry_disks(self, prepared: Prepared) -> None:
        """First the disks that only this host has: they are most of the way, memory comes last."""
        if not prepared.disk_port:
            return
        move = self.move
        await move.enter(Stage.PRECOPY, "copying disks while the VM runs")
        work = move.world.carried.copy(
            prepared.uri_host,
            prepared.disk_port,
            tls_hostname=prepared.tls_hostname,
            heard=lambda copied, total: self._disk_bytes.put_nowait((copied, total)),
        )
        telling = asyncio.ensure_future(self._tell_of_disks())
        try:
            await move.until_stopped(work, what="copy disks")
        finally:
            telling.cancel()
            await asyncio.wait({telling})

    async def _tell_of_disks(self) -> None:
        while True:
            copied, total = await self._disk_bytes.get()
            done = f"disks: {format_size(copied)} of {format_size(total)}"
            await self.move.tell(
                Progress(
                    stage=Stage.PRECOPY,
                    percent=DISK_PERCENT * copied / max(1, total),
                    bytes_transferred=copied,
                    bytes_remaining=max(0, total - copied),
                    sentence=done,
                )
            )

    async def _connect(self, host: str, port: int) -> None:
        await self.stream.connect_on(await self.move.world.dial(host, port))

    async def end(self) -> str:
        """Bring the stream to its end; with nothing started the VM simply runs on."""
        await self.move.world.carried.drop()
        if not self._started or self._events is None:
            return "gone" if self.move.world.machine.exited.is_set() else "none"
        status = await end_stream(self.stream, self._events)
        if status == "gone" or self.move.world.machine.exited.is_set():
            return "gone"
        return status

    async def drain(self) -> None:
        """Post-copy: serve pages until the destination has them all."""
        if self.postcopy and self._events is not None:
            await postcopy.drain(self.move, self.link, self.stream, self._events)
        else:
            await final_bytes(self.stream, self.move)

    async def adopt(self) -> bool:
        """Find the stream of a move whose agent died; True when it is post-copy already."""
        self._started = True
        self._events = self.move.world.machine.monitor.events("MIGRATION")
        status = (await self.stream.read()).status
        owned = self.link.owner.migration
        paged = owned is not None and owned.phase is MovePhase.PAGE_SOURCE
        self.postcopy = paged or status.startswith("postcopy")
        return self.postcopy

    async def undone(self) -> None:
        """Nothing was made for the destination outside of QEMU."""

    # Copying.

    async def _copy(self, events: EventStream) -> None:
        """Follow the stream until QEMU pauses the VM by itself."""
        move = self.move
        limits = move.order.limits
        state = policy.start(
            limits, overhead_ms=self._overhead_ms, now=move.world.clock.monotonic()
        )
        now = Reading("none")
        back = (HoldBack if self._can_hold_back else NoHoldBack)(move, self.stream)
        while True:
            looking = self._next_status(events, back.look_s)
            event = await move.until_stopped(looking, what="pre-copy")
            if event == "pre-switchover":
                return back.stopped()
            if event in ENDED:
                now = await self.stream.read()
                raise fail(f"QEMU ended the stream ({event}): {now.error or 'no reason given'}")
            waited = back.waiting
            if not waited:  # else only the processors count
                now = await self.stream.read()
            if words := await back.look(now, limit_ms=state.knobs.limit_ms):
                move.tell_beside(self._progress(now, state).but(sentence=words))
            if waited or back.waiting:
                state = policy.resume(state, move.world.clock.monotonic())
                continue
            sample = now.sample(move.world.clock.monotonic())
            state, decision = policy.decide(state, sample, limits, overhead_ms=self._overhead_ms)
            move.say(decision.sentence)
            await self._apply(decision, back, state.knobs.limit_ms)
            move.tell_beside(self._progress(now, state))

    async def _next_status(self, events: EventStream, within_s: float) -> str:
        """The next status worth acting on, or "" when it is time for a sample."""
        try:
            event = await wait_status(events, ENDED | {"pre-switchover"}, timeout=within_s)
        except TimeoutError:
            return ""
        return str(event.data["status"])

    async def _apply(self, decision: policy.Decision, back: HoldBack, limit_ms: float) -> None:
        if decision.abort:
            raise fail(decision.sentence)
        if decision.limit_ms is not None:
            await back.limit(decision.limit_ms)
        if decision.quota is not None or decision.postcopy:
            await back.end(limit_ms)
        if decision.quota is not None:
            self.move.world.throttle(decision.quota)
            self.move.record = self.move.record.but(strategy="throttled-precopy")
        if decision.postcopy:
            await self.stream.monitor.execute("migrate-start-postcopy")
            self.postcopy = True
            self.move.record = self.move.record.but(strategy="postcopy")

    def _progress(self, now: Reading, state: policy.Progressing) -> Progress:
        done = now.transferred / max(1, now.transferred + now.remaining)
        link = now.link_bytes_per_s or self.move.world.info.migration_rate_bits / 8
        expected = now.remaining / link * 1000 + self._overhead_ms if link else None
        return Progress(
            stage=Stage.PRECOPY,
            percent=min(99.0, done * 100),
            bytes_transferred=now.transferred,
            bytes_remaining=now.remaining,
            dirty_bytes_per_s=now.dirty_bytes_per_s,
            link_bytes_per_s=now.link_bytes_per_s,
            expected_blackout_ms=round(expected, 1) if expected is not None else None,
            pass_number=now.pass_number,
            throttle_percent=round((1 - state.knobs.quota) * 100),
            sentence=f"pass {now.pass_number}",
        )

    # Switching over: the VM is dark from here.

    async def _switch_over(self, events: EventStream) -> None:
        move = self.move
        move.enter_quietly(Stage.SWITCHOVER)
        await move.hold("pre-switchover")
        await move.until_stopped(move.world.carried.settle(), what="the last bytes of its disks")
        await self._commit()
        await move.hold("committing")
        move.check()
        await self.stream.go_on()
        wanted = ENDED | {"postcopy-active"} if self.postcopy else ENDED
        status = await self._device(events, wanted)
        if status == "completed":
            self.postcopy = False  # nothing was left to be fetched
        elif status == "postcopy-active":
            move.no_way_back = True  # QEMU cannot bring a source back from here
            await postcopy.loaded_there(move)
        else:
            now = await self.stream.read()
            raise fail(f"the last pages were not taken over: {now.error or status}")

    async def _device(self, events: EventStream, wanted: frozenset[str]) -> str:
        try:
            event = await self.move.until_stopped(
                wait_status(events, wanted, timeout=DEVICE_S), what="the last pages"
            )
        except TimeoutError:
            raise fail(
                f"{self.move.order.destination} did not take the last pages within {DEVICE_S:g} s"
            ) from None
        return str(event.data["status"])

    async def _commit(self) -> None:
        """The checks that allow the irrevocable: peer, own lease, store; else it is called off."""
        move, world = self.move, self.move.world
        left = world.guard.lease_left()
        if left < LEASE_MARGIN_S:
            raise fail(f"{world.host}'s own lease lasts only {left:.1f} s: not committing")
        try:
            state, _ = await asyncio.gather(
                world.peer.ping(move.order.id, oob=True, timeout=PRE_SWITCHOVER_S),
                self.link.commit(timeout=COMMIT_S),
            )
        except PeerSilent as error:
            raise fail(f"{move.order.destination} did not answer in time: {error}") from None
        except (StoreError, CasFailed) as error:
            move.committed = True  # it may have been written
            raise fail(f"the hand-over could not be recorded: {error}") from None
        except GodwitError as error:
            raise fail(error.message) from None
        finally:
            move.committed = True
        if not state.qemu_status or state.phase == "gone":
            raise fail(f"{move.order.destination} is not ready: {state.reason or 'QEMU is silent'}")


async def final_bytes(stream: Stream, move: Move) -> None:
    """Read the bytes of the whole move once the destination runs."""
    try:
        now = await stream.read(timeout=1.0)
    except (MonitorError, MoveStopped):
        return
    progress = move.record.progress.but(bytes_transferred=now.transferred)
    move.record = move.record.but(progress=progress)
