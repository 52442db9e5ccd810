"""Which code a VM is powered on with: this host's, noted in its record, or none at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent.firmware import powered_on
from godwit.model import keys
from godwit.model.errors import NotFound, Refused
from godwit.model.firmware import FirmwareImage, UefiFacts
from godwit.model.vm import Disk, Firmware, Pins, Vm
from godwit.store.memory import MemoryStore
from godwit.store.records import Records

CODE = FirmwareImage(path="/fw/code.fd", size_bytes=4096, sha256="a" * 64)
NEWER = CODE.but(sha256="c" * 64)
VARIABLES = Disk(
    id="vars0", volume="shared", path="/s/web/vars0.qcow2", size_bytes=512, serial="V", lun=0
)
VM = Vm(
    name="web",
    cpus=1,
    memory_bytes=64 << 20,
    pins=Pins(uuid="u-1", machine="pc-q35-9.2", cpu_model="Nehalem-v1", accelerator="tcg"),
    created_at=1.0,
    firmware=Firmware(code=CODE, variables=VARIABLES),
)


class Desk(SimpleNamespace):
    """As much of the desk as a power-on asks."""

    def __init__(self, code: FirmwareImage | None) -> None:
        facts = None if code is None else UefiFacts(code=code, template=code)
        super().__init__(
            host="host1",
            firmware=SimpleNamespace(uefi=lambda: facts),
            records=Records(MemoryStore()),
            events=[],
        )

    async def event(self, kind: str, vm: str, message: str) -> None:
        self.events.append((kind, vm, message))

    async def recorded(self) -> Vm:
        found = await self.records.vm("web")
        assert found is not None
        return found.value


async def a_desk(code: FirmwareImage | None) -> Any:
    desk = Desk(code)
    await desk.records.cas(keys.vm_spec("web"), VM.but(cpus=2), 0)
    return desk


async def test_the_same_code_changes_nothing() -> None:
    desk = await a_desk(CODE)
    assert await powered_on(desk, VM) == VM
    assert desk.events == []
    bios = VM.but(firmware=None)
    assert await powered_on(await a_desk(None), bios) == bios


async def test_newer_code_is_taken_and_noted_and_nothing_else_changes() -> None:
    desk = await a_desk(NEWER)
    taken = await powered_on(desk, VM)
    assert taken.firmware == Firmware(code=NEWER, variables=VARIABLES)
    noted = await desk.recorded()
    assert (noted.firmware, noted.cpus) == (taken.firmware, 2), "what others changed stays"
    ((kind, vm, message),) = desk.events
    assert (kind, vm) == ("vm.firmware-renewed", "web")
    assert "cccccccccccc" in message


async def test_what_does_not_fit_is_refused() -> None:
    desk = await a_desk(CODE.but(size_bytes=8192))
    with pytest.raises(Refused, match="needs UEFI firmware of 4096 bytes, host1 has 8192"):
        await powered_on(desk, VM)
    assert (await desk.recorded()).firmware == VM.firmware
    with pytest.raises(Refused, match="host1 has no UEFI firmware") as caught:
        await powered_on(await a_desk(None), VM)
    assert "ovmf" in caught.value.hint
    with pytest.raises(NotFound):
        await powered_on(Desk(NEWER), VM)  # type: ignore[arg-type]
