"""Network: one migration network for all, undivided packets of full size, its speed."""

from __future__ import annotations

import ipaddress
from typing import Final

from godwit.cluster.validation.findings import Findings, listed, names, odd_ones
from godwit.model.validation import ValidationCheck
from godwit.model.validation_facts import ClusterFacts, HostProbe, PathSeen

SLOW_BITS: Final = 900_000_000
"""Below it (a Gigabit Ethernet gives 940 Mbit/s) a big, busy VM takes minutes to move."""
TOO_SLOW_BITS: Final = 57_000_000
"""4 GiB in the ten minutes that a move has by default: with less a small VM does not make it."""
OF_STATED: Final = 0.7
"""Less than this part of the stated rate means that something is wrong with the link."""
JUMBO_FROM_BITS: Final = 5_000_000_000
JUMBO: Final = 9000


def checks(facts: ClusterFacts) -> list[ValidationCheck]:
    """The checks of this category."""
    found = Findings("network")
    probes = facts.probes
    if probes:
        _subnet(found, probes)
        _dedicated(found, probes)
        _mtu(found, probes)
    if len(facts.hosts) > 1:
        _reach(found, facts)
        _undivided(found, facts)
        if not facts.partial:
            _speed(found, facts)
    if probes and not facts.partial:
        _vm_networks(found, facts)
    return found


