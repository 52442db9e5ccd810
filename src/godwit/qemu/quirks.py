"""What is odd about which QEMU, as data: when it applies, what it does, and why, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

Version = tuple[int, int, int]

OLDEST: Final[Version] = (7, 2, 0)
NEWEST_TRIED: Final[Version] = (10, 0, 2)

USO_FEATURE: Final = "virtio-net-uso"

SHORT_RAM: Final = "short-ram"
SHORT_RAM_BYTES: Final = 8192
SHORT_RAM_MULTIPLE: Final = 256 << 10

_FOREVER: Final[Version] = (9999, 0, 0)


@dataclass(frozen=True, slots=True)
class Quirk:
    """An oddity of QEMU from ``since`` up to, without, ``until``.

    ``accelerator`` and ``feature`` narrow it further: it applies to that accelerator only, and
    only while the named feature is present (or, with ``!``, absent).
    """

    name: str
    reason: str
    since: Version = (0, 0, 0)
    until: Version = _FOREVER
    accelerator: str = ""
    feature: str = ""
    refuses_live_migration: bool = False

    def applies(self, version: Version, *, accelerator: str, features: frozenset[str]) -> bool:
        """Whether this QEMU, used this way, is odd like that."""
        if not self.since <= version < self.until:
            return False
        if self.accelerator and self.accelerator != accelerator:
            return False
        if self.feature.startswith("!"):
            return self.feature[1:] not in features
        return not self.feature or self.feature in features


QUIRKS: Final[tuple[Quirk, ...]] = (
    Quirk(
        name="tcg-dirty-bitmap",
        until=(9, 0, 0),
        accelerator="tcg",
        refuses_live_migration=True,
        reason="QEMU before 9.0 loses pages of emulated guests when it moves them: it forgets to "
        "reset the soft TLB when it reads the dirty bitmap, and the guest goes on with old memory",
    ),
    Quirk(
        name="multifd-without-postcopy",
        until=(10, 1, 0),
        feature="multifd",
        reason="before 10.1 several channels (multifd) and post-copy exclude each other",
    ),
    Quirk(
        name="device-state-hidden",
        until=(10, 0, 0),
        reason="before 10.0 the state 'device' is seen only with pause-before-switchover",
    ),
    Quirk(
        name="no-switchover-bandwidth",
        feature="!avail-switchover-bandwidth",
        reason="QEMU guesses the link's speed at switchover from the last pass; before 8.2 it "
        "cannot be told",
    ),
    Quirk(
        name="save-without-file",
        feature="!mapped-ram",
        reason="before 9.0 memory is saved as a plain stream into a descriptor, not as a file "
        "that can be mapped",
    ),
    Quirk(
        name="postcopy-cancel-kills",
        until=(10, 0, 0),
        reason="a cancel after post-copy has begun was seen to destroy the VM on 7.2 (10.0 "
        "refuses it); it is never sent",
    ),
    Quirk(
        name="dirty-rate-crash",
        until=(10, 0, 0),
        accelerator="tcg",
        reason="calc-dirty-rate by bitmap or ring was seen to crash 7.2 under emulation (10.0 "
        "answers zero); only page-sampling is used",
    ),
)

SHORT_RAM_REASON: Final = (
    "RAM is 8 KiB less than asked for where its size would be a multiple of 256 KiB: QEMU before "
    "9.0 then takes a slower, right path through the dirty bitmap of an emulated guest"
)


def quirks_of(version: Version, *, accelerator: str, features: frozenset[str]) -> tuple[Quirk, ...]:
    """The quirks of a QEMU used with this accelerator."""
    return tuple(
        quirk
        for quirk in QUIRKS
        if quirk.applies(version, accelerator=accelerator, features=features)
    )


def live_migration_refusal(version: Version, *, accelerator: str) -> str:
    """Why this QEMU must not move guests, in words; empty when it may."""
    for quirk in quirks_of(version, accelerator=accelerator, features=frozenset()):
        if quirk.refuses_live_migration:
            return quirk.reason
    return ""
