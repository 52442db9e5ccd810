"""Before the first live move to or from a host, its network and system are looked at.

A host that was validated once, and nothing failed, is not looked at again by this. The look takes a
fraction of a second: facts, clocks, one packet of full size each way. Only what fails refuses the
move, and ``allow_unvalidated`` overrides it; what warns is in the report of a whole validation.
"""

from __future__ import annotations

import logging

from godwit.cluster.validation import judge
from godwit.cluster.validation.fitness import fit_hosts
from godwit.manager.snapshot import Snapshot
from godwit.manager.work.validation_facts import gather_pair
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import ChecksFailed
from godwit.model.requests import MigrateVm
from godwit.model.validation import HostValidated
from godwit.store.api import put
from godwit.store.errors import StoreError
from godwit.store.records import encode

_LOG = logging.getLogger("godwit.manager")


def unknown_hosts(snapshot: Snapshot, *hosts: str) -> list[str]:
    """Those that were never validated. Pure."""
    return [host for host in hosts if host not in snapshot.validated]


def _told(hosts: list[str]) -> str:
    return f"{' and '.join(hosts)} {'was' if len(hosts) == 1 else 'were'}"


async def check_first_move(
    world: World, request: MigrateVm, *, source: str, destination: str, by: str
) -> None:
    """Validate the pair when one of them never was. ChecksFailed with every check that failed."""
    if request.method != "live" or request.allow_unvalidated:
        return
    new = unknown_hosts(world.cache.snapshot, source, destination)
    if not new:
        return
    facts = await gather_pair(world, [source, destination])
    checks = judge(facts)
    failed = [check for check in checks if check.result == "fail"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ChecksFailed(
            f"{_told(new)} never validated, and not fit: {failed[0].message}{more}",
            hint=f"{failed[0].hint}; all checks: godwit cluster validate",
            checks=[check.model_dump(mode="json") for check in failed],
        )
    note = HostValidated(at=world.clock.realtime(), task=by, peers=(source, destination))
    for host in fit_hosts(checks, [p.name for p in facts.probes if p.name in new]):
        try:
            ops = [put(keys.host_validated(host), encode(note))]
            await world.records.store.txn([], ops)
        except StoreError as error:  # the next move looks again
            _LOG.warning("the validation of %s is not noted: %s", host, error)
