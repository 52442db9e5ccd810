"""A host's power device through the API: set, shown, asked, told; and where its password is not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bmc_rig
import pytest

from godwit.client.api import AsyncClient
from godwit.cluster.facts import Member
from godwit.manager.snapshot import Snapshot
from godwit.manager.work import power_acts
from godwit.manager.work.admit import admit
from godwit.manager.work.power_rules import check_keys, refuse_the_last
from godwit.model import keys
from godwit.model import requests as ask
from godwit.model.errors import InvalidRequest, NotFound, Refused
from godwit.model.event import Event
from godwit.model.host import ConfirmedDown
from godwit.model.ownership import Owner, OwnerState
from godwit.model.power import PowerConfig
from godwit.model.render import FORMS, render
from godwit.model.vm import Pins, Vm
from godwit.power.vault import Vault
from godwit.store.records import encode
from godwit.wire.errors import PeerRefused

HANDED_IN = f"secret:{'0' * 32}"


def setting(bmc: Any, **changes: Any) -> dict[str, Any]:
    fields = {"type": "redfish", "address": bmc.url, "user": bmc_rig.USER}
    return {**fields, "fingerprint": bmc.fingerprint, **changes}


async def set_device(api: Any, bmc: Any, password: str = "", **changes: Any) -> Any:
    content = (password or bmc_rig.PASSWORD).encode()
    answer = await api.api.request("POST", "/v1/secrets", content=content)
    body = setting(bmc, password_file=answer.json()["path"], **changes)
    return await api.act("POST", "/v1/hosts/host1/power", body)


async def told(api: Any, verb: str, **body: Any) -> Any:
    return await api.act("POST", f"/v1/hosts/host1/power/actions/{verb}", body)


async def test_set_test_off_with_proof_and_on(api: Any, bmc: Any) -> None:
    assert (await set_device(api, bmc))["state"] == "completed"
    tested = await told(api, "test")
    assert tested["result"]["state"] == "on", tested
    off = await told(api, "off")
    assert off["state"] == "completed", off
    assert off["result"]["state"] == "off"
    assert not bmc.machine.on
    assert (await told(api, "test"))["result"]["state"] == "off"
    assert (await told(api, "on"))["result"]["state"] == "on"
    assert (await told(api, "reset"))["state"] == "completed"
    assert bmc.machine.seen == ["ForceOff", "On", "ForceOff", "On"]
    kinds = [found.value.kind for found in (await api.records.list(keys.EVENTS, Event)).values()]
    assert kinds.count("host.power-off") == 2


@pytest.mark.parametrize("verb", ["off", "reset"])
async def test_what_keeps_the_store_is_not_switched_off(
    api: Any, bmc: Any, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await set_device(api, bmc)
    here = Member(name="host1", host="host1")
    away = Member(name="witness", healthy=False)
    monkeypatch.setattr(power_acts, "members_of", lambda *_: (here, away))
    refused = await told(api, verb)
    assert refused["error"]["code"] == "refused"
    assert "without host1 0 of 2 members of the store are left, not 2" in refused["reason"]
    assert "--force" in refused["error"]["hint"]
    assert bmc.machine.seen == []
    assert (await told(api, verb, force=True))["state"] == "completed"


def test_the_only_manager_is_not_switched_off() -> None:
    with pytest.raises(Refused, match="the only manager runs on host1"):
        refuse_the_last("host1", (), ["host1"])
    refuse_the_last("host1", (), ["host1", "host2"])
    refuse_the_last("host1", (), ["control"])
    refuse_the_last("host1", (), [])


async def test_off_is_the_end_of_that_boot(api: Any, bmc: Any) -> None:
    info = (await api.records.hosts())["host1"]
    await api.store.put(keys.host_info("host1"), encode(info.but(boot_id="boot-7")))
    await set_device(api, bmc)
    bmc.machine.deaf = True
    stuck = await told(api, "off", timeout_s=0.5)
    assert stuck["state"] == "unknown", stuck
    assert stuck["error"]["code"] == "outcome-unknown"
    assert await api.records.get(keys.host_confirmed_down("host1"), ConfirmedDown) is None
    bmc.machine.deaf = False
    assert (await told(api, "off"))["state"] == "completed"
    found = await api.records.get(keys.host_confirmed_down("host1"), ConfirmedDown)
    assert found is not None
    assert found.value.boot_id == "boot-7"


async def test_the_password_is_nowhere_but_sealed(
    api: Any, bmc: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await set_device(api, bmc)
    await told(api, "test")
    await set_device(api, bmc, password="a-wrong-password")
    denied = await told(api, "test")
    assert denied["state"] == "failed"
    assert "does not accept us" in denied["reason"]
    everything = [await api.api.get(f"/v1/{noun}") for noun in ("tasks", "hosts", "hosts/host1")]
    everything.append(shown := await api.api.get("/v1/hosts/host1/power"))
    stored = await api.store.range("")
    text = f"{everything}{caplog.text}" + "".join(
        f"{kv.key} {kv.value.decode()}" for kv in stored.kvs
    )
    for secret in (bmc_rig.PASSWORD, "a-wrong-password"):
        assert secret not in text
    assert "password" not in shown
    assert shown["fingerprint"] == bmc.fingerprint
    # Sealed for this host, and what was handed in is used up.
    found = await api.records.get(keys.host_power("host1"), PowerConfig)
    assert found is not None
    assert "a-wrong" not in repr(found.value)
    assert found.value.password not in repr(found.value)
    assert [kv.key for kv in stored.kvs if kv.key.startswith(keys.SECRETS)] == []


async def test_a_record_that_was_turned_to_another_address_gives_nothing_away(
    api: Any, bmc: Any
) -> None:
    await set_device(api, bmc, address="https://192.0.2.1")
    found = await api.records.get(keys.host_power("host1"), PowerConfig)
    assert found is not None
    tries: list[Any] = []
    bmc.service.log_in = tries.append
    await api.store.put(keys.host_power("host1"), encode(found.value.but(address=bmc.url)))
    failed = await told(api, "test")
    assert failed["state"] == "failed"
    assert "the power device of host1 is for was changed" in failed["reason"]
    assert bmc.asked == tries == []
    # Neither does one that was copied to another host.
    await api.store.put(keys.host_power("host2"), encode(found.value))
    copied = await api.act("POST", "/v1/hosts/host2/power/actions/test")
    assert "the power device of host2 is for was changed" in copied["reason"]


async def test_a_secret_is_used_once_and_is_no_password(api: Any, bmc: Any) -> None:
    answer = await api.api.request("POST", "/v1/secrets", content=b"x")
    body = setting(bmc, password_file=answer.json()["path"])
    assert (await api.act("POST", "/v1/hosts/host1/power", body))["state"] == "completed"
    again = await api.act("POST", "/v1/hosts/host2/power", body)
    assert again["error"]["code"] == "refused"
    assert "used or was forgotten" in again["reason"]
    body["password_file"] = "hunter2"
    tasks = len(await api.api.get("/v1/tasks"))
    with pytest.raises(PeerRefused) as caught:
        await api.api.post("/v1/hosts/host1/power", body)
    assert caught.value.problem.code == "invalid"
    assert "hunter2" not in caught.value.problem.detail
    assert len(await api.api.get("/v1/tasks")) == tasks
    for wrong in (b"", b"two\nlines", b"\xff\xfe", b"x" * 1025):
        with pytest.raises(PeerRefused):
            await api.api.request("POST", "/v1/secrets", content=wrong)


async def test_the_client_hands_in_what_is_in_a_file(
    api: Any, bmc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    file.write_text(f"{bmc_rig.PASSWORD}\n")
    token = tmp_path / "token"
    token.write_text("a-token-of-many-letters")
    async with AsyncClient(
        api.api.url, token_file=token, ca_file=api.identities["m1"].ca
    ) as client:
        settings = setting(bmc, fingerprint="", ca=str(bmc.folder / "cert.pem"))
        task = await client.hosts.set_power("host1", password_file=str(file), **settings)
        await client.wait(task)
        done = await client.wait(await client.hosts.test_power("host1"))
        assert (done.result or {})["state"] == "on"
        view = await client.hosts.power("host1")
        assert (view.ca, view.user, view.set_by[:5]) == (True, bmc_rig.USER, "admin")
        await client.wait(await client.hosts.remove_power("host1"))
        with pytest.raises(NotFound, match="no power device"):
            await client.hosts.power("host1")
        with pytest.raises(NotFound, match="no power device"):
            await client.hosts.test_power("host1")
        with pytest.raises(InvalidRequest, match="cannot be read"):
            await client.hosts.set_power("host1", password_file="/nowhere", **settings)
        file.write_text("")
        with pytest.raises(InvalidRequest, match="one line"):
            await client.hosts.set_power("host1", password_file=str(file), **settings)


def test_scripts_name_a_file(bmc: Any) -> None:
    request = ask.SetHostPower(name="host1", password_file="bmc-password", **setting(bmc))
    for form in FORMS:
        assert "bmc-password" in render(request, form)


def _world(make_host: Callable[..., Any], **changes: Any) -> Snapshot:
    device = PowerConfig(type="ipmi", address="192.0.2.1", password="gw1.key.x")
    return Snapshot(hosts={"host1": make_host("host1")}, powers={"host1": device}, **changes)


def test_what_may_be_asked(make_host: Callable[..., Any]) -> None:
    world = _world(make_host)
    device = {"type": "ipmi", "address": "192.0.2.1", "password_file": HANDED_IN}
    for request in (
        ask.SetHostPower(name="host1", **device),
        ask.CheckHostPower(name="host1"),
        ask.SwitchHostOff(name="host1"),
        ask.RemoveHostPower(name="host1"),
    ):
        assert admit(world, request) == "host/host1"
    with pytest.raises(NotFound, match="no host host9"):
        admit(world, ask.SetHostPower(name="host9", **device))
    bare = Snapshot(hosts=world.hosts)
    for kind in (ask.CheckHostPower, ask.SwitchHostOn, ask.SwitchHostOff, ask.RemoveHostPower):
        with pytest.raises(NotFound, match="host1 has no power device"):
            admit(bare, kind(name="host1"))
    web = Vm(
        name="web",
        memory_bytes=256 << 20,
        cpus=1,
        pins=Pins(uuid="u", machine="pc-q35-10.0", cpu_model="qemu64", accelerator="tcg"),
        created_at=1.0,
    )
    running = Owner(host="host1", epoch=1, state=OwnerState.RUNNING)
    busy = _world(make_host, vms={"web": web}, owners={"web": running})
    for kind in (ask.SwitchHostOff, ask.ResetHost):
        with pytest.raises(Refused, match="host1 runs web") as caught:
            admit(busy, kind(name="host1"))
        assert "--force" in caught.value.hint
        assert admit(busy, kind(name="host1", force=True)) == "host/host1"
    assert admit(busy, ask.SwitchHostOn(name="host1")) == "host/host1"


def test_managers_with_different_keys_are_told(make_host: Callable[..., Any]) -> None:
    with pytest.raises(Refused, match="sealed with the key key"):
        check_keys(_world(make_host), "another")
    check_keys(_world(make_host), "key")


async def test_a_manager_without_the_key_opens_nothing(api: Any, bmc: Any, tmp_path: Path) -> None:
    await set_device(api, bmc)
    other = Vault(tmp_path / "other.key")
    other.create()
    object.__setattr__(api.manager.world, "vault", other)
    failed = await told(api, "off")
    assert failed["error"]["code"] == "refused"
    assert bmc.machine.seen == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"address": "http://192.0.2.1"}, "the address is like https"),
        ({"address": "https://me:pw@192.0.2.1"}, "no place in the address"),
        ({"address": "https://192.0.2.1/redfish/v1"}, "without a path"),
        ({"fingerprint": "abc"}, "64 hexadecimal"),
        ({"fingerprint": "0" * 64, "ca": "x"}, "not both"),
        ({"agent": "fence_redfish"}, "of fence-agent"),
        ({"options": ("cipher=3",)}, "may not be given to redfish"),
        ({"type": "ipmi", "address": "-x"}, "HOST or HOST:PORT"),
        ({"type": "ipmi", "address": "a b"}, "HOST or HOST:PORT"),
        ({"type": "ipmi", "address": "a", "options": ("cipher=3 -f x",)}, "no value"),
        ({"type": "fence-agent", "address": "a"}, "which fence agent"),
        ({"type": "fence-agent", "address": "a", "agent": "/bin/sh"}, "which fence agent"),
        ({"user": "a\nb"}, "control characters"),
    ],
)
def test_devices_that_cannot_be(changes: dict[str, Any], why: str) -> None:
    fields = {"kind": "host.power.set", "name": "host1", "type": "redfish"}
    fields |= {"address": "https://192.0.2.1", "password_file": HANDED_IN}
    with pytest.raises(InvalidRequest, match=why):
        ask.parse_request(fields | changes)


@pytest.mark.parametrize(
    "option",
    [
        *("password=x", "password_script=/bin/sh", "debug_file=/etc/x", "verbose=1", "action=off"),
        *(
            "gnutlscli_path=/bin/sh",
            "missing_as_off=1",
            "ip=elsewhere",
            "plug=1\nverbose=1",
            "plug",
        ),
    ],
)
def test_options_that_no_agent_is_given(option: str) -> None:
    fields = {"kind": "host.power.set", "name": "host1", "type": "fence-agent"}
    fields |= {"address": "a", "agent": "fence_x", "password_file": HANDED_IN}
    assert ask.parse_request(fields | {"options": ("plug=1",)})
    with pytest.raises(InvalidRequest):
        ask.parse_request(fields | {"options": (option,)})
