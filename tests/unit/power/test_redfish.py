"""Redfish against a real HTTPS service: whom we trust, what we send, what we take for proof."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from godwit.host.clock import RealClock
from godwit.lab.bmc import Refusal
from godwit.model.errors import GodwitError
from godwit.model.power import PowerConfig, PowerState
from godwit.power.choose import driver_of
from godwit.power.device import Confirmed
from godwit.power.errors import (
    PowerDenied,
    PowerFailed,
    PowerNotConfirmed,
    PowerNotTrusted,
    PowerUnavailable,
)
from godwit.power.redfish import tls_of

USER, PASSWORD = "admin", "correct horse, battery: ümlaut"


@contextlib.asynccontextmanager
async def device(bmc: Any, password: str = PASSWORD, **changes: Any) -> AsyncIterator[Confirmed]:
    fields = {"user": USER, "address": bmc.url, "fingerprint": bmc.fingerprint}
    config = PowerConfig(type="redfish", password="(sealed)", **{**fields, **changes})
    made = Confirmed(driver_of(config, password), RealClock())
    try:
        yield made
    finally:
        await made.aclose()


def says_nothing_secret(error: GodwitError) -> bool:
    return PASSWORD not in f"{error.message}{error.hint}{error.context}{error!r}"


async def test_state_off_and_on_are_read_back_and_the_session_ends(bmc: Any) -> None:
    async with device(bmc) as power:
        assert await power.state(deadline_s=5) is PowerState.ON
        proof = await power.off(deadline_s=5)
        assert (proof.state, proof.commands) == (PowerState.OFF, 1)
        assert not bmc.machine.on
        assert (await power.on(deadline_s=5)).state is PowerState.ON
        assert (await power.reset(deadline_s=5)).state is PowerState.OFF
        assert len(bmc.service.sessions()) == 1
    assert bmc.machine.seen == ["ForceOff", "On", "ForceOff", "On"]
    assert bmc.service.sessions() == ()


async def test_a_ca_serves_instead_of_a_fingerprint(bmc: Any) -> None:
    async with device(bmc, fingerprint="", ca=bmc.ca) as power:
        assert await power.state(deadline_s=5) is PowerState.ON


async def test_without_either_only_what_this_system_trusts_is_spoken_to(bmc: Any) -> None:
    async with device(bmc, fingerprint="") as power:
        with pytest.raises(PowerNotTrusted, match="not accepted") as caught:
            await power.state(deadline_s=5)
        assert "--fingerprint" in caught.value.hint
    with pytest.raises(PowerFailed, match="the CA cannot be used"):
        tls_of(fingerprint="", ca="nonsense")


async def test_basic_authentication_where_there_are_no_sessions(bmc: Any) -> None:
    root = bmc.service.tree._root
    bmc.service.tree._root = lambda: {**root(), "Links": {}}
    async with device(bmc) as power:
        assert await power.state(deadline_s=5) is PowerState.ON
        assert (await power.off(deadline_s=5)).commands == 1
    async with device(bmc, password="not-it") as power:
        with pytest.raises(PowerDenied):
            await power.state(deadline_s=5)


async def test_a_wrong_password_is_said_and_sent_once(bmc: Any) -> None:
    tries = []
    log_in = bmc.service.log_in
    bmc.service.log_in = lambda body: (tries.append(body), log_in(body))[1]
    async with device(bmc, password="not-it") as power:
        with pytest.raises(PowerDenied, match="the password is wrong") as caught:
            await power.off(deadline_s=5)
    assert len(tries) == 1
    assert says_nothing_secret(caught.value)
    assert bmc.machine.seen == []


async def test_a_device_that_forgot_our_session_gets_another(bmc: Any) -> None:
    async with device(bmc) as power:
        assert await power.state(deadline_s=5) is PowerState.ON
        bmc.service.log_out(*bmc.service.sessions())
        proof = await power.off(deadline_s=5)
    assert (proof.state, proof.commands) == (PowerState.OFF, 1)
    assert bmc.service.sessions() == ()


async def test_another_certificate_gets_no_password(bmc: Any) -> None:
    tries = []
    bmc.service.log_in = tries.append
    old = bmc.fingerprint
    bmc.stop()
    bmc.start()
    assert bmc.fingerprint != old
    async with device(bmc, fingerprint=old) as power:
        with pytest.raises(PowerNotTrusted, match=bmc.fingerprint) as caught:
            await power.off(deadline_s=5)
    assert says_nothing_secret(caught.value)
    assert tries == []
    assert bmc.asked == []  # not one request


async def test_a_certificate_that_changes_meanwhile_is_noticed(bmc: Any) -> None:
    async with device(bmc) as power:
        assert await power.state(deadline_s=5) is PowerState.ON
        bmc.stop()
        bmc.start()
        power._driver._client.use_tls(power._driver._client._tls)  # drops its connection
        with pytest.raises(PowerNotTrusted):
            await power.off(deadline_s=5)
    assert bmc.machine.seen == []


async def test_a_host_that_stays_on_is_no_proof(bmc: Any) -> None:
    bmc.machine.deaf = True
    async with device(bmc) as power:
        with pytest.raises(PowerNotConfirmed, match="never said off") as caught:
            await power.off(deadline_s=1)
    assert bmc.machine.seen == ["ForceOff"]
    assert caught.value.exit_code == 6


async def test_a_frozen_bmc_costs_the_deadline_and_no_more(bmc: Any) -> None:
    bmc.hang()
    start = asyncio.get_running_loop().time()
    async with device(bmc) as power:
        with pytest.raises(PowerUnavailable):
            await power.off(deadline_s=0.6)
    assert asyncio.get_running_loop().time() - start < 3.5
    assert bmc.machine.seen == []


async def test_one_that_freezes_after_the_command_is_no_proof(bmc: Any) -> None:
    bmc.machine.deaf = True
    async with device(bmc) as power:
        work = asyncio.create_task(power.off(deadline_s=2))
        await asyncio.to_thread(bmc.machine.told.wait)
        bmc.hang()
        with pytest.raises(PowerNotConfirmed):
            await work


async def test_a_bmc_that_thaws_in_time_gives_proof(bmc: Any) -> None:
    async with device(bmc) as power:
        assert await power.state(deadline_s=5) is PowerState.ON
        bmc.hang()
        work = asyncio.create_task(power.off(deadline_s=10))
        await asyncio.sleep(0.3)
        assert not work.done()
        bmc.wake()
        assert (await work).state is PowerState.OFF


async def test_one_that_accepts_connections_and_says_nothing(bmc: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # as a process that was stopped
        async with device(bmc, address=f"https://127.0.0.1:{mute.getsockname()[1]}") as power:
            with pytest.raises(PowerUnavailable):
                await power.state(deadline_s=0.5)
    async with device(bmc, address=f"https://127.0.0.1:{mute_port()}") as power:
        with pytest.raises(PowerUnavailable, match="cannot be reached"):
            await power.state(deadline_s=5)


def mute_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        return int(gone.getsockname()[1])


async def test_of_several_systems_one_has_to_be_named(bmc: Any) -> None:
    read = bmc.service.read

    def two(path: str) -> Any:
        found = read(path)
        if path == "/redfish/v1/Systems":
            found["Members"].append({"@odata.id": "/redfish/v1/Systems/other"})
        return found

    bmc.service.read = two
    async with device(bmc) as power:
        with pytest.raises(PowerFailed, match="host1, other") as caught:
            await power.state(deadline_s=5)
        assert "--system" in caught.value.hint
    async with device(bmc, system="host1") as power:
        assert await power.state(deadline_s=5) is PowerState.ON
    async with device(bmc, system="host7") as power:
        with pytest.raises(PowerFailed, match="not host7"):
            await power.state(deadline_s=5)


async def test_a_device_that_offers_no_forced_off_says_what_it_offers(bmc: Any) -> None:
    read = bmc.service.read

    def gentle(path: str) -> Any:
        found = read(path)
        if "Actions" in (found or {}):
            action = found["Actions"]["#ComputerSystem.Reset"]
            action["ResetType@Redfish.AllowableValues"] = ["GracefulShutdown"]
        return found

    bmc.service.read = gentle
    async with device(bmc) as power:
        with pytest.raises(GodwitError, match="offers no ForceOff, only GracefulShutdown"):
            await power.off(deadline_s=0.5)
    assert bmc.machine.seen == []


async def test_a_busy_device_is_waited_for(bmc: Any) -> None:
    reset, refusals = bmc.service.reset, [Refusal(503, "busy"), Refusal(503, "busy")]

    def busy(body: Any) -> None:
        if refusals:
            raise refusals.pop()
        reset(body)

    bmc.service.reset = busy
    async with device(bmc) as power:
        assert (await power.off(deadline_s=5)).state is PowerState.OFF


async def test_what_is_no_redfish_service_says_so(bmc: Any) -> None:
    bmc.service.read = lambda _: "<html>"
    async with device(bmc) as power:
        with pytest.raises(PowerFailed, match="does not speak Redfish"):
            await power.state(deadline_s=5)
