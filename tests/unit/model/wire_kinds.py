"""Everything that daemons keep for one another or send one another, and a full example of each.

An example has every field set to something that is not its default, made from the declarations
alone. ``python tests/unit/model/wire_kinds.py`` writes the examples that are missing below
``tests/golden/wire/RELEASE``; files that are there are never changed: later versions have to read
them as they are.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import godwit
from godwit.agent.disk_journal import Journal
from godwit.agent.growth import Note as GrowthNote
from godwit.agent.local_disks import AlongNote
from godwit.manager import keyspace
from godwit.migration import peer
from godwit.model import diskmove, processes, skew, trust, validation, validation_facts
from godwit.model.base import Record, Value
from godwit.model.power import SealedSecret
from godwit.qemu.runtime import Runtime, Started
from godwit.storage import lending
from godwit.storage.broker_record import BrokerRecord, PeerRecord

GOLDEN: Final = Path(__file__).resolve().parents[2] / "golden" / "wire"
RELEASE: Final = "0.1"

# Values that the declarations alone do not lead to.
_CHOSEN: Mapping[tuple[str, str], Any] = {
    ("Nic", "mac"): "52:54:00:00:00:01",
    ("Disk", "source"): "image",
    ("Disk", "format"): "qcow2",
    ("Disk", "tier"): "brokered",
    ("Disk", "passthrough"): False,
    ("FirmwareImage", "sha256"): "0123456789abcdef" * 4,
}


def in_the_store() -> dict[str, type[Record]]:
    """The kinds of records in the store."""
    places = [place[1] for leaves in keyspace._NESTED.values() for place in leaves.values()]
    places += [place[1] for place in keyspace._PAIRS.values()]
    places += [place[1] for place in keyspace._FLAT.values()]
    found = {kind.__name__: kind for kind in places if kind is not None}
    more = (
        keyspace.ClusterSettings,
        skew.Speaks,
        validation.ValidationReport,
        SealedSecret,
        trust.ClusterIdentity,
        trust.IssuedCertificate,
        trust.JoinToken,
        trust.RenewalAsk,
        trust.Renewed,
    )
    return found | {kind.__name__: kind for kind in more}


def on_disk() -> dict[str, type[Record]]:
    """What an agent notes for the one after it."""
    return {
        "Runtime": Runtime,
        "Started": Started,
        "BrokerRecord": BrokerRecord,
        "PeerRecord": PeerRecord,
        "DiskJournal": Journal,
        "GrowthNote": GrowthNote,
        "AlongNote": AlongNote,
    }


def between_daemons() -> dict[str, type[Record]]:
    """What agents and managers send one another, beside records of the store."""
    kinds = (
        *(peer.CheckAsk, peer.CheckAnswer, peer.PrepareAsk, peer.Prepared, peer.PeerState),
        *(peer.TakenOver, peer.Recovered),
        *(lending.ExportAsk, lending.ExportAnswer, lending.WithdrawAsk, lending.Withdrawn),
        *(lending.ExportedAsk, lending.Exported),
        *(diskmove.DiskMoveAsk, diskmove.DiskMove),
        *(processes.HostProcesses, trust.JoinAnswer),
        *(validation_facts.MeasureAsk, validation_facts.MeasurePorts),
    )
    return {kind.__name__: kind for kind in kinds}


def all_kinds() -> dict[str, type[Record]]:
    """All of them, by the name of their example."""
    return in_the_store() | on_disk() | between_daemons()


def every_record() -> Iterator[type[Record]]:
    """Every record that the program declares anywhere."""
    for module in pkgutil.walk_packages(godwit.__path__, "godwit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    todo = list(Record.__subclasses__())
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        yield kind


def nested(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The models in a model's fields, at any depth."""
    for info in kind.model_fields.values():
        for part in _models(info.annotation):
            yield part
            yield from nested(part)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)


