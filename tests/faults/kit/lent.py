"""The hand-over of a VM whose I/O goes over NBD: through the other host, which lends its path.

Its broker here has no image open; a daemon of the host that it moves to has, without a lock, and
serves it over TLS at the owner's epoch. So at the hand-over one host has to let go of the image
twice: as the lender, and as what it lent to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from godwit.model.errors import GodwitError

from . import cells
from .cells import Cell
from .cluster import Cluster

LENDER = "destination-lent"
LENDING = (("source", "pre-switchover"), ("source", "committing"), ("destination", "prepared"))
"""Where a move stands while the lender still has the image open."""
GONE_S = 15.0


def lender_cells() -> tuple[Cell, ...]:
    """What exports the disks killed and frozen, wherever there is one."""
    return tuple(
        Cell(role, point, kind, LENDER) for role, point in LENDING for kind in ("kill", "freeze")
    )


@contextmanager
def through_the_other(cluster: Cluster, vm: str) -> Iterator[list[str]]:
    """The VM's I/O goes through the host it is not on, by request; and its own way afterwards.

    What is wrong about that is in the list: a host that lends on when nobody borrows.
    """
    here = cells.ready(cluster, vm)
    wrong: list[str] = []
    cluster.client.wait(cluster.client.volumes.redirect("shared", host=here))
    lender = cluster.other(here)
    assert cluster.lab.process(lender, f"lent:{vm}"), "nobody lends"
    try:
        yield wrong
    finally:
        try:
            cluster.heal()
            cluster.client.wait(cluster.client.volumes.restore("shared", host=here))
        except (GodwitError, AssertionError) as error:
            wrong.append(f"no way back from the other host: {error}")
        wrong += _still_lent(cluster, vm)


def _still_lent(cluster: Cluster, vm: str) -> list[str]:
    """Hosts that export the VM's disks still, a while after the last one needed it."""
    until = time.monotonic() + GONE_S
    while True:
        roots = {host: cluster.lab.root_of(host) for host in cluster.hosts}
        left = [host for host, root in roots.items() if (root / f"run/godwit/lent/{vm}").exists()]
        if not left or time.monotonic() > until:
            return [f"{host} still exports the disks of {vm}" for host in left]
        time.sleep(0.1)  # it ends beside what people wait for
