"""How a host is emptied and filled again, on a command line. A room of `godwit.model.words`."""

from __future__ import annotations

from godwit.model.flags import Action, Flag, on

_EMPTIES: tuple[Flag, ...] = (
    Flag("reason", "--reason", "text", "Why, for people to see.", "TEXT"),
    on("--allow-quick", "Save, hand over and restore what cannot move live."),
    on("--allow-shutdown", "Shut down what cannot move at all."),
    on("--force", "Go on although something cannot move; it stays there."),
    Flag("max_blackout_ms", "--max-blackout", "ms", "Longest pause of each (300ms).", "TIME"),
    Flag("deadline_s", "--deadline", "seconds", "Give each up after this (10m).", "TIME"),
)
_FILLS = (on("--bring-back", "Move the VMs back that were there."),)

MAINTENANCE_ACTIONS: tuple[Action, ...] = (
    Action("host.drain", "Drain {}", "Move every VM off a host; no new one goes there.", _EMPTIES),
    Action("host.return", "Return {}", "Let a drained host take VMs again.", _FILLS),
    Action(
        "host.maintenance.enter",
        "Empty {} for maintenance",
        "Move every VM off a host, so that it may be switched off.",
        _EMPTIES,
    ),
    Action(
        "host.maintenance.exit",
        "End the maintenance of {}",
        "Let a host in maintenance take VMs again.",
        _FILLS,
    ),
)
