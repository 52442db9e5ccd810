"""``godwit volume``: places that hold disks."""

from __future__ import annotations

from godwit.cli.act import action_command
from godwit.cli.look import list_command, noun_group, show_command

volume = noun_group("volume", "Places that hold disks.")
volume.add_command(action_command("volume.create"))
volume.add_command(list_command("volume", "All volumes: their health and how hosts reach them."))
volume.add_command(show_command("volume", "One volume: each host's state and the reason."))
volume.add_command(action_command("volume.set"))
volume.add_command(action_command("volume.delete"))
volume.add_command(action_command("volume.redirect"))
volume.add_command(action_command("volume.restore"))
disk = noun_group("disk", "Images in a volume.")
disk.add_command(action_command("volume.disk.import"))
volume.add_command(disk)
