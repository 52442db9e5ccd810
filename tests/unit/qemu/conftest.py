"""VM records as a manager would make them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from godwit.model.firmware import FirmwareImage
from godwit.model.vm import Boot, Disk, Firmware, Nic, Pins, Vm

UUID = "6f0e9b6c-4d3c-4f0a-9a53-0a4f5e1f2b3c"


def _disk(n: int, kind: str) -> Disk:
    """A disk of some format, or (``device``) a block device passed through."""
    device = kind in ("device", "lun")
    values: dict[str, object] = {
        "id": f"disk{n}",
        "volume": "" if device else "shared",
        "path": "/dev/mapper/lun7" if device else f"/clusterstorage/shared/web/disk{n}.{kind}",
        "size_bytes": 1 << 30,
        "serial": f"GW{n:018d}",
        "lun": n,
        "format": "raw" if device else kind,
        "source": "device" if device else "image",
        "passthrough": kind == "lun",
    }
    return Disk.model_validate(values)


def _uefi() -> Firmware:
    code = FirmwareImage(path="/usr/share/OVMF/CODE.fd", size_bytes=3653632, sha256="ab" * 32)
    variables = Disk(
        id="vars0",
        volume="shared",
        path="/clusterstorage/shared/web/vars0.qcow2",
        size_bytes=540672,
        serial="GWVARS",
        lun=0,
    )
    return Firmware(code=code, variables=variables)


def _make(
    *,
    disks: int = 0,
    nics: int = 0,
    kernel: bool = True,
    accelerator: str = "tcg",
    queues: int = 1,
    kinds: tuple[str, ...] = (),
    uefi: bool = False,
    **more: object,
) -> Vm:
    boot = "/clusterstorage/shared/.godwit/boot/"
    values: dict[str, object] = {
        "name": "web",
        "cpus": 1,
        "memory_bytes": 256 << 20,
        "created_at": 0.0,
        "pins": Pins(
            uuid=UUID,
            machine="pc-q35-9.0",
            cpu_model="Westmere-v1" if accelerator == "tcg" else "Skylake-Server-v5",
            accelerator=accelerator,  # type: ignore[arg-type]
        ),
        "boot": Boot(kernel=boot + "aa11", initrd=boot + "bb22", append="console=ttyS0 quiet")
        if kernel
        else Boot(),
        "firmware": _uefi() if uefi else None,
        "disks": tuple(
            Disk(
                id=f"disk{n}",
                volume="shared",
                path=f"/clusterstorage/shared/web/disk{n}.qcow2",
                size_bytes=1 << 30,
                serial=f"GW{n:018d}",
                lun=n,
                format="qcow2" if n == 0 else "raw",
            )
            for n in range(disks)
        )
        + tuple(_disk(n, kind) for n, kind in enumerate(kinds)),
        "nics": tuple(
            Nic(id=f"net{n}", network="lan", mac=f"02:00:00:00:00:{n:02x}", queues=queues)
            for n in range(nics)
        ),
    }
    return Vm.model_validate(values | more)


@pytest.fixture
def make_vm() -> Callable[..., Vm]:
    """A VM by its shape."""
    return _make
