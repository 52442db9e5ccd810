"""Inventory: which hosts there are, whether they answered, and what is installed on them."""

from __future__ import annotations

from godwit.cluster.validation.findings import Findings, dotted, listed, names, odd_ones
from godwit.model.validation import ValidationCheck
from godwit.model.validation_facts import ClusterFacts, HostProbe


def machine_age(machine: str) -> tuple[int, ...]:
    """Sorts versions of one kind of machine by age: ``pc-q35-9.2`` comes before ``pc-q35-10.0``."""
    numbers = machine.rpartition("-")[2].split(".")
    return tuple(int(number) for number in numbers if number.isdigit())


def checks(facts: ClusterFacts) -> list[ValidationCheck]:
    """The checks of this category."""
    found = Findings("inventory")
    _hosts(found, facts)
    if facts.probes:
        _versions(found, facts.probes)
        _machines(found, facts.probes)
    return found


def _hosts(found: Findings, facts: ClusterFacts) -> None:
    silent = [host for host in facts.hosts if host.probe is None]
    if not facts.hosts:
        found.fail("hosts", "there is no host", "install the agent on a machine and let it join")
    for host in silent:
        found.fail(
            "hosts",
            f"{host.name} ({host.state}) did not answer: {host.reason or 'its agent is silent'}",
            "bring it back, or remove it from the cluster; nothing of it was checked",
            [host.name],
        )
    if facts.hosts and not silent:
        if len(facts.hosts) == 1:
            found.warn("hosts", "there is one host: nothing can move", "let a second machine join")
        else:
            found.ok("hosts", f"all {len(facts.hosts)} hosts answered")


def _versions(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    godwit = {probe.name: probe.version for probe in probes}
    if len(set(godwit.values())) > 1:
        found.warn(
            "godwit-versions",
            f"hosts run different versions of Godwit: {listed(godwit)}",
            "finish the update: a mixed cluster works, and is meant to be one for hours only",
            odd_ones(godwit),
        )
    else:
        found.ok("godwit-versions", f"Godwit {probes[0].version} on every host")
    qemu = {probe.name: dotted(probe.qemu.version) for probe in probes}
    if len(set(qemu.values())) > 1:
        found.warn(
            "qemu-versions",
            f"hosts have different versions of QEMU: {listed(qemu)}",
            "VMs move from an older QEMU to a newer one only: update the older hosts",
            odd_ones(qemu),
        )
    else:
        found.ok("qemu-versions", f"QEMU {dotted(probes[0].qemu.version)} on every host")


def _machines(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    """A VM is pinned to a machine version when it is made: hosts need one in common."""
    shared = set(probes[0].qemu.machines).intersection(*(one.qemu.machines for one in probes[1:]))
    if not shared:
        newest = {p.name: max(p.qemu.machines, key=machine_age, default="none") for p in probes}
        found.fail(
            "machine-versions",
            f"no QEMU machine version is known to all hosts: {listed(newest)} at the most",
            "update QEMU on the oldest host: no new VM could run on all of them",
            odd_ones(newest),
        )
        return
    best = max(shared, key=machine_age)
    newer = {p.name for p in probes if max(p.qemu.machines, key=machine_age) != best}
    more = f"; {names(newer)} could do more" if newer else ""
    found.ok("machine-versions", f"new VMs are made for {best}, which every host knows{more}")
