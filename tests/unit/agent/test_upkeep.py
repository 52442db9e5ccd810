"""A host runs what its own configuration lists, once, and nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from godwit.agent.upkeep import Upkeep
from godwit.host.config import AgentConfig, ConfigError
from godwit.model.errors import Conflict, NotAllowed


def make(tmp_path: Path, *commands: str) -> Upkeep:
    table: dict[str, Any] = {"host": "host1", "paths": {"state": str(tmp_path)}}
    if commands:
        table["maintenance"] = {"commands": list(commands)}
    return Upkeep(AgentConfig.parse(table))


async def test_nothing_is_allowed_by_default(tmp_path: Path) -> None:
    with pytest.raises(NotAllowed) as caught:
        await make(tmp_path).run("t-1", ("/bin/true",), timeout_s=5)
    assert "maintenance.commands" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


async def test_only_the_very_words_are_allowed(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    upkeep = make(tmp_path, f"/usr/bin/touch {mark}")
    for argv in (
        ("/usr/bin/touch", str(mark), "more"),
        ("/usr/bin/touch",),
        (f"/usr/bin/touch {mark}",),
        ("touch", str(mark)),
    ):
        with pytest.raises(NotAllowed):
            await upkeep.run("t-1", argv, timeout_s=5)
    assert not mark.exists()
    done = await upkeep.run("t-1", ("/usr/bin/touch", str(mark)), timeout_s=5)
    assert (done["state"], done["exit"]) == ("done", 0)
    assert mark.exists()


async def test_a_run_is_carried_out_once_and_told_as_it_ended(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    argv = ("/usr/bin/sed", "-i", "$a x", str(tmp_path / "log"))
    (tmp_path / "log").write_text("begin\n")
    line = f"/usr/bin/sed -i '$a x' {tmp_path / 'log'}"
    upkeep = make(tmp_path, line)
    first, second = await asyncio.gather(
        upkeep.run("t-1", argv, timeout_s=5), upkeep.run("t-1", argv, timeout_s=5)
    )
    assert first == second
    assert await make(tmp_path, line).run("t-1", argv, timeout_s=5) == first, "a later agent, too"
    assert (tmp_path / "log").read_text() == "begin\nx\n"
    await upkeep.run("t-2", argv, timeout_s=5)
    assert (tmp_path / "log").read_text() == "begin\nx\nx\n"


async def test_failures_are_told_with_their_words(tmp_path: Path) -> None:
    upkeep = make(tmp_path, "/bin/ls /nowhere-at-all", "/usr/bin/sleep 60", "/nowhere/program")
    failed = await upkeep.run("t-1", ("/bin/ls", "/nowhere-at-all"), timeout_s=5)
    assert failed["exit"] == 2
    assert "nowhere-at-all" in failed["output"]
    late = await upkeep.run("t-2", ("/usr/bin/sleep", "60"), timeout_s=0.2)
    assert (late["exit"], late["output"]) == (124, "it took longer than 0.2 s and was ended")
    missing = await upkeep.run("t-3", ("/nowhere/program",), timeout_s=5)
    assert missing["exit"] == 127


async def test_one_at_a_time_and_an_end_that_nobody_saw_is_no_end(tmp_path: Path) -> None:
    argv = ("/usr/bin/sleep", "60")
    upkeep = make(tmp_path, "/usr/bin/sleep 60", "/bin/true")
    asking = asyncio.create_task(upkeep.run("t-1", argv, timeout_s=60))
    await asyncio.wait([asking], timeout=0.2)
    assert (tmp_path / "upkeep.json").exists()
    with pytest.raises(Conflict):
        await upkeep.run("t-2", ("/bin/true",), timeout_s=5)
    asking.cancel()  # who asked goes away; the command is not ended in its middle
    await asyncio.gather(asking, return_exceptions=True)
    assert upkeep._running
    for task in upkeep._running.values():  # the agent dies
        task.cancel()
    await asyncio.gather(*upkeep._running.values(), return_exceptions=True)
    told = await make(tmp_path, "/usr/bin/sleep 60").run("t-1", argv, timeout_s=5)
    assert told["state"] == "interrupted"


@pytest.mark.parametrize("text", ["true", "", "/bin/true '"])
def test_a_command_that_is_none_is_refused_in_the_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"maintenance\.commands"):
        make(tmp_path, text)
