"""Two hosts in one process: real engine, real store twin, fake QEMUs, and a witness of all of it.

The witness sees every change of every run state and every write of the owner record. It objects
when two QEMUs run at once, or when one runs that the record does not name at that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtual_time import VirtualClock

from godwit.migration import recover
from godwit.migration.destination import Incoming
from godwit.migration.gift import give_back
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
from godwit.migration.source import SourceMove
from godwit.migration.world import (
    DestinationWorld,
    DiskGate,
    NoDisks,
    NothingCarried,
    SourceWorld,
)
from godwit.model import keys
from godwit.model.errors import GodwitError, NotFound
from godwit.model.host import HostInfo, QemuFacts
from godwit.model.migration import Migration, MoveLimits
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import Pins, Vm
from godwit.qemu.machine import Machine
from godwit.qemu.tree import DeviceTree
from godwit.qmp import Monitor
from godwit.qmp.fake import FakeQemu, link
from godwit.qmp.fake_migration import FakeMigration, _BrokenError
from godwit.store.api import OpKind
from godwit.store.memory import MemoryStore
from godwit.store.records import Records, encode

EPOCH_AT_START = 7
MOVE = "m-1"
TREE = DeviceTree(
    machine="pc-q35-9.2", cpu_model="Nehalem", cpus=1, memory_bytes=64 << 20, devices=()
)


def vm(**changes: Any) -> Vm:
    fields: dict[str, Any] = {
        "name": "web",
        "cpus": 1,
        "memory_bytes": 64 << 20,
        "pins": Pins(uuid="u-1", machine="pc-q35-9.2", cpu_model="Nehalem-v1", accelerator="tcg"),
        "created_at": 1.0,
    }
    return Vm(**{**fields, **changes})


def host_info(name: str, **changes: Any) -> HostInfo:
    fields: dict[str, Any] = {
        "name": name,
        "agent_url": f"https://{name}",
        "cpus": 4,
        "cpu_vendor": "GenuineIntel",
        "memory_bytes": 8 << 30,
        "qemu": QemuFacts(
            version=(10, 0, 2),
            accelerator="tcg",
            machines=("pc-q35-9.2",),
            cpu_models=("Nehalem-v1",),
        ),
        "migration_address": "10.0.0.1",
        "migration_subnet": "10.0.0.0/24",
        "migration_rate_bits": 1_000_000_000,
        "networks": {"lan": 1500},
        "volumes": ("shared",),
    }
    return HostInfo(**{**fields, **changes})


class Witness:
    """Who ran when, who was entitled, and what happened in which order."""

    def __init__(self) -> None:
        self.effects: list[str] = []
        self.timed: list[tuple[float, str]] = []
        self.clock: Callable[[], float] = lambda: 0.0
        self.running: set[str] = set()
        self.open_gates: set[str] = set()  # hosts that may write the brokered disks
        self.violations: list[str] = []
        self.owner: Owner | None = None
        self.epochs: list[int] = []

    def did(self, what: str) -> None:
        self.effects.append(what)
        self.timed.append((self.clock(), what))

    def ran(self, host: str, runs: bool) -> None:
        if runs == (host in self.running):
            return
        if not runs:
            self.running.discard(host)
            self.did(f"{host}: vcpus stop")
            return
        if self.running:
            self.violations.append(f"{host} runs while {sorted(self.running)} runs")
        if self.owner is None or self.owner.host != host:
            self.violations.append(f"{host} runs but the record says {self.owner!r}")
        self.running.add(host)
        self.did(f"{host}: vcpus run")

    def wrote(self, owner: Owner) -> None:
        move = owner.migration
        bound = f" {move.phase.value}" if move else ""
        self.did(f"record: {owner.host} {owner.epoch} {owner.state.value}{bound}")
        if self.epochs and owner.epoch < self.epochs[-1]:
            self.violations.append(f"the epoch fell from {self.epochs[-1]} to {owner.epoch}")
        self.epochs.append(owner.epoch)
        self.owner = owner


class WitnessedStore(MemoryStore):
    """The twin, whose owner writes are witnessed; ``on_txn`` may meddle just before one."""

    def __init__(self, witness: Witness, **more: Any) -> None:
        super().__init__(**more)
        self.witness = witness
        self.on_owner_write: Callable[[Owner], Awaitable[None] | None] | None = None

    async def txn(self, compare: Any, then: Any, orelse: Any = (), *, timeout: Any = None) -> Any:
        writes = [op for op in then if op.kind is OpKind.PUT and op.key.endswith("/owner")]
        for op in writes:
            if self.on_owner_write is not None:
                meddling = self.on_owner_write(Owner.model_validate_json(op.value))
                if meddling is not None:
                    await meddling
        before = self._engine.revision
        try:
            return await super().txn(compare, then, orelse, timeout=timeout)
        finally:
            if writes and self._engine.revision > before:
                found = self._engine.get(_get(writes[0].key)).records[0]
                self.witness.wrote(Owner.model_validate_json(found.value))


def _get(key: str) -> Any:
    from godwit.store.codec import key_bytes
    from godwit.store.engine import Get

    return Get(key_bytes(key))


class LabMigration(FakeMigration):
    """Post-copy, too, stops at pre-switchover when asked to, as the real one does."""

    async def _postcopy(self, peer: FakeMigration) -> None:
        self._stop_guest()
        if self.capabilities["pause-before-switchover"]:
            self._set("pre-switchover")
            await self._continue.wait()
            if self._broken == "cancelled":
                raise _BrokenError
        await super()._postcopy(peer)


class LabQemu(FakeQemu):
    """A fake on a host, watched by the witness; frozen, it does nothing at all."""

    def __init__(self, host: str, witness: Witness, **more: Any) -> None:
        self.host = host
        self.witness = witness
        self.died = asyncio.Event()
        self.released = False  # the note beside it
        self._state = ""
        super().__init__(name=host, clock=VirtualClock().realtime, sleep=self._nap, **more)
        self.migration = LabMigration(self)
        self._handlers |= self.migration.handlers()

    @property  # type: ignore[override]
    def run_state(self) -> str:
        return self._state

    @run_state.setter
    def run_state(self, state: str) -> None:
        self._state = state
        self.witness.ran(self.host, state == "running")

    async def _nap(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.until_thawed()

    async def run(self, command: str, arguments: dict[str, Any], *, oob: bool) -> Any:
        if command in ("cont", "stop", "quit", "migrate", "migrate-continue", "migrate_cancel",
                       "yank", "announce-self"):  # fmt: skip
            self.witness.did(f"{self.host}: {command}")
        return await super().run(command, arguments, oob=oob)

    async def die(self) -> None:
        self._thawed.set()  # SIGKILL reaches a stopped process too
        if not self.dead:
            self.witness.did(f"{self.host}: qemu dies")
        await super().die()
        self.died.set()


class LabMachine(Machine):
    """The real ``Machine`` over a fake: only its process is another."""

    def __init__(self, qemu: LabQemu, monitor: Monitor, epoch: int) -> None:
        self.qemu = qemu
        self.monitor = monitor
        self.exited = qemu.died
        self.exit_status = None
        self._epoch = epoch
        self._joining = None
        self.tree = TREE

    vm = "web"  # type: ignore[assignment]
    pid = os.getpid()  # type: ignore[assignment]
    cgroup = None  # type: ignore[assignment]

    @property
    def epoch(self) -> int:
        return self._epoch

    def amend(self, **changes: object) -> None:
        if changes.get("released"):
            self.qemu.released = True
            self.qemu.witness.did(f"{self.qemu.host}: notes that it was let go")
        self._epoch = int(str(changes.get("epoch", self._epoch)))

    async def device_tree(self) -> DeviceTree:
        await self.status()
        return self.tree

    async def kill(self, *, timeout: float = 10.0) -> int | None:
        await self.qemu.die()
        return None

    async def close(self) -> None:
        await self.monitor.close()


class LabDisks:
    """A gate before brokered disks, told to the witness; it can be made to break either way."""

    def __init__(self, host: str, witness: Witness) -> None:
        self.host, self.witness, self.is_open = host, witness, host == "host1"
        witness.open_gates |= {host} if self.is_open else set()
        self.stuck: GodwitError | None = None  # it does not close
        self.pathless: GodwitError | None = None  # it closes, and cannot be synced
        self.refusal: GodwitError | None = None  # it does not open

    async def close(self, *, sync: bool = True) -> None:
        if self.stuck is not None:
            raise self.stuck
        if self.is_open:
            self.witness.did(f"{self.host}: disks close")
        self.is_open = False
        self.witness.open_gates.discard(self.host)
        if sync and self.pathless is not None:
            raise self.pathless

    async def open(self, epoch: int, *, unsynced: bool = False) -> None:
        if self.refusal is not None:
            raise self.refusal
        if not self.is_open:
            self.witness.did(f"{self.host}: disks open at {epoch}{' unsynced' * unsynced}")
        self.is_open = True
        self.witness.open_gates.add(self.host)
        if len(self.witness.open_gates) > 1:
            self.witness.violations.append("two hosts may write the brokered disks")


class LabGate:
    """Open or closed, and told to the witness."""

    def __init__(self, host: str, witness: Witness, *, is_open: bool) -> None:
        self.host, self.witness, self.is_open = host, witness, is_open
        self.broken = False

    def close(self) -> None:
        if self.is_open:
            self.witness.did(f"{self.host}: gate closes")
        self.is_open = False

    def open(self) -> None:
        if self.broken:
            raise OSError("no such bridge")
        if not self.is_open:
            self.witness.did(f"{self.host}: gate opens")
        self.is_open = True

    def announce(self) -> None:
        self.witness.did(f"{self.host}: announce")


class LabGuard:
    """The guard as the engine sees it: remembers arms, and has a lease to show."""

    def __init__(self) -> None:
        self.armed: dict[str, tuple[str, str]] = {}
        self.left = 11.0

    async def arm(self, vm: str, migration: str, role: str) -> None:
        self.armed[vm] = (migration, role)

    async def disarm(self, vm: str) -> None:
        self.armed.pop(vm, None)

    def lease_left(self) -> float:
        return self.left


@dataclass
class LabHolds:
    """Hold points by (role, point); ``at`` runs an act there instead of holding."""

    acts: dict[tuple[str, str], Callable[[], Awaitable[None] | None]] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    async def reach(self, point: str, *, vm: str, role: str) -> None:
        self.seen.append(f"{role} {point}")
        act = self.acts.pop((role, point), None)
        if act is not None:
            result = act()
            if result is not None:
                await result


class LabCarried:
    """Disks that come along, told to the witness; each step can be made to fail."""

    def __init__(self, witness: Witness) -> None:
        self.witness = witness
        self.refusal: dict[str, GodwitError] = {}
        self.heard = [(1 << 20, 4 << 20), (4 << 20, 4 << 20)]
        self.arrived = asyncio.Event()  # the copying ends once this is set
        self.arrived.set()
        self.dropped = 0

    def _step(self, name: str) -> None:
        self.witness.did(f"disks along: {name}")
        if (error := self.refusal.get(name)) is not None:
            raise error

    async def copy(self, host: str, port: int, *, tls_hostname: str, heard: Any) -> None:
        assert (host, port) == ("10.0.0.2", 10809)
        self._step("copy")
        for copied, total in self.heard:
            heard(copied, total)
            await asyncio.sleep(0)
        await self.arrived.wait()

    async def settle(self) -> None:
        self._step("settle")

    async def drop(self) -> None:
        self.dropped += 1

    async def take_in(self, _machine: Machine) -> int:
        self._step("take in")
        return 10809

    async def taken_in(self, _machine: Machine) -> None:
        self._step("taken in")


class DestinationAgent:
    """The destination's agent as far as a move needs it; it can die, hang and come back."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.incoming: dict[str, Incoming] = {}
        self.asks: dict[str, PrepareAsk] = {}
        self.machine: LabMachine | None = None
        self.qemu: LabQemu | None = None
        self.gate: LabGate | None = None
        self.guard = LabGuard()
        self.note = 0
        self.alive = asyncio.Event()
        self.alive.set()
        self.gone: list[str] = []
        self.announced = 0
        self.calls: list[str] = []

    def world(self, ask: PrepareAsk) -> DestinationWorld:
        rig, witness = self.rig, self.rig.witness

        async def spawn(_postcopy: bool) -> Machine:
            qemu = LabQemu("host2", witness, incoming=True, autostart=False)
            self.qemu = qemu
            self.gate = LabGate("host2", witness, is_open=False)
            link(rig.qemu, qemu)
            await qemu.listen(rig.path / "d.qmp")
            return await self.machine_of(qemu, ask.epoch + 1)

        async def note(epoch: int, migration: str) -> None:
            witness.did(f"host2: notes epoch {epoch}")
            self.note = epoch

        async def unnote() -> None:
            witness.did("host2: forgets its note")
            self.note = 0

        async def announced(_machine: Machine) -> None:
            self.announced += 1

        async def gone(reason: str) -> None:
            self.gone.append(reason)

        def gate(_machine: Machine) -> LabGate:
            assert self.gate is not None
            return self.gate

        return DestinationWorld(
            host="host2",
            info=host_info("host2"),
            clock=VirtualClock(rig.skew),
            records=rig.records,
            spawn=spawn,
            gate=gate,
            guard=self.guard,
            note_started=note,
            forget_note=unnote,
            noted_epoch=lambda: self.note,
            announced=announced,
            gone=gone,
            holds=rig.holds,
            disks=rig.disks["host2"],
            migration_address="10.0.0.2",
            strain=lambda _machine: rig.strain["host2"](),
            **(
                {"take_in": rig.carried.take_in, "taken_in": rig.carried.taken_in}
                if rig.carried is not None
                else {}
            ),
        )

    async def machine_of(self, qemu: LabQemu, epoch: int) -> LabMachine:
        monitor = await Monitor.connect(self.rig.path / "d.qmp", name="d", deadline=2)
        self.machine = LabMachine(qemu, monitor, epoch)
        return self.machine

    # Faults.

    async def die(self) -> None:
        """SIGKILL: connections close, QEMU stays."""
        self.alive.clear()
        for incoming in self.incoming.values():
            incoming.close()
        self.incoming.clear()
        if self.machine is not None:
            await self.machine.close()

    async def restart(self) -> str:
        """A new life: finds the QEMU, asks ``recover``, acts. Returns the action."""
        assert self.qemu is not None
        action = "nothing"
        if not self.qemu.dead:
            ask = self.asks[MOVE]
            machine = await self.machine_of(self.qemu, ask.epoch + 1)
            status, stream = await machine.status(), await machine.query_migrate()
            found = recover.Found(
                role="incoming",
                epoch=ask.epoch + 1,
                migration=MOVE,
                qemu_status=status.status,
                stream_status=str(stream.get("status", "none")),
            )
            owner = await self.rig.records.owner("web")
            verdict = recover.judge(owner.value if owner else None, found, host="host2")
            action = verdict.action.value
            if verdict.action is recover.Action.GO_ON_AS_DESTINATION:
                self.incoming[MOVE] = incoming = Incoming(ask, self.world(ask))
                incoming.adopt(machine)
            elif verdict.action is recover.Action.END:
                await machine.kill()
        self.alive.set()
        return action

    async def close(self) -> None:
        for incoming in self.incoming.values():
            incoming.close()
        if self.machine is not None:
            await self.machine.qemu.die()
            await self.machine.close()


