"""A host is emptied: the plan beforehand, the drain against its bound, a cancel half-way, the way
back, and what cannot move. Every VM answers from somewhere at each step.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

from godwit.model.errors import Cancelled, ChecksFailed, GodwitError
from godwit.model.task import Task

from .cluster import Cluster
from .report import Say, Section, tell

HOST = "host1"
SIZES_MIB = (128, 192, 256, 320)
OVER_BOUND = 1.15
PATIENCE_S = 600.0


def run(cluster: Cluster, *, vms: int = 12, again: bool = True, say: Say = tell) -> Section:
    """So many VMs of mixed sizes on one host: empty it, bring them back, call a drain off.

    Those that run there already count; they are there again in the end.
    """
    section = Section("drain")
    others = tuple(vm.name for vm in cluster.client.vms.list() if vm.host == HOST)
    made = tuple(f"drain{number:02}" for number in range(vms - len(others)))
    names = (*others, *made)
    for number, name in enumerate(made):
        cluster.make(name, host=HOST, memory_mib=SIZES_MIB[number % len(SIZES_MIB)])
    try:
        _refused(cluster, section, names)
        _planned(cluster, section, names)
        _whole(cluster, section, names, say, name="drain")
        _back(cluster, section, names)
        _updates(cluster, section, names, whole=again)
        if again:  # the forecasts know the VMs' own moves by now
            _whole(cluster, section, names, say, name="drain again")
            _back(cluster, section, names)
        _half(cluster, section, names, say)
    finally:
        _clear(cluster)
        for name in made:
            cluster.remove(name)
        for name in others:
            if cluster.owner(name).host != HOST:
                cluster.move(name, HOST)
    return section


def _refused(cluster: Cluster, section: Section, names: Sequence[str]) -> None:
    """One VM may only run there: it is named, and nothing moves."""
    client, last = cluster.client, names[-1]
    client.wait(client.vms.set(last, allow_hosts=[HOST]))
    before = len(client.migrations.list())
    said = ""
    try:
        client.wait(client.hosts.drain(HOST))
    except ChecksFailed as error:
        said = error.message
    moved = len(client.migrations.list()) - before
    section.judge(
        "what cannot move is named with the reason, before anything moves",
        last in said and "allow only" in said and moved == 0,
        {"said": said, "moves": moved},
    )
    section.judge("a refused drain leaves no mark", _state(cluster) == "up", _state(cluster))
    client.wait(client.vms.set(last, any_host=True))


def _planned(cluster: Cluster, section: Section, names: Sequence[str]) -> None:
    said = cluster.cli("host", "drain", HOST, "--dry-run", "-o", "json")
    plan = json.loads(said.out) if said.code == 0 else {}
    rows = [one for one in plan.get("vms", []) if one["vm"] in names]
    section.figures["plan"] = {
        "bound_s": plan.get("bound_s"),
        "bound_reason": plan.get("bound_reason"),
        "seconds": round(said.wall_s, 3),
        "vms": [(one["vm"], one["way"], one["destination"]) for one in rows],
    }
    whole = all(
        one["way"] == "live" and one["destination"] and one["forecast"]["total_ms"] for one in rows
    )
    section.judge(
        "the plan says where each VM goes, how, and how long it takes",
        len(rows) == len(names) and whole and bool(plan["bound_s"]),
        said.err or section.figures["plan"],
    )
    section.judge("a plan changes nothing", _state(cluster) == "up", _state(cluster))


def _whole(
    cluster: Cluster, section: Section, names: Sequence[str], say: Say, *, name: str
) -> None:
    client, before = cluster.client, {move.id for move in cluster.client.migrations.list()}
    began = time.monotonic()
    done = client.wait(client.hosts.drain(HOST, reason="proof"))
    wall_s = time.monotonic() - began
    result = done.result or {}
    bound_s, took_s = result.get("bound_s"), result.get("took_s")
    every = client.migrations.list()
    moves = [move for move in every if move.vm in names and move.id not in before]
    moves.sort(key=lambda move: move.turn_at or 0.0)
    dark = [move.blackout_ms for move in moves if move.blackout_ms is not None]
    alone = [(move.ended_at or 0.0) - (move.turn_at or 0.0) for move in moves]
    gaps = [
        (after.turn_at or 0.0) - (before.ended_at or 0.0)
        for before, after in itertools.pairwise(moves)
    ]
    section.figures[name] = {
        "vms": len(names),
        "hosts": len(cluster.hosts),
        "bound_s": bound_s,
        "took_s": took_s,
        "wall_s": round(wall_s, 3),
        "over_bound": round(took_s / bound_s, 3) if bound_s and took_s else None,
        "moves_s": [round(value, 3) for value in alone],
        "forecast_s": [round((move.forecast.total_ms or 0.0) / 1000, 3) for move in moves],
        "gaps_s": [round(value, 3) for value in gaps],
        "before_first_s": round((moves[0].turn_at or 0.0) - done.created_at, 3) if moves else None,
        "blackout_ms": [round(value, 1) for value in dark],
        "said": done.reason,
    }
    say(f"{name} of {len(names)} VMs: {took_s} s, at least {bound_s} s")
    gone = _running(cluster, names)
    section.judge("every VM runs elsewhere", HOST not in gone.values() and all(gone.values()), gone)
    section.judge("and answers", *_answers(cluster, names))
    section.judge("an empty host is marked", _state(cluster) == "draining", _state(cluster))
    section.judge(
        f"{name}: it takes at most {OVER_BOUND} x the bound it prints",
        bool(bound_s and took_s and took_s <= OVER_BOUND * bound_s),
        section.figures[name]["over_bound"],
        timing=True,
    )


def _back(cluster: Cluster, section: Section, names: Sequence[str]) -> None:
    client = cluster.client
    done = client.wait(client.hosts.return_(HOST, bring_back=True))
    there = _running(cluster, names)
    section.judge(
        "they come back on return", set(there.values()) == {HOST}, {"said": done.reason, **there}
    )
    section.judge("the host takes VMs again", _state(cluster) == "up", _state(cluster))
    section.judge("they answer there", *_answers(cluster, names))


def _updates(cluster: Cluster, section: Section, names: Sequence[str], *, whole: bool) -> None:
    """What a host does not allow is refused; ``whole``: it is updated, once well, once not."""
    client, before = cluster.client, len(cluster.client.migrations.list())
    said = _failure(cluster, "/usr/bin/touch /nothing-allows-this")
    moved = len(client.migrations.list()) - before
    section.judge(
        "a command that a host does not list is refused, before anything moves",
        "does not allow" in said and moved == 0,
        {"said": said, "moves": moved},
    )
    if not whole:
        return
    done = client.wait(client.cluster.update(command="/usr/bin/true", hosts=[HOST]))
    there = _running(cluster, names)
    section.judge(
        "a host is emptied, runs its command, and gets its VMs back",
        set(there.values()) == {HOST} and _state(cluster) == "up",
        {"said": done.reason, **there},
    )
    said = _failure(cluster, "/usr/bin/false")
    section.judge(
        "a command that fails stops the update with the host kept empty",
        "ended with 1" in said and _state(cluster) == "maintenance",
        {"said": said, "state": _state(cluster)},
    )
    client.wait(client.hosts.exit_maintenance(HOST, bring_back=True))
    section.judge("and its VMs come back", *_answers(cluster, names))


def _failure(cluster: Cluster, command: str) -> str:
    client = cluster.client
    try:
        client.wait(client.cluster.update(command=command, hosts=[HOST]))
    except GodwitError as error:
        return error.message
    return ""


def _half(cluster: Cluster, section: Section, names: Sequence[str], say: Say) -> None:
    client = cluster.client
    task = client.hosts.drain(HOST)
    half = _await_moved(cluster, task, names, len(names) // 2)
    client.wait(client.tasks.cancel(task.id))
    said = ""
    try:
        client.wait(task)
    except Cancelled as error:
        said = error.message
    places = _running(cluster, names)
    here = sum(host == HOST for host in places.values())
    say(f"cancelled half-way: {here} of {len(names)} VMs run on {HOST}")
    section.figures["cancel"] = {"moved_before": half, "there_after": here, "said": said}
    section.judge(
        "cancelled half-way, every VM runs somewhere and the host takes VMs again",
        all(places.values()) and _state(cluster) == "up" and 0 < here < len(names) and bool(said),
        {"said": said, "state": _state(cluster), **places},
    )
    section.judge("and all of them answer", *_answers(cluster, names))


def _await_moved(cluster: Cluster, task: Task, names: Sequence[str], count: int) -> int:
    until = time.monotonic() + PATIENCE_S
    while True:
        moved = sum(host != HOST for host in _running(cluster, names).values())
        if moved >= count:
            return moved
        now = cluster.client.tasks.get(task.id)
        assert not now.state.final, f"the drain ended early: {now.reason}"
        assert time.monotonic() < until, "the drain stands still"
        time.sleep(0.05)


def _running(cluster: Cluster, names: Sequence[str]) -> dict[str, str | None]:
    """Where each runs; None where it does not."""
    rows: list[Any] = cluster.client.vms.list()
    alive = ("running", "migrating")
    return {
        vm.name: vm.host if vm.state.value in alive else None for vm in rows if vm.name in names
    }


def _answers(cluster: Cluster, names: Sequence[str]) -> tuple[bool, list[str]]:
    silent = [name for name in names if not cluster.guest(name).alive(timeout=5.0)]
    return not silent, silent


def _state(cluster: Cluster) -> str:
    return str(cluster.client.hosts.get(HOST).state.value)


def _clear(cluster: Cluster) -> None:
    """No mark stays behind, whatever went wrong."""
    client = cluster.client
    for task in client.tasks.list():
        if task.request.get("kind") == "host.drain" and not task.state.final:
            client.wait(client.tasks.cancel(task.id))
    if _state(cluster) == "draining":
        client.wait(client.hosts.return_(HOST))
    if _state(cluster) == "maintenance":
        client.wait(client.hosts.exit_maintenance(HOST))
