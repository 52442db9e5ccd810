"""The one way a value is declared: frozen, strict about unknown fields, JSON by pydantic."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict

from godwit.model.errors import InvalidRequest

_NAME = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")


class Value(BaseModel):
    """An immutable value that others write requests with; unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    def but(self, **changes: object) -> Self:
        """A copy with these fields changed and validated again."""
        return type(self).model_validate({**dict(self), **changes})


class Record(Value):
    """An immutable value kept in the store; unknown fields (of a newer version) are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


def check_name(name: str, *, what: str = "name") -> str:
    """The name itself, or InvalidRequest: lower-case letters, digits and ``-``, at most 63."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is not a usable {what}",
            hint="use lower-case letters, digits and '-', at most 63, not '-' at either end",
        )
    return name


def _name_for_pydantic(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("use lower-case letters, digits and '-', at most 63, no '-' at the ends")
    return name


Name = Annotated[str, AfterValidator(_name_for_pydantic)]
