"""From a host's record to its device, with the password opened at the last moment.

async with opened("host1", config, vault=vault, clock=clock) as device:
    proof = await device.off(deadline_s=30)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator

from godwit.model.power import PowerConfig
from godwit.model.world import Clock
from godwit.power.agents import AgentDriver
from godwit.power.device import Confirmed, Driver, PowerDevice
from godwit.power.ipmi import IpmiDriver
from godwit.power.redfish import RedfishDriver, tls_of
from godwit.power.vault import Vault

# What says when and by whom a record was written changes nothing about where the password goes.
_NOT_BOUND = {"password", "set_at", "set_by", "task"}


def sealed(host: str, config: PowerConfig, password: str, *, vault: Vault) -> PowerConfig:
    """The record with its password sealed, for this host and this device alone."""
    return config.but(password=vault.seal(password, about=_about(host, config)))


def _about(host: str, config: PowerConfig) -> str:
    # Defaults are left out, so that a field of a later version does not void older records.
    bound = config.model_dump(mode="json", exclude=_NOT_BOUND, exclude_defaults=True)
    return f"the power device of {host}\n{json.dumps(bound, sort_keys=True)}"


@contextlib.asynccontextmanager
async def opened(
    host: str, config: PowerConfig, *, vault: Vault, clock: Clock
) -> AsyncIterator[PowerDevice]:
    """A host's device for a while. Errors: those of `Vault.open`; PowerFailed for a bad CA."""
    driver = driver_of(config, vault.open(config.password, about=_about(host, config)))
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
