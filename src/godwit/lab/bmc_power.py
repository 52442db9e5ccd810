"""The power of a lab host as its BMC switches it.

The look is a look at the host's control group: what has power has processes there. The switch is
the lab's own (`fault.power_off`, `fault.power_on`), in a process of its own, because it needs far
more than a BMC that only waits should keep in memory.

    python -I -m godwit.lab.bmc_power LAB ROOT HOST on|off
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from godwit.host.run import run
from godwit.lab import groups

_SWITCH_S = 120.0
_PATIENCE_S = 60.0
_RETRY_S = 0.05


class LabMachine:
    """A host of a lab."""

    def __init__(self, lab: str, root: Path, host: str, *, group: str) -> None:
        self._lab, self._root, self._host, self._group = lab, root, host, group

    def is_on(self) -> bool:
        """Whether any process of the host is there."""
        return bool(groups.members(self._group))

    def reset(self, kind: str) -> None:
        """``ForceRestart`` is off and on."""
        for way in {"ForceOff": ("off",), "On": ("on",)}.get(kind, ("off", "on")):
            argv = [sys.executable, "-I", "-m", "godwit.lab.bmc_power"]
            run([*argv, self._lab, str(self._root), self._host, way], timeout=_SWITCH_S)


def switch(lab: str, root: Path, host: str, way: str) -> None:
    """Cut or give power, once no other command works on the lab; fine when it is so already."""
    from godwit.lab.fault import power_off, power_on
    from godwit.lab.handle import Lab
    from godwit.model.errors import Conflict

    until = time.monotonic() + _PATIENCE_S
    while True:
        now = Lab.load(lab, root=root)
        if (now.record.node(host) is not None) == (way == "on"):
            return
        try:
            if way == "on":
                power_on(now, host, wait=False)
            else:
                power_off(now, host)
        except Conflict:  # whoever holds the lab's lock, or did the same just before us
            if time.monotonic() > until:
                raise
            time.sleep(_RETRY_S)  # an abstract socket's end is no event
        else:
            return


if __name__ == "__main__":
    switch(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])
