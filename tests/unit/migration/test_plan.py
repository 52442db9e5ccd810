"""May this VM move there: every check alone, and all failures at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from move_rig import host_info, vm

from godwit.migration import plan
from godwit.migration.plan import DestinationFacts, SourceFacts
from godwit.model.firmware import FirmwareImage, UefiFacts
from godwit.model.host import HostInfo, QemuFacts
from godwit.model.migration import Check
from godwit.model.ownership import MoveIntent, Owner, OwnerState
from godwit.model.vm import Disk, Firmware, Nic

MACHINE = vm(
    disks=(
        Disk(
            id="disk0", volume="shared", path="/s/web/disk0.qcow2", size_bytes=1, serial="a", lun=0
        ),
    ),
    nics=(Nic(id="nic0", network="lan", mac="52:54:00:00:00:01"),),
)
RUNNING = Owner(host="host1", epoch=3, state=OwnerState.RUNNING)
HERE = SourceFacts(info=host_info("host1"), qemu_status="running")
THERE = DestinationFacts(
    info=host_info("host2"),
    memory_free_bytes=1 << 30,
    volumes={"shared": ""},
    files={"/s/web/disk0.qcow2": ""},
)


def info(**changes: Any) -> HostInfo:
    return host_info("host2", **changes)


def qemu(**changes: Any) -> QemuFacts:
    return host_info("host2").qemu.but(**changes)


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.result == "fail"]


def test_when_all_is_well_every_group_says_so() -> None:
    groups = [
        plan.check_request(RUNNING, source="host1", destination="host2"),
        plan.check_source(MACHINE, HERE, method="live"),
        plan.check_destination(MACHINE, THERE, method="live"),
        plan.check_pair(host_info("host1"), info(), postcopy=False, clock_offset_s=0.01),
    ]
    assert [[check.result for check in group] for group in groups] == [["pass"]] * 4


@pytest.mark.parametrize(
    ("owner", "destination", "name"),
    [
        (RUNNING.but(host="host9"), "host2", "owner"),
        (RUNNING, "host1", "destination"),
        (RUNNING.but(state=OwnerState.STOPPED), "host2", "state"),
        (
            RUNNING.but(
                migration=MoveIntent(id="m", method="live", source="host1", destination="host3")
            ),
            "host2",
            "exclusive",
        ),
    ],
)
def test_the_request(owner: Owner, destination: str, name: str) -> None:
    assert failed(plan.check_request(owner, source="host1", destination=destination)) == [name]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"qemu_status": "io-error"}, "guest"),
        ({"qemu_status": ""}, "guest"),
        ({"blocked_reasons": ("no migration for it",)}, "blocked"),
        ({"block_jobs": ("mirror0",)}, "block-jobs"),
        ({"devices_leaving": ("nic1",)}, "devices"),
        ({"info": host_info("host1", qemu=qemu(live_migration_refusal="old TCG"))}, "qemu"),
    ],
)
def test_the_source(changes: dict[str, Any], name: str) -> None:
    assert failed(plan.check_source(MACHINE, replace(HERE, **changes), method="live")) == [name]


def test_a_quick_move_does_not_mind_what_only_live_ones_trip_over() -> None:
    refused = host_info("host1", qemu=qemu(live_migration_refusal="old TCG"))
    assert failed(plan.check_source(MACHINE, replace(HERE, info=refused), method="quick")) == []
    there = replace(THERE, info=refused)
    assert failed(plan.check_destination(MACHINE, there, method="quick")) == []


@pytest.mark.parametrize("model", ["host", "max"])
def test_a_vm_with_its_hosts_own_cpu_goes_nowhere(model: str) -> None:
    own = MACHINE.but(pins=MACHINE.pins.but(cpu_model=model))
    there = replace(THERE, info=info(qemu=qemu(cpu_models=(model, "Nehalem-v1"))))
    for checks in (
        plan.check_destination(own, there, method="live"),
        plan.check_destination(own, there, method="quick"),
    ):
        (check,) = [one for one in checks if one.name == "cpu"]
        assert check.result == "fail"
        assert "its host's own CPU" in check.message


def test_a_guard_that_is_away_is_a_warning() -> None:
    (check,) = plan.check_source(MACHINE, replace(HERE, guard_ready=False), method="live")
    assert (check.name, check.result) == ("guard", "warn")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"holds_vm": True}, "clean"),
        ({"memory_free_bytes": 1 << 20}, "memory"),
        ({"info": info(qemu=qemu(machines=("pc-q35-8.2",)))}, "machine"),
        ({"info": info(qemu=qemu(cpu_models=()))}, "cpu"),
        ({"info": info(qemu=qemu(accelerator="kvm"))}, "accelerator"),
        ({"volumes": {"shared": "not mounted"}}, "storage"),
        ({"files": {"/s/web/disk0.qcow2": "permission denied"}}, "storage"),
        ({"info": info(networks={})}, "network"),
        ({"info": info(networks={"lan": 9000})}, "mtu"),
        ({"macs_in_use": ("52:54:00:00:00:01",)}, "mac"),
        ({"tls_ready": False}, "tls"),
        ({"info": info(qemu=qemu(live_migration_refusal="old TCG"))}, "qemu"),
    ],
)
def test_the_destination(changes: dict[str, Any], name: str) -> None:
    checks = plan.check_destination(MACHINE, replace(THERE, **changes), method="live")
    assert failed(checks) == [name]
    assert all(check.hint for check in checks)


def test_both_hosts_have_the_same_firmware_or_the_move_is_refused() -> None:
    code = FirmwareImage(path="/fw/code.fd", size_bytes=4096, sha256="a" * 64)
    facts = UefiFacts(code=code, template=code)
    variables = MACHINE.disks[0].but(id="vars0", path="/s/web/vars0.qcow2")
    machine = MACHINE.but(firmware=Firmware(code=code, variables=variables))
    for uefi, expected in (
        (facts, []),
        (None, ["firmware"]),
        (facts.but(code=code.but(sha256="c" * 64)), ["firmware"]),
        (facts.but(code=code.but(path="/fw/other.fd")), ["firmware"]),
    ):
        there = replace(THERE, info=info(uefi=uefi))
        for method in ("live", "quick"):
            checks = plan.check_destination(machine, there, method=method)
            assert failed(checks) == expected
            assert all(check.hint for check in checks if check.result == "fail")


@pytest.mark.parametrize(
    ("changes", "offset", "postcopy", "name"),
    [
        ({"migration_subnet": "10.9.0.0/24"}, 0.0, False, "subnet"),
        ({"cpu_vendor": "AuthenticAMD"}, 0.0, False, "vendor"),
        ({"qemu": qemu(version=(9, 2, 0))}, 0.0, False, "qemu-version"),
        ({}, 1.5, False, "clock"),
        ({}, -1.5, False, "clock"),
        ({"userfaultfd": False}, 0.0, True, "postcopy"),
    ],
)
def test_the_pair(changes: dict[str, Any], offset: float, postcopy: bool, name: str) -> None:
    checks = plan.check_pair(
        host_info("host1"), info(**changes), postcopy=postcopy, clock_offset_s=offset
    )
    assert failed(checks) == [name]


def test_an_unknown_clock_offset_warns_and_never_passes_silently() -> None:
    (check,) = plan.check_pair(host_info("host1"), info(), postcopy=False, clock_offset_s=None)
    assert check.result == "warn"


def test_every_failure_is_reported_at_once() -> None:
    owner = RUNNING.but(
        host="host9",
        state=OwnerState.STOPPED,
        migration=MoveIntent(id="m", method="live", source="host1", destination="host3"),
    )
    assert failed(plan.check_request(owner, source="host1", destination="host1")) == [
        "owner", "destination", "state", "exclusive",
    ]  # fmt: skip
    here = replace(
        HERE,
        qemu_status="",
        blocked_reasons=("a", "b"),
        block_jobs=("j",),
        devices_leaving=("d",),
        guard_ready=False,
    )
    assert failed(plan.check_source(MACHINE, here, method="live")) == [
        "guest", "blocked", "blocked", "block-jobs", "devices",
    ]  # fmt: skip
    there = DestinationFacts(
        info=info(
            networks={},
            qemu=QemuFacts(version=(7, 0, 0), accelerator="kvm", live_migration_refusal="no"),
        ),
        memory_free_bytes=0,
        volumes={"shared": "gone"},
        files={"/s/web/disk0.qcow2": "gone"},
        macs_in_use=("52:54:00:00:00:01",),
        holds_vm=True,
        tls_ready=False,
    )
    assert failed(plan.check_destination(MACHINE, there, method="live")) == [
        "clean", "memory", "machine", "cpu", "accelerator", "storage", "storage", "network",
        "mac", "tls", "qemu",
    ]  # fmt: skip


def test_who_is_eligible_and_every_reason_against_the_others() -> None:
    hosts = [
        (host_info("host1"), 1 << 30, True),
        (host_info("host2"), 1 << 30, True),
        (host_info("host3", volumes=(), networks={}), 0, False),
    ]
    found = plan.eligible(MACHINE, hosts, source=host_info("host1"))
    assert found["host1"] == ("the VM is there now",)
    assert found["host2"] == ()
    assert found["host3"][0] == "host3 is not up"
    assert len(found["host3"]) == 4
