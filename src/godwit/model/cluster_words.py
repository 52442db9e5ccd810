"""How the cluster as a whole is spoken to on a command line. A room of `godwit.model.words`."""

from __future__ import annotations

from godwit.model.flags import Action, Flag, on

CLUSTER_ACTIONS: tuple[Action, ...] = (
    Action(
        "cluster.remove",
        "Remove host {} from the cluster",
        "Take a host without VMs out of the cluster and revoke its certificates.",
        (on("--store", "Its member of the store has been taken out; revoke that, too."),),
        about="host",
    ),
    Action(
        "cluster.set",
        "Change settings of the cluster",
        "Change settings of the cluster; what is not said stays. 0 is no limit.",
        (
            Flag("moves_per_host", "--moves-per-host", "count", "Moves of one host at once.", "N"),
            Flag("moves_per_pair", "--moves-per-pair", "count", "Between two hosts.", "N"),
            Flag("moves_per_network", "--moves-per-network", "count", "Over one network.", "N"),
            Flag("cpus_per_core", "--cpus-per-core", "count", "vCPUs promised per CPU.", "N"),
            Flag(
                "cpu_baseline",
                "--cpu-baseline",
                "text",
                "CPU model of new VMs; auto: the best that all hosts can give.",
                "MODEL",
            ),
        ),
        subject="",
    ),
    Action(
        "cluster.update",
        "Update the cluster",
        "Empty, update and refill one host after the other; stop when one fails.",
        (
            Flag(
                "command",
                "--command",
                "text",
                "What each host runs; its own configuration has to allow it.",
                "COMMAND",
                required=True,
            ),
            Flag(
                "hosts",
                "--host",
                "name",
                "Only this host (default: all). May be repeated.",
                "HOST",
                many=True,
                completes="host",
            ),
            Flag("timeout_s", "--timeout", "seconds", "Longest time of the command (30m).", "TIME"),
            on("--reboots", "The command restarts the host: wait for that."),
            Flag("healthy_s", "--healthy", "seconds", "Until it is up again (10m).", "TIME"),
            on("--allow-quick", "Save, hand over and restore what cannot move live."),
            on("--allow-shutdown", "Shut down what cannot move at all."),
        ),
        subject="",
    ),
)
