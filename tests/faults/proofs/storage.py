"""The sections of issue B: disks of every kind, and the storage that they lie on."""

from __future__ import annotations

import dataclasses

from tests.faults.kit import (
    along,
    brokers,
    checkpoints,
    clones,
    debian,
    diskmoves,
    formats,
    full,
    growth,
    handover,
    hotdisks,
    lent,
    outages,
    rbd,
    redirect,
    served,
    starts,
    uefi,
)
from tests.faults.kit.cluster import Cluster
from tests.faults.kit.report import Section, tell
from tests.faults.proofs.setting import Work, joined, lab, on_lab

FORMAT_MOVES = 20
BROKER_REPEATS = 5
CLONE_MOVES = 3
CHECKPOINT_ROUNDS = 3
REDIRECTS = 3
FEW_CELLS = (*handover.sample(1), *handover.sample(2))
DIRECT_CELLS = tuple(c for n in (1, 2, 3) for c in handover.sample(n, brokers=False))
LENT_CELLS = (*lent.lender_cells(), *FEW_CELLS, *handover.sample(3), *handover.sample(4))


def _checkpoints(cluster: Cluster) -> Section:
    """Disks that QEMU opens, that the broker opens, and one of each."""
    section = Section("checkpoints")
    for tiers in (("direct", "direct"), ("brokered", "brokered"), checkpoints.MIXED):
        part = checkpoints.run(cluster, rounds=CHECKPOINT_ROUNDS, tiers=tiers)
        name = " and ".join(tiers)
        section.figures[name] = part.figures
        section.criteria += [
            dataclasses.replace(c, text=f"{name}: {c.text}") for c in part.criteria
        ]
    return section


def _served() -> Section:
    """NFS images and iSCSI LUNs, each in a lab that serves them, beside raw on a directory."""
    section = Section("served")
    parts: dict[str, Section] = {}
    with lab(section, storage="iscsi") as cluster:
        parts["iscsi"] = served.luns(cluster, moves=FORMAT_MOVES)
    with lab(section, storage="nfs") as cluster:
        parts["nfs"] = served.images(cluster, moves=FORMAT_MOVES)
        parts["cut"] = served.cut(cluster)
        cells = handover.run(cluster, FEW_CELLS, setting=handover.SERVED, starts=BROKER_REPEATS)
        parts["on NFS, where openings are not watched"] = cells
    return joined(section, parts)


def _handover() -> Section:
    """All cells where no image lock helps; some with locks, of QEMU's own disks, and over NBD."""
    section = Section("handover")
    parts: dict[str, Section] = {}
    with lab(section, image_locks=False) as cluster:
        parts["without image locks"] = handover.run(cluster, setting=handover.UNLOCKED)
        parts["without image locks, the disk opened by QEMU itself"] = handover.run(
            cluster, DIRECT_CELLS, setting=handover.DIRECT, starts=BROKER_REPEATS
        )
        parts["without image locks, over NBD through the other host"] = handover.run(
            cluster, LENT_CELLS, setting=handover.LENT, starts=BROKER_REPEATS
        )
    with lab(section) as cluster:
        parts["with image locks"] = handover.run(cluster, FEW_CELLS, starts=BROKER_REPEATS)
    return joined(section, parts)


def _uefi() -> Section:
    """Variables on a directory, and on a volume that is served to QEMU alone."""
    section = on_lab(lambda cluster: uefi.run(cluster, every_way=True))
    served_part = on_lab(uefi.on_nfs, storage="nfs")
    section.criteria += [
        dataclasses.replace(c, text=f"on NFS: {c.text}") for c in served_part.criteria
    ]
    return section


def _redirect() -> Section:
    """A host loses its path: to a directory, an NFS server, a LUN; brokered, and opened by QEMU."""
    section = Section("redirect")
    for storage in ("dir", "nfs", "iscsi"):
        with lab(section, storage=storage) as cluster:
            parts = [redirect.run(cluster, repeats=REDIRECTS, strikes=1)]
            if storage != "dir":
                parts.append(outages.run(cluster, say=tell))
        for part in parts:
            section.figures[f"{part.name} {storage}"] = part.figures
            section.criteria += [
                dataclasses.replace(c, text=f"{storage}: {c.text}") for c in part.criteria
            ]
    return section


SECTIONS: dict[str, Work] = {
    "formats": lambda: on_lab(lambda cluster: formats.run(cluster, moves=FORMAT_MOVES)),
    "served": _served,
    "rbd": lambda: on_lab(lambda c: rbd.run(c, moves=FORMAT_MOVES), storage="nfs"),
    "brokers": lambda: on_lab(lambda cluster: brokers.run(cluster, repeats=BROKER_REPEATS)),
    "hotdisks": lambda: on_lab(hotdisks.run),
    "handover": _handover,
    "disk-move": lambda: on_lab(diskmoves.run),
    "growth": lambda: on_lab(growth.run),
    "full-volume": lambda: full.run(kinds=full.EVERY),
    "starts": lambda: on_lab(starts.run),
    "uefi": _uefi,
    "debian": lambda: on_lab(debian.run),
    "checkpoints": lambda: on_lab(_checkpoints),
    "clones": lambda: on_lab(lambda cluster: clones.run(cluster, moves=CLONE_MOVES)),
    "shared-nothing": lambda: on_lab(along.run),
    "redirect": _redirect,
}
