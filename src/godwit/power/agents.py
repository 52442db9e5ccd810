"""A host's power by a fence agent (``fence_*`` of the package fence-agents).

Its interface: options as ``key=value`` lines on standard input, one of them ``action``; the exit
status says the rest. Of ``status``: 0 is on, 2 is off, all else is trouble. Of ``on`` and ``off``:
0 is done. That an agent says "done" is not taken for proof either; its ``status`` is.
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
from godwit.power.ipmi import split_place
from godwit.power.program import call

_VERBS: Final = {PowerState.ON: "on", PowerState.OFF: "off"}
_OFF: Final = 2
_SILENT: Final = ("timed out", "timeout", "unable to connect", "connection refused", "no route")
_DENIED: Final = ("login", "password", "authenticat", "unauthorized", "401")


class AgentDriver:
    """One plug of one device behind a fence agent."""

    def __init__(
        self,
        agent: str,
        place: str,
        *,
        user: str,
        password: str,
        options: Mapping[str, str],
    ) -> None:
        self._agent = agent
        self._place = place
        self._password = password
        host, port = split_place(place, 0)
        own = {"ip": host, "username": user, "password": password}
        self._options = {**options, **({"ipport": str(port)} if port else {}), **own}

    @property
    def label(self) -> str:
        """``fence_redfish at HOST``."""
        return f"{self._agent} at {self._place}"

    async def read(self, *, deadline_s: float) -> PowerState:
        """The exit status of ``status``."""
        try:
            await self._act("status", deadline_s)
        except ProgramTimedOut:
            raise PowerUnavailable(
                f"{self.label} did not answer within {deadline_s:g} s", hint="is its network up?"
            ) from None
        except ProgramFailed as error:
            if error.returncode == _OFF:
                return PowerState.OFF
            raise self._failed("status", error) from None
        return PowerState.ON

    async def send(self, wanted: Wanted, *, deadline_s: float) -> None:
        """The agent waits for its device itself; what it waits beyond the deadline is cut off."""
        try:
            await self._act(_VERBS[wanted], deadline_s)
        except ProgramTimedOut:
            raise PowerNotConfirmed(
                f"{self.label} did not end within {deadline_s:g} s",
                hint="look: godwit host power test",
            ) from None
        except ProgramFailed as error:
            raise self._failed(_VERBS[wanted], error) from None

    async def aclose(self) -> None:
        """Nothing is held."""

    async def _act(self, action: str, deadline_s: float) -> None:
        lines = {"action": action, **self._options}
        if any("\n" in text for pair in lines.items() for text in pair):
            raise PowerFailed(f"{self.label}: a value holds a line break", hint="set it again")
        text = "".join(f"{key}={value}\n" for key, value in lines.items())
        await call([self._agent], deadline_s=deadline_s, package="fence-agents", stdin=text)

    def _failed(self, action: str, error: ProgramFailed) -> GodwitError:
        said = scrubbed(error.stderr, self._password) or f"exit status {error.returncode}"
        words = said.lower()
        if any(word in words for word in _SILENT):
            return PowerUnavailable(f"{self.label} does not answer: {said}")
        if any(word in words for word in _DENIED):
            return PowerDenied(f"{self.label} was not let in: {said}", hint="check the password")
        return PowerFailed(f"{self.label} failed at {action}: {said}")
