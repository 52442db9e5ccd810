"""``godwit cluster``: the cluster as a whole."""

from __future__ import annotations

from godwit.cli.act import action_command
from godwit.cli.cluster_validate import validate
from godwit.cli.look import looking, noun_group
from godwit.cli.session import Command, say, say_json


def _settings() -> None:
    now = looking()
    with now.client() as client:
        row = client.row("cluster", "settings")
    if now.json:
        say_json(row)
    else:
        from godwit.cli.tables import sheet

        say(sheet(row))


cluster = noun_group("cluster", "The cluster as a whole.")
cluster.add_command(
    Command("settings", callback=_settings, help="Limits on moves, and what CPUs may be promised.")
)
cluster.add_command(action_command("cluster.set"))
cluster.add_command(action_command("cluster.update"))
cluster.add_command(validate)
