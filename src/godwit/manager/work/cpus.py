"""Which CPU a new VM gets, and why: the cluster's baseline unless another is asked for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from godwit.cluster.baseline import common_model, joins
from godwit.model.errors import Refused
from godwit.model.host import HostInfo
from godwit.model.settings import ClusterSettings
from godwit.qemu.pins import best_first


@dataclass(frozen=True)
class Chosen:
    """A CPU model and the sentence why; ``cannot``: host -> why the VM could not be there."""

    model: str
    reason: str
    cannot: Mapping[str, str]


def choose_cpu(hosts: Mapping[str, HostInfo], settings: ClusterSettings, wanted: str) -> Chosen:
    """``wanted`` as in `model.requests.CreateVm`. Refused when no host could run such a VM, and
    when the hosts have nothing in common to be the baseline."""
    if wanted == "host":
        return _own_cpu(hosts)
    if wanted != "baseline":
        return _named(hosts, wanted, f"{wanted} was asked for")
    if settings.cpu_baseline:
        model = settings.cpu_baseline
        return _named(hosts, model, f"{model} is the cluster's baseline, as it was set")
    given = {name: info.qemu.cpu_models for name, info in hosts.items()}
    ranked = best_first(model for models in given.values() for model in models)
    found = common_model(given, ranked)
    if not found.model:
        raise Refused(
            found.sentence,
            hint="ask for one that some of them have: --cpu MODEL; they are in godwit cluster "
            "validate",
        )
    return Chosen(found.model, found.sentence, {})


def _own_cpu(hosts: Mapping[str, HostInfo]) -> Chosen:
    """KVM calls it ``host``; emulation has all that it can do as ``max``."""
    model = "host" if any(i.qemu.accelerator == "kvm" for i in hosts.values()) else "max"
    said = f"{model}: the CPU of the host that it starts on; while it runs it cannot move"
    return Chosen(model, said, {})


def _named(hosts: Mapping[str, HostInfo], model: str, why: str) -> Chosen:
    cannot = {
        name: f"{name} cannot give {model}"
        for name, info in sorted(hosts.items())
        if joins(model, info.qemu.cpu_models)
    }
    if len(cannot) == len(hosts):
        known = best_first(one for info in hosts.values() for one in info.qemu.cpu_models)
        raise Refused(
            f"no host can give the CPU model {model}", hint=f"there are: {', '.join(known)}"
        )
    said = f"{why}; {', '.join(cannot)} cannot give it" if cannot else why
    return Chosen(model, said, cannot)
