"""The validation of a cluster as a task: ask everybody, judge, note, and keep the report."""

from __future__ import annotations

from importlib.metadata import version

from godwit.cluster.validation import judge
from godwit.cluster.validation.findings import dotted
from godwit.cluster.validation.fitness import fit_hosts
from godwit.manager.work.canary import try_canary
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.work.validation_facts import gather
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.requests import ValidateCluster
from godwit.model.validation import (
    Canary,
    HostRow,
    HostValidated,
    LinkRow,
    ValidationCheck,
    ValidationReport,
    worst,
)
from godwit.model.validation_facts import ClusterFacts, HostSeen
from godwit.store.api import Op, put
from godwit.store.records import encode


async def validate(world: World, run: TaskRun, request: ValidateCluster) -> Done:
    """Carry it out; a check that fails is a result, not a failure of the task."""
    started = world.clock.realtime()

    async def say(step: str) -> None:
        await run.say(step, progress={"steps": int(run.task.progress.get("steps", 0)) + 1})

    facts = await gather(world, say, run=run.task.id)
    checks = judge(facts)
    canary = None
    if request.live:
        canary = await try_canary(world, run, say)
        checks = (*checks, of_canary(canary))
    report = ValidationReport(
        task=run.task.id,
        by=run.task.by,
        version=version("godwit"),
        started_at=started,
        ended_at=world.clock.realtime(),
        live=request.live,
        result=worst(checks),
        checks=checks,
        hosts=tuple(_row(host) for host in facts.hosts),
        links=_links(facts),
        canary=canary,
    )
    await _keep(world, report)
    reason = told(report)
    await world.records.append_event(
        "cluster.validated",
        "cluster/validation",
        reason,
        at=report.ended_at,
        level="info" if report.result == "pass" else "warning",
    )
    counts = {result: report.count(result) for result in ("pass", "warn", "fail")}
    return Done(reason, {"result": report.result, **counts})


def told(report: ValidationReport) -> str:
    """The report in a sentence. Pure."""
    words = f"{report.count('pass')} checks pass, {report.count('warn')} warn, "
    return words + f"{report.count('fail')} fail"


async def _keep(world: World, report: ValidationReport) -> None:
    """The report, and which hosts may be moved to and from without another look."""
    good = fit_hosts(report.checks, [row.name for row in report.hosts if row.qemu])
    note = HostValidated(at=report.ended_at, task=report.task, peers=tuple(good))
    ops: list[Op] = [put(keys.host_validated(name), encode(note)) for name in good]
    await world.records.store.txn([], [put(keys.VALIDATION, encode(report)), *ops])


def _row(host: HostSeen) -> HostRow:
    probe = host.probe
    if probe is None:
        return HostRow(name=host.name, state=host.state)
    return HostRow(
        name=host.name,
        state=host.state,
        cpu=probe.cpu.model_name or probe.cpu.vendor,
        cpus=probe.cpu.count,
        memory_bytes=probe.memory_bytes,
        kernel=probe.kernel,
        system=probe.system,
        qemu=dotted(probe.qemu.version),
        accelerator=probe.qemu.accelerator,
        godwit=probe.version,
        migration_address=probe.migration_address,
        mtu=probe.migration.mtu if probe.migration else None,
    )


def _links(facts: ClusterFacts) -> tuple[LinkRow, ...]:
    return tuple(
        LinkRow(
            source=path.source,
            destination=path.destination,
            largest_bytes=path.largest_bytes,
            bits_per_s=path.bits_per_s,
            clock_offset_s=path.clock_offset_s,
            clock_error_s=path.clock_error_s,
        )
        for path in facts.paths
    )


def of_canary(canary: Canary) -> ValidationCheck:
    """What the canary's life says, as a check. Pure."""
    hosts = tuple(host for host in (canary.source, canary.destination) if host)
    check = ValidationCheck(category="cluster", name="canary", result="warn", message="")
    if canary.failure:
        hint = "try the same by hand: godwit vm create, start, migrate"
        return check.but(result="fail", message=canary.failure, hint=hint, hosts=hosts)
    if not canary.migration:
        said = f"no VM was moved: {'; '.join(canary.not_done)}"
        return check.but(message=said, hint="see to what it needs, and validate again")
    moved = f"a small VM moved live from {canary.source} to {canary.destination}"
    if canary.blackout_ms is None:
        hint = f"an agent was restarted meanwhile? See: godwit migration show {canary.migration}"
        said = f"{moved}, and nobody measured how long it was dark"
        return check.but(message=said, hint=hint, hosts=hosts)
    spent = (canary.total_ms or 0.0) / 1000
    said = f"{moved}: dark for {canary.blackout_ms:.0f} ms, {spent:.1f} s in all"
    return check.but(result="pass", message=said)
