"""System: processors, virtualization, QEMU and clocks; what a running VM depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from godwit.cluster.baseline import joins
from godwit.cluster.validation.findings import Findings, dotted, listed, names, odd_ones
from godwit.model.validation import ValidationCheck
from godwit.model.validation_facts import ClusterFacts, HostProbe, PathSeen
from godwit.model.vm import OWN_CPU

CLOCK_FAIL_S: Final = 1.0
"""Beyond it a move is refused (`migration.plan`): guests would jump and reports lie."""
CLOCK_WARN_S: Final = 0.1
_FEATURES_SHOWN = 6

Rule = Callable[[Findings, tuple[HostProbe, ...]], None]


def checks(facts: ClusterFacts) -> list[ValidationCheck]:
    """The checks of this category."""
    found = Findings("system")
    if facts.probes:
        rules: tuple[Rule, ...] = (_architecture, _vendor, _features, _models, _virtualization)
        for rule in (*rules, _slat, _accelerator, _qemu, _postcopy):
            rule(found, facts.probes)
        _baseline(found, facts)
    _clocks(found, facts)
    return found


def _architecture(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    kinds = {probe.name: probe.machine for probe in probes}
    wrong = [name for name, kind in kinds.items() if kind != "x86_64"]
    if wrong:
        found.fail(
            "architecture",
            f"not every host is x86-64: {listed(kinds)}",
            "Godwit runs x86-64 guests: take the others out of the cluster",
            wrong,
        )
    else:
        found.ok("architecture", "every host is x86-64")


def _vendor(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    makers = {probe.name: probe.cpu.vendor or "unknown" for probe in probes}
    if len(set(makers.values())) > 1:
        found.fail(
            "cpu-vendor",
            f"CPUs are of different manufacturers: {listed(makers)}",
            "a running VM cannot move between them: make a cluster of each",
            odd_ones(makers),
        )
    else:
        found.ok("cpu-vendor", f"all CPUs are made by {probes[0].cpu.vendor or 'an unknown maker'}")


def _features(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    """What not all CPUs have is out of the common baseline."""
    known = [probe for probe in probes if probe.cpu.flags]
    if not known:
        found.warn("cpu-features", "no host shows its CPU's features", "look at /proc/cpuinfo")
        return
    every = set().union(*(probe.cpu.flags for probe in known))
    missing = {p.name: tuple(sorted(every.difference(p.cpu.flags))) for p in known}
    poor = {name: flags for name, flags in missing.items() if flags}
    if not poor:
        found.ok("cpu-features", f"every host's CPU has the same {len(every)} features")
        return
    baseline = set(known[0].cpu.flags).intersection(*(one.cpu.flags for one in known[1:]))
    told = "; ".join(f"{name} lacks {_some(flags)}" for name, flags in sorted(poor.items()))
    found.warn(
        "cpu-features",
        f"CPUs differ, {len(baseline)} features are common to all: {told}",
        "new VMs get a CPU model that all hosts can give; a firmware or microcode setting may "
        "bring the feature back",
        poor,
    )


def _some(flags: tuple[str, ...]) -> str:
    more = len(flags) - _FEATURES_SHOWN
    return ", ".join(flags[:_FEATURES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _models(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    """The baseline as QEMU sees it: a VM's CPU model must be there in full on every host."""
    shared = set(probes[0].qemu.cpu_models)
    shared = shared.intersection(*(probe.qemu.cpu_models for probe in probes[1:]))
    if not shared:
        found.fail(
            "cpu-models",
            "no CPU model can be given by all hosts",
            "look at each host's CPU and QEMU: no new VM could move between all of them",
        )
        return
    least = min(len(probe.qemu.cpu_models) for probe in probes)
    most = max(len(probe.qemu.cpu_models) for probe in probes)
    if least != most or len(shared) != most:
        counts = {probe.name: len(probe.qemu.cpu_models) for probe in probes}
        found.warn(
            "cpu-models",
            f"{len(shared)} CPU models can be given by all hosts, {most} by the best of them",
            "VMs that need more cannot move everywhere",
            odd_ones(counts),
        )
    else:
        found.ok("cpu-models", f"every host can give the same {len(shared)} CPU models")


def _baseline(found: Findings, facts: ClusterFacts) -> None:
    """Each host against the CPU models that VMs have, and that new ones are to get."""
    needed = {model: count for model, count in facts.cpu_models.items() if model not in OWN_CPU}
    below: dict[str, tuple[str, ...]] = {}
    for probe in facts.probes:
        gives = probe.qemu.cpu_models
        if why := joins(facts.cpu_baseline, gives):
            below[probe.name] = (*below.get(probe.name, ()), f"the baseline that was set: {why}")
        for model, count in sorted(needed.items()):
            if joins(model, gives):
                said = f"it cannot give {model}, which {count} VMs have"
                below[probe.name] = (*below.get(probe.name, ()), said)
    if below:
        who = "; ".join(f"{name}: {', '.join(why)}" for name, why in sorted(below.items()))
        found.warn(
            "cpu-baseline",
            f"{len(below)} hosts are below what VMs need: {who}",
            "those VMs are never placed there; godwit cluster set --cpu-baseline MODEL says what "
            "new ones get",
            below,
        )
    elif needed or facts.cpu_baseline:
        found.ok("cpu-baseline", "every host can give the CPU model that each VM has")


