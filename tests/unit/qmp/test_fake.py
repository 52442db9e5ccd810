"""The fake's migration: QEMU's states and events in QEMU's order, and its faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from godwit.qmp import Monitor, QmpError
from godwit.qmp.fake import FakeQemu, link

CAPABILITIES = ("events", "return-path", "pause-before-switchover")


class Pair:
    """Source and target fakes with a monitor each."""

    def __init__(self, source: FakeQemu, target: FakeQemu, s: Monitor, d: Monitor) -> None:
        self.source, self.target, self.s, self.d = source, target, s, d

    async def start(self, *more: str, without: tuple[str, ...] = ()) -> None:
        on = [c for c in (*CAPABILITIES, *more) if c not in without]
        wanted = {"capabilities": [{"capability": c, "state": True} for c in on]}
        await self.s.execute("migrate-set-capabilities", wanted)
        incoming = [c for c in wanted["capabilities"] if "pause" not in str(c["capability"])]
        await self.d.execute("migrate-set-capabilities", {"capabilities": incoming})
        await self.s.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 20})
        await self.d.execute("migrate-incoming", {"uri": "tcp:10.0.0.2:0"})
        address = (await self.d.execute("query-migrate"))["socket-address"][0]
        await self.s.execute("migrate", {"uri": f"tcp:{address['host']}:{address['port']}"})

    async def status(self, wanted: str) -> None:
        stream = self.s.events("MIGRATION")
        if (await self.s.execute("query-migrate")).get("status") == wanted:
            return
        await stream.wait(lambda event: event.data["status"] == wanted, timeout=2)

    def story(self, fake: FakeQemu) -> list[str]:
        return [str(data.get("status", name)) for name, data in fake.emitted]


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    source = FakeQemu(name="s")
    target = FakeQemu(name="d", incoming=True, autostart=False)
    await source.listen(tmp_path / "s")
    await target.listen(tmp_path / "d")
    link(source, target)
    s = await Monitor.connect(tmp_path / "s", name="s", deadline=2)
    d = await Monitor.connect(tmp_path / "d", name="d", deadline=2)
    yield Pair(source, target, s, d)
    for fake in (source, target):
        fake.thaw()
        await fake.die()
    await s.close()
    await d.close()


async def test_a_move_tells_qemus_story(pair: Pair) -> None:
    await pair.start()
    await pair.status("pre-switchover")
    assert pair.source.run_state == "finish-migrate"
    await pair.s.execute("migrate-continue", {"state": "pre-switchover"})
    await pair.status("completed")
    assert pair.story(pair.source) == [
        "setup", "active", "MIGRATION_PASS", "STOP", "pre-switchover", "device", "completed",
    ]  # fmt: skip
    assert pair.story(pair.target) == ["setup", "active", "completed"]
    assert (pair.source.run_state, pair.target.run_state) == ("postmigrate", "paused")
    assert (await pair.s.execute("query-migrate"))["ram"]["transferred"] == 64 << 20
    await pair.d.execute("cont")
    assert pair.target.run_state == "running"


async def test_a_guest_that_outruns_the_link_never_switches_over(pair: Pair) -> None:
    migration = pair.source.migration
    migration.link_bytes_per_s, migration.dirty_bytes_per_s = 1e9, 2e9
    migration.working_set_bytes = 40 << 20
    await pair.start()
    passes = pair.s.events("MIGRATION_PASS")
    await passes.wait(lambda event: event.data["pass"] == 4, timeout=2)
    assert migration.status == "active"
    assert (await pair.s.execute("query-migrate"))["expected-downtime"] > 20
    await pair.s.execute("migrate-set-parameters", {"downtime-limit": 300})
    await pair.status("pre-switchover")


async def test_cancel_in_pre_switchover_brings_the_guest_back(pair: Pair) -> None:
    await pair.start()
    await pair.status("pre-switchover")
    await pair.s.execute("migrate_cancel")
    await pair.status("cancelled")
    assert pair.story(pair.source)[-4:] == ["device", "cancelling", "RESUME", "cancelled"]
    await pair.d.wait_lost()
    assert pair.target.dead


async def test_the_source_learns_of_a_dead_target_only_when_it_goes_on(pair: Pair) -> None:
    await pair.start()
    await pair.status("pre-switchover")
    await pair.target.die()
    assert pair.source.migration.status == "pre-switchover"
    await pair.s.execute("migrate-continue", {"state": "pre-switchover"})
    await pair.status("failed")
    assert pair.source.run_state == "running"


async def test_without_return_path_the_source_believes_in_a_dead_target(pair: Pair) -> None:
    await pair.start(without=("return-path",))
    await pair.status("pre-switchover")
    await pair.target.die()
    await pair.s.execute("migrate-continue", {"state": "pre-switchover"})
    await pair.status("completed")


async def test_a_frozen_target_holds_the_source_until_the_yank(pair: Pair) -> None:
    await pair.start()
    await pair.status("pre-switchover")
    pair.target.freeze()
    await pair.s.execute("migrate-continue", {"state": "pre-switchover"})
    await asyncio.sleep(0.05)
    assert pair.source.migration.status == "device"
    await pair.s.execute_oob("yank", {"instances": [{"type": "migration"}]})
    await pair.status("failed")
    assert pair.source.run_state == "running"


async def test_cont_on_an_incoming_target_arms_autostart(pair: Pair) -> None:
    await pair.d.execute("cont")
    await pair.start(without=("pause-before-switchover",))
    await pair.status("completed")
    assert pair.target.run_state == "running"


async def test_post_copy_survives_a_cut_link(pair: Pair) -> None:
    migration = pair.source.migration
    migration.link_bytes_per_s, migration.dirty_bytes_per_s = 5e8, 2e9
    migration.working_set_bytes = 60 << 20
    await pair.start("postcopy-ram")
    await pair.s.events("MIGRATION_PASS").wait(lambda e: e.data["pass"] == 2, timeout=2)
    await pair.s.execute("migrate-start-postcopy")
    await pair.status("postcopy-active")
    with pytest.raises(QmpError, match="cannot cancel"):
        await pair.s.execute("migrate_cancel")
    await pair.d.execute("cont")
    pair.source.cut_link()
    await pair.status("postcopy-paused")
    await pair.d.execute_oob("migrate-recover", {"uri": "tcp:10.0.0.2:0"})
    await pair.s.execute("migrate", {"uri": "tcp:10.0.0.2:40000", "resume": True})
    await pair.status("completed")
    assert "postcopy-recover" in pair.story(pair.target)
    assert (pair.source.run_state, pair.target.run_state) == ("postmigrate", "running")


async def test_a_link_cut_in_pre_copy_fails_and_the_guest_runs_on(pair: Pair) -> None:
    pair.source.migration.link_bytes_per_s = 1e8
    await pair.start()
    await pair.status("active")
    pair.source.cut_link()
    await pair.status("failed")
    assert pair.source.run_state == "running"
    assert "reset by peer" in (await pair.s.execute("query-migrate"))["error-desc"]


async def test_injected_refusals_run_out_and_delays_hold_up_the_queue(pair: Pair) -> None:
    pair.source.fail("cont", "no permission", times=1)
    with pytest.raises(QmpError, match="no permission"):
        await pair.s.execute("cont")
    await pair.s.execute("cont")
    pair.source.delay("query-version", 0.05)
    order: list[str] = []

    async def run(command: str) -> None:
        await pair.s.execute(command)
        order.append(command)

    await asyncio.gather(run("query-version"), run("query-status"))
    assert order == ["query-version", "query-status"]


async def test_saving_to_a_file_and_loading_it(pair: Pair, tmp_path: Path) -> None:
    events = {"capabilities": [{"capability": "events", "state": True}]}
    for monitor in (pair.s, pair.d):
        await monitor.execute("migrate-set-capabilities", events)
    await pair.s.execute("migrate-set-parameters", {"max-bandwidth": 0})
    await pair.s.execute("stop")
    await pair.s.execute("migrate", {"uri": f"file:{tmp_path}/image"})
    await pair.status("completed")
    loaded = pair.d.events("MIGRATION")
    await pair.d.execute("migrate-incoming", {"uri": f"file:{tmp_path}/image"})
    await loaded.wait(lambda event: event.data["status"] == "completed", timeout=2)
    assert pair.target.run_state == "paused"
