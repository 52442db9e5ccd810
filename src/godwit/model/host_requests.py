"""What can be asked about a host. A room of `godwit.model.requests`, which knows them all."""

from __future__ import annotations

import re
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from godwit.model.base import Name, Value
from godwit.model.power import PowerKind

SECRET = "secret:"  # noqa: S105 - what the name of a secret that was handed in begins with
LONGEST_POWER_S = 86400.0
_PLACE = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*)(:\d{1,5})?$")
# What may be said to a fence agent beside where, who and the password. Not its options that name
# programs and files, make it talkative, or let it take what it does not find for off.
_AGENT_OPTIONS = (
    *("plug", "port", "ipport", "ssl", "ssl_secure", "ssl_insecure", "notls", "tls1.0"),
    *("redfish_uri", "systems_uri", "lanplus", "auth", "cipher", "privlvl"),
    *("inet4_only", "inet6_only", "hexadecimal_kg", "secure"),
    *("snmp_version", "snmp_sec_level", "snmp_auth_prot", "snmp_priv_prot", "switch"),
    *("login_timeout", "shell_timeout", "power_timeout", "power_wait", "retry_on"),
    *("region", "zone", "project", "resourcegroup", "uuid"),
)
OPTIONS: dict[PowerKind, dict[str, str]] = {
    "redfish": {},
    "ipmi": {"cipher": r"\d{1,2}", "privlvl": r"(?i)user|operator|administrator"},
    "fence-agent": dict.fromkeys(_AGENT_OPTIONS, r".{0,256}"),
}
"""Which options a device may be given, and what their values look like."""


class ConfirmHostDown(Value):
    """Say that a host which does not answer is off, so that what waits for its word goes on.

    Refused while the host answers. A wrong word may cost data: what that host still writes lands
    after newer writes.
    """

    kind: Literal["host.confirm-down"] = "host.confirm-down"
    name: Name


class SetHostPower(Value):
    """Say how a host's power is switched; the password is kept sealed.

    ``password_file`` is what ``POST /v1/secrets`` answered for the password; the command line and
    the client take a file here and hand its content in first. ``address`` is an https URL for
    redfish, HOST[:PORT] otherwise. ``fingerprint`` (SHA-256) or ``ca`` (PEM) says which
    certificate the device must have; without either it must be one that this system trusts.
    """

    kind: Literal["host.power.set"] = "host.power.set"
    name: Name
    type: PowerKind
    address: str = Field(min_length=1, max_length=512)
    user: str = Field(default="", max_length=256)
    password_file: str = Field(min_length=1, max_length=4096)
    fingerprint: str = ""
    ca: str = Field(default="", max_length=1 << 17)
    system: str = Field(default="", max_length=256)
    agent: str = ""
    options: tuple[str, ...] = ()

    @field_validator("fingerprint")
    @classmethod
    def _plain_hex(cls, text: str) -> str:
        plain = text.replace(":", "").lower()
        if plain and not re.fullmatch(r"[0-9a-f]{64}", plain):
            raise ValueError("write the SHA-256 of the certificate, 64 hexadecimal digits")
        return plain

    @field_validator("address", "user", "system", "options")
    @classmethod
    def _one_line(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else value
        if any(not text.isprintable() for text in texts):
            raise ValueError("control characters have no place here")
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.type == "redfish":
            _check_url(self.address)
        elif not _PLACE.fullmatch(self.address):
            raise ValueError("the address is HOST or HOST:PORT")
        elif self.fingerprint or self.ca or self.system:
            raise ValueError("fingerprint, CA and system are of redfish")
        if self.fingerprint and self.ca:
            raise ValueError("give a fingerprint or a CA, not both")
        if self.type == "fence-agent" and not re.fullmatch(r"fence_[a-z0-9_]{1,40}", self.agent):
            raise ValueError("say which fence agent, like fence_redfish")
        if self.type != "fence-agent" and self.agent:
            raise ValueError("an agent is of fence-agent")
        _check_options(self.type, self.options)
        return self


def _check_options(kind: PowerKind, options: tuple[str, ...]) -> None:
    for option in options:
        name, equals, value = option.partition("=")
        pattern = OPTIONS[kind].get(name)
        if not equals:
            raise ValueError(f"{option!r} is not KEY=VALUE")
        if pattern is None:
            raise ValueError(f"the option {name} may not be given to {kind}")
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} is no value of the option {name}")


def _check_url(text: str) -> None:
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError("the address is like https://192.0.2.7 or https://bmc1.example:8443")
    if "@" in parts.netloc:
        raise ValueError("a user or password has no place in the address")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("the address is the device's alone, without a path")
    _ = parts.port  # ValueError when it is none


class RemoveHostPower(Value):
    """Forget a host's power device, and its password."""

    kind: Literal["host.power.remove"] = "host.power.remove"
    name: Name


class CheckHostPower(Value):
    """Ask a host's power device for the host's state; changes nothing."""

    kind: Literal["host.power.test"] = "host.power.test"
    name: Name


class SwitchHostOn(Value):
    """Switch a host on; done when its power device says that it is on."""

    kind: Literal["host.power.on"] = "host.power.on"
    name: Name
    timeout_s: float = Field(default=60.0, gt=0, le=LONGEST_POWER_S)


class SwitchHostOff(Value):
    """Cut a host's power; done when its power device says that it is off.

    Refused while VMs run there, or when the store's majority or the only manager would go with it,
    unless ``force``.
    """

    kind: Literal["host.power.off"] = "host.power.off"
    name: Name
    force: bool = False
    timeout_s: float = Field(default=60.0, gt=0, le=LONGEST_POWER_S)


class ResetHost(Value):
    """Cut a host's power, see that it is off, and switch it on again.

    Refused while VMs run there, or when the store's majority or the only manager would go with it,
    unless ``force``.
    """

    kind: Literal["host.power.reset"] = "host.power.reset"
    name: Name
    force: bool = False
    timeout_s: float = Field(default=60.0, gt=0, le=LONGEST_POWER_S)


PowerRequest = (
    SetHostPower | RemoveHostPower | CheckHostPower | SwitchHostOn | SwitchHostOff | ResetHost
)