def _virtualization(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    without = [probe for probe in probes if not probe.cpu.virtualization]
    closed = [p for p in probes if p.cpu.virtualization and not p.kvm]
    if without:
        found.warn(
            "virtualization",
            f"the CPU shows no hardware virtualization on {names(p.name for p in without)}: "
            "VMs are emulated there, many times slower",
            "switch on VT-x or AMD-V (SVM) in the firmware; in a virtual machine, nesting",
            [probe.name for probe in without],
        )
    for probe in closed:
        found.warn(
            "virtualization",
            f"{probe.name} cannot use KVM: {probe.kvm_reason or 'no reason given'}",
            "load the module kvm_intel or kvm_amd, and look at the rights of /dev/kvm",
            [probe.name],
        )
    if not without and not closed:
        found.ok("virtualization", "every host's CPU virtualizes, and KVM answers")


def _slat(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    without = [probe.name for probe in probes if not probe.cpu.slat]
    if without:
        found.warn(
            "slat",
            f"no second-level address translation (EPT, NPT) on {names(without)}",
            "without it a VM's memory is slow: switch it on with virtualization in the firmware",
            without,
        )
    else:
        found.ok("slat", "every host translates guests' addresses in hardware")


def _accelerator(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    kinds = {probe.name: probe.qemu.accelerator for probe in probes}
    if len(set(kinds.values())) > 1:
        found.fail(
            "accelerator",
            f"VMs run differently: {listed(kinds)}",
            "a running VM cannot move between emulation and KVM: make all hosts alike",
            odd_ones(kinds),
        )
    else:
        found.ok("accelerator", f"VMs run with {probes[0].qemu.accelerator} on every host")


def _qemu(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    refused = [probe for probe in probes if probe.qemu.live_migration_refusal]
    for probe in refused:
        found.fail(
            "qemu-live",
            f"QEMU {dotted(probe.qemu.version)} on {probe.name} is too old to move a running VM: "
            f"{probe.qemu.live_migration_refusal}",
            "install a newer QEMU there, on Debian from the backports suite",
            [probe.name],
        )
    if not refused:
        found.ok("qemu-live", "every host's QEMU can move running VMs")


def _postcopy(found: Findings, probes: tuple[HostProbe, ...]) -> None:
    without = [probe.name for probe in probes if not probe.userfaultfd]
    if without:
        found.warn(
            "post-copy",
            f"no usable /dev/userfaultfd on {names(without)}",
            "moves to these hosts do without post-copy; it needs Linux 6.1 and that device",
            without,
        )
    else:
        found.ok("post-copy", "every host can take a VM by post-copy")


def _clocks(found: Findings, facts: ClusterFacts) -> None:
    if len(facts.hosts) < 2:
        return
    measured = [path for path in facts.paths if path.clock_offset_s is not None]
    off = [path for path in measured if _apart(path) > CLOCK_WARN_S]
    for host, path, limit in _culprits(off, [host.name for host in facts.hosts]):
        text = (
            f"the clock of {host} is off by {abs(path.clock_offset_s or 0.0):.3f} s"
            if limit
            else f"the clocks of {' and '.join(sorted(_ends(path)))} differ by "
            f"{abs(path.clock_offset_s or 0.0):.3f} s"
        )
        hosts = [host] if limit else [path.source, path.destination]
        hint = "let every host follow one time source (chrony, systemd-timesyncd)"
        if _apart(path) > CLOCK_FAIL_S:
            found.fail("clock", text, f"{hint}; moves are refused beyond {CLOCK_FAIL_S:g} s", hosts)
        else:
            found.warn("clock", text, hint, hosts)
    seen = {(path.source, path.destination) for path in measured}
    linked = {frozenset(pair) for pair in seen}
    lost = [p for p in facts.paths if frozenset((p.source, p.destination)) not in linked]
    for path in {frozenset((p.source, p.destination)): p for p in lost}.values():
        found.warn(
            "clock",
            f"the clocks of {path.source} and {path.destination} could not be compared: "
            f"{path.clock_reason or 'no answer'}",
            "see to it that their agents reach each other",
            [path.source, path.destination],
        )
    if not off and not lost and measured:
        largest = max(abs(path.clock_offset_s or 0.0) for path in measured)
        found.ok("clock", f"no two clocks differ by more than {largest * 1000:.0f} ms")


def _apart(path: PathSeen) -> float:
    """How far two clocks are apart for certain: what the measurement may be wrong by is off."""
    return abs(path.clock_offset_s or 0.0) - (path.clock_error_s or 0.0)


def _culprits(off: list[PathSeen], hosts: list[str]) -> list[tuple[str, PathSeen, bool]]:
    """The host behind each difference, with the worst measurement of it; True when it is certain.

    Whose clock is wrong shows when it differs from most of the others.
    """
    against = {host: {_other(p, host) for p in off if host in _ends(p)} for host in hosts}
    most = (len(hosts) - 1) / 2
    wrong = [host for host, others in against.items() if len(others) > most]
    if len(hosts) < 3 or not wrong:
        pairs = {frozenset(_ends(path)): path for path in off}
        return [("", path, False) for path in pairs.values()]
    found = []
    for host in wrong:
        worst = max((path for path in off if host in _ends(path)), key=_apart)
        found.append((host, worst, True))
    return found


def _ends(path: PathSeen) -> tuple[str, str]:
    return path.source, path.destination


def _other(path: PathSeen, host: str) -> str:
    return path.destination if path.source == host else path.source
