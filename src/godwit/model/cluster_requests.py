"""What can be asked of the cluster as a whole. A room of `godwit.model.requests`."""

from __future__ import annotations

import shlex
from typing import Literal, Self

from pydantic import Field, model_validator

from godwit.model.base import Name, Value

CPU_MODEL = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}-v[0-9]{1,3}"
"""A named CPU model with its version, as QEMU writes it: no alias, which would mean another one
on another QEMU."""


class SetCluster(Value):
    """Change settings of the whole cluster; what is not said stays as it is. A limit of 0 is none.

    `model.settings.ClusterSettings` says what they mean; ``cpu_baseline`` is ``auto`` for none.
    """

    kind: Literal["cluster.set"] = "cluster.set"
    moves_per_host: int | None = Field(default=None, ge=0, le=64)
    moves_per_pair: int | None = Field(default=None, ge=0, le=64)
    moves_per_network: int | None = Field(default=None, ge=0, le=1024)
    cpus_per_core: int | None = Field(default=None, ge=0, le=256)
    cpu_baseline: str | None = Field(default=None, pattern=rf"^(auto|{CPU_MODEL})$")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.changes:
            raise ValueError("say what is to change: godwit cluster set --help")
        return self

    @property
    def changes(self) -> dict[str, int | str]:
        """The settings that are to change; ``auto`` is how people say that there is none."""
        found: dict[str, int | str] = self.model_dump(exclude_none=True, exclude={"kind"})
        if self.cpu_baseline == "auto":
            found["cpu_baseline"] = ""
        return found


class UpdateCluster(Value):
    """Empty one host after the other, run a command on each, bring its VMs back, and go on.

    ``command`` is split into words as a shell would, but no shell runs it; each host runs it as
    root only if its own configuration lists exactly these words. ``hosts`` empty: all, by name.
    With ``reboots`` a host is healthy when it is up again after another start of its kernel. It
    stops at the first host where something fails, with that host still marked.
    """

    kind: Literal["cluster.update"] = "cluster.update"
    command: str = Field(min_length=1, max_length=4096)
    hosts: tuple[Name, ...] = Field(default=(), max_length=1024)
    timeout_s: float = Field(default=1800.0, gt=0, le=86400)
    reboots: bool = False
    healthy_s: float = Field(default=600.0, gt=0, le=86400)
    allow_quick: bool = False
    allow_shutdown: bool = False

    @model_validator(mode="after")
    def _is_a_command(self) -> Self:
        try:
            words = self.argv
        except ValueError as error:
            raise ValueError(f"the command cannot be split into words: {error}") from None
        if not words or not words[0].startswith("/"):
            raise ValueError("name the program by its whole path, like /usr/bin/apt-get")
        return self

    @property
    def argv(self) -> tuple[str, ...]:
        """The command's words."""
        return tuple(shlex.split(self.command))


class RemoveHost(Value):
    """Take a host out of the cluster; its certificates are revoked.

    Refused while VMs are there; and while a member of the store is, unless ``store`` says that it
    has been taken out.
    """

    kind: Literal["cluster.remove"] = "cluster.remove"
    name: Name
    store: bool = False
