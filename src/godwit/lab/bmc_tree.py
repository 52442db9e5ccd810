"""The resources of an emulated BMC, as JSON objects; pure.

Types and versions are those of DMTF's schema bundle; ``ComputerSystem.v1_13_0`` knows all that is
said here. Standard library only.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Final

_V1: Final = "/redfish/v1"
RESETS: Final = ("On", "ForceOff", "ForceRestart")
_EDMX: Final = "http://docs.oasis-open.org/odata/ns/edmx"
_NAMESPACE: Final = uuid.UUID("6f2b1f0e-3c53-4a38-9a0e-5a2c9b0c4f11")

METADATA: Final = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    f'<edmx:Edmx xmlns:edmx="{_EDMX}" Version="4.0">\n'
    + "".join(
        f'  <edmx:Reference Uri="http://redfish.dmtf.org/schemas/v1/{file}_v1.xml">\n'
        f'    <edmx:Include Namespace="{namespace}"/>\n'
        "  </edmx:Reference>\n"
        for file, namespace in (
            ("ServiceRoot", "ServiceRoot.v1_9_0"),
            ("SessionService", "SessionService.v1_1_8"),
            ("SessionCollection", "SessionCollection"),
            ("Session", "Session.v1_3_0"),
            ("ComputerSystemCollection", "ComputerSystemCollection"),
            ("ComputerSystem", "ComputerSystem.v1_13_0"),
        )
    )
    + "  <edmx:DataServices>\n"
    '    <Schema xmlns="http://docs.oasis-open.org/odata/ns/edm" Namespace="Service">\n'
    '      <EntityContainer Name="Service" Extends="ServiceRoot.v1_9_0.ServiceContainer"/>\n'
    "    </Schema>\n"
    "  </edmx:DataServices>\n"
    "</edmx:Edmx>\n"
)


class Tree:
    """The resources of one machine."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.system = f"{_V1}/Systems/{name}"
        self.reset_target = f"{self.system}/Actions/ComputerSystem.Reset"

    def read(self, path: str, *, on: bool, sessions: Sequence[str]) -> dict[str, Any] | None:
        """The resource at a path without a slash at its end; None when there is none."""
        services = f"{_V1}/SessionService"
        fixed = {
            "/redfish": {"v1": f"{_V1}/"},
            _V1: self._root(),
            f"{_V1}/odata": self._odata(),
            services: self._session_service(),
            f"{services}/Sessions": _collection(
                f"{services}/Sessions", "Session", [f"{services}/Sessions/{n}" for n in sessions]
            ),
            f"{_V1}/Systems": _collection(f"{_V1}/Systems", "ComputerSystem", [self.system]),
            self.system: self._machine(on),
        }
        if path in fixed:
            return fixed[path]
        folder, _, number = path.rpartition("/")
        if folder == f"{services}/Sessions" and number in sessions:
            return self.session(number, "")
        return None

    def session(self, number: str, user: str) -> dict[str, Any]:
        """A session's resource."""
        return {
            "@odata.id": f"{_V1}/SessionService/Sessions/{number}",
            "@odata.type": "#Session.v1_3_0.Session",
            "Id": number,
            "Name": f"Session {number}",
            "UserName": user,
        }

    def _root(self) -> dict[str, Any]:
        return {
            "@odata.id": f"{_V1}/",
            "@odata.type": "#ServiceRoot.v1_9_0.ServiceRoot",
            "Id": "RootService",
            "Name": f"BMC of {self.name}",
            "RedfishVersion": "1.11.0",
            "UUID": str(uuid.uuid5(_NAMESPACE, f"bmc/{self.name}")),
            "Product": "Godwit lab BMC",
            "Systems": {"@odata.id": f"{_V1}/Systems"},
            "SessionService": {"@odata.id": f"{_V1}/SessionService"},
            "Links": {"Sessions": {"@odata.id": f"{_V1}/SessionService/Sessions"}},
        }

    def _odata(self) -> dict[str, Any]:
        members = (("Service", f"{_V1}/"), ("Systems", f"{_V1}/Systems"))
        value = [{"name": name, "kind": "Singleton", "url": url} for name, url in members]
        return {"@odata.context": f"{_V1}/$metadata", "value": value}

    def _session_service(self) -> dict[str, Any]:
        return {
            "@odata.id": f"{_V1}/SessionService",
            "@odata.type": "#SessionService.v1_1_8.SessionService",
            "Id": "SessionService",
            "Name": "Session Service",
            "ServiceEnabled": True,
            "Sessions": {"@odata.id": f"{_V1}/SessionService/Sessions"},
        }

    def _machine(self, on: bool) -> dict[str, Any]:
        return {
            "@odata.id": self.system,
            "@odata.type": "#ComputerSystem.v1_13_0.ComputerSystem",
            "Id": self.name,
            "Name": self.name,
            "SystemType": "Physical",
            "Manufacturer": "Godwit",
            "Model": "Lab host",
            "UUID": str(uuid.uuid5(_NAMESPACE, self.name)),
            "Status": {"State": "Enabled" if on else "StandbyOffline", "Health": "OK"},
            "PowerState": "On" if on else "Off",
            "Actions": {
                "#ComputerSystem.Reset": {
                    "target": self.reset_target,
                    "ResetType@Redfish.AllowableValues": list(RESETS),
                }
            },
        }


def _collection(path: str, kind: str, members: Sequence[str]) -> dict[str, Any]:
    return {
        "@odata.id": path,
        "@odata.type": f"#{kind}Collection.{kind}Collection",
        "Name": f"{kind} Collection",
        "Members@odata.count": len(members),
        "Members": [{"@odata.id": one} for one in members],
    }
