"""What a new VM is pinned to: the best all hosts have, or a refusal that says why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.host.facts import Usable
from godwit.model.errors import Conflict, InvalidRequest, Refused
from godwit.model.host import QemuFacts
from godwit.model.vm import Nic
from godwit.qemu import pins

UUID = "6f0e9b6c-4d3c-4f0a-9a53-0a4f5e1f2b3c"
OLD = ("pc-q35-6.2", "pc-q35-7.2")
NEW = (*OLD, "pc-q35-9.2", "pc-q35-10.0")


def _facts(
    *,
    machines: tuple[str, ...] = NEW,
    models: tuple[str, ...] = ("Nehalem-v1", "Westmere-v1", "qemu64-v1"),
    accelerator: str = "tcg",
) -> QemuFacts:
    return QemuFacts(
        version=(10, 0, 2), accelerator=accelerator, machines=machines, cpu_models=models
    )


def test_newest_machine_and_best_model_all_have() -> None:
    both = {"a": _facts(), "b": _facts()}
    chosen = pins.choose_pins(both, uuid=UUID)
    assert (chosen.machine, chosen.cpu_model) == ("pc-q35-10.0", "Westmere-v1")
    assert chosen.accelerator == "tcg"
    older = both | {"c": _facts(machines=OLD, models=("Nehalem-v1", "Penryn-v1"))}
    chosen = pins.choose_pins(older, uuid=UUID)
    assert (chosen.machine, chosen.cpu_model) == ("pc-q35-7.2", "Nehalem-v1")


def test_newer_version_of_a_model_wins_and_strange_ones_never() -> None:
    models = ("Skylake-Server-v1", "Skylake-Server-v5", "Zhaoxin-v1", "max", "host")
    chosen = pins.choose_pins({"a": _facts(models=models, accelerator="kvm")}, uuid=UUID)
    assert chosen.cpu_model == "Skylake-Server-v5"


def test_an_alias_is_never_pinned() -> None:
    chosen = pins.choose_pins({"a": _facts(machines=("q35", "pc", "pc-q35-8.0"))}, uuid=UUID)
    assert chosen.machine == "pc-q35-8.0"


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        ({}, "no host is up"),
        ({"a": _facts(accelerator="kvm"), "b": _facts()}, "b without KVM"),
        ({"a": _facts(), "b": _facts(machines=())}, "no q35 machine version in common"),
        ({"a": _facts(), "b": _facts(models=("EPYC-v4",))}, "no CPU model in common"),
    ],
)
def test_nothing_in_common_is_refused_with_the_reason(
    hosts: dict[str, QemuFacts], words: str
) -> None:
    with pytest.raises(Refused, match=words) as caught:
        pins.choose_pins(hosts, uuid=UUID)
    assert caught.value.hint


def test_quirks_are_named_or_refused() -> None:
    chosen = pins.choose_pins({"a": _facts()}, uuid=UUID, quirks=("short-ram",))
    assert chosen.qemu_quirks == ("short-ram",)
    with pytest.raises(InvalidRequest, match="no such quirk"):
        pins.choose_pins({"a": _facts()}, uuid=UUID, quirks=("shrot-ram",))


@given(st.permutations(["a", "b", "c"]))
def test_the_order_of_hosts_does_not_matter(order: list[str]) -> None:
    known = {"a": _facts(), "b": _facts(machines=OLD), "c": _facts(models=("qemu64-v1",))}
    hosts = {name: known[name] for name in order}
    assert pins.choose_pins(hosts, uuid=UUID) == pins.choose_pins(known, uuid=UUID)


def test_addresses_are_local_free_and_repeatable() -> None:
    first = pins.new_mac(UUID, "net0", taken=())
    assert first == pins.new_mac(UUID, "net0", taken=())
    assert first != pins.new_mac(UUID, "net1", taken=())
    head = int(first[:2], 16)
    assert head & 2, "locally administered"
    assert not head & 1, "not a group address"
    assert pins.new_mac(UUID, "net0", taken={first}) not in {first}
    Nic(id="net0", network="lan", mac=first)


def test_no_free_address_says_so() -> None:
    class Everything(set[str]):
        def __contains__(self, item: object) -> bool:
            return True

    with pytest.raises(Conflict, match="no free network address"):
        pins.new_mac(UUID, "net0", taken=Everything())


def test_serials_fit_a_scsi_disk() -> None:
    serial = pins.new_serial(UUID, "disk0")
    assert len(serial) == 20
    assert serial.isalnum()
    assert serial != pins.new_serial(UUID, "disk1")


def test_places_are_filled_lowest_first() -> None:
    nics = [Nic(id=f"net{n}", network="lan", mac="02:00:00:00:00:01") for n in (0, 2)]
    assert pins.next_nic_id(nics) == "net1"
    full = [Nic(id=f"net{n}", network="lan", mac="02:00:00:00:00:01") for n in range(8)]
    with pytest.raises(Refused, match="at most 8"):
        pins.next_nic_id(full)
    assert pins.next_disk(()) == ("disk0", 0)


def test_accelerator_falls_back_with_a_sentence() -> None:
    broken = Usable(False, "/dev/kvm opens, but the processor shows neither vmx nor svm")
    kind, reason = pins.choose_accelerator("auto", broken)
    assert kind == "tcg"
    assert "neither vmx nor svm" in reason
    assert pins.choose_accelerator("auto", Usable(True)) == ("kvm", "")
    assert pins.choose_accelerator("tcg", Usable(True))[0] == "tcg"
    with pytest.raises(Refused, match="does not work"):
        pins.choose_accelerator("kvm", broken)
    with pytest.raises(InvalidRequest):
        pins.choose_accelerator("hvf", Usable(True))
