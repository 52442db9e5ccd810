"""The planner behind a failover: rooms, what was placed just now, and the smallest reason."""

from __future__ import annotations

from typing import Any

from cluster_builders import NOW, cluster, definition, vm

from godwit.cluster import decide
from godwit.cluster.placing import PlannerPlace
from godwit.cluster.steps import Swap, Unplaceable
from godwit.model.host import HostInfo, HostState, QemuFacts
from godwit.planner.placement import OVERHEAD_BYTES, Room

GIB = 1 << 30
WEB, DB = definition("web"), definition("db")


def room(name: str, free: int, **changes: Any) -> Room:
    """A host with room for ``free`` VMs of one GiB."""
    info = HostInfo(
        name=name,
        agent_url="https://x",
        cpus=8,
        memory_bytes=16 * GIB,
        qemu=QemuFacts(version=(10, 0, 2), accelerator="tcg"),
        migration_address="x",
        volumes=("shared",),
    )
    left = free * (GIB + OVERHEAD_BYTES)
    return Room(info=info, memory_free_bytes=left, **changes)


def test_what_was_placed_already_takes_its_room() -> None:
    place = PlannerPlace([room("h2", 1), room("h3", 1)], {"web": WEB, "db": DB})
    assert place(WEB, {}, {}).host == "h2"
    assert place(WEB, {"db": "h2"}, {}).host == "h3"
    both = place(WEB, {"db": "h2", "gone": "h3", "web": "h9"}, {})
    assert both.host == "h3"


def test_more_reasons_and_the_smallest() -> None:
    place = PlannerPlace([room("h1", 9, state=HostState.DOWN, reason="silent"), room("h2", 0)], {})
    said = place(WEB, {}, {"h1": ("it is down",), "h2": ("it could not start it: no",)})
    assert said.host is None
    assert said.why.startswith("not enough memory: 0 B free on h2, 1.06 GiB needed")
    assert said.rejected["h1"] == ("h1 is down: silent",)
    assert "not enough memory" in said.rejected["h2"][0]
    roomy = PlannerPlace([room("h2", 9)], {})
    assert roomy(WEB, {}, {"h2": ("it could not start it: no",)}).rejected == {
        "h2": ("it could not start it: no",)
    }


def test_a_whole_decision() -> None:
    rooms = [room("h1", 9, state=HostState.DOWN), room("h2", 1), room("h3", 1)]
    seen = [vm(name, processes=()) for name in ("a", "b", "c")]
    snapshot = cluster(*seen, silent={"h1": 20.0})
    place = PlannerPlace(rooms, {one.name: one.vm for one in seen})
    steps = decide(snapshot, NOW, place=place).steps
    assert [(s.vm, s.to) for s in steps if isinstance(s, Swap)] == [("a", "h2"), ("b", "h3")]
    (left,) = [step for step in steps if isinstance(step, Unplaceable)]
    assert left.vm == "c"
    assert "not enough memory" in left.why