class DirectPeer:
    """Calls the destination's agent without a network; ``cut`` makes it silent."""

    def __init__(self, agent: DestinationAgent) -> None:
        self.agent = agent
        self.cut = False
        self.cut_only: set[str] = set()

    async def _call(self, verb: str, work: Callable[[], Awaitable[Any]], timeout: float) -> Any:
        self.agent.calls.append(verb)
        try:
            async with asyncio.timeout(timeout):
                if self.cut or verb in self.cut_only:
                    await asyncio.sleep(timeout + 1)
                await self.agent.alive.wait()
                return await work()
        except TimeoutError:
            raise PeerSilent(f"no answer within {timeout:g} s") from None

    def _incoming(self, migration: str) -> Incoming:
        found = self.agent.incoming.get(migration)
        if found is None:
            raise NotFound(f"host2 knows nothing of {migration}", hint="it was ended")
        return found

    async def check(self, ask: CheckAsk, *, timeout: float) -> CheckAnswer:
        raise NotImplementedError

    async def prepare(self, ask: PrepareAsk, *, timeout: float) -> Prepared:
        async def work() -> Prepared:
            self.agent.asks[ask.migration] = ask
            incoming = Incoming(ask, self.agent.world(ask))
            self.agent.incoming[ask.migration] = incoming
            return await incoming.prepare()

        found: Prepared = await self._call("prepare", work, timeout)
        return found

    async def ping(self, migration: str, *, oob: bool = False, timeout: float) -> PeerState:
        async def work() -> PeerState:
            incoming = self.agent.incoming.get(migration)
            if incoming is None:
                return PeerState(phase="gone", reason=f"host2 knows nothing of {migration}")
            return await incoming.ping(oob=oob)

        found: PeerState = await self._call("ping", work, timeout)
        return found

    async def released(self, migration: str, *, timeout: float) -> None:
        async def work() -> None:
            await self._incoming(migration).release()

        await self._call("released", work, timeout)

    async def take_over(self, migration: str, vm: str, *, timeout: float) -> TakenOver:
        async def work() -> TakenOver:
            agent = self.agent
            if migration not in agent.incoming and agent.qemu is not None and agent.qemu.dead:
                owner = await agent.rig.owner()
                if agent.note < owner.epoch:
                    await give_back(
                        agent.rig.records, agent.rig.clock, vm=vm, migration=migration, host="host2"
                    )
            return await self._incoming(migration).take_over()

        found: TakenOver = await self._call("take_over", work, timeout)
        return found

    async def abort(self, migration: str, reason: str, *, timeout: float) -> None:
        async def work() -> None:
            incoming = self.agent.incoming.get(migration)
            if incoming is not None:
                await incoming.abort(reason)

        await self._call("abort", work, timeout)

    async def recover(self, migration: str, *, timeout: float) -> Recovered:
        async def work() -> Recovered:
            return await self._incoming(migration).recover(41000)

        found: Recovered = await self._call("recover", work, timeout)
        return found

    async def clock(self, *, timeout: float) -> float:
        async def work() -> float:
            return VirtualClock(self.agent.rig.skew).realtime()

        found: float = await self._call("clock", work, timeout)
        return found


