"""How a validation is asked for on a command line. A room of `godwit.model.words`."""

from __future__ import annotations

from godwit.model.flags import Action, host_option, on

VALIDATE = Action(
    "cluster.validate",
    "Validate the cluster",
    "Check hosts, networks, storage and the cluster; print a report.",
    (
        on("--live", "Make a small VM, move it live and remove it, too."),
        host_option(
            "--failover",
            "With --live: cut this host's power with that VM on it, time what follows, give it "
            "back. Nothing else may run there.",
        ),
    ),
    subject="",
)