def example(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON of a full one."""
    found = {}
    for name, info in kind.model_fields.items():
        chosen = next(
            (_CHOSEN[at.__name__, name] for at in kind.__mro__ if (at.__name__, name) in _CHOSEN),
            None,
        )
        found[name] = _filled(info.annotation, info) if chosen is None else chosen
    return found


def _filled(annotation: Any, info: FieldInfo | None = None) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _filled(arguments[0], info)
    if origin in (typing.Union, types.UnionType):
        return _filled(next(one for one in arguments if one is not type(None)), info)
    if origin is typing.Literal:
        return next((one for one in reversed(arguments) if one), arguments[0])
    if origin is dict:
        return {_filled(arguments[0]): _filled(arguments[1])}
    if origin in (tuple, list, frozenset):
        fixed = [one for one in arguments if one is not Ellipsis]
        return [_filled(one) for one in fixed]
    if isinstance(annotation, type):
        return _plain(annotation, info)
    return {"told": 1}  # anything: JSON


def _plain(annotation: type, info: FieldInfo | None) -> Any:
    if issubclass(annotation, Value):
        return example(annotation)
    if issubclass(annotation, Enum):
        return list(annotation)[-1].value
    if annotation is bool:
        return not (info is not None and info.default is True)
    if annotation in (int, float):
        return annotation(_number(info))
    if issubclass(annotation, Path):
        return "/a/path"
    if annotation in (dict, object):
        return {"told": 1}
    if annotation is bytes:
        return "text"
    least = max((one.min_length for one in _limits(info, MinLen)), default=0)
    return "a".ljust(least, "b")


def _number(info: FieldInfo | None) -> float:
    least = max(
        (*(one.ge for one in _limits(info, Ge)), *(one.gt + 1 for one in _limits(info, Gt)), 3)
    )
    for one in _limits(info, MultipleOf):
        least = math.ceil(least / one.multiple_of) * one.multiple_of
    most = (*(one.le for one in _limits(info, Le)), *(one.lt - 1 for one in _limits(info, Lt)))
    return min((least, *most))


def _limits(info: FieldInfo | None, kind: type) -> list[Any]:
    return [one for one in (info.metadata if info is not None else ()) if isinstance(one, kind)]


def words_of(kind: type[BaseModel]) -> dict[str, list[str]]:
    """The words that each of its own fields may hold: enumerations and literals."""
    found = {}
    for name, info in kind.model_fields.items():
        words = sorted({str(word) for word in _words(info.annotation)})
        if words:
            found[f"{kind.__name__}.{name}"] = words
    return found


def _words(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
        return
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        yield from (one.value for one in annotation)
    for part in typing.get_args(annotation):
        yield from _words(part)


def all_words() -> dict[str, list[str]]:
    """Of all kinds and what is in them."""
    kinds = {kind for top in all_kinds().values() for kind in (top, *nested(top))}
    found: dict[str, list[str]] = {}
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        found |= words_of(kind)
    return found


def with_news(found: Any, annotation: Any, news: Mapping[str, Any]) -> Any:
    """The JSON of a value with fields of a later version in each of the records in it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if found is None:
        return None
    if origin in (typing.Annotated, typing.Union, types.UnionType):
        models = [one for one in arguments if any(True for _ in _models(one))]
        return with_news(found, models[0], news) if models else found
    if origin is dict:
        return {name: with_news(one, arguments[1], news) for name, one in found.items()}
    if origin in (tuple, list):
        return [with_news(one, arguments[0], news) for one in found]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        known = {name: with_news(one, fields[name].annotation, news) for name, one in found.items()}
        return {**known, **news}
    return found


def write_missing() -> list[str]:
    """Write the examples of this release that have no file; their names."""
    written = []
    folder = GOLDEN / RELEASE
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in sorted(all_kinds().items()):
        path = folder / f"{name}.json"
        if not path.exists():
            text = json.dumps(example(kind), indent=1, sort_keys=True) + "\n"
            kind.model_validate_json(text)
            path.write_text(text)
            written.append(name)
    words = GOLDEN / f"words-{RELEASE}.json"
    if not words.exists():
        words.write_text(json.dumps(all_words(), indent=1) + "\n")
        written.append(words.name)
    return written


if __name__ == "__main__":
    print(*write_missing() or ["nothing is missing"], sep="\n")
