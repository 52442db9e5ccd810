"""The request to validate the cluster. A room of `godwit.model.requests`."""

from __future__ import annotations

from typing import Literal

from godwit.model.base import Value


class ValidateCluster(Value):
    """Check hosts, networks, storage, systems and the cluster, and write a report.

    It changes nothing, and runs beside everything else; the migration network is busy for some
    seconds. ``live``: a small VM is made, moved live between two hosts and removed, too.
    """

    kind: Literal["cluster.validate"] = "cluster.validate"
    live: bool = False
