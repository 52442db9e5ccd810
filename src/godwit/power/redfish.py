"""A host's power by Redfish: HTTPS and JSON, as DMTF's DSP0266 and its ComputerSystem schema say.

    GET  /redfish/v1/                         where things are; needs no login
    POST  .../Sessions                        a session, its token in X-Auth-Token; where there are
                                              no sessions, basic authentication
    GET   .../Systems, then the one system    PowerState, and where and how it may be reset
    POST  .../Actions/ComputerSystem.Reset    {"ResetType": "ForceOff"} or "On"
    DELETE the session

Who answers is checked before the password leaves: by the SHA-256 of its certificate (the factory's
own certificates carry no useful name), by a CA and the name in the address, or by this system's
trust store. TLS 1.2 is the least, for devices live long.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from godwit.model.errors import GodwitError
from godwit.model.power import PowerState
from godwit.power.device import Wanted
from godwit.power.errors import (
    PowerDenied,
    PowerFailed,
    PowerNotConfirmed,
    PowerNotTrusted,
    PowerUnavailable,
    scrubbed,
)
from godwit.wire.errors import PeerNotTrusted, PeerOutcomeUnknown, PeerRefused, PeerUnreachable
from godwit.wire.http import Answer, PeerClient
from godwit.wire.identity import PeerIdentity
from godwit.wire.tls import ClientTls

ROOT = "/redfish/v1/"
_GOODBYE_S = 2.0
_RESET = "#ComputerSystem.Reset"
# Of ComputerSystem.PowerState; others (Paused) say nothing about a machine without power.
_STATES = {
    "On": PowerState.ON,
    "Off": PowerState.OFF,
    "PoweringOn": PowerState.CHANGING,
    "PoweringOff": PowerState.CHANGING,
}
# In the order of preference, of what the device allows.
_WAYS = {PowerState.OFF: ("ForceOff",), PowerState.ON: ("On", "ForceOn")}


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedTls(ClientTls):
    """TLS to a device whose certificate we know; checked before the first byte of a request."""

    fingerprint: str = ""

    def verify(self, ssl_object: ssl.SSLObject | None, *, where: str) -> PeerIdentity | None:
        """Errors: PeerNotTrusted when it is another certificate."""
        if self.fingerprint:
            der = ssl_object.getpeercert(binary_form=True) if ssl_object else None
            seen = hashlib.sha256(der or b"").hexdigest()
            if not hmac.compare_digest(seen, self.fingerprint):
                raise PeerNotTrusted(
                    f"{where} shows another certificate: its SHA-256 is {seen}.",
                    hint="Find out why it changed; then: godwit host power set ... --fingerprint",
                )
        return None


def tls_of(*, fingerprint: str, ca: str) -> PinnedTls:
    """How a device's certificate is to be judged. Errors: PowerFailed for a CA that is none."""
    try:
        context = ssl.create_default_context(cadata=ca or None)
    except (ssl.SSLError, ValueError) as error:
        raise PowerFailed(f"the CA cannot be used: {error}", hint="give it as PEM") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if fingerprint:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # judged by `PinnedTls.verify`
    return PinnedTls(context=context, expect=None, fingerprint=fingerprint)


@dataclass(frozen=True, slots=True)
class _System:
    """The machine behind the service, as it was when it was read."""

    state: PowerState
    target: str  # where its reset is asked for
    allowed: tuple[str, ...]  # empty: the device does not say


