"""A host's power by IPMI 2.0 over the network, spoken by the program ``ipmitool``.

    ipmitool -I lanplus -H HOST -p PORT -U USER -E ... chassis power status|on|off

The password is in the program's environment (``-E``). ipmitool ends with status 1 whatever went
wrong; what it says on its error output tells a wrong password from silence, and it says that only
with ``-v`` (1.8.19). Which cipher suite to speak it asks the BMC, for three seconds where the BMC
does not know that question: the option ``cipher`` saves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from godwit.host.errors import ProgramFailed, ProgramTimedOut
from godwit.model.errors import GodwitError
from godwit.model.power import PowerState
from godwit.power.device import Wanted
from godwit.power.errors import (
    PowerDenied,
    PowerFailed,
    PowerNotConfirmed,
    PowerUnavailable,
    scrubbed,
)
from godwit.power.program import call

PORT: Final = 623
_VERBS: Final = {PowerState.ON: "on", PowerState.OFF: "off"}
# What its messages contain when the device answered and the two of us do not agree on who we are.
_DENIED: Final = ("rakp", "unauthorized", "password", "insufficient privilege", "invalid user")


def split_place(place: str, port: int) -> tuple[str, int]:
    """Host and port of HOST, HOST:PORT or [ADDRESS]:PORT."""
    if place.startswith("["):
        host, _, rest = place[1:].partition("]")
        return host, int(rest[1:] or port)
    host, _, given = place.partition(":")
    return host, int(given or port)


class IpmiDriver:
    """One BMC. Each call is a session of its own."""

    def __init__(self, place: str, *, user: str, password: str, options: Mapping[str, str]) -> None:
        self._place = place
        self._host, self._port = split_place(place, PORT)
        self._user = user
        self._password = password
        words = {"cipher": "-C", "privlvl": "-L"}
        self._more = [word for key, text in options.items() for word in (words[key], text)]

    @property
    def label(self) -> str:
        """``the IPMI device at HOST``."""
        return f"the IPMI device at {self._place}"

    async def read(self, *, deadline_s: float) -> PowerState:
        """``Chassis Power is on``."""
        try:
            said = await self._chassis("status", deadline_s)
        except ProgramTimedOut:
            raise PowerUnavailable(
                f"{self.label} did not answer within {deadline_s:g} s", hint="is its network up?"
            ) from None
        word = said.strip().lower().rpartition(" ")[2]
        return {"on": PowerState.ON, "off": PowerState.OFF}.get(word, PowerState.UNKNOWN)

    async def send(self, wanted: Wanted, *, deadline_s: float) -> None:
        """``chassis power off`` cuts the power without a word to the system."""
        try:
            await self._chassis(_VERBS[wanted], deadline_s)
        except ProgramTimedOut:
            raise PowerNotConfirmed(
                f"{self.label} did not say within {deadline_s:g} s whether it did it",
                hint="look: godwit host power test",
            ) from None

    async def aclose(self) -> None:
        """Nothing is held."""

    async def _chassis(self, verb: str, deadline_s: float) -> str:
        argv = [
            *("ipmitool", "-I", "lanplus", "-H", self._host, "-p", str(self._port)),
            *("-U", self._user, "-E", *self._more, "-v", "-R", "2", "-N", "1"),
            *("chassis", "power", verb),
        ]
        env = {"IPMITOOL_PASSWORD": self._password}
        try:
            return await call(argv, deadline_s=deadline_s, package="ipmitool", env=env)
        except ProgramFailed as error:
            last = "; ".join(error.stderr.strip().splitlines()[-2:])
            raise self._failed(verb, scrubbed(last, self._password)) from None

    def _failed(self, verb: str, said: str) -> GodwitError:
        words = said.lower()
        if any(word in words for word in _DENIED):
            return PowerDenied(
                f"{self.label} does not accept us as {self._user!r}: {said}",
                hint="check user and password: godwit host power set",
            )
        if "unable to establish" in words or "timeout" in words or "could not open" in words:
            return PowerUnavailable(f"{self.label} does not answer: {said}")
        return PowerFailed(f"{self.label} refused power {verb}: {said or 'without a word'}")
