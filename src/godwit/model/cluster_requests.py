"""What can be asked of the cluster as a whole. A room of `godwit.model.requests`."""

from __future__ import annotations

import shlex
from typing import Literal, Self

from pydantic import Field, model_validator

from godwit.model.base import Name, Value


class SetCluster(Value):
    """Change settings of the whole cluster; what is not said stays as it is. A limit of 0 is none.

    `model.settings.ClusterSettings` says what they mean.
    """

    kind: Literal["cluster.set"] = "cluster.set"
    moves_per_host: int | None = Field(default=None, ge=0, le=64)
    moves_per_pair: int | None = Field(default=None, ge=0, le=64)
    moves_per_network: int | None = Field(default=None, ge=0, le=1024)
    cpus_per_core: int | None = Field(default=None, ge=0, le=256)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.changes:
            raise ValueError("say what is to change: godwit cluster set --help")
        return self

    @property
    def changes(self) -> dict[str, int]:
        """The settings that are to change."""
        found: dict[str, int] = self.model_dump(exclude_none=True, exclude={"kind"})
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