def _subnet(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    """As configured, and as the interface really has it."""
    subnets = {probe.name: _network_of(probe) for probe in probes}
    hint = "give every host an address in the same subnet of the migration network"
    for probe in probes:
        if not probe.migration_address:
            found.fail("subnet", f"{probe.name} has no migration address", hint, [probe.name])
        elif probe.migration is None:
            text = f"no interface of {probe.name} has its migration address"
            found.fail("subnet", f"{text} {probe.migration_address}", hint, [probe.name])
    known = {name: subnet for name, subnet in subnets.items() if subnet}
    if len(set(known.values())) > 1:
        text = f"migration addresses are in different subnets: {listed(known)}"
        found.fail("subnet", text, hint, odd_ones(known))
    elif len(known) == len(probes):
        found.ok("subnet", f"all migration addresses are in {next(iter(known.values()))}")


def _network_of(probe: HostProbe) -> str:
    """The subnet a host is in: that of its interface, else the configured one."""
    if probe.migration is not None:
        return str(ipaddress.ip_interface(probe.migration.address).network)
    return probe.migration_subnet


def _dedicated(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    shared = [
        probe.name
        for probe in probes
        if probe.migration and probe.management and probe.migration.name == probe.management.name
    ]
    unknown = [p.name for p in probes if p.migration is None or p.management is None]
    if shared:
        found.warn(
            "dedicated",
            f"moves share the interface of the management network on {names(shared)}",
            "give the migration network an interface of its own: a move fills it",
            shared,
        )
    elif unknown:
        found.warn(
            "dedicated",
            f"not known whether the migration network is a separate one on {names(unknown)}",
            "look at its addresses",
            unknown,
        )
    else:
        found.ok("dedicated", "the migration network has an interface of its own on every host")


def _mtu(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    sizes = {probe.name: probe.migration.mtu for probe in probes if probe.migration}
    if len(set(sizes.values())) > 1:
        found.fail(
            "mtu",
            f"MTUs of the migration network differ: {listed(sizes)}",
            "set the same MTU on every host: packets that are too large vanish without a word",
            odd_ones(sizes),
        )
    elif sizes:
        found.ok("mtu", f"the migration network has an MTU of {next(iter(sizes.values()))}")


def _reach(found: Findings, facts: ClusterFacts) -> None:
    """Nothing arrives at all: worth one line for each host, not for each pair."""
    dead = [path for path in facts.paths if path.largest_bytes is None]
    hosts = {path.source for path in dead} | {path.destination for path in dead}
    alone = {h for h in hosts if all(p in dead for p in facts.paths if h in _ends(p))}
    hint = "look at the cable, the switch and a packet filter of the migration network"
    for host in sorted(alone):
        why = next(path.reason for path in dead if host in _ends(path))
        found.fail(
            "reachable",
            f"nothing passes between {host} and the others on the migration network: {why}",
            hint,
            [host],
        )
    for path in dead:
        if not alone.intersection(_ends(path)):
            text = f"nothing arrives from {path.source} at {path.destination}: {path.reason}"
            found.fail("reachable", text, hint, _ends(path))
    if not facts.paths:
        found.warn("reachable", "no path between two hosts was measured", "see the inventory")
    elif not dead:
        found.ok("reachable", f"packets arrive on all {len(facts.paths)} ways between hosts")


def _undivided(found: Findings, facts: ClusterFacts) -> None:
    arrived = [path for path in facts.paths if path.largest_bytes is not None]
    short = [path for path in arrived if (path.largest_bytes or 0) < path.full_bytes]
    for path in short:
        found.fail(
            "full-packets",
            f"undivided packets of {path.full_bytes} bytes do not get from {path.source} to "
            f"{path.destination}; {path.largest_bytes} bytes do",
            f"set the MTU of both hosts and of the switch between them to {path.full_bytes}, or "
            f"that of all hosts to {path.largest_bytes}",
            _ends(path),
        )
    if arrived and not short:
        sizes = " to ".join(map(str, sorted({path.full_bytes for path in arrived})))
        found.ok("full-packets", f"undivided packets of {sizes} bytes arrive everywhere")


def _speed(found: Findings, facts: ClusterFacts) -> None:
    measured = [path for path in facts.paths if path.bits_per_s is not None]
    stated = {probe.name: probe.migration_rate_bits for probe in facts.probes}
    slow = 0
    for path in measured:
        rate, wanted = path.bits_per_s or 0.0, _stated(stated, path)
        text = f"{path.source} to {path.destination} carries {told(rate)}"
        if rate < TOO_SLOW_BITS:
            found.fail(
                "bandwidth",
                f"{text}: a VM of 4 GiB does not make it in ten minutes",
                "look for a link that came up slower than it can (ethtool), or a limit in between",
                _ends(path),
            )
        elif wanted and rate < OF_STATED * wanted:
            found.warn(
                "bandwidth",
                f"{text}, and {told(wanted)} are stated",
                "look for a link that came up slower than it can, or correct migration.rate",
                _ends(path),
            )
        elif rate < SLOW_BITS and not wanted:
            found.warn(
                "bandwidth", text, "live moves of large VMs want a gigabit and more", _ends(path)
            )
        else:
            continue
        slow += 1
    unmeasured = [path for path in facts.paths if path.rate_reason]
    for path in unmeasured:
        found.warn(
            "bandwidth",
            f"not measured from {path.source} to {path.destination}: {path.rate_reason}",
            "validate again at another time",
            _ends(path),
        )
    if not measured and not unmeasured:
        found.warn("bandwidth", "no bandwidth was measured", "see the checks above")
    elif not slow and not unmeasured:
        least = min(path.bits_per_s or 0.0 for path in measured)
        found.ok("bandwidth", f"each of {len(measured)} ways carries {told(least)} or more")
    _jumbo(found, facts, max((path.bits_per_s or 0.0 for path in measured), default=0.0))


def _stated(stated: dict[str, int], path: PathSeen) -> int:
    both = [stated.get(host, 0) for host in _ends(path)]
    return min(both) if all(both) else 0


def _jumbo(found: Findings, facts: ClusterFacts, fastest: float) -> None:
    sizes = [path.largest_bytes for path in facts.paths if path.largest_bytes is not None]
    if not sizes:
        return
    if min(sizes) >= JUMBO:
        found.ok("jumbo-frames", f"packets of {min(sizes)} bytes arrive end to end")
    elif fastest >= JUMBO_FROM_BITS:
        found.warn(
            "jumbo-frames",
            f"the migration network is fast ({told(fastest)}), its packets are of {min(sizes)} "
            "bytes at the most",
            f"an MTU of {JUMBO} on hosts and switch saves processor time in every move",
        )
    else:
        found.ok("jumbo-frames", "none, and at this speed they would gain little")


def _vm_networks(found: Findings, facts: ClusterFacts) -> None:
    wrong = False
    for network in sorted(facts.networks):
        there = {p.name: p.networks[network] for p in facts.probes if network in p.networks}
        missing = [probe.name for probe in facts.probes if network not in probe.networks]
        if missing:
            wrong = True
            found.fail(
                "vm-networks",
                f"network {network} is missing on {names(missing)}",
                "name its bridge in the configuration there: no VM of it can move to that host",
                missing,
            )
        if len(set(there.values())) > 1:
            wrong = True
            found.fail(
                "vm-networks",
                f"the MTU of network {network} differs: {listed(there)}",
                "set the same MTU everywhere: a VM keeps its own when it moves",
                odd_ones(there),
            )
    if not wrong:
        told = ", ".join(sorted(facts.networks)) or "none"
        found.ok("vm-networks", f"every host has every VM network, with one MTU each: {told}")


def told(bits_per_s: float) -> str:
    """``940 Mbit/s``, ``9.41 Gbit/s``."""
    if bits_per_s >= 1e9:
        return f"{bits_per_s / 1e9:.2f} Gbit/s"
    digits = 0 if bits_per_s >= 1e7 else 1
    return f"{bits_per_s / 1e6:.{digits}f} Mbit/s"


def _ends(path: PathSeen) -> tuple[str, str]:
    return path.source, path.destination
