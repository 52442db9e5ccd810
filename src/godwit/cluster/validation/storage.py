"""Storage: each shared volume is there for every host, is the same one, and its locks count."""

from __future__ import annotations

from godwit.cluster.validation.findings import Findings, listed, names, odd_ones
from godwit.model.validation import ValidationCheck
from godwit.model.validation_facts import ClusterFacts, VolumeKnown, VolumeSeen

_PATH_HINT = "look at its way to the storage; VMs there cannot be started or moved to it"


def checks(facts: ClusterFacts) -> list[ValidationCheck]:
    """The checks of this category."""
    found = Findings("storage")
    shared = [volume for volume in facts.volumes if volume.kind != "local"]
    if not shared:
        found.warn(
            "volumes",
            "no volume is shared by the hosts",
            "define one: godwit volume create; VMs on local disks take them along when they move",
        )
    for volume in shared:
        seen = [one for one in facts.volumes_seen if one.volume == volume.name]
        _present(found, volume, seen, facts)
        _same(found, volume, seen)
        if volume.kind == "dir":
            _read(found, volume, seen)
    _locks(found, facts, {volume.name for volume in shared if volume.kind == "dir"})
    return found


def _present(
    found: Findings, volume: VolumeKnown, seen: list[VolumeSeen], facts: ClusterFacts
) -> None:
    hosts = {probe.name for probe in facts.probes}
    silent = hosts - {one.host for one in seen}
    wrong = [one for one in seen if one.wrong or one.state == "unavailable"]
    for one in wrong:
        found.fail(
            "volumes",
            f"{one.host} cannot use volume {volume.name}: {one.wrong or one.state_reason}",
            f"mount or connect it there: {_PATH_HINT}",
            [one.host],
        )
    for host in sorted(silent):
        found.warn(
            "volumes",
            f"{host} has said nothing of volume {volume.name}",
            _PATH_HINT,
            [host],
        )
    others = [one for one in seen if one.state in ("redirected", "paused") and one not in wrong]
    for one in others:
        found.warn(
            "volumes",
            f"volume {volume.name} is {one.state} on {one.host}: {one.state_reason}",
            "bring the host's own path back",
            [one.host],
        )
    if not wrong and not silent and not others:
        found.ok("volumes", f"volume {volume.name} ({volume.kind}) works on all {len(seen)} hosts")


def _same(found: Findings, volume: VolumeKnown, seen: list[VolumeSeen]) -> None:
    marks = {one.host: one.identity for one in seen if one.identity}
    if len(set(marks.values())) > 1:
        found.fail(
            "same-volume",
            f"hosts have different storage under the name {volume.name}: {listed(marks)}",
            f"mount the same storage everywhere; if each host is meant to have its own: "
            f"godwit volume create {volume.name} --kind local",
            odd_ones(marks),
        )


def _read(found: Findings, volume: VolumeKnown, seen: list[VolumeSeen]) -> None:
    """What one host writes the others must find."""
    good = [one for one in seen if not one.wrong and one.state != "unavailable"]
    able = {one.host for one in good}
    blind = False
    for one in good:
        unread = {writer: why for writer, why in one.unread.items() if writer in able}
        if unread:
            blind = True
            found.fail(
                "written-and-read",
                f"{one.host} does not find what {names(unread)} wrote to volume {volume.name}: "
                f"{next(iter(unread.values()))}",
                "they have different directories under that name, or one serves old contents; "
                f"meant to be each host's own: godwit volume create {volume.name} --kind local",
                [one.host, *unread],
            )
    if not blind and len(good) > 1:
        slowest = max((one.write_s or 0.0 for one in good), default=0.0)
        found.ok(
            "written-and-read",
            f"what each host writes to {volume.name} every other one reads; "
            f"a durable write took {slowest * 1000:.0f} ms at the most",
        )


def _locks(found: Findings, facts: ClusterFacts, volumes: set[str]) -> None:
    """The last guard against two QEMUs on one image."""
    off = [probe.name for probe in facts.probes if not probe.image_locks]
    if off:
        found.warn(
            "image-locks",
            f"image locks are switched off on {names(off)}",
            "with them QEMU itself refuses an image that is open elsewhere: qemu.image_locks",
            off,
        )
    unseen = [lock for lock in facts.locks if not lock.seen]
    for lock in unseen:
        found.fail(
            "image-locks",
            f"{lock.observer} does not see that {lock.holder} has locked an image on "
            f"{lock.volume}: {lock.reason}",
            "mount it so that locks reach the server (NFS without nolock or local_lock)",
            [lock.holder, lock.observer],
        )
    locked = {lock.volume for lock in facts.locks}
    if not unseen and locked:
        found.ok("image-locks", f"locks on images of {names(locked)} are seen by every host")
    elif not unseen and volumes and len(facts.probes) > 1:
        found.warn(
            "image-locks", "no lock could be tried across hosts", "see the checks of the volumes"
        )
