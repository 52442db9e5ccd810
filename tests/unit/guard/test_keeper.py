"""The keeper in a time the test owns: the store's twin, freezers that do what they are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from godwit.guard.deadline import RESET_S, Stand
from godwit.guard.freezer import Freezer
from godwit.guard.keeper import Keeper
from godwit.guard.lease import HostLease, Promise
from godwit.guard.notes import load
from godwit.guard.vms import Vms
from godwit.guard.watchdog import Watchdog
from godwit.host.errors import CgroupError
from godwit.host.process import Process, identify
from godwit.model import keys
from godwit.model.membership import Renewal
from godwit.model.ownership import Owner, OwnerState
from godwit.store.memory import MemoryStore
from godwit.store.records import Records, encode

from .test_lease import ManualClock

OURS = Owner(host="host1", epoch=7, state=OwnerState.RUNNING)


class FakeFreezer(Freezer):
    """Stands still at once, or not at all."""

    def __init__(self, process: Process, name: str) -> None:
        object.__setattr__(self, "process", process)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "state", Stand.RUNNING)
        object.__setattr__(self, "did", [])
        object.__setattr__(self, "broken", "")

    def _to(self, what: str, stand: Stand) -> Stand:
        self.did.append(what)  # type: ignore[attr-defined]
        if self.broken and what == "freeze":  # type: ignore[attr-defined]
            raise CgroupError("no such freezer")
        object.__setattr__(self, "state", stand)
        return stand

    def check(self) -> str:
        return str(self.broken)  # type: ignore[attr-defined]

    def stand(self) -> Stand:
        return Stand(self.state)  # type: ignore[attr-defined]

    def freeze(self) -> Stand:
        return self._to("freeze", Stand.FROZEN)

    def thaw(self) -> Stand:
        return self._to("thaw", Stand.RUNNING)

    def kill(self) -> Stand:
        return self._to("kill", Stand.GONE)


class FakeWatchdog(Watchdog):
    """Notes until when it was fed."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"), now=lambda: 0.0)
        self.until: float | None = None
        self.left = False

    @property
    def running(self) -> bool:
        return self.until is not None

    def probe(self) -> bool:
        self.usable = True
        return True

    def keep(self, until: float) -> bool:
        self.until = until
        return True

    def rest(self) -> None:
        self.until = None

    def leave(self) -> None:
        self.left = True


