"""What a failover writes of a VM in the middle of a move, on each store: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from godwit.cluster.steps import Conclude, Step, Stopped, Swap
from godwit.host.clock import RealClock
from godwit.manager.cache import Cache
from godwit.manager.failover.acting import Actor
from godwit.manager.world import World
from godwit.model import keys, ownership
from godwit.model.membership import Renewal
from godwit.model.migration import Migration, MoveState, Outcome
from godwit.model.ownership import MoveIntent, Owner, OwnerState, Restarts
from godwit.model.vm import Pins
from godwit.store.api import Store, value_is
from godwit.store.records import CasFailed, Records, encode

ME = b"m1/a"
EPOCH = 4
PINS = Pins(uuid="u", machine="pc-q35-10.0", cpu_model="Nehalem-v1", accelerator="tcg")


class NoAgents:
    """Nobody is asked for anything here."""

    async def call(self, *_: Any, **__: Any) -> Any:
        raise AssertionError


class Scene:
    """A VM of its own in the middle of a move from h1 to h2, and who writes about it."""

    def __init__(self, store: Store, vm: str) -> None:
        self.store, self.vm = store, vm
        self.records = Records(store)
        self.intent = MoveIntent(id=f"m-{vm}", method="live", source="h1", destination="h2")
        world = World(
            records=self.records,
            cache=Cache(store),
            agents=NoAgents(),
            clock=RealClock(),
            pin=lambda _hosts: PINS,
            worker=ME.decode(),
        )
        self.actor = Actor(world, proof=lambda: value_is(keys.LEADER, ME))

    async def begin(self, *, swapped: bool = False) -> None:
        owner = Owner(host="h1", epoch=EPOCH, state=OwnerState.RUNNING)
        owner = ownership.committing(ownership.begin_move(owner, self.intent), self.intent.id)
        if swapped:
            owner = ownership.swap(owner, self.intent.id)
        await self.store.put(keys.LEADER, ME)
        await self.store.put(keys.host_lease("h2"), b"{}")
        await self.renew(1)
        await self.store.put(keys.host_reservation("h2", self.vm), b"1024")
        await self.store.put(keys.vm_owner(self.vm), encode(owner))
        await self.tell(MoveState.RUNNING)

    async def renew(self, number: int) -> None:
        renewal = Renewal(boot_id="b", number=number, guard="armed", watchdog=True)
        await self.store.put(keys.host_renewal("h1"), encode(renewal))

    async def tell(self, state: MoveState) -> None:
        """What the source's agent publishes."""
        move = Migration(id=self.intent.id, vm=self.vm, source="h1", destination="h2", state=state)
        await self.store.put(keys.migration(move.id), encode(move))

    async def swap(self, *, adopt: bool) -> Swap:
        found = await self.records.owner(self.vm)
        renewal = await self.store.get(keys.host_renewal("h1"))
        assert found is not None
        assert renewal is not None
        return Swap(
            vm=self.vm,
            source="h1",
            to="h2",
            epoch=EPOCH + 1,
            owner_revision=found.revision,
            renewal_revision=renewal.mod_revision,
            proof="it is off",
            adopt=adopt,
            counts=not adopt,
        )

    async def conclude(self) -> Conclude:
        found = await self.records.owner(self.vm)
        assert found is not None
        return Conclude(
            vm=self.vm, migration=self.intent.id, owner_revision=found.revision, why="h1 is lost"
        )

    async def owner(self) -> Owner:
        found = await self.records.owner(self.vm)
        assert found is not None
        return found.value

    async def move(self) -> Migration:
        found = await self.records.migration(self.intent.id)
        assert found is not None
        return found.value

    async def reserved(self) -> bool:
        return await self.store.get(keys.host_reservation("h2", self.vm)) is not None


@pytest.fixture
def scene(store: Store, base: str) -> Scene:
    return Scene(store, base.strip("/").replace("_", "-")[-50:].strip("-"))


async def test_a_copy_is_adopted(scene: Scene) -> None:
    await scene.begin()
    await scene.actor.act(await scene.swap(adopt=True))
    owner = await scene.owner()
    assert (owner.host, owner.epoch, owner.state) == ("h2", EPOCH + 1, OwnerState.RUNNING)
    assert owner.migration is not None
    assert owner.migration.id == scene.intent.id  # by this the destination knows its copy
    assert not await scene.reserved()
    assert (await scene.move()).state is MoveState.RUNNING
    assert await scene.records.get(keys.vm_restarts(scene.vm), Restarts) is None


