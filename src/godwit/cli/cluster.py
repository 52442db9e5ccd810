"""``godwit cluster``: form it, let hosts join and leave, update it, carry its records over."""

from __future__ import annotations

from typing import Any

import click

from godwit.cli.act import action_command
from godwit.cli.cluster_validate import validate
from godwit.cli.look import looking, noun_group
from godwit.cli.session import Command, note, say, say_json, session
from godwit.model.errors import InvalidRequest
from godwit.model.units import parse_duration


def _root() -> click.Option:
    help_ = "Where /etc, /var and /run are meant to be (for tests)."
    return click.Option(["--root"], metavar="DIR", default="/", type=click.Path(), help=help_)


def _host_options() -> list[click.Parameter]:
    """What a host is told about itself, at init and at join."""
    return [
        click.Option(["--host"], metavar="NAME", help="This host's name (default: as it is)."),
        click.Option(
            ["--address"], metavar="IP", required=True, help="Its management network's address."
        ),
        click.Option(
            ["--migration-address"],
            metavar="IP",
            default="",
            help="Its address on the migration network (default: --address).",
        ),
        click.Option(
            ["--migration-subnet"], metavar="CIDR", default="", help="The migration network."
        ),
        click.Option(
            ["--network"],
            metavar="NAME=BRIDGE[:UPLINK]",
            multiple=True,
            help="A VM network and its bridge here. May be repeated.",
        ),
    ]


def _facts(words: dict[str, Any]) -> Any:
    import socket

    from godwit.form.places import HostFacts, read_networks

    return HostFacts(
        name=words["host"] or socket.gethostname().partition(".")[0].lower(),
        address=words["address"],
        migration_address=words["migration_address"],
        migration_subnet=words["migration_subnet"],
        networks=read_networks(words["network"]),
    )


def _places(root: str) -> Any:
    from pathlib import Path

    from godwit.form.places import Places

    return Places(Path(root).resolve())


def _init(name: str, store: str, endpoints: str, root: str, **words: Any) -> None:
    from godwit.form.init import init

    _plain("cluster init")
    found = tuple(one.strip() for one in endpoints.split(",") if one.strip())
    if (store == "etcd") != bool(found):
        raise InvalidRequest(
            "an etcd has endpoints, the embedded store has none",
            hint="like: --store etcd --endpoints https://10.0.0.1:2379,https://10.0.0.2:2379",
        )
    made = init(_places(root), _facts(words), cluster=name, endpoints=found)
    if session().json:
        say_json(
            {
                "cluster": made.cluster,
                "url": made.url,
                "ca_fingerprint": made.fingerprint,
                "units": list(made.units),
            }
        )
        return
    say(f"cluster {made.cluster} is formed; its CA's fingerprint is {made.fingerprint}")
    note(f"next: systemctl enable --now {' '.join(made.units)}")
    note("then, for each further host: godwit cluster token create")


def _join(token: str, root: str, **words: Any) -> None:
    import asyncio
    import sys

    from godwit.form.join import join

    now = _plain("cluster join")
    if not now.url:
        raise InvalidRequest("where is the manager?", hint="say it: --url https://ADDRESS:7100")
    text = sys.stdin.readline() if token == "-" else token  # noqa: S105
    made = asyncio.run(join(_places(root), _facts(words), url=str(now.url), token=text))
    if now.json:
        valid = made.valid_until
        say_json({"cluster": made.cluster, "host": made.host, "valid_until": valid})
        return
    say(f"{made.host} has joined the cluster {made.cluster}")
    note(f"next: systemctl enable --now {' '.join(made.units)}")


def _create_token(ttl: str, host: str | None) -> None:
    now = _plain("cluster token create")
    with now.client() as client:
        made = client.cluster.create_token(ttl_s=parse_duration(ttl), host=host)
        url = client.target.url
    if now.json:
        say_json(made.model_dump(mode="json"))
        return
    say(made.token)
    note(f"it works once, within {ttl}; on the host that joins:")
    note(f"  godwit cluster join --url {url} --address ITS-ADDRESS --token -")
    note("and give it the token on standard input")


def _issue(name: str, role: str, address: tuple[str, ...], into: str, root: str) -> None:
    from pathlib import Path

    from godwit.form.init import issue_identity

    _plain("cluster issue")
    issue_identity(_places(root), role=role, name=name, addresses=address, into=Path(into))
    if session().json:
        say_json({"role": role, "name": name, "directory": into})
        return
    say(f"{role}/{name} lies in {into}")


def _plain(path: str) -> Any:
    """The session of a command that is no request, so that there is nothing to script."""
    now = session()
    if now.script is not None or now.dry_run:
        option = "--script" if now.script is not None else "--dry-run"
        raise InvalidRequest(f"{option} means nothing for {path}", hint="leave it out")
    return now


def _export(file: str, config: str, endpoint: str | None) -> None:
    from godwit.form.carry import export_to

    looking()
    made = export_to(file, config=config, endpoint=endpoint)
    if session().json:
        say_json({"file": file, "records": len(made.records), "revision": made.revision})
        return
    say(f"{len(made.records)} records as of revision {made.revision} are in {file}")