class RedfishDriver:
    """One Redfish service and the machine behind it. Connects with the first call."""

    def __init__(
        self, address: str, *, user: str, password: str, tls: PinnedTls, system: str = ""
    ) -> None:
        self._address = address.rstrip("/")
        self._user = user
        self._password = password
        self._wanted = system
        self._pinned = bool(tls.fingerprint)
        self._client = PeerClient(
            self._address, tls=tls, headers={"accept": "application/json", "odata-version": "4.0"}
        )
        self._login: dict[str, str] = {}
        self._session = ""
        self._path = ""  # of the system, once it was found

    @property
    def label(self) -> str:
        """``the Redfish device at https://...``."""
        return f"the Redfish device at {self._address}"

    async def read(self, *, deadline_s: float) -> PowerState:
        """``PowerState`` of the system."""
        return (await self._look(deadline_s)).state

    async def send(self, wanted: Wanted, *, deadline_s: float) -> None:
        """Post the reset type that does it."""
        system = await self._look(deadline_s)
        ways = [way for way in _WAYS[wanted] if not system.allowed or way in system.allowed]
        if not system.target or not ways:
            raise PowerFailed(
                f"{self.label} offers no {' or '.join(_WAYS[wanted])}, only "
                f"{', '.join(system.allowed) or 'nothing'}",
                hint="look in the device's own interface whether this is switched off there",
            )
        await self._ask("POST", system.target, {"ResetType": ways[0]}, deadline_s=deadline_s)

    async def aclose(self) -> None:
        """End the session: devices have room for a few."""
        if self._session:
            with contextlib.suppress(GodwitError):
                await self._ask("DELETE", self._session, deadline_s=_GOODBYE_S)
            self._session = ""
        await self._client.close(at_once=True)

    async def _look(self, deadline_s: float) -> _System:
        if not self._login:
            await self._log_in(deadline_s)
        if not self._path:
            self._path = await self._find(deadline_s)
        found = await self._get(self._path, deadline_s)
        reset = (found.get("Actions") or {}).get(_RESET) or {}
        allowed = reset.get("ResetType@Redfish.AllowableValues") or ()
        return _System(
            state=_STATES.get(str(found.get("PowerState")), PowerState.UNKNOWN),
            target=str(reset.get("target") or ""),
            allowed=tuple(str(one) for one in allowed),
        )

    async def _log_in(self, deadline_s: float) -> None:
        root = await self._get(ROOT, deadline_s)
        links = root.get("Links") or {}
        where = (links.get("Sessions") or {}).get("@odata.id")
        if not where:
            self._login = {"authorization": f"Basic {self._basic()}"}
            return
        body = {"UserName": self._user, "Password": self._password}
        answer = await self._ask("POST", _local(where), body, deadline_s=deadline_s)
        token = answer.headers.get("x-auth-token", "")
        if not token:
            raise PowerFailed(f"{self.label} began a session without a token")
        self._login = {"x-auth-token": token}
        self._session = _local(answer.headers.get("location", ""))

    def _basic(self) -> str:
        return base64.b64encode(f"{self._user}:{self._password}".encode()).decode()

    async def _find(self, deadline_s: float) -> str:
        """The path of the one system, or of the one that was named."""
        root = await self._get(ROOT, deadline_s)
        systems = (root.get("Systems") or {}).get("@odata.id")
        if not systems:
            raise PowerFailed(f"{self.label} has no systems", hint="is it a chassis or a switch?")
        listed = (await self._get(_local(systems), deadline_s)).get("Members") or []
        paths = [_local(str(one.get("@odata.id", ""))) for one in listed]
        names = {path.rstrip("/").rpartition("/")[2]: path for path in paths if path}
        found = names.get(self._wanted) if self._wanted else paths[0] if len(paths) == 1 else None
        if found is None:
            raise PowerFailed(
                f"{self.label} has the systems {', '.join(sorted(names)) or '(none)'}"
                + (f", not {self._wanted}" if self._wanted else ""),
                hint="say which one: godwit host power set ... --system ID",
            )
        return found

    async def _get(self, path: str, deadline_s: float) -> dict[str, Any]:
        answer = await self._ask("GET", path, deadline_s=deadline_s)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise PowerFailed(
                f"{self.label} does not speak Redfish: {path} is no JSON object",
                hint="check the address",
            )
        return found

    async def _ask(self, method: str, path: str, body: Any = None, *, deadline_s: float) -> Answer:
        try:
            return await self._client.request(
                method, path, json=body, headers=self._login, deadline_s=deadline_s
            )
        except PeerNotTrusted as error:
            hint = error.hint if self._pinned else "say whose it is: --fingerprint or --ca-file"
            raise PowerNotTrusted(error.message, hint=hint) from None
        except PeerUnreachable as error:
            raise PowerUnavailable(error.message, hint="is the device's network up?") from None
        except PeerOutcomeUnknown as error:
            if method == "GET":
                raise PowerUnavailable(error.message, hint="the device may hang") from None
            raise PowerNotConfirmed(error.message, hint="look: godwit host power test") from None
        except PeerRefused as error:
            raise self._refused(method, path, error) from None

    def _refused(self, method: str, path: str, error: PeerRefused) -> GodwitError:
        said = scrubbed(_said(error), self._password)
        if error.status == 401 and "x-auth-token" in self._login:
            # The device ended the session, as it does when it restarts; the next call begins one.
            self._login, self._session = {}, ""
            return PowerUnavailable(f"{self.label} has forgotten our session", hint="try again")
        if error.status in (401, 403):
            return PowerDenied(
                f"{self.label} does not accept us as {self._user!r}: {said}",
                hint="check user and password: godwit host power set",
            )
        if error.status in (429, 502, 503, 504):
            return PowerUnavailable(f"{self.label} is busy: {said}", hint="try again")
        return PowerFailed(f"{self.label} refused {method} {path} ({error.status}): {said}")


def _local(path: str) -> str:
    """The path of a link, which some devices give with their own address before it."""
    return urlsplit(path).path or ""


def _said(error: PeerRefused) -> str:
    """A Redfish error's own words: the first extended message, else its message."""
    body = error.problem.extra.get("error")
    if isinstance(body, dict):
        more = body.get("@Message.ExtendedInfo")
        if isinstance(more, list) and more and isinstance(more[0], dict):
            return str(more[0].get("Message") or body.get("message") or error.message)
        return str(body.get("message") or error.message)
    return error.message
