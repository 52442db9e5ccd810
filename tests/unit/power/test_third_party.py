"""The lab's BMC before clients of others: DMTF's own library, and the agent ``fence_redfish``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import redfish
from redfish.rest.v1 import InvalidCredentialsError

from godwit.host.clock import RealClock
from godwit.lab.bmc import Account
from godwit.model.power import PowerConfig, PowerState
from godwit.power.choose import driver_of
from godwit.power.device import Confirmed
from godwit.power.errors import PowerFailed

USER, PASSWORD = "admin", "correct horse, battery: ümlaut"


def _client(bmc: Any, password: str = PASSWORD) -> Any:
    ca = bmc.folder / "cert.pem"
    return redfish.redfish_client(
        base_url=bmc.url, username=USER, password=password, cafile=str(ca), max_retry=1
    )


@pytest.mark.parametrize("auth", ["session", "basic"])
def test_dmtfs_client_reads_and_resets(bmc: Any, auth: str) -> None:
    client = _client(bmc)
    client.login(auth=auth)
    root = client.root
    assert root.RedfishVersion == "1.11.0"
    systems = client.get(root.Systems["@odata.id"]).dict
    assert systems["Members@odata.count"] == 1
    system = client.get(systems["Members"][0]["@odata.id"]).dict
    assert system["PowerState"] == "On"
    action = system["Actions"]["#ComputerSystem.Reset"]
    assert "ForceOff" in action["ResetType@Redfish.AllowableValues"]
    answer = client.post(action["target"], body={"ResetType": "ForceOff"})
    assert answer.status == 204
    assert bmc.machine.told.wait(5)
    assert client.get(system["@odata.id"]).dict["PowerState"] == "Off"
    wrong = client.post(action["target"], body={"ResetType": "Explode"})
    assert wrong.status == 400
    told = wrong.dict["error"]["@Message.ExtendedInfo"][0]
    assert told["MessageId"].endswith("ActionParameterNotSupported")
    assert client.get("/redfish/v1/Nowhere").status == 404
    client.logout()
    assert bmc.service.sessions() == ()


def test_dmtfs_client_with_a_wrong_password_stays_outside(bmc: Any) -> None:
    with pytest.raises(InvalidCredentialsError):
        _client(bmc, "wrong").login(auth="session")


@pytest.mark.skipif(shutil.which("fence_redfish", path="/usr/sbin") is None, reason="not there")
async def test_fence_redfish_switches_our_bmc(bmc: Any, tmp_path: Path) -> None:
    config = PowerConfig(
        type="fence-agent",
        agent="fence_redfish",
        address=f"127.0.0.1:{bmc.port}",
        user=USER,
        password="(sealed)",
        options={"ssl_insecure": "1", "systems_uri": "/redfish/v1/Systems/host1"},
    )
    # It sends a password in Latin-1, so one of ASCII.
    bmc.service.account = Account(USER, "plain-letters")
    device = Confirmed(driver_of(config, "plain-letters"), RealClock())
    assert await device.state(deadline_s=20) is PowerState.ON
    proof = await device.off(deadline_s=40)
    assert proof.state is PowerState.OFF
    assert bmc.machine.seen == ["ForceOff"]
    assert (await device.on(deadline_s=40)).state is PowerState.ON
    wrong = Confirmed(driver_of(config, "not-it"), RealClock())
    # This agent takes the refusal for an answer without a state, so nobody can say more.
    with pytest.raises(PowerFailed, match="Unable to get PowerState") as caught:
        await wrong.state(deadline_s=20)
    assert "not-it" not in caught.value.message
