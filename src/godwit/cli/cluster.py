"""``godwit cluster``: the cluster as a whole."""

from __future__ import annotations

from godwit.cli.cluster_validate import validate
from godwit.cli.look import noun_group

cluster = noun_group("cluster", "The cluster as a whole.")
cluster.add_command(validate)
