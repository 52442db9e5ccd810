"""``godwit volume``: places that hold disks."""

from __future__ import annotations

from godwit.cli.look import list_command, noun_group, show_command

volume = noun_group("volume", "Places that hold disks.")
volume.add_command(list_command("volume", "All volumes."))
volume.add_command(show_command("volume", "One volume."))
