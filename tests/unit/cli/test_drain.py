"""A host's drain as text: the plan, and how far it is."""

from __future__ import annotations

import io

from godwit.cli.drain import render_drain
from godwit.cli.progress import teller
from godwit.model.drain import DrainPlan, PlannedVm
from godwit.model.migration import Check, Forecast
from godwit.model.task import Task, TaskState

MIB = 1 << 20
PLAN = DrainPlan(
    host="host1",
    reason="4 VMs: 1 live, 1 quick, 1 shut down, 1 staying",
    bound_s=3.5,
    bound_reason="2 moves of host1, one at a time",
    refused=("d cannot move live: the rules of d allow only host1, not host2",),
    hint="allow it: --allow-shutdown; or leave them there: --force",
    vms=(
        PlannedVm(
            vm="a",
            way="live",
            destination="host2",
            memory_bytes=512 * MIB,
            forecast=Forecast(total_ms=1500.0, blackout_ms=60.0),
            checks=(Check(name="clock", result="warn", message="0.4 s apart"),),
        ),
        PlannedVm(
            vm="b",
            way="quick",
            destination="host3",
            reason="a device stays",
            memory_bytes=256 * MIB,
            forecast=Forecast(total_ms=2000.0),
        ),
        PlannedVm(vm="c", way="shutdown", reason="no room", memory_bytes=256 * MIB),
        PlannedVm(
            vm="d",
            way="stay",
            reason="the rules of d allow only host1, not host2",
            needs="--allow-shutdown",
            memory_bytes=256 * MIB,
        ),
    ),
)


def test_a_plan_names_each_vm_its_way_and_what_is_refused() -> None:
    assert render_drain(PLAN) == (
        """\
empty host1: 4 VMs: 1 live, 1 quick, 1 shut down, 1 staying
   1. a (512 MiB) → host2, live: 1.5 s in all, 60 ms dark
      ! clock: 0.4 s apart
   2. b (256 MiB) → host3, quick: 2.0 s in all
      a device stays
   3. ! c (256 MiB) is shut down
      no room
   4. ✗ d (256 MiB) stays
      the rules of d allow only host1, not host2 (--allow-shutdown lets it go)
at least 3.5 s in all (2 moves of host1, one at a time)
it would be refused:
  ✗ d cannot move live: the rules of d allow only host1, not host2
    allow it: --allow-shutdown; or leave them there: --force"""
    )


def test_a_plan_without_a_bound_says_why() -> None:
    plan = DrainPlan(host="host1", bound_reason="a: the link's speed is not known yet")
    assert render_drain(plan).endswith(
        "how long it takes is not known: a: the link's speed is not known yet"
    )


def test_each_new_sentence_of_a_drain_is_a_line() -> None:
    task = Task(
        id="t-1",
        request={"kind": "host.drain", "name": "host1"},
        subject="host/host1",
        state=TaskState.RUNNING,
        reason="accepted",
        created_at=0.0,
    )
    said = [
        "accepted",
        "0 of 2 VMs have left host1, about 4 s left",
        "0 of 2 VMs have left host1, about 4 s left",
        "1 of 2 VMs have left host1, about 2 s left",
    ]
    out = io.StringIO()
    with teller(out) as showing:
        for line in said:
            showing.tell(task.but(reason=line))
        showing.tell(task.but(reason="host1 is empty", state=TaskState.COMPLETED))
        showing.tell(task.but(request={"kind": "vm.start"}, reason="elsewhere"))
    assert out.getvalue().splitlines() == [said[1], said[3]]
