"""A host's power device: how it is reached, what it says, and what people are shown of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from godwit.model.base import Name, Record

PowerKind = Literal["redfish", "ipmi", "fence-agent"]


class PowerState(StrEnum):
    """What a power device says of its host; only ``off`` proves that nothing runs there."""

    ON = "on"
    OFF = "off"
    CHANGING = "changing"  # on its way to either
    UNKNOWN = "unknown"  # the device answers, and cannot tell


class PowerConfig(Record):
    """How a host's power is switched. ``password`` is sealed with the cluster's key.

    ``address``: an https URL (redfish), HOST[:PORT] (ipmi, fence-agent). ``fingerprint`` is the
    SHA-256 of the device's certificate, in hex; ``ca`` a PEM to check it by instead. ``system``
    names one of several machines behind a Redfish service. ``agent`` is a fence agent's program.
    """

    type: PowerKind
    address: str
    user: str = ""
    password: str = Field(repr=False)
    fingerprint: str = ""
    ca: str = Field(default="", repr=False)
    system: str = ""
    agent: str = ""
    options: dict[str, str] = Field(default_factory=dict)
    set_at: float = 0.0
    set_by: str = ""
    task: str = ""  # which task wrote it


class SealedSecret(Record):
    """A secret that was handed in and waits, for minutes, to be named in a request."""

    sealed: str = Field(repr=False)


class PowerView(Record):
    """What ``host power show -o json`` prints: everything but the password."""

    host: Name
    type: PowerKind
    address: str
    user: str
    fingerprint: str
    ca: bool
    system: str
    agent: str
    options: dict[str, str]
    set_at: float
    set_by: str

    @staticmethod
    def of(host: str, config: PowerConfig) -> PowerView:
        """The public part of a host's device."""
        return PowerView(
            host=host,
            type=config.type,
            address=config.address,
            user=config.user,
            fingerprint=config.fingerprint,
            ca=bool(config.ca),
            system=config.system,
            agent=config.agent,
            options=config.options,
            set_at=config.set_at,
            set_by=config.set_by,
        )
