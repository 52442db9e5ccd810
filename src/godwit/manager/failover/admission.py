"""May a VM be highly available? Only where something could prove that it stands still."""

from __future__ import annotations

from godwit.cluster import Memory
from godwit.cluster.facts import Heard, StoreSeen, Timings, VmSeen
from godwit.cluster.fencing import admission
from godwit.manager.cutting import Cutter
from godwit.manager.failover.reading import Known, Renewals, assemble
from godwit.manager.snapshot import Snapshot
from godwit.model.errors import Refused
from godwit.model.vm import Vm


def check_ha(records: Snapshot, renewals: Renewals, vm: Vm, cutter: Cutter) -> None:
    """Refused, with the reason of the first host on which no rung of the ladder exists."""
    if not vm.ha:
        return
    heard = {
        name: Heard(one.renewal, one.revision, 0.0, 0.0)
        for name, one in renewals.items()
        if name in records.leases  # a host that is silent now promises nothing for what is new
    }
    seen = assemble(
        records,
        renewals,
        StoreSeen(),
        {},
        known=Known(uncuttable=cutter.uncuttable, unbound=cutter.unbound),
        timings=Timings(),
        wall=0.0,
        asked=False,
        heard=Memory(hosts=heard),
    )
    if why := admission(seen, VmSeen(vm=vm)):
        raise Refused(
            f"{vm.name} cannot be highly available: {why}",
            hint="give its hosts a watchdog or a power device (godwit host power set), or its "
            "volumes a fencing daemon (godwit volume set NAME --fence-url URL)",
        )
