"""A person's word about a host: taken only while the host is silent, and for one boot of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.admit import admit
from godwit.model import keys
from godwit.model import requests as ask
from godwit.model.errors import NotFound, Refused
from godwit.model.host import ConfirmedDown
from godwit.store.records import encode

HOST1 = keys.host_info("host1")


def test_only_a_silent_host_is_confirmed_down(make_host: Callable[..., Any]) -> None:
    both = frozenset({"host1"})
    world = Snapshot(hosts={"host1": make_host("host1")}, leases=both, agents=both)
    request = ask.ConfirmHostDown(name="host1")
    with pytest.raises(NotFound, match="no host host9"):
        admit(world, ask.ConfirmHostDown(name="host9"))
    for alive in ({}, {"leases": frozenset()}, {"agents": frozenset()}):
        with pytest.raises(Refused, match="host1 answers"):
            admit(dataclasses.replace(world, **alive), request)
    silent = dataclasses.replace(world, leases=frozenset(), agents=frozenset())
    assert admit(silent, request) == "host/host1"


async def _silence(api: Any) -> None:
    for key in (keys.host_lease("host1"), keys.host_agent("host1")):
        await api.store.delete(key)
    while (await api.api.get("/v1/hosts/host1"))["state"] != "down":
        pass


async def test_the_word_is_written_down_for_that_boot(api: Any) -> None:
    await _silence(api)
    info = (await api.records.hosts())["host1"]
    await api.store.put(HOST1, encode(info.but(boot_id="boot-7")))
    task = await api.act("POST", "/v1/hosts/host1/actions/confirm-down")
    assert task["state"] == "completed", task
    found = await api.records.get(keys.host_confirmed_down("host1"), ConfirmedDown)
    assert found is not None
    assert found.value.boot_id == "boot-7"
    assert found.value.by.startswith("admin")


async def test_a_host_that_comes_back_meanwhile_is_not_down(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _silence(api)
    get = api.manager.world.records.get

    async def slowly(key: str, *words: Any, **more: Any) -> Any:
        found = await get(key, *words, **more)
        if key == HOST1:  # just after it was read
            await api.store.put(keys.host_agent("host1"), b"{}")
        return found

    monkeypatch.setattr(api.manager.world.records, "get", slowly)
    task = await api.act("POST", "/v1/hosts/host1/actions/confirm-down")
    assert task["state"] == "failed", task
    assert "answers again" in task["reason"]
    assert await api.records.get(keys.host_confirmed_down("host1"), ConfirmedDown) is None
