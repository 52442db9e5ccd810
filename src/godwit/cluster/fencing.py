"""The fencing ladder: what may count as proof that a VM stands still on a host that is lost.

1. storage: the VM's disks are cut off from that host, and every one of them confirmed it;
2. deadline: the host's guard kept a deadline (`Renewal.guard` armed) with a watchdog behind it;
3. power: the host's power device was told off and read back off;
4. person: ``godwit host confirm-down``.

A rung counts only if it is proof for *this* silence: an `Attempt` and a word are bound to the last
renewal that was heard. What is proof already is used at once: that the host's own agent answers and
has nothing of the VM, a person's word, a power device that said off, the deadline. Otherwise the
next rung that can be tried is, in this order; one that failed is passed over for
`Timings.retry_s`. A cut is taken back when its host has renewed again. Where the host's agent
has answered for a while, it is asked to end the VM before any other rung is tried; one that has
just come back renews in a moment.

After rung 1 the old QEMU may still compute, but nothing it does reaches a disk. A VM without a disk
has no such rung: there would be nothing that confirms. Nor has one whose disks a storage broker
opens: cut off, it would look for a peer that lends it its own way to them.

Power stops every VM of its host, and a storage cut takes the disks on the same volumes from all of
them. Neither is therefore used while the host answers and runs VMs that are not highly available.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from godwit.cluster.facts import Attempt, Rung, Snapshot, VmSeen
from godwit.cluster.membership import Standing, is_off
from godwit.cluster.steps import Fence, Restore
from godwit.model.disks import tier_of
from godwit.model.vm import Disk
from godwit.model.volume import SERVED


@dataclass(frozen=True, kw_only=True)
class RungView:
    """Whether a rung is there for a VM on a host, and why (not)."""

    rung: Rung
    there: bool
    why: str


@dataclass(frozen=True)
class Proof:
    """A VM provably stands still on its old host."""

    rung: Rung
    sentence: str


@dataclass(frozen=True)
class Wait:
    """No proof yet, and what it waits for. ``person``: only a person can help."""

    sentence: str
    person: bool = False


def ladder(snapshot: Snapshot, vm: VmSeen, host: str) -> tuple[RungView, ...]:
    """The four rungs for a VM on one host, in their order."""
    return (
        _storage(snapshot, vm, host),
        _deadline(snapshot, vm, host),
        _power(snapshot, host),
        RungView(rung=Rung.PERSON, there=True, why="godwit host confirm-down"),
    )


def admission(snapshot: Snapshot, vm: VmSeen) -> str:
    """Why the VM cannot be highly available; empty when on each host it may run on a rung exists.

    A person is no rung here: a failover that always waits for one is none.
    """
    local = [disk.id for disk in vm.vm.written if disk.local]
    if local:
        return f"disk {local[0]} of {vm.name} lies on its host's own storage"
    for name in sorted(vm.vm.rules.hosts or snapshot.hosts):
        if name not in snapshot.hosts:
            continue
        rungs = ladder(snapshot, vm, name)[:3]
        if not any(view.there for view in rungs):
            reasons = "; ".join(f"{view.rung.value}: {view.why}" for view in rungs)
            return f"nothing could prove that {vm.name} stands still on {name} ({reasons})"
    return ""


def _storage(snapshot: Snapshot, vm: VmSeen, host: str) -> RungView:
    """Each of the VM's disks needs something that cuts this one host off from it."""
    disks = vm.vm.written
    reasons = [why for disk in disks if (why := _uncut(snapshot, disk, host))]
    if not disks:
        reasons = ["it has no disk whose loss would be proof"]
    if reasons:
        return RungView(rung=Rung.STORAGE, there=False, why=reasons[0])
    volumes = ", ".join(sorted({disk.volume for disk in disks}))
    return RungView(rung=Rung.STORAGE, there=True, why=f"{volumes} can cut {host} off")


