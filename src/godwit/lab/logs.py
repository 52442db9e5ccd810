"""The logs of a lab's daemons, on the real machine's disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from godwit.host.inotify import MODIFIED, PathWatch
from godwit.lab.handle import Lab
from godwit.model.errors import NotFound

_TAIL_BYTES = 256 << 10


def files(lab: Lab, where: str | None = None, unit: str | None = None) -> list[Path]:
    """The log files of all nodes, of one, or of one unit there. NotFound when there is none."""
    nodes = lab.layout.nodes if where is None else (lab.node(where),)
    found = [path for node in nodes for path in sorted(lab.layout.logs(node).glob("*.log"))]
    if unit is not None:
        known = ", ".join(sorted({path.stem for path in found}))
        found = [path for path in found if path.stem == unit]
        if not found:
            raise NotFound(f"{where} has no log of {unit}", hint=f"there are: {known}")
    return found


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file."""
    with path.open("rb") as stream:
        end = stream.seek(0, 2)
        stream.seek(max(0, end - _TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    return text.splitlines()[-lines:] if lines > 0 else []


def follow_files(paths: Sequence[Path], say: Callable[[str], None]) -> None:
    """Print what is added to the files, until interrupted."""
    asyncio.run(_follow(paths, say))


async def _follow(paths: Sequence[Path], say: Callable[[str], None]) -> None:
    places = {path: path.stat().st_size for path in paths}
    with PathWatch(*paths, mask=MODIFIED) as watch:
        while True:
            await watch.changed()
            for path, place in places.items():
                with path.open("rb") as stream:
                    stream.seek(place)
                    new = stream.read()
                whole = new[: new.rfind(b"\n") + 1]
                places[path] = place + len(whole)
                label = f"{path.parent.name} {path.stem}: " if len(paths) > 1 else ""
                for line in whole.decode(errors="replace").splitlines():
                    say(label + line)
