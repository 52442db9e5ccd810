"""Every request can be printed in every form and read back as the same value."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from godwit.model import requests
from godwit.model.errors import InvalidRequest
from godwit.model.parse import parse
from godwit.model.render import FORMS, Form, render
from godwit.model.requests import ROUTES, Request, parse_request
from godwit.model.spelling import read, spell, spell_size
from godwit.model.words import ACTIONS, PLANNED

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
IDS = st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
TEMPLATES = st.sampled_from(
    ["{{ x }}", "a{% b %}", "{#", "$(id)", "`id`", "'\"", "-x", "\\U00e9", "END\n"]
)
FORMATS = st.sampled_from(["raw", "qcow2", "vhd-fixed", "vhd", "vhdx"])
PATHS = st.from_regex(r"/?[a-z-][a-z.{}' -]{0,20}", fullmatch=True)
SIZES = st.integers(1, 1 << 50) | st.integers(1, 1 << 20).map(lambda mib: mib << 20)
FENCES = st.sampled_from(
    ["https://192.0.2.9:7102", "https://[fd00::9]:7102", "https://san.example"]
)
BY_FIELD: dict[str, st.SearchStrategy[object]] = {
    "name": NAMES,
    "failover": st.none() | NAMES,
    "id": IDS,
    "memory_bytes": st.integers(16 << 20, 1 << 44)
    | st.integers(4, 1 << 20).map(lambda quarters: quarters * (4 << 20)),
    "cpus": st.integers(1, 256),
    "image": st.none() | NAMES,
    "kernel": st.none() | TEXTS | TEMPLATES,
    "initrd": st.none() | TEXTS,
    "append": TEXTS | TEMPLATES,
    "disks": st.lists(
        st.fixed_dictionaries(
            {
                "volume": NAMES,
                "size_bytes": st.integers(1, 1 << 50),
                "format": FORMATS,
            }
        ),
        max_size=3,
    ),
    "cloud_init": st.none() | TEXTS | TEMPLATES,
    "iso": st.none() | st.from_regex(r"[a-z]{1,9}:[a-z.{}' -]{1,20}", fullmatch=True),
    "networks": st.lists(NAMES, max_size=3),
    "host": st.none() | NAMES,
    "to": st.none() | NAMES,
    "ha": st.booleans(),
    "priority": st.integers(0, 100),
    "order": st.integers(0, 1000),
    "apart": st.lists(NAMES, max_size=3),
    "allow_hosts": st.lists(NAMES, max_size=3),
    "restarts": st.integers(0, 60),
    "autostart": st.booleans(),
    "on_shutdown": st.sampled_from(["stop", "restart"]),
    "no_apart": st.just(False),
    "any_host": st.just(False),
    "reason": TEXTS | TEMPLATES,
    "allow_quick": st.booleans(),
    "allow_shutdown": st.booleans(),
    "bring_back": st.booleans(),
    "reboots": st.booleans(),
    "store": st.booleans(),
    "moves_per_host": st.integers(0, 64),
    "moves_per_pair": st.none() | st.integers(0, 64),
    "moves_per_network": st.none() | st.integers(0, 1024),
    "cpu": st.sampled_from(["baseline", "host", "Nehalem-v1", "EPYC-Rome-v4"]),
    "cpu_baseline": st.none() | st.sampled_from(["auto", "Skylake-Server-v5"]),
    "cpus_per_core": st.none() | st.integers(0, 256),
    "command": st.sampled_from(["/bin/true", "/usr/bin/apt-get -y 'dist upgrade'", "/a {{ x }}"]),
    "hosts": st.lists(NAMES, max_size=3),
    "healthy_s": st.floats(1e-6, 86400),
    "force": st.booleans(),
    "timeout_s": st.floats(1e-6, 86400),
    "firmware": st.sampled_from(["bios", "uefi"]),
    "guest_agent": st.booleans(),
    "method": st.sampled_from(["live", "quick"]),
    "max_blackout_ms": st.floats(1e-6, 3_600_000) | st.integers(1, 1000).map(float),
    "deadline_s": st.floats(1e-6, 31_622_400) | st.integers(1, 500_000).map(float),
    "allow_postcopy": st.booleans(),
    "allow_throttle": st.booleans(),
    "allow_unvalidated": st.booleans(),
    "live": st.booleans(),
    "mtu": st.integers(576, 9216),
    "subnet": TEXTS,
    "uplink": TEXTS,
    "disk": NAMES,
    "volume": NAMES,
    "keep": st.booleans(),
    "max_bytes_per_s": st.none() | st.integers(1 << 20, 1 << 40),
    "size_bytes": SIZES,
    "format": FORMATS,
    "target_format": FORMATS,
    "target": TEXTS,
    "linked": st.booleans(),
    "checkpoint": NAMES,
    "fence_url": st.just("") | FENCES,
    "source": TEXTS | TEMPLATES,
    "path": PATHS,
}
OF_KIND: dict[str, dict[str, st.SearchStrategy[object]]] = {
    "vm.clone": {"target": NAMES, "append": st.none() | TEXTS | TEMPLATES},
    "volume.redirect": {"host": NAMES},
    "vm.set": {
        "ha": st.booleans(),
        "priority": st.none() | st.integers(0, 100),
        "order": st.none() | st.integers(0, 1000),
        "restarts": st.none() | st.integers(0, 60),
        "autostart": st.none() | st.booleans(),
        "on_shutdown": st.none() | st.sampled_from(["stop", "restart"]),
    },
    "volume.restore": {"host": NAMES},
}
# One disk is one of three things; each has fields of its own.
_NEW = {"volume": NAMES, "size_bytes": SIZES, "format": st.none() | FORMATS}
_EXISTING = {"volume": NAMES, "size_bytes": st.none() | SIZES, "format": FORMATS, "path": PATHS}
_LUN = {"volume": NAMES, "lun": st.integers(0, 16383)}
_DEVICE = {
    "device": PATHS.map(lambda path: "/dev/" + path.replace("..", "")),
    "format": st.none() | st.just("raw"),
    "passthrough": st.booleans(),
}
_TIERS = st.sampled_from(["auto", "brokered"])
KINDS: dict[str, type[BaseModel]] = {
    one.model_fields["kind"].default: one for one in get_args(get_args(requests.Request)[0])
}


_SERVERS = st.sampled_from(["10.94.0.1", "files.example", "fd00::1", "a"])
_DIRECTORY = {"type": st.sampled_from(["dir", "local"]), "path": PATHS}
_NFS = {
    "type": st.just("nfs"),
    "server": _SERVERS,
    "export": PATHS.map(lambda path: "/" + path.replace("..", "")),
    "fence_url": st.just("") | FENCES,
}
_ISCSI = {
    "type": st.just("iscsi"),
    "portal": st.just("10.94.0.1:3261") | st.just("[fd00::1]:3260") | st.just("target.example"),
    "target": st.from_regex(r"iqn\.[a-z0-9:.-]{1,20}", fullmatch=True),
}
_RBD = {
    "type": st.just("rbd"),
    "pool": st.just("vms") | st.just("vms/godwit"),
    "client": st.just("godwit"),
}

_WHO = {
    "name": NAMES,
    "user": st.text(st.characters(categories=["L", "N", "P"]), max_size=20),
    "password_file": PATHS,
}
_PINNED = {"fingerprint": st.from_regex(r"[0-9a-f]{64}", fullmatch=True)}
_REDFISH = {
    "type": st.just("redfish"),
    "address": st.sampled_from(
        ["https://192.0.2.7", "https://bmc.example:8443", "https://[fd00::7]"]
    ),
    "system": st.just("") | NAMES,
}
_IPMI = {
    "type": st.just("ipmi"),
    "address": st.sampled_from(["192.0.2.7", "bmc.example:6230", "[fd00::7]:623"]),
    "options": st.sampled_from([(), ("cipher=3",), ("cipher=17", "privlvl=operator")]),
}
_AGENT = {
    "type": st.just("fence-agent"),
    "address": st.just("192.0.2.7"),
    "agent": st.just("fence_apc"),
    "options": st.lists(st.from_regex(r"plug=[a-z0-9 '-]{1,9}", fullmatch=True), max_size=2),
}


def any_request(kind: str) -> st.SearchStrategy[Request]:
    if kind == "host.power.set":
        named = {"kind": st.just(kind)} | _WHO
        devices = (named | _REDFISH | _PINNED, named | _REDFISH | {"ca": TEXTS | TEMPLATES})
        devices += (named | _IPMI, named | _AGENT)
        return st.one_of(*(st.fixed_dictionaries(one) for one in devices)).map(parse_request)
    if kind == "volume.create":
        named = {"kind": st.just(kind), "name": NAMES}
        kinds = (named | _DIRECTORY, named | _NFS, named | _ISCSI, named | _RBD)
        return st.one_of(*(st.fixed_dictionaries(one) for one in kinds)).map(parse_request)
    if kind == "vm.disk.add":
        common = {"kind": st.just(kind), "name": NAMES}
        image = common | {"tier": _TIERS}
        ways = (image | _NEW, image | _EXISTING, image | _LUN, common | _DEVICE)
        return st.one_of(*(st.fixed_dictionaries(way) for way in ways)).map(parse_request)
    own = OF_KIND.get(kind, {})
    fields = {
        name: st.just(kind) if name == "kind" else own.get(name, BY_FIELD[name])
        for name in KINDS[kind].model_fields
    }
    return st.fixed_dictionaries(fields).map(parse_request)


def test_the_tables_know_every_request_and_every_field() -> None:
    assert set(ACTIONS) == set(KINDS) == set(ROUTES)
    for kind, model in KINDS.items():
        action = ACTIONS[kind]
        said = (set(action.fields) | {action.subject, "kind"}) - {""}
        assert said == set(model.model_fields), kind


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_printed_reads_back_the_same(kind: str, form: Form) -> None:
    @settings(max_examples=60, deadline=None)
    @given(any_request(kind), st.booleans(), st.booleans())
    def check(request: Request, wait: bool, dry_run: bool) -> None:
        text = render(request, form, wait=wait, dry_run=dry_run and kind in PLANNED)
        assert parse(text, form) == request

    check()


MOVE = parse_request(
    {"kind": "vm.migrate", "name": "web", "to": "host2", "max_blackout_ms": 200, "deadline_s": 900}
)


def test_the_command_line() -> None:
    assert render(MOVE, "cli") == (
        "godwit vm migrate web --to host2 --max-blackout 200ms --deadline 15m\n"
    )
    assert render(MOVE, "cli", dry_run=True).endswith(" --dry-run\n")
    assert render(MOVE, "cli", wait=False).endswith(" --no-wait\n")
    disk = {"volume": "shared", "size_bytes": 2 << 30, "format": "raw"}
    create = {"kind": "vm.create", "name": "web", "memory_bytes": 512 << 20, "disks": [disk]}
    assert render(parse_request(create | {"append": "-v it's"}), "cli") == (
        "godwit vm create web --memory 512M '--append=-v it'\"'\"'s' --disk shared:2G:raw\n"
    )


DISK_LINES = [
    (
        {"kind": "vm.disk.add", "name": "web", "volume": "shared", "size_bytes": 2 << 30},
        "godwit vm disk add web shared:2G",
    ),
    (
        {
            "kind": "vm.disk.add",
            "name": "web",
            "volume": "shared",
            "size_bytes": 2 << 30,
            "format": "vhdx",
        },
        "godwit vm disk add web shared:2G:vhdx",
    ),
    (
        {"kind": "vm.disk.add", "name": "web", "volume": "shared", "path": "a", "format": "raw"},
        "godwit vm disk add web shared --existing a --format raw",
    ),
    (
        {"kind": "vm.disk.add", "name": "web", "volume": "luns", "lun": 2},
        "godwit vm disk add web luns --lun 2",
    ),
    (
        {"kind": "vm.disk.add", "name": "web", "device": "/dev/sdb", "passthrough": True},
        "godwit vm disk add web --device /dev/sdb --passthrough",
    ),
    (
        {"kind": "vm.disk.remove", "name": "web", "disk": "disk1", "keep": True},
        "godwit vm disk remove web disk1 --keep",
    ),
    (
        {"kind": "vm.disk.resize", "name": "web", "disk": "disk1", "size_bytes": 3 << 30},
        "godwit vm disk resize web disk1 3G",
    ),
    (
        {
            "kind": "vm.disk.move",
            "name": "web",
            "disk": "disk1",
            "to": "fast",
            "format": "raw",
            "max_bytes_per_s": 50 << 20,
        },
        "godwit vm disk move web disk1 --to fast --format raw --max-rate 50M",
    ),
    (
        {"kind": "vm.disk.export", "name": "web", "disk": "disk1", "target": "-x"},
        "godwit vm disk export -- web disk1 -x",
    ),
    (
        {"kind": "volume.create", "name": "fast", "type": "local"},
        "godwit volume create fast --kind local",
    ),
    (
        {
            "kind": "volume.create",
            "name": "far",
            "type": "nfs",
            "server": "10.94.0.1",
            "export": "/srv/far",
        },
        "godwit volume create far --kind nfs --server 10.94.0.1 --export /srv/far",
    ),
    (
        {
            "kind": "volume.create",
            "name": "luns",
            "type": "iscsi",
            "portal": "10.94.0.1:3260",
            "target": "iqn.2026-11.example:a",
        },
        "godwit volume create luns --kind iscsi --portal 10.94.0.1:3260"
        " --target iqn.2026-11.example:a",
    ),
    (
        {
            "kind": "volume.disk.import",
            "volume": "shared",
            "name": "debian",
            "source": "https://example.org/d.vmdk",
            "format": "vmdk",
        },
        "godwit volume disk import shared debian https://example.org/d.vmdk --format vmdk",
    ),
]


HOST_LINES = [
    (
        {"kind": "vm.set", "name": "web", "ha": False, "priority": 80, "apart": ["db", "web"]},
        "godwit vm set web --ha off --priority 80 --apart db --apart web",
    ),
    ({"kind": "vm.set", "name": "web", "any_host": True}, "godwit vm set web --any-host"),
    (
        {"kind": "host.drain", "name": "host1", "reason": "new disks", "allow_quick": True},
        "godwit host drain host1 --reason 'new disks' --allow-quick",
    ),
    (
        {"kind": "host.return", "name": "host1", "bring_back": True},
        "godwit host return host1 --bring-back",
    ),
    (
        {"kind": "host.maintenance.enter", "name": "host1"},
        "godwit host maintenance enter host1",
    ),
    ({"kind": "cluster.set", "moves_per_host": 2}, "godwit cluster set --moves-per-host 2"),
    (
        {"kind": "cluster.update", "command": "/bin/true now", "hosts": ["host2"]},
        "godwit cluster update --command '/bin/true now' --host host2",
    ),
]


@pytest.mark.parametrize(("fields", "line"), [*DISK_LINES, *HOST_LINES])
def test_the_lines_of_disks_and_volumes(fields: dict[str, object], line: str) -> None:
    request = parse_request(fields)
    assert render(request, "cli") == line + "\n"
    assert parse(line, "cli") == request


def test_the_python_of_a_disk_calls_what_the_client_has() -> None:
    text = render(parse_request(DISK_LINES[5][0]), "python")
    assert 'client.vms.remove_disk("web", "disk1", keep=True)' in text
    text = render(parse_request(DISK_LINES[1][0]), "python")
    size = 2 << 30
    call = f'add_disk("web", volume="shared", size_bytes={size}, format="vhdx")'
    assert f"client.vms.{call}" in text


def test_the_python_of_hosts_and_of_the_cluster() -> None:
    text = render(parse_request(HOST_LINES[3][0]), "python")
    assert 'client.hosts.return_("host1", bring_back=True)' in text
    text = render(parse_request(HOST_LINES[4][0]), "python", dry_run=True)
    assert 'client.hosts.enter_maintenance("host1", dry_run=True)' in text
    assert "client.cluster.set(moves_per_host=2)" in render(
        parse_request(HOST_LINES[5][0]), "python"
    )


@pytest.mark.parametrize(
    "line",
    [
        "godwit vm set web",
        "godwit vm set web --ha maybe",
        "godwit vm set web --apart db --no-apart",
        "godwit vm set web --allow-host host1 --any-host",
        "godwit vm set web --priority 101",
        "godwit cluster set",
        "godwit cluster set web",
        "godwit cluster update --command true",
        "godwit cluster update --command '/bin/true \"'",
        "godwit host maintenance leave host1",
    ],
)
def test_wrong_lines_about_rules_and_hosts_are_refused(line: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(line, "cli")
    assert caught.value.hint


def test_every_python_form_has_its_method() -> None:
    import inspect

    from godwit.client import nouns

    for action in ACTIONS.values():
        function = getattr(getattr(nouns, action.nouns.capitalize()), action.method)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        placed = [one for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        first = 1 if action.subject else 0
        assert len(placed) == first + sum(not one.covers for one in action.arguments), action.kind
        named = {one.name for one in parameters} - {"dry_run"}
        fields = set(KINDS[action.kind].model_fields) - {"kind"}
        assert len(named) == len(fields), action.kind
        assert fields - named <= {action.subject}, action.kind


def test_a_format_said_twice_must_be_the_same() -> None:
    line = "godwit vm disk add web shared:1G:raw --format"
    assert parse(f"{line} raw", "cli").format == "raw"  # type: ignore[union-attr]
    with pytest.raises(InvalidRequest, match="said twice"):
        parse(f"{line} vhd", "cli")


def test_curl_keeps_the_token_off_the_command_line() -> None:
    text = render(MOVE, "curl")
    command, _, rest = text.partition("<<END")
    assert "TOKEN" not in command
    assert "Bearer" in rest
    assert subprocess.run(["/bin/sh", "-n"], input=text, text=True, check=False).returncode == 0


def test_python_is_a_whole_program() -> None:
    for options in ({}, {"wait": False}, {"dry_run": True}):
        ast.parse(render(MOVE, "python", **options))  # type: ignore[arg-type]


def test_ansible_never_takes_a_value_for_a_template() -> None:
    request = parse_request(
        {"kind": "vm.create", "name": "web", "memory_bytes": 1 << 30, "append": "{{ lookup() }}"}
    )
    line = re.search(r"append: (.*)", render(request, "ansible"))
    assert line
    assert line[1] == '!unsafe "{{ lookup() }}"'


@pytest.mark.parametrize("form", FORMS)
@given(st.text(max_size=80))
def test_nonsense_is_refused_in_words(form: Form, text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse(text, form)


@pytest.mark.parametrize(
    "line",
    [
        "godwit vm migrate web --to",
        "godwit vm migrate web other",
        "godwit vm fly web",
        "godwit vm create web --memory lots",
        "godwit vm migrate web --sideways",
        "godwit vm migrate 'Not A Name'",
        "godwit vm disk",
        "godwit vm disk fly web",
        "godwit vm disk add web",
        "godwit vm disk add web shared",
        "godwit vm disk add web shared --existing a",
        "godwit vm disk add web shared:1G --device /dev/sdb",
        "godwit vm disk add web shared:1G other",
        "godwit vm disk add web shared:1G:vhdx --tier direct",
        "godwit vm disk resize web disk1",
        "godwit vm disk remove web",
    ],
)
def test_wrong_lines_are_refused_in_words(line: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(line, "cli")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("sort", "text", "value"),
    [
        ("ms", "200", 200.0),
        ("ms", "200ms", 200.0),
        ("ms", "0.3ms", 0.3),
        ("ms", "1.5s", 1500.0),
        ("seconds", "10m", 600.0),
        ("seconds", "90", 90.0),
        ("size", "1.5G", 3 << 29),
        ("count", "4", 4),
    ],
)
def test_reading_values(sort: str, text: str, value: object) -> None:
    assert read(sort, text) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sort", "text"),
    [
        ("ms", "0"),
        ("ms", "fast"),
        ("seconds", "-1"),
        ("size", "12Q"),
        ("size", "0"),
        ("count", "1.5"),
        ("count", "²"),
        ("disk", "shared"),
        ("disk", "shared:"),
        ("disk", "a:1G:raw:x"),
        ("place", "a:"),
        ("place", ":1G"),
        ("place", "a:1G:raw:x"),
    ],
)
def test_garbage_values(sort: str, text: str) -> None:
    with pytest.raises(InvalidRequest):
        read(sort, text)  # type: ignore[arg-type]


@given(st.integers(1, 1 << 59))
def test_sizes_lose_nothing(size: int) -> None:
    assert read("size", spell_size(size)) == size
    assert spell("count", 3) == "3"


def test_the_words_stay_light() -> None:
    code = "import sys, godwit.model.render; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
