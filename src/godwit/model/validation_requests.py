"""The request to validate the cluster. A room of `godwit.model.requests`."""

from __future__ import annotations

from typing import Literal

from godwit.model.base import Name, Value


class ValidateCluster(Value):
    """Check hosts, networks, storage, systems and the cluster, and write a report.

    It changes nothing, and runs beside everything else; the migration network is busy for some
    seconds. ``live``: a small VM is made, moved live between two hosts and removed, too.
    ``failover``: the host whose power is cut with that VM on it, and given back; nothing else may
    run there.
    """

    kind: Literal["cluster.validate"] = "cluster.validate"
    live: bool = False
    failover: Name | None = None
