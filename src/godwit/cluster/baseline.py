"""The CPU model that new VMs get: the best that every host can give, and who holds it back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """``model`` is empty when the hosts have none in common. ``held_back``: host -> better models
    that all others can give and this one cannot."""

    model: str
    sentence: str
    held_back: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def common_model(hosts: Mapping[str, Collection[str]], ranked: Sequence[str]) -> Baseline:
    """``hosts``: host -> the models it gives in full; ``ranked``: all known ones, best first."""
    if not hosts:
        return Baseline(model="", sentence="no host has said which CPU models it can give")
    model = next((one for one in ranked if all(one in has for has in hosts.values())), "")
    better = ranked[: ranked.index(model)] if model else ranked
    held = {name: found for name in sorted(hosts) if (found := _alone(name, hosts, better))}
    if not model:
        return Baseline(
            model="",
            sentence="the hosts have no CPU model in common that each can give in full",
            held_back=held,
        )
    if not held:
        return Baseline(model=model, sentence=f"{model} is the best that all hosts can give")
    who = "; ".join(f"{name} cannot give {models[0]}" for name, models in held.items())
    return Baseline(
        model=model, sentence=f"{model} is the best that all hosts can give: {who}", held_back=held
    )


def _alone(
    name: str, hosts: Mapping[str, Collection[str]], better: Sequence[str]
) -> tuple[str, ...]:
    """Better models that only this host keeps the cluster from."""
    others = [has for other, has in hosts.items() if other != name]
    return tuple(
        model
        for model in better
        if others and model not in hosts[name] and all(model in has for has in others)
    )


def joins(model: str, gives: Collection[str]) -> str:
    """Why a host does not fit the baseline of a cluster; empty when it does."""
    if not model or model in gives:
        return ""
    return f"it cannot give {model}, which the cluster's VMs have: none of them could move there"
