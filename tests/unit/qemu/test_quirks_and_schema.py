"""Which QEMU is odd in which way, and how its schema is read."""

from __future__ import annotations

from typing import Any

import pytest

from godwit.qemu.facts import machine_key, q35_machines, usable_models
from godwit.qemu.quirks import QUIRKS, live_migration_refusal, quirks_of
from godwit.qemu.schema import Schema

SCHEMA: list[dict[str, Any]] = [
    {"name": "migrate-set-capabilities", "meta-type": "command", "arg-type": "1", "ret-type": "9"},
    {
        "name": "1",
        "meta-type": "object",
        "members": [{"name": "capabilities", "type": "[2]"}],
    },
    {"name": "[2]", "meta-type": "array", "element-type": "2"},
    {
        "name": "2",
        "meta-type": "object",
        "members": [{"name": "capability", "type": "3"}, {"name": "state", "type": "bool"}],
    },
    {"name": "3", "meta-type": "enum", "values": ["multifd", "events"]},
    {"name": "query-migrate", "meta-type": "command", "arg-type": "9", "ret-type": "4"},
    {"name": "4", "meta-type": "object", "members": [{"name": "status", "type": "5"}]},
    {"name": "5", "meta-type": "enum", "members": [{"name": "device"}, {"name": "active"}]},
    {"name": "9", "meta-type": "object", "members": []},
]


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("migrate-set-capabilities", True),
        ("migrate-set-capabilities/capabilities/capability/multifd", True),
        ("migrate-set-capabilities/capabilities/capability/mapped-ram", False),
        ("migrate-set-capabilities/capabilities/nothing", False),
        ("migrate-set-capabilities/capabilities/capability/multifd/deeper", False),
        ("query-migrate/->/status/device", True),
        ("query-migrate/->/status/recover", False),
        ("query-migrate/status", False),
        ("yank", False),
        ("3", False),
    ],
)
def test_schema_paths(path: str, known: bool) -> None:
    assert Schema(SCHEMA).has(path) is known


@pytest.mark.parametrize(
    ("version", "accelerator", "refused"),
    [
        ((7, 2, 22), "tcg", True),
        ((8, 2, 2), "tcg", True),
        ((8, 99, 0), "tcg", True),
        ((9, 0, 0), "tcg", False),
        ((10, 0, 2), "tcg", False),
        ((7, 2, 22), "kvm", False),
    ],
)
def test_emulated_guests_do_not_move_on_old_qemu(
    version: tuple[int, int, int], accelerator: str, refused: bool
) -> None:
    assert bool(live_migration_refusal(version, accelerator=accelerator)) is refused


def test_features_narrow_quirks() -> None:
    names = {q.name for q in quirks_of((10, 0, 2), accelerator="kvm", features=frozenset())}
    assert "no-switchover-bandwidth" in names
    assert "multifd-without-postcopy" not in names
    features = frozenset({"avail-switchover-bandwidth", "multifd", "mapped-ram"})
    names = {q.name for q in quirks_of((10, 0, 2), accelerator="kvm", features=features)}
    assert names == {"multifd-without-postcopy"}


def test_every_quirk_says_why_once() -> None:
    assert len({quirk.name for quirk in QUIRKS}) == len(QUIRKS)
    assert all(len(quirk.reason) > 30 for quirk in QUIRKS)


def test_machines_are_sorted_by_age() -> None:
    answer = [{"name": n} for n in ("pc-q35-10.0", "q35", "pc-q35-9.2", "pc-q35-4.0.1", "pc", "x")]
    assert q35_machines(answer) == ("pc-q35-4.0.1", "pc-q35-9.2", "pc-q35-10.0")
    assert machine_key("q35") == ()


def test_only_whole_versioned_models_count() -> None:
    answer = [
        {"name": "Nehalem-v1", "static": False, "unavailable-features": []},
        {"name": "Haswell-v1", "static": False, "unavailable-features": ["pcid"]},
        {"name": "Nehalem", "static": False, "unavailable-features": []},
        {"name": "max", "static": False, "unavailable-features": []},
        {"name": "Silent-v1", "static": False},
    ]
    assert usable_models(answer) == ("Nehalem-v1",)
