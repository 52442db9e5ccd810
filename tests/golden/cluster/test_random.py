"""Random scripts of faults: the invariants hold, and once everything is well again, every VM runs.

A script that fails is printed as a scenario file would hold it.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, example, given, note, settings
from hypothesis import strategies as st
from sim_scenario import Cluster, Scenario, Script, Setup, verdict
from sim_world import World

from godwit.model.ownership import OwnerState

HOSTS = ["host1", "host2", "host3", "host4"]
VMS = {
    "web": "ha volume=shared",
    "db": "ha volume=lun priority=80",
    "app": "ha volume=lun apart=x",
    "two": "ha volume=shared apart=x",
    "test": "volume=shared",
    "auto": "volume=lun autostart",
}
FAULTS_UNTIL_S = 120.0
WELL_AFTER_S = 190.0
EXAMPLES = int(os.environ.get("GODWIT_EXAMPLES", "15"))

host = st.sampled_from(HOSTS)
vm = st.sampled_from(sorted(VMS))
link = st.sampled_from(["management", "storage", "migration"])
daemon = st.sampled_from(["guard", "agent", "manager"])


def _line(*words: st.SearchStrategy[str] | str) -> st.SearchStrategy[str]:
    parts = [st.just(word) if isinstance(word, str) else word for word in words]
    return st.tuples(*parts).map(" ".join)


FAULT = st.one_of(
    _line(st.sampled_from(["lose-power", "switch-off", "power-on", "freeze", "thaw"]), host),
    _line(st.sampled_from(["cut", "join"]), host, link),
    _line("split", host),
    _line("split", host, host),
    _line("heal"),
    _line(st.sampled_from(["kill", "lose", "hang", "hold", "mend"]), daemon, host),
    _line(st.sampled_from(["kill", "mend"]), "etcd", st.sampled_from(HOSTS[:3])),
    _line("kill", "qemu", vm),
    _line(st.sampled_from(["deaf", "hearing"]), host),
    _line(st.sampled_from(["stall-elections", "elect"])),
    _line("slow-store", st.sampled_from(["0.02", "0.5", "1.4"])),
    _line(st.sampled_from(["break", "mend"]), st.sampled_from(["bmc", "storage"]), host),
    _line(
        "move",
        vm,
        host,
        st.sampled_from(["", "precopy=1", "hold=committing", "hold=completed", "hold=swapped"]),
    ),
    _line("move", vm, host, "postcopy precopy=1"),
    _line(st.sampled_from(["go-on", "abandon"]), vm),
    _line(st.sampled_from(["shutdown", "stop"]), vm),
    _line(st.sampled_from(["mark"]), host, st.sampled_from(["draining", "maintenance"])),
    _line("unmark", host),
    _line("wall", host, st.sampled_from(["-90000", "90000"])),
)
SCRIPT = st.lists(
    st.tuples(st.floats(1, FAULTS_UNTIL_S).map(lambda at: round(at, 1)), FAULT),
    min_size=1,
    max_size=14,
)
KIT = st.tuples(
    st.sampled_from(["", "without watchdog all", "without watchdog host1 host3"]),
    st.sampled_from(["", "without freezer host2", "without freezer all"]),
    st.sampled_from(["", "with bmc all", "with bmc host1 host2"]),
    st.sampled_from(["", "clock host1 1.1", "clock host2 0.9"]),
)


def _well() -> list[str]:
    """Everything works again; whoever was away comes back."""
    lines = ["heal", "elect", "slow-store 0.02", "mend storage x"]
    lines += [f"mend etcd {name}" for name in HOSTS[:3]]
    for name in HOSTS:
        lines += [
            f"join {name} management storage migration",
            f"hearing {name}",
            f"thaw {name}",
            f"power-on {name}",
            f"mend bmc {name}",
            f"unmark {name}",
        ]
        lines += [f"mend {which} {name}" for which in ("guard", "agent", "manager")]
    lines += [f"go-on {name}" for name in VMS]
    again = [f"{FAULTS_UNTIL_S + 40} power-on {name}" for name in HOSTS]  # fenced as it came back
    return [*(f"{FAULTS_UNTIL_S + 5} {line}" for line in lines), *again]


def _scenario(script: list[tuple[float, str]], kit: tuple[str, ...]) -> Scenario:
    setup = ["hosts: 4", "store: host1 host2 host3", "managers: host1 host2 host3 host4"]
    setup += [line for line in kit if line]
    setup += ["volume shared dir", "volume lun iscsi"]
    setup += [f"vm {name} on {HOSTS[i % 4]} restarts=60 {VMS[name]}" for i, name in enumerate(VMS)]
    lines = [f"{at} {fault}" for at, fault in sorted(script)]
    end = FAULTS_UNTIL_S + WELL_AFTER_S
    return Scenario("random", "random", setup, [*lines, *_well(), f"end {end}"])


def _played(found: Scenario) -> World:
    cluster = Cluster()
    Setup(cluster).read(found.setup)
    cluster.begin()
    end = Script(cluster).read(found.script)
    cluster.world.run(end)
    return cluster.world


def _not_well(world: World) -> list[str]:
    """VMs whose record says running and that do not run, exactly once, where it says."""
    found = []
    for name in VMS:
        owner = world.owner(name)
        here = [q for q in world.qemus if q.vm == name]
        if owner.state is OwnerState.STOPPED:
            good = not here
        else:
            good = [(q.host.name, q.epoch, q.state, q.cut) for q in here] == [
                (owner.host, owner.epoch, "running", False)
            ]
        if not good:
            found.append(name)
    return found


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    # A script is read as it is; making it smaller would play thousands of them.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(SCRIPT, KIT)
@example([(10.0, "cut host3 management")], ("", "", "", ""))
def test_whatever_breaks(script: list[tuple[float, str]], kit: tuple[str, ...]) -> None:
    found = _scenario(script, kit)
    note(found.text(""))
    world = _played(found)
    note("\n".join(world.lines))
    assert _not_well(world) == [], "\n".join(verdict(world))


def test_what_does_not_run_in_the_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: nobody restarts anything."""
    from godwit.cluster import failover

    monkeypatch.setattr(failover, "plan", lambda *_, **__: [])
    found = _scenario([(10.0, "lose-power host1")], ("", "", "", ""))
    found.script = [line for line in found.script if "power-on" not in line]
    assert _not_well(_played(found)) == ["test", "web"] or "web" in _not_well(_played(found))
