"""The one way a value is declared: frozen, JSON by pydantic.

Requests are strict about unknown fields: what somebody asks for and we do not know must not be left
out in silence. Records keep them.
"""

from __future__ import annotations

import re
from enum import StrEnum
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
    """An immutable value that other daemons keep, send and read, perhaps of another version.

    Fields that this version does not know are kept and written back as they came, whoever changes
    the record in between (`godwit.model.skew`). They mean nothing here.
    """

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)


class OpenWord(StrEnum):
    """A word that is only shown: one that a newer version says is kept, and equals none of ours.

    Not for words that anything acts on: there a reader has to refuse what it does not know.
    """

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        word = str.__new__(cls, value)
        word._name_, word._value_ = value, value
        return word

    @property
    def known(self) -> bool:
        """Whether it is one of ours."""
        return self in list(type(self))


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
