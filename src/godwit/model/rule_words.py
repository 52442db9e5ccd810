"""How a VM's rules are said on a command line. A room of `godwit.model.words`."""

from __future__ import annotations

from godwit.model.flags import Action, Flag, on

_PLACES: tuple[Flag, ...] = (
    Flag("priority", "--priority", "count", "0 to 100 (50): higher comes first.", "N"),
    Flag("order", "--order", "count", "Of one priority, lower starts first (0).", "N"),
    Flag(
        "apart",
        "--apart",
        "name",
        "Keep it on another host than the VMs of this group. May be repeated.",
        "GROUP",
        many=True,
    ),
    Flag(
        "allow_hosts",
        "--allow-host",
        "name",
        "A host it may run on (default: all). May be repeated.",
        "HOST",
        many=True,
        completes="host",
    ),
    Flag("restarts", "--restarts", "count", "Failovers an hour that may start it (3).", "N"),
)
_SHUTDOWN = Flag(
    "on_shutdown",
    "--on-shutdown",
    "choice",
    "After a clean shutdown inside the guest: stop (default), or restart.",
    choices=("stop", "restart"),
)
RULES: tuple[Flag, ...] = (
    *_PLACES,
    on("--autostart", "Start it again after a loss of power, also without --ha."),
    _SHUTDOWN,
)


def _on_off(option: str, help_: str) -> Flag:
    field = option.removeprefix("--").replace("-", "_")
    return Flag(field, option, "onoff", help_, choices=("on", "off"))


SET_VM = Action(
    "vm.set",
    "Change the rules of VM {}",
    "Change a VM's rules; what is not said stays.",
    (
        _on_off("--ha", "Start it elsewhere when its host dies."),
        *_PLACES,
        on("--no-apart", "It is kept apart from nothing."),
        on("--any-host", "It may run on any host."),
        _on_off("--autostart", "Start it again after a loss of power, also without HA."),
        _SHUTDOWN,
    ),
)