def _uncut(snapshot: Snapshot, disk: Disk, host: str) -> str:
    """Why ``host`` cannot be cut off from a disk; empty when it can."""
    volume = disk.volume
    if not volume:
        return "a block device of a host has nothing that cuts it off"
    if tier_of(disk) == "brokered":
        return f"the storage broker of {disk.id} could reach {volume} through another host"
    peer = snapshot.hosts[host].redirected.get(volume)
    if peer is not None:
        seen = snapshot.hosts.get(peer)
        if seen is None or not seen.answers:
            return f"{volume} is redirected through {peer}, which does not answer"
        return ""
    known = snapshot.volumes.get(volume)
    kind = "dir" if known is None else known.kind
    if kind not in SERVED:
        return f"{volume} is a plain directory on each host, nothing cuts one off"
    return snapshot.uncuttable.get(volume) or snapshot.unbound.get((volume, host), "")


def _deadline(snapshot: Snapshot, vm: VmSeen, host: str) -> RungView:
    heard = snapshot.heard.hosts.get(host)
    renewal = None if heard is None else heard.renewal
    if not vm.deadline:
        why = f"the guard of {host} keeps no deadline for it"
    elif renewal is None:
        why = f"{host} has not renewed its lease since this manager listens"
    elif renewal.boot_id != snapshot.hosts[host].boot_id:
        why = f"{host} was booted since its guard said so, and has not renewed since"
    elif renewal.guard != "armed":
        why = f"the guard of {host} did not keep the deadline (unarmed)"
    elif not renewal.watchdog:
        why = f"{host} has no watchdog, and a guard alone proves nothing"
    else:
        return RungView(
            rung=Rung.DEADLINE, there=True, why=f"the guard of {host} is armed, with a watchdog"
        )
    return RungView(rung=Rung.DEADLINE, there=False, why=why)


def _power(snapshot: Snapshot, host: str) -> RungView:
    if not snapshot.hosts[host].power:
        why = f"no power device is known for {host}"
        return RungView(rung=Rung.POWER, there=False, why=why)
    return RungView(rung=Rung.POWER, there=True, why=f"{host} has a power device")


def spared(snapshot: Snapshot, host: str, *, cut: VmSeen | None = None) -> tuple[str, ...]:
    """VMs because of which a host is not switched off: it answers, and they are not ``ha``.

    ``cut``: because of which it is not cut off from the disks of this VM: they have disks there.
    """
    if not snapshot.hosts[host].answers:
        return ()
    plain = [vm for vm in snapshot.owned_by(host) if not vm.vm.ha]
    if cut is not None:
        volumes = {disk.volume for disk in cut.vm.written}
        plain = [vm for vm in plain if volumes & {disk.volume for disk in vm.vm.written}]
    return tuple(vm.name for vm in plain)


def proof(snapshot: Snapshot, vm: VmSeen, host: str) -> Proof | None:
    """What proves now that the VM does not run on a host that is lost; None when nothing does."""
    if snapshot.hosts[host].listed and not vm.on(host):
        return Proof(Rung.AGENT, f"{host} itself says that nothing of it runs")
    off = is_off(snapshot, host)
    if off:
        tries = _tries(snapshot, host, "", Rung.POWER)
        powered = any(attempt.outcome == "confirmed" for attempt in tries)
        return Proof(Rung.POWER if powered else Rung.PERSON, off)
    counted = snapshot.silence(host) >= snapshot.timings.takeover_s
    if counted and _deadline(snapshot, vm, host).there and not _seen_moving(snapshot, vm, host):
        return Proof(
            Rung.DEADLINE,
            f"silent for {snapshot.silence(host):.1f} s: its guard was armed, with a watchdog",
        )
    needed = {disk.id for disk in vm.vm.written}
    confirmed = {
        disk for attempt in _tries(snapshot, host, vm.name, Rung.STORAGE) for disk in attempt.disks
    }
    if needed and needed <= confirmed:
        return Proof(Rung.STORAGE, f"{host} is cut off from every disk of {vm.name}")
    return None


