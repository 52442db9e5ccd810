"""``godwit migration``: moves of VMs, under way and past."""

from __future__ import annotations

from typing import Any

from godwit.cli.act import action_command, timeline_or_state
from godwit.cli.look import list_command, noun_group, show_command


def _picture(row: dict[str, Any]) -> str:
    from godwit.model.migration import Migration

    move = Migration.model_validate(row)
    log = "\n".join(f"  {sentence}" for sentence in move.log)
    return timeline_or_state(move) + (f"\n\n{log}" if log else "")


migration = noun_group("migration", "Moves of VMs, under way and past.")
migration.add_command(list_command("migration", "All moves, with their times."))
migration.add_command(show_command("migration", "The report of one move.", show=_picture))
migration.add_command(action_command("migration.cancel"))