class Rig:
    """A guard without its socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = ManualClock()
        self.store = MemoryStore(clock=self.clock.monotonic)
        self.freezers: dict[str, FakeFreezer] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def freezer(self, process: Process, name: str) -> FakeFreezer:
        return self.freezers.setdefault(name, FakeFreezer(process, name))

    async def start(self) -> None:
        async def promise() -> Promise:
            return await self.keeper.promise()

        self.watchdog = FakeWatchdog()
        self.vms = Vms(now=self.clock.monotonic, log=self.path / "log", notify=lambda: None)
        self.lease = HostLease(
            self.store,
            self.clock,
            host="host1",
            boot_id=lambda: "boot-1",
            promise=promise,
            renewed=lambda: self.keeper.renewed(),
        )
        self.keeper = Keeper(
            self.vms,
            self.lease,
            Records(self.store),
            self.clock,
            host="host1",
            boot_id="boot-1",
            watchdog=self.watchdog,
            file=self.path / "guard.json",
            log=self.path / "log",
            freezer=self.freezer,
        )
        self.keeper.recall()
        self.tasks = [
            asyncio.create_task(work, name=name)
            for work, name in (
                (self.keeper.serve(), "keeper"),
                (self.lease.serve(), "lease"),
                (self.lease.failsafe(), "failsafe"),
            )
        ]
        await self.pass_(0.1)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.vms.close()

    def register(self, vm: str = "web", *, ha: bool = True, deadline: bool = True) -> None:
        me = identify(os.getpid())
        assert me is not None
        self.vms.register(
            vm=vm,
            process=me,
            monitor=self.path / vm / "guard.sock",
            epoch=7,
            ha=ha,
            deadline=deadline,
            cgroup=vm,
        )
        self.keeper.registered()

    async def own(self, owner: Owner = OURS, vm: str = "web") -> None:
        away, self.store.faults.unavailable = self.store.faults.unavailable, False
        await self.store.put(keys.vm_owner(vm), encode(owner))
        self.store.faults.unavailable = away

    async def pass_(self, seconds: float) -> None:
        """Let time pass in small steps; threads get the real moments they need."""
        until = self.clock.now + seconds
        while self.clock.now < until - 1e-9:
            await self.clock.advance(min(0.1, until - self.clock.now))
            await asyncio.sleep(0.002)

    def did(self, vm: str = "web") -> list[str]:
        return list(self.freezers[vm].did) if vm in self.freezers else []  # type: ignore[attr-defined]

    async def renewal(self) -> Renewal:
        found = await self.store.get(keys.host_renewal("host1"))
        assert found is not None
        return Renewal.model_validate_json(found.value)

    def cut(self, *, off: bool = True) -> None:
        self.store.faults.unavailable = off


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    found = Rig(tmp_path)
    await found.start()
    yield found
    await found.stop()
    with contextlib.suppress(Exception):
        await found.store.aclose()


async def test_it_freezes_at_eight_seconds_and_thaws_by_the_record(rig: Rig) -> None:
    await rig.own()
    rig.register()
    await rig.pass_(7)
    sent = rig.lease.renewed_at
    assert sent is not None
    rig.cut()
    await rig.pass_(sent + 7.9 - rig.clock.now)
    assert rig.did() == []
    await rig.pass_(0.3)
    assert rig.did() == ["freeze"]
    assert "not renewed for 8.0 s" in rig.keeper.frozen()["web"]
    await rig.pass_(30)
    assert rig.did() == ["freeze"]
    rig.cut(off=False)
    await rig.pass_(1.5)
    assert rig.did() == ["freeze", "thaw"]
    assert rig.keeper.frozen() == {}
    acts = [json.loads(line)["act"] for line in (rig.path / "log").read_text().splitlines()]
    assert acts == ["freeze", "thaw"]


async def test_it_kills_what_moved(rig: Rig) -> None:
    await rig.own()
    rig.register()
    await rig.pass_(1)
    rig.cut()
    await rig.pass_(10)
    await rig.own(OURS.but(host="host2", epoch=8))
    rig.cut(off=False)
    await rig.pass_(1.5)
    assert rig.did() == ["freeze", "kill"]


async def test_a_record_that_cannot_be_read_thaws_nothing(rig: Rig) -> None:
    await rig.own()
    rig.register()
    await rig.pass_(1)
    rig.cut()
    await rig.pass_(10)
    rig.cut(off=False)
    rig.keeper._records = Records(broken := MemoryStore(clock=rig.clock.monotonic))
    broken.faults.unavailable = True
    await rig.pass_(5)
    assert rig.did() == ["freeze"]
    rig.keeper._records = Records(rig.store)
    await rig.pass_(1)
    assert rig.did() == ["freeze", "thaw"]


async def test_others_are_never_touched(rig: Rig) -> None:
    rig.register("plain", ha=False)
    rig.register("fenced", deadline=False)
    await rig.pass_(1)
    assert rig.watchdog.until is None  # and for them no host is reset
    rig.cut()
    await rig.pass_(60)
    assert (rig.did("plain"), rig.did("fenced")) == ([], [])
    assert rig.watchdog.until is None


async def test_it_is_no_more_watched_once_it_is_not_highly_available(rig: Rig) -> None:
    rig.register()
    await rig.pass_(1)
    assert rig.watchdog.running
    rig.register(ha=False)
    assert not rig.watchdog.running
    rig.cut()
    await rig.pass_(20)
    assert rig.did() == []


async def test_what_ended_while_nobody_looked_binds_no_watchdog(rig: Rig) -> None:
    gone = Process(2**22 - 1, 1)
    monitor = rig.path / "old" / "guard.sock"
    rig.vms.register(vm="old", process=gone, monitor=monitor, epoch=1, ha=True, cgroup="old")
    rig.register()
    rig.keeper.registered()
    await rig.pass_(1)
    assert set(rig.vms.vms) == {"web"}
    assert rig.watchdog.running
    rig.vms.forget("web")
    await rig.pass_(1)
    assert not rig.watchdog.running
    known = load(rig.path / "guard.json", boot_id="boot-1")
    assert known is not None
    assert "old" not in {entry.vm for entry in known.vms}


async def test_without_a_leader_nobody_stops(rig: Rig) -> None:
    await rig.own()
    rig.register()
    await rig.pass_(1)
    rig.store.faults.leaderless = True
    await rig.pass_(60)
    assert rig.did() == []
    proven, counted = rig.lease.renewed_at, rig.lease.counts_from
    assert proven is not None
    assert counted is not None
    assert counted - proven > 50
    # Cut off as well: nobody says any more that there is no leader.
    rig.cut()
    await rig.pass_(9)
    assert rig.did() == ["freeze"]


async def test_the_watchdog_runs_out_at_the_deadline(rig: Rig) -> None:
    rig.register()
    await rig.pass_(1)
    rig.cut()
    counts = rig.lease.counts_from
    assert counts is not None
    rig.freezers["web"].__dict__["broken"] = "no such freezer"
    await rig.pass_(counts + 8.9 - rig.clock.now)
    assert set(rig.did()) == {"freeze"}
    assert rig.watchdog.until == counts + RESET_S
    await rig.pass_(0.6)
    assert rig.did()[-1] == "kill"  # and then nothing is left to reset a host for
    await rig.pass_(5)
    assert rig.watchdog.until is not None
    assert rig.watchdog.until > rig.clock.now + 9


async def test_what_stands_still_keeps_the_host(rig: Rig) -> None:
    rig.register()
    await rig.pass_(1)
    rig.cut()
    await rig.pass_(40)
    assert rig.watchdog.until is not None
    assert rig.watchdog.until > rig.clock.now + 9


async def test_a_renewal_says_armed_only_when_it_is(rig: Rig) -> None:
    first = await rig.renewal()
    assert (first.boot_id, first.guard, first.watchdog) == ("boot-1", "armed", True)
    rig.freezers["web"] = FakeFreezer(Process(1, 1), "web")
    rig.freezers["web"].__dict__["broken"] = "its QEMU is not in the group"
    rig.register()
    await rig.pass_(0.5)  # at once: nobody has to wait for the next one
    second = await rig.renewal()
    assert (second.guard, second.number > first.number) == ("unarmed", True)
    rig.freezers["web"].__dict__["broken"] = ""
    await rig.pass_(3.5)
    assert (await rig.renewal()).guard == "armed"
    rig.watchdog.usable = False
    await rig.pass_(3.5)
    assert (await rig.renewal()).watchdog is False


@pytest.mark.parametrize("moved", [False, True])
async def test_the_next_guard_thaws_or_kills(rig: Rig, moved: bool) -> None:
    await rig.own()
    rig.register()
    await rig.pass_(1)
    rig.cut()
    await rig.pass_(9)
    assert rig.did() == ["freeze"]
    await rig.stop()
    assert rig.watchdog.left  # it was promised, so it runs on
    await rig.start()
    assert "found frozen" in rig.keeper.frozen()["web"]
    await rig.pass_(20)
    assert rig.did() == ["freeze"]
    if moved:
        await rig.own(OURS.but(host="host2", epoch=8))
    rig.cut(off=False)
    await rig.pass_(1.5)
    assert rig.did() == ["freeze", "kill" if moved else "thaw"]


async def test_a_guard_that_starts_while_cut_off_keeps_the_old_deadline(rig: Rig) -> None:
    await rig.own()
    rig.register()
    await rig.pass_(1)
    sent = rig.lease.renewed_at
    assert sent is not None
    rig.cut()
    await rig.pass_(6)
    await rig.stop()
    await rig.start()
    await rig.pass_(sent + 8.3 - rig.clock.now)
    assert rig.did() == ["freeze"]


async def test_notes_of_another_boot_count_for_nothing(rig: Rig) -> None:
    rig.register()
    await rig.pass_(1)
    file = rig.path / "guard.json"
    known = load(file, boot_id="boot-1")
    assert known is not None
    assert [entry.vm for entry in known.vms] == ["web"]
    assert load(file, boot_id="boot-2") is None
    file.write_text("{ damaged")
    assert load(file, boot_id="boot-1") is None


async def test_what_the_agent_froze_is_looked_at(rig: Rig) -> None:
    await rig.own()
    rig.register()
    await rig.pass_(1)
    rig.freezers["web"].__dict__["state"] = Stand.FROZEN
    await rig.pass_(4)
    assert rig.did() == []  # it knows nothing of it
    rig.keeper.look("web")
    await rig.pass_(0.5)
    assert rig.did() == ["thaw"]


async def test_the_epoch_is_what_the_agent_noted_last(rig: Rig) -> None:
    """A copy that came back as a gift has another one than it was registered with."""
    rig.register()
    folder = rig.path / "web"
    folder.mkdir()
    (folder / "runtime.json").write_text(json.dumps({"pid": os.getpid(), "epoch": 12}))
    await rig.own(OURS.but(epoch=12))
    rig.cut()
    await rig.pass_(12)
    rig.cut(off=False)
    await rig.pass_(1.5)
    assert rig.did() == ["freeze", "thaw"]
