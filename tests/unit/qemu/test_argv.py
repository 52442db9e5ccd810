"""The command line is what is on file, and what must never happen in it never does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from godwit.model.errors import InvalidRequest
from godwit.model.vm import Vm
from godwit.qemu.argv import Plugs, build_argv, one_per_line
from godwit.qemu.quirks import USO_FEATURE

GOLDEN = Path(__file__).parents[2] / "golden" / "argv"
NEW = frozenset({USO_FEATURE})


def _plugs(vm: Vm, **more: object) -> Plugs:
    number = iter(range(20, 99))
    taps = {nic.id: tuple(next(number) for _ in range(nic.queues)) for nic in vm.nics}
    values: dict[str, object] = {"taps": taps, "features": NEW}
    return Plugs(monitors=(10, 11), serial=12, console_log=13, **(values | more))  # type: ignore[arg-type]


CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "kernel-boot-minimal": ({}, {}),
    "two-disks-two-nics": ({"disks": 2, "nics": 2, "cpus": 2}, {}),
    "incoming": ({"disks": 1, "nics": 1}, {"incoming": True}),
    "kvm": (
        {"disks": 1, "nics": 1, "accelerator": "kvm", "cpus": 4, "queues": 4},
        {"vhost": {"net0": (30, 31, 32, 33)}},
    ),
    "disk-boot": ({"disks": 2, "kernel": False}, {}),
    "all-formats": (
        {"kinds": ("raw", "qcow2", "vhd-fixed", "vhd", "vhdx", "device", "lun")},
        {"broker": "/run/godwit/vms/web/nbd.sock"},
    ),
    "no-image-locks": ({"kinds": ("raw", "qcow2", "vhd-fixed", "device")}, {"locking": False}),
    "uefi": ({"disks": 1, "kernel": False, "uefi": True}, {"firmware": 14}),
    "guest-agent": ({"nics": 1, "guest_agent": True}, {"guest_agent": 14}),
    "old-qemu": ({"nics": 1}, {"features": frozenset(), "data_dir": "/opt/qemu-7.2/share"}),
}


@pytest.mark.parametrize("name", CASES)
def test_command_line_is_the_one_on_file(name: str, make_vm: Callable[..., Vm]) -> None:
    shape, plugged = CASES[name]
    vm = make_vm(**shape)
    text = one_per_line(build_argv(vm, _plugs(vm, **plugged)))
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("GODWIT_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), "a guest sees another machine: is that meant?"


def test_no_golden_file_is_forgotten() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


def test_incoming_differs_by_one_option_only(make_vm: Callable[..., Vm]) -> None:
    vm = make_vm(disks=2, nics=2)
    source = build_argv(vm, _plugs(vm))
    target = build_argv(vm, _plugs(vm, incoming=True))
    at = target.index("-incoming")
    assert target[at : at + 2] == ["-incoming", "defer"]
    assert target[:at] + target[at + 2 :] == source


def test_machine_starts_stopped_and_denied(make_vm: Callable[..., Vm]) -> None:
    vm = make_vm()
    argv = build_argv(vm, _plugs(vm))
    assert "-S" in argv
    assert "-no-shutdown" in argv
    assert argv[argv.index("-sandbox") + 1].count("deny") == 4
    assert argv[argv.index("-cpu") + 1].endswith(",enforce")


def test_images_are_never_probed_nor_followed(make_vm: Callable[..., Vm]) -> None:
    vm = make_vm(disks=2)
    argv = build_argv(vm, _plugs(vm))
    nodes = [json.loads(argv[i + 1]) for i, word in enumerate(argv) if word == "-blockdev"]
    assert [node["driver"] for node in nodes] == ["file", "qcow2", "file", "raw"]
    assert all(node["cache"] == {"direct": True, "no-flush": False} for node in nodes)
    assert nodes[1]["backing"] is None
    assert "locking" not in nodes[0]
    assert "-drive" not in argv


def test_strange_paths_stay_one_value(make_vm: Callable[..., Vm]) -> None:
    vm = make_vm(disks=1)
    path = '/clusterstorage/sh,ared/a "b"/disk=0.qcow2'
    vm = vm.but(disks=(vm.disks[0].but(path=path, serial="A,B"),))
    argv = build_argv(vm, _plugs(vm))
    assert json.loads(argv[argv.index("-blockdev") + 1])["filename"] == path
    assert any(word.startswith("scsi-hd") and "serial=A,,B," in word for word in argv)


def test_places_follow_ids_not_the_order(make_vm: Callable[..., Vm]) -> None:
    vm = make_vm(nics=3)
    fewer = vm.but(nics=(vm.nics[2],))
    wanted = [w for w in build_argv(vm, _plugs(vm)) if "id=net2," in w]
    plugs = _plugs(fewer)
    assert [w for w in build_argv(fewer, plugs) if "id=net2," in w] == wanted


@pytest.mark.parametrize(("memory", "less"), [(256 << 20, 8), ((256 << 20) + 1, 0)])
def test_short_ram_quirk_leaves_no_multiple_of_256_kib(
    memory: int, less: int, make_vm: Callable[..., Vm]
) -> None:
    vm = make_vm(memory_bytes=memory)
    quirky = vm.but(pins=vm.pins.but(qemu_quirks=("short-ram",)))
    sizes = []
    for each in (vm, quirky):
        argv = build_argv(each, _plugs(each))
        sizes.append(int(argv[argv.index("-m") + 1].removeprefix("size=").removesuffix("k")))
    assert sizes[0] - sizes[1] == less
    assert sizes[1] % 256 != 0


def test_uso_is_named_only_where_qemu_knows_it(make_vm: Callable[..., Vm]) -> None:
    vm = make_vm(nics=1)
    assert "guest_uso4=off" in " ".join(build_argv(vm, _plugs(vm)))
    assert "uso" not in " ".join(build_argv(vm, _plugs(vm, features=frozenset())))


def test_impossible_machines_are_refused(make_vm: Callable[..., Vm]) -> None:
    vm = make_vm(nics=2, disks=2)
    twice = vm.but(disks=(vm.disks[0], vm.disks[1].but(lun=0)))
    with pytest.raises(InvalidRequest, match="disk places"):
        build_argv(twice, _plugs(twice))
    clash = vm.but(nics=(vm.nics[0], vm.nics[1].but(id="card0")))
    with pytest.raises(InvalidRequest, match="card places"):
        build_argv(clash, _plugs(clash))
    with pytest.raises(InvalidRequest, match="2 queues but 1"):
        build_argv(vm.but(nics=(vm.nics[0].but(queues=2),)), _plugs(vm, taps={"net0": (20,)}))
    far = vm.but(nics=(vm.nics[0].but(id="net8"),))
    with pytest.raises(InvalidRequest, match="no free place"):
        build_argv(far, _plugs(far))


def test_uefi_without_its_code_is_refused(make_vm: Callable[..., Vm]) -> None:
    vm = make_vm(uefi=True)
    with pytest.raises(InvalidRequest, match="none was opened"):
        build_argv(vm, _plugs(vm))


def test_descriptors_are_all_the_command_line_names(make_vm: Callable[..., Vm]) -> None:
    vm = make_vm(nics=2, queues=2)
    plugs = _plugs(vm, vhost={"net0": (50, 51)})
    assert set(_plugs(vm, firmware=14).descriptors()) - set(_plugs(vm).descriptors()) == {14}
    assert set(plugs.descriptors()) == {10, 11, 12, 13, 20, 21, 22, 23, 50, 51}
