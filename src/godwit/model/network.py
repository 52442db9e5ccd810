"""A VM network: the same bridge under the same name on every host."""

from __future__ import annotations

from pydantic import Field

from godwit.model.base import Name, Record


class Network(Record):
    """A layer-2 network that VMs plug into."""

    name: Name
    bridge: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,14}$")
    mtu: int = Field(default=1500, ge=576, le=9216)
    subnet: str = ""  # for people; Godwit routes nothing
    uplink: str = ""  # the interface the bridge gets as its port on each host


class NetworkView(Network):
    """One row of ``network list -o json``."""

    hosts: tuple[str, ...] = ()
    vms: int = 0
