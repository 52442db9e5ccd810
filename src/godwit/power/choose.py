"""From a host's record to its device, with the password opened at the last moment.

async with opened("host1", config, vault=vault, clock=clock) as device:
    proof = await device.off(deadline_s=30)
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from godwit.model.power import PowerConfig
from godwit.model.world import Clock
from godwit.power.agents import AgentDriver
from godwit.power.device import Confirmed, Driver, PowerDevice
from godwit.power.ipmi import IpmiDriver
from godwit.power.redfish import RedfishDriver, tls_of
from godwit.power.vault import Vault, about_host


@contextlib.asynccontextmanager
async def opened(
    host: str, config: PowerConfig, *, vault: Vault, clock: Clock
) -> AsyncIterator[PowerDevice]:
    """A host's device for a while. Errors: those of `Vault.open`; PowerFailed for a bad CA."""
    driver = driver_of(config, vault.open(config.password, about=about_host(host)))
    device: PowerDevice = Confirmed(driver, clock)
    try:
        yield device
    finally:
        await device.aclose()


def driver_of(config: PowerConfig, password: str) -> Driver:
    """What speaks to such a device."""
    match config.type:
        case "redfish":
            return RedfishDriver(
                config.address,
                user=config.user,
                password=password,
                tls=tls_of(fingerprint=config.fingerprint, ca=config.ca),
                system=config.system,
            )
        case "ipmi":
            return IpmiDriver(
                config.address, user=config.user, password=password, options=config.options
            )
        case "fence-agent":
            return AgentDriver(
                config.agent,
                config.address,
                user=config.user,
                password=password,
                options=config.options,
            )
