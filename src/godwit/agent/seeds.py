"""User data for cloud-init: kept by its hash, and written onto a CD for one VM (NoCloud).

    user data --> .godwit/user-data/HASH, root's alone --> VM/seed0.iso, QEMU's user's alone

User data has passwords and keys in it. It is on no command line and in no record: those name the
hash. The guest knows the CD by its label and reads who it is from it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from godwit.agent.desk import Desk
from godwit.host.files import write_durable
from godwit.model.base import check_name
from godwit.model.disks import SEED, is_user_data
from godwit.model.errors import InvalidRequest, NotFound, Refused
from godwit.storage.iso import write_iso

LARGEST = 1 << 20
LABEL = "cidata"


class Seeds:
    """What the agent writes for guests that ask who they are."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    @property
    def _shared(self) -> Path:
        return self._desk.config.paths.volumes / "shared"

    def _check_place(self) -> None:
        if self._desk.catalog.files("shared").node(self._shared) is not None:
            raise Refused(
                "user data is kept on the volume shared, which is served to QEMU alone here",
                hint="give it to the guest in another way, like an ISO image of your own",
            )

    async def put(self, sha256: str, chunks: AsyncIterator[bytes]) -> dict[str, str]:
        """Keep user data under its hash, for root alone."""
        self._check_place()
        data = bytearray()
        async for chunk in chunks:
            data += chunk
            if len(data) > LARGEST:
                raise Refused("user data is at most 1 MiB", hint="let the guest fetch the rest")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Refused("the user data arrived damaged", hint="send it again")
        folder = self._shared / ".godwit" / "user-data"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / sha256
        await asyncio.to_thread(write_durable, path, bytes(data), mode=0o600)
        return {"sha256": sha256, "path": str(path)}

    async def make(
        self, vm: str, user_data: str, *, instance_id: str, hostname: str
    ) -> dict[str, str]:
        """Write the VM's CD; one that is there is replaced, for the VM has never run."""
        if not is_user_data(user_data):
            raise InvalidRequest(f"{user_data} is no user data", hint="POST /v1/user-data")
        if vm in self._desk.slots:
            raise Refused(f"{vm} runs here", hint=f"stop it first: godwit vm stop {vm}")
        source = self._shared / ".godwit" / "user-data" / user_data.rpartition("/")[2]
        try:
            data = source.read_bytes()
        except FileNotFoundError:
            raise NotFound(
                f"the user data {source.name} is not there", hint="upload it again"
            ) from None
        about = f"instance-id: {instance_id}\nlocal-hostname: {check_name(hostname)}\n".encode()
        files = {"user-data": data, "meta-data": about}
        image = write_iso(LABEL, files, at=self._desk.clock.realtime())
        path = self._shared / check_name(vm) / f"{SEED}.iso"
        path.parent.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(write_durable, path, image, mode=0o400)
        if (user := self._desk.equipment.binary.user) is not None:
            os.chown(path, *user)
        return {"path": str(path)}