async def test_a_start_from_disk_ends_the_move(scene: Scene) -> None:
    await scene.begin()
    await scene.actor.act(await scene.swap(adopt=False))
    owner = await scene.owner()
    assert (owner.epoch, owner.state, owner.migration) == (EPOCH + 1, OwnerState.STARTING, None)
    assert not await scene.reserved()
    move = await scene.move()
    assert (move.state, move.outcome) == (MoveState.FAILED, Outcome.FAILED)
    assert "h1 was lost" in move.reason
    assert move.ended_at is not None


async def test_a_move_that_is_over_frees_the_record(scene: Scene) -> None:
    await scene.begin(swapped=True)
    await scene.actor.act(await scene.conclude())
    owner = await scene.owner()
    assert (owner.host, owner.epoch, owner.migration) == ("h2", EPOCH + 1, None)
    assert not await scene.reserved()
    move = await scene.move()
    assert (move.outcome, move.reason) == (Outcome.COMPLETED, "h1 is lost")


async def test_a_vm_that_stays_down_keeps_no_move(scene: Scene) -> None:
    await scene.begin()
    found = await scene.records.owner(scene.vm)
    assert found is not None
    step = Stopped(vm=scene.vm, owner_revision=found.revision, why="nothing of it runs")
    await scene.actor.act(step)
    assert (await scene.owner()).state is OwnerState.STOPPED
    assert not await scene.reserved()
    assert (await scene.move()).outcome is Outcome.FAILED


async def _rolls_back(scene: Scene) -> None:
    back = ownership.rolled_back(await scene.owner(), scene.intent.id)
    await scene.store.put(keys.vm_owner(scene.vm), encode(back))


async def _swaps(scene: Scene) -> None:
    after = ownership.swap(await scene.owner(), scene.intent.id)
    await scene.store.put(keys.vm_owner(scene.vm), encode(after))


async def _renews(scene: Scene) -> None:
    await scene.renew(2)


async def _destination_is_lost(scene: Scene) -> None:
    await scene.store.delete(keys.host_lease("h2"))


async def _another_leads(scene: Scene) -> None:
    await scene.store.put(keys.LEADER, b"m2/b")


Meddle = Callable[[Scene], Awaitable[None]]
MEDDLES: list[Meddle] = [_rolls_back, _swaps, _renews, _destination_is_lost, _another_leads]


@pytest.mark.parametrize("adopt", [True, False], ids=["adopt", "restart"])
@pytest.mark.parametrize("meddle", MEDDLES, ids=lambda one: one.__name__.strip("_"))
async def test_whoever_was_first_has_it(scene: Scene, meddle: Meddle, adopt: bool) -> None:
    """The source that is back, or anybody else: what was decided before is written no more."""
    await scene.begin()
    step: Step = await scene.swap(adopt=adopt)
    await meddle(scene)
    owner, move = await scene.owner(), await scene.move()
    with pytest.raises(CasFailed):
        await scene.actor.act(step)
    assert (await scene.owner(), await scene.move()) == (owner, move)
    assert await scene.reserved()


async def test_what_was_done_is_not_done_twice(scene: Scene) -> None:
    """The answer was lost: the same step again, with what it rested on gone."""
    await scene.begin()
    step = await scene.swap(adopt=True)
    await scene.actor.act(step)
    with pytest.raises(CasFailed):
        await scene.actor.act(step)
    assert (await scene.owner()).epoch == EPOCH + 1
    over = await scene.conclude()
    await scene.actor.act(over)
    with pytest.raises(CasFailed):
        await scene.actor.act(over)


@pytest.mark.parametrize("which", ["restart", "conclude"])
async def test_the_last_word_of_an_agent_that_came_back_stands(
    scene: Scene, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It publishes between the reading of the move's record and the write."""
    await scene.begin(swapped=which == "conclude")
    step: Step = await scene.swap(adopt=False) if which == "restart" else await scene.conclude()
    reads, owner = scene.records.get, await scene.owner()

    async def get(key: str, kind: Any, **more: Any) -> Any:
        found = await reads(key, kind, **more)
        if kind is Migration:
            await scene.tell(MoveState.UNKNOWN)
        return found

    monkeypatch.setattr(scene.records, "get", get)
    with pytest.raises(CasFailed):
        await scene.actor.act(step)
    assert await scene.owner() == owner
    assert (await scene.move()).state is MoveState.UNKNOWN
    await scene.actor.act(step)  # decided anew: the record of the move is closed already
    assert (await scene.owner()).migration is None
    assert (await scene.move()).state is MoveState.UNKNOWN