def _import(
    file: str, config: str, endpoint: str | None, gone: tuple[str, ...], keep_running: bool
) -> None:
    from godwit.form.carry import import_from

    now = session()
    if now.script is not None:
        _plain("cluster import")
    planned, count = import_from(
        file,
        config=config,
        endpoint=endpoint,
        gone=gone,
        keep_running=keep_running,
        dry_run=now.dry_run,
    )
    if now.json:
        say_json({"records": count, "vms": dict(planned.sentences)})
        return
    for vm, sentence in sorted(planned.sentences.items()):
        say(f"{vm}: {sentence}")
    verb = "would be imported" if now.dry_run else "are imported"
    say(f"{len(planned.records)} records {verb}")


def _settings() -> None:
    now = looking()
    with now.client() as client:
        row = client.row("cluster", "settings")
    if now.json:
        say_json(row)
    else:
        from godwit.cli.tables import sheet

        say(sheet(row))


def _manager_words(one: dict[str, Any]) -> str:
    after = one.get("next", "")
    said = [one.get("version", ""), "leads" if one["leads"] else "", after]
    words = ", ".join(word for word in said if word)
    return f"{one['name']} ({words})" if words else str(one["name"])


def _status() -> None:
    now = looking()
    with now.client() as client:
        found = client.call("GET", "cluster")
    if now.json:
        say_json(found)
        return
    from godwit.cli.tables import table

    store, managers = found["store"], found["managers"]
    say(f"cluster {found['name'] or '-'}: {found['words']}")
    say(f"store: {store['words']}")
    for member in store["members"]:
        problem = f": {member['problem']}" if member["problem"] else ""
        say(f"  {member['endpoint']} {member['state']}{problem}")
    say(f"managers: {', '.join(map(_manager_words, managers)) or 'none'}")
    say(table("host-standing", found["hosts"]))


cluster = noun_group("cluster", "The cluster as a whole: form it, join it, update it.")
cluster.add_command(
    Command(
        "init",
        params=[
            click.Argument(["name"], metavar="NAME", required=False, default="godwit"),
            *_host_options(),
            click.Option(
                ["--store"],
                type=click.Choice(["embedded", "etcd"]),
                default="embedded",
                help="Where the records are: on this host (default), or in an etcd.",
            ),
            click.Option(["--endpoints"], metavar="URL,...", default="", help="Of the etcd."),
            _root(),
        ],
        callback=_init,
        help="Form a cluster with this machine as its first host.",
    )
)
token_group = noun_group("token", "What lets a host join.")
token_group.add_command(
    Command(
        "create",
        params=[
            click.Option(
                ["--ttl"],
                metavar="TIME",
                default="1h",
                help="How long it works (1h).",
            ),
            click.Option(["--host"], metavar="NAME", help="Only for a host of this name."),
        ],
        callback=_create_token,
        help="Make a token that lets one host join, once.",
    )
)
cluster.add_command(token_group)
cluster.add_command(
    Command(
        "join",
        params=[
            click.Option(
                ["--token"],
                metavar="TOKEN",
                default="-",
                help="The token; - (default): read it from standard input.",
            ),
            *_host_options(),
            _root(),
        ],
        callback=_join,
        help="Make this machine a host of the cluster at --url.",
    )
)
cluster.add_command(
    Command("status", callback=_status, help="How the cluster stands, and what happens next.")
)
cluster.add_command(action_command("cluster.remove"))
cluster.add_command(
    Command("settings", callback=_settings, help="Limits on moves, and what CPUs may be promised.")
)
cluster.add_command(action_command("cluster.set"))
cluster.add_command(action_command("cluster.update"))
cluster.add_command(validate)
cluster.add_command(
    Command(
        "issue",
        params=[
            click.Argument(["name"], metavar="NAME"),
            click.Option(
                ["--role"],
                type=click.Choice(["store", "manager", "storage"]),
                required=True,
                help="store: for an etcd member; manager: for a second manager; "
                "storage: for the fencing daemon of a storage server.",
            ),
            click.Option(
                ["--address"], metavar="IP", multiple=True, help="Its address. May be repeated."
            ),
            click.Option(
                ["--into"], metavar="DIR", required=True, type=click.Path(), help="Where to."
            ),
            _root(),
        ],
        callback=_issue,
        help="Issue a certificate, on the machine that has the CA's key.",
    )
)
_CONFIG = [
    click.Option(
        ["--config"],
        metavar="FILE",
        default="/etc/godwit/manager.toml",
        type=click.Path(),
        help="A manager's configuration: it says where the store is.",
    ),
    click.Option(
        ["--endpoint"], metavar="URL", help="Another store than the one in the configuration."
    ),
]
cluster.add_command(
    Command(
        "export",
        params=[click.Argument(["file"], metavar="FILE"), *_CONFIG],
        callback=_export,
        help="Write all records to a new file, on a machine with a manager.",
    )
)
cluster.add_command(
    Command(
        "import",
        params=[
            click.Argument(["file"], metavar="FILE"),
            *_CONFIG,
            click.Option(
                ["--gone"],
                metavar="HOST",
                multiple=True,
                help="This host is off for good and need not be asked. May be repeated.",
            ),
            click.Option(["--keep-running"], is_flag=True, help="Move a store while VMs run."),
        ],
        callback=_import,
        help="Fill an empty store with exported records; epochs are raised first.",
    )
)
