"""Facts of machines that are not this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from godwit.host import facts

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) CPU
flags\t\t: fpu vme vmx sse2

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) CPU
flags\t\t: fpu vme vmx sse2
"""


def machine(root: Path, cpuinfo: str = INTEL, devices: tuple[str, ...] = ("kvm",)) -> Path:
    (root / "proc/sys/kernel/random").mkdir(parents=True)
    (root / "dev").mkdir()
    (root / "etc").mkdir()
    (root / "proc/cpuinfo").write_text(cpuinfo)
    (root / "proc/meminfo").write_text(
        "MemTotal:  1000 kB\nMemFree:  400 kB\nMemAvailable:  600 kB\n"
    )
    (root / "proc/sys/kernel/hostname").write_text("host1\n")
    (root / "proc/sys/kernel/osrelease").write_text("6.1.0-amd64\n")
    (root / "proc/sys/kernel/random/boot_id").write_text("abc\n")
    (root / "etc/os-release").write_text('NAME="X"\nPRETTY_NAME="Debian GNU/Linux 13"\n')
    for device in devices:
        (root / "dev" / device).touch()
    return root


def test_everything(tmp_path: Path) -> None:
    found = facts.host_facts(machine(tmp_path, devices=("kvm", "userfaultfd")))
    assert (found.hostname, found.boot_id, found.kernel) == ("host1", "abc", "6.1.0-amd64")
    assert found.system == "Debian GNU/Linux 13"
    assert found.cpu.count == 2
    assert found.cpu.vendor == "GenuineIntel"
    assert found.cpu.virtualization == "vmx"
    assert found.memory == facts.MemoryFacts(1_024_000, 409_600, 614_400)
    assert found.kvm.usable
    assert str(found.kvm) == "usable"
    assert found.userfaultfd.usable


def test_amd(tmp_path: Path) -> None:
    root = machine(tmp_path, INTEL.replace("vmx", "svm"))
    assert facts.kvm_facts(root).usable
    assert facts.cpu_facts(root).virtualization == "svm"


def test_kvm_that_opens_but_cannot_work(tmp_path: Path) -> None:
    found = facts.kvm_facts(machine(tmp_path, INTEL.replace("vmx ", "")))
    assert str(found) == ("unusable (/dev/kvm opens, but the processor shows neither vmx nor svm)")


@pytest.mark.parametrize("flag", ["avmx", "vmx_x"])
def test_part_of_a_word_is_no_flag(tmp_path: Path, flag: str) -> None:
    assert not facts.kvm_facts(machine(tmp_path, INTEL.replace("vmx", flag))).usable


def test_missing_devices_say_why(tmp_path: Path) -> None:
    root = machine(tmp_path, devices=())
    assert facts.kvm_facts(root).reason == "/dev/kvm: No such file or directory"
    assert facts.userfaultfd_facts(root).reason == "/dev/userfaultfd: No such file or directory"


def test_this_machine_has_processors_and_memory() -> None:
    found = facts.host_facts()
    assert found.cpu.count >= 1
    assert 0 < found.memory.available <= found.memory.total
    assert len(found.boot_id) == 36