def _seen_moving(snapshot: Snapshot, vm: VmSeen, host: str) -> bool:
    """The host answers, and what it says contradicts its guard: it is not frozen."""
    moving = ("running", "starting", "paused")
    return snapshot.hosts[host].listed and any(p.state in moving for p in vm.on(host))


def _tries(snapshot: Snapshot, host: str, vm: str, rung: Rung) -> tuple[Attempt, ...]:
    """What was tried on one rung in this silence of a host; ``vm`` is empty for its power."""
    heard = snapshot.identity(host)
    return tuple(
        attempt
        for attempt in snapshot.attempts
        if (attempt.host, attempt.vm, attempt.rung) == (host, vm, rung) and attempt.heard == heard
    )


def restores(snapshot: Snapshot, hosts: Mapping[str, Standing]) -> list[Restore]:
    """Cuts to take back: the host has renewed since, and nothing there can run beside the owner."""
    found: dict[str, Restore] = {}
    for attempt in snapshot.attempts:
        here = hosts.get(attempt.host)
        if attempt.rung is not Rung.STORAGE or attempt.outcome == "running":
            continue
        if here is None or here.lost or not snapshot.hosts[attempt.host].listed:
            continue
        if _harmless(snapshot, attempt) and attempt.heard != snapshot.identity(attempt.host):
            vm = snapshot.vms.get(attempt.vm)
            revision = 0 if vm is None else vm.owner_revision
            step = Restore(host=attempt.host, vm=attempt.vm, owner_revision=revision)
            cuts = {*found.get(step.key, step).cuts, *filter(None, [attempt.cut])}
            found[step.key] = replace(step, cuts=tuple(sorted(cuts)))
    return list(found.values())


def _harmless(snapshot: Snapshot, attempt: Attempt) -> bool:
    """The VM belongs there, or there is no QEMU of it there; also of one that is forgotten."""
    vm = snapshot.vms.get(attempt.vm)
    if vm is None:
        return attempt.vm not in snapshot.hosts[attempt.host].runs
    return vm.owner.host == attempt.host or not vm.on(attempt.host)


def next_step(snapshot: Snapshot, vm: VmSeen, host: str, now: float) -> Fence | Wait:
    """The rung to try now for a VM that is without proof, or what it waits for."""
    storage, _, power, _ = ladder(snapshot, vm, host)
    since = snapshot.heard.answering.get(host, now)
    steady = snapshot.hosts[host].listed and now - since >= snapshot.timings.late_s
    asked = RungView(rung=Rung.AGENT, there=steady, why=f"{host} answers")
    passed: list[str] = []
    for view, name in ((asked, vm.name), (storage, vm.name), (power, "")):
        if not view.there:
            continue
        held: tuple[str, ...] = ()
        if view.rung is not Rung.AGENT:
            held = spared(snapshot, host, cut=vm if view.rung is Rung.STORAGE else None)
        if held:
            also = f"{view.rung.value} would also stop {', '.join(held)}"
            passed.append(f"{also}, and {host} answers")
            continue
        tries = _tries(snapshot, host, name, view.rung)
        if any(attempt.outcome == "running" for attempt in tries):
            return Wait(f"fencing {host} by {view.rung.value}")
        failed = [attempt for attempt in tries if attempt.outcome == "failed"]
        recent = [a for a in failed if now - a.ended_at < snapshot.timings.retry_s]
        if recent:
            passed.append(f"{view.rung.value} failed: {recent[-1].reason}")
            continue
        disks = tuple(d.id for d in vm.vm.written) if view.rung is Rung.STORAGE else ()
        return Fence(
            host=host,
            rung=view.rung,
            vm=name,
            disks=disks,
            heard=snapshot.identity(host),
            owner_revision=vm.owner_revision if view.rung is Rung.AGENT else 0,
            why=view.why,
        )
    if passed:
        return Wait(
            f"{'; '.join(passed)}; if {host} is down: godwit host confirm-down {host}", True
        )
    return Wait(
        f"no rung can prove that it stands still on {host}; "
        f"if it is down: godwit host confirm-down {host}",
        True,
    )