class Rig:
    """Everything of one scenario. Use as an async context manager."""

    def __init__(
        self,
        path: Path,
        *,
        method: str = "live",
        paused: bool = False,
        skew: float = 0.0,
        limits: MoveLimits | None = None,
    ) -> None:
        self.path = path
        self.skew = skew
        self.paused = paused
        self.clock = VirtualClock()
        self.witness = Witness()
        self.store = WitnessedStore(self.witness, clock=self.clock.monotonic)
        self.records = Records(self.store)
        self.disks: dict[str, DiskGate] = {"host1": NoDisks(), "host2": NoDisks()}
        self.carried: LabCarried | None = None
        self.holds = LabHolds()
        self.guard = LabGuard()
        self.published: list[Migration] = []
        self.quotas: list[float] = []
        self.agent = DestinationAgent(self)
        self.peer = DirectPeer(self.agent)
        self.vm = vm()
        self.method = method
        self.limits = limits or MoveLimits()
        self.past_overhead_ms: tuple[float, ...] = ()
        self.strain: dict[str, Callable[[], float]] = {"host1": lambda: 1.0, "host2": lambda: 1.0}
        self.unreachable = False
        self.dialled: list[tuple[str, int]] = []

    async def __aenter__(self) -> Rig:
        self.witness.owner = Owner(
            host="host1",
            epoch=EPOCH_AT_START,
            state=OwnerState.RUNNING,
            paused=self.paused,
        )
        await self.store.put(keys.vm_owner("web"), encode(self.witness.owner))
        await self.renew("host2")
        self.gate = LabGate("host1", self.witness, is_open=True)
        self.qemu = LabQemu("host1", self.witness)
        if self.paused:
            self.qemu.set_run_state("paused")
        self.witness.effects.clear()
        self.witness.timed.clear()
        await self.qemu.listen(self.path / "s.qmp")
        await self.qemu.listen(self.path / "s.guard")
        self.machine = await self.connect()
        self.move = self.make_move()
        return self

    async def connect(self) -> LabMachine:
        monitor = await Monitor.connect(self.path / "s.qmp", name="s", deadline=2)
        return LabMachine(self.qemu, monitor, EPOCH_AT_START)

    def make_move(self) -> SourceMove:
        order = Migration(
            id=MOVE,
            vm="web",
            source="host1",
            destination="host2",
            method="quick" if self.method == "quick" else "live",
            accepted_at=self.clock.realtime(),
            limits=self.limits,
        )
        world = SourceWorld(
            host="host1",
            info=host_info("host1"),
            clock=self.clock,
            records=self.records,
            machine=self.machine,
            gate=self.gate,
            guard=self.guard,
            peer=self.peer,
            publish=self._publish,
            throttle=self.throttle,
            holds=self.holds,
            disks=self.disks["host1"],
            carried=self.carried or NothingCarried(),
            volumes=self.path,
            past_overhead_ms=self.past_overhead_ms,
            strain=lambda: self.strain["host1"](),
            dial=self.dial,
        )
        return SourceMove(order, self.vm, world)

    async def dial(self, host: str, port: int) -> socket.socket:
        """A stream's socket; the fakes only count the bytes that would go through it."""
        if self.unreachable:
            raise OSError("No route to host")
        self.dialled.append((host, port))
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours

    def throttle(self, quota: float) -> None:
        self.quotas.append(quota)

    async def _publish(self, record: Migration) -> None:
        self.published.append(record)

    async def renew(self, host: str, *, ttl_s: int = 100_000) -> None:
        lease = await self.store.lease_grant(ttl_s)
        await self.store.put(keys.host_lease(host), b"{}", lease=lease.id)

    async def __aexit__(self, *_exc: object) -> None:
        await self.agent.close()
        await self.qemu.die()
        await self.machine.close()
        with contextlib.suppress(Exception):
            await self.store.aclose()

    # Driving and judging.

    def at(self, role: str, point: str, act: Callable[[], Awaitable[None] | None]) -> None:
        """Do this when the engine comes to a hold point."""
        self.holds.acts[(role, point)] = act

    async def play(self) -> Migration:
        """Run the move, then let everything settle."""
        report = await self.move.run()
        await self.settle()
        return report

    async def settle(self, seconds: float = 10.0) -> None:
        await asyncio.sleep(seconds)

    async def owner(self) -> Owner:
        found = await self.records.owner("web")
        assert found is not None
        return found.value

    async def judge(self, runs_on: str) -> Owner:
        """The invariants that hold after every scenario; ``runs_on`` may be ``none``."""
        assert self.witness.violations == []
        assert self.witness.epochs == sorted(self.witness.epochs)
        wanted = set() if runs_on == "none" else {runs_on}
        assert self.witness.running == wanted
        owner = await self.owner()
        if wanted:
            assert owner.host == runs_on
            assert owner.state is OwnerState.RUNNING
        destination = self.agent.gate
        assert (
            self.gate.is_open == (runs_on == "host1")
            or self.qemu.dead
            or self.paused
            or (runs_on == "none")
        )
        if destination is not None and runs_on == "host1":
            assert not destination.is_open or (self.agent.qemu is not None and self.agent.qemu.dead)
        return owner

    def nothing_left(self) -> None:
        """Neither arms nor copies nor reservations of a move that is over."""
        assert self.guard.armed == {}
        found = self.store._engine.get(_get(keys.host_reservation("host2", "web")))
        assert found.records in ((), [])

    def done(self, *wanted: str) -> list[str]:
        """The recorded effects that begin with one of these."""
        return [effect for effect in self.witness.effects if effect.startswith(wanted)]

    def order(self, *marks: str) -> None:
        """These effects happened, in this order."""
        at = -1
        for mark in marks:
            later = [
                n for n, effect in enumerate(self.witness.effects) if n > at and effect == mark
            ]
            assert later, f"{mark!r} not after #{at} in {self.witness.effects}"
            at = later[0]


def stage_names(report: Migration) -> list[str]:
    return [stage.name.value for stage in report.stages]
