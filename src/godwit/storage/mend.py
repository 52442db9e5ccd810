"""Makes an image whole that a daemon left at its death, before another daemon opens it.

Only a VHDX needs it, and only where QEMU's driver does not help itself (`vhdx_log`). A dynamic VHD
does not: killed before it wrote its footer at the new end, the image is opened by the copy at its
start, and the next new block writes the footer again.

What is written follows from what lies in the image alone, and has the next number. So a step that
hangs on a dead path and lands late, when another host has opened the image, puts at most an old
number into one of the headers: the other one leads then, as after any kill between the two.
"""

from __future__ import annotations

import base64
import logging
from typing import Final

from godwit.storage import vhdx_log
from godwit.storage.nodes import BrokerDisk
from godwit.storage.remote import Child

_log = logging.getLogger("storage")

_PIECE: Final = 1 << 20


async def mend(disk: BrokerDisk, child: Child, path: str, *, timeout: float) -> None:
    """Mend the image at the child's ``path``, which nobody has open, if it needs it.

    What is odd about it is left as it is, with a warning. OSError when it cannot be read or
    written; ``timeout`` in seconds is for each step. It can be done again at any time.
    """
    if disk.format != "vhdx":
        return

    async def read(offset: int, length: int) -> bytes:
        answer = await child.ask("read", path=path, offset=offset, length=length, timeout=timeout)
        return base64.b64decode(answer)

    try:
        first, second = [await read(at, vhdx_log.HEADER_BYTES) for at in vhdx_log.HEADERS]
        mark = vhdx_log.find_mark(first, second)
        if mark is None:
            return
        end = mark.log_at + mark.log_bytes
        pieces = [await read(at, min(_PIECE, end - at)) for at in range(mark.log_at, end, _PIECE)]
        steps = vhdx_log.unmark(mark, b"".join(pieces))
    except vhdx_log.Unclear as odd:
        _log.warning("%s was not closed in order, and is left as it is: %s", disk.path, odd)
        return
    for at, content in steps:
        text = base64.b64encode(content).decode()
        await child.ask("patch", path=path, offset=at, content=text, timeout=timeout)
    if steps:
        _log.info("%s: its log was opened and never written: closed again", disk.path)
    else:
        _log.info("%s: its log has an entry, which is carried out when it is opened", disk.path)
