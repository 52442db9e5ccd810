"""Names, places and addresses of labs, and the text of their files; all pure."""

from __future__ import annotations

import ipaddress
import json
import tomllib
from pathlib import Path

import pytest

from godwit.host.config import AgentConfig
from godwit.lab import configs, network
from godwit.lab.layout import (
    CLIENT,
    CONTROL,
    LAN,
    MAX_HOSTS,
    MGMT,
    NETS,
    Layout,
    checked_hosts,
    checked_name,
    host_number,
    net_named,
    state_root,
)
from godwit.manager.config import ManagerConfig
from godwit.model.errors import InvalidRequest
from godwit.store.daemon.main import settings_from

BIG = Layout("a-lab-of-twenty-chars", MAX_HOSTS)


def test_every_address_is_given_once_and_lies_in_its_subnet() -> None:
    cables = BIG.all_cables()
    given = [cable.cidr for cable in cables if cable.cidr]
    assert len(set(given)) == len(given) == 2 + 3 * MAX_HOSTS
    for cable in cables:
        if cable.cidr:
            interface = ipaddress.ip_interface(cable.cidr)
            assert interface.network == ipaddress.ip_network(cable.net.subnet)


def test_the_vm_network_has_room_after_100() -> None:
    network_ = ipaddress.ip_network(LAN.subnet)
    taken = {c.cidr.partition("/")[0] for c in BIG.all_cables() if c.net == LAN}
    free = [a for a in network_.hosts() if int(a) >= int(network_[100]) and str(a) not in taken]
    assert len(free) >= 200


def test_link_names_fit_and_are_unique() -> None:
    ports = [cable.switch_port for cable in BIG.all_cables()] + [net.bridge for net in NETS]
    assert len(set(ports)) == len(ports)
    assert max(map(len, ports)) <= 15


def test_socket_paths_are_short() -> None:
    assert max(len(str(BIG.control_socket(node))) for node in BIG.nodes) < 60


def test_labs_of_other_names_share_nothing() -> None:
    one, other = Layout("a", 2), Layout("a-b", 2)
    for of in (
        lambda lab: {lab.netns(place) for place in lab.places},
        lambda lab: {lab.cgroup(node) for node in lab.nodes},
        lambda lab: {lab.state, lab.run},
    ):
        assert not of(one) & of(other)


def test_hosts_are_told_apart() -> None:
    assert Layout("x", 2).host_names == ("host1", "host2")
    assert Layout("x", 2).address("host2", MGMT) == "10.92.0.12"
    assert Layout("x", 2).agent_url("host1") == "https://10.92.0.11:7101"
    assert host_number("host12") == 12
    for wrong in ("host0", "host01", "hostx", "client", "host", ""):
        with pytest.raises(InvalidRequest):
            host_number(wrong)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a/b", "..", "a" * 21])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InvalidRequest):
        checked_name(name)


def test_counts_that_cannot_be() -> None:
    assert checked_hosts(MAX_HOSTS) == MAX_HOSTS
    for count in (0, -1, MAX_HOSTS + 1):
        with pytest.raises(InvalidRequest):
            checked_hosts(count)


def test_networks_by_name() -> None:
    assert net_named("mgmt") == MGMT
    with pytest.raises(InvalidRequest, match="vlan"):
        net_named("vlan")


def test_where_the_state_is() -> None:
    assert state_root({}) == Path("/var/lib/godwit-lab")
    assert state_root({"GODWIT_LAB_DIR": "/x"}) == Path("/x")


def test_the_daemons_understand_their_files(tmp_path: Path) -> None:
    layout = Layout("x", 2, "200mbit")
    qemu: dict[str, str | bool] = {"accelerator": "tcg", "allow_tcg_migration_on_old_qemu": True}
    text = configs.toml(configs.agent_config(layout, "host2", qemu=qemu))
    agent = AgentConfig.parse(tomllib.loads(text))
    assert agent.host == "host2"
    assert agent.lab.enabled
    assert agent.migration.address == "10.93.0.12"
    assert agent.migration.rate_bits == 200_000_000
    assert agent.networks["lan"].bridge == "br-lan"
    assert agent.qemu.allow_tcg_migration_on_old_qemu
    assert agent.store.endpoints == ("https://10.92.0.1:7379",)
    free = configs.agent_config(Layout("x", 1, ""), "host1")
    assert AgentConfig.parse(tomllib.loads(configs.toml(free))).migration.rate_bits == 0

    path = tmp_path / "manager.toml"
    path.write_text(configs.toml(configs.manager_config(layout)))
    manager = ManagerConfig.load(path)
    assert manager.lab
    assert manager.store_endpoints == agent.store.endpoints

    path = tmp_path / "store.toml"
    path.write_text(configs.toml(configs.store_config()))
    store = settings_from(["--config", str(path)])
    assert store.listen == ("tcp:10.92.0.1:7379", "unix:/run/godwit/store.sock")
    assert store.tls is not None


def test_a_host_is_told_no_other_hosts_things() -> None:
    text = configs.toml(configs.agent_config(Layout("x", 2), "host1"))
    assert "host2" not in text
    assert "10.92.0.12" not in text


def test_units_say_what_to_run() -> None:
    units = configs.control_units("/py") + configs.host_units("/py")
    assert [unit.name for unit in units] == ["store", "manager", "guard", "agent"]
    read = json.loads(configs.units_file(units))["units"]
    assert read[1]["sockets"] == ["api"]
    assert all(unit["watchdog_s"] == 2.0 for unit in read)
    assert read[3]["argv"][:4] == ["/py", "-I", "-m", "godwit.agent.main"]


def test_the_switch_plugs_every_cable_into_its_network() -> None:
    layout = Layout("x", 2)
    lines = network.switch_lines(layout)
    assert "link set dev host2-mig master br-mig" in lines
    assert "link set dev client-lan master br-lan" in lines
    assert sum(line.startswith("link add") and "type veth" in line for line in lines) == 10
    assert sum("type bridge" in line for line in lines) == 4


def test_a_host_is_a_switch_on_the_vm_network_and_a_station_elsewhere() -> None:
    lines = network.node_lines(Layout("x", 2), "host1")
    assert "link set dev lan0 master br-lan" in lines
    assert [line for line in lines if line.startswith("address")] == [
        "address add 10.92.0.11/24 dev mgmt0",
        "address add 10.93.0.11/24 dev mig0",
        "address add 10.94.0.11/24 dev stor0",
    ]
    assert network.node_lines(Layout("x", 1), CLIENT)[1] == "address add 10.91.0.1/22 dev lan0"
    assert "address add 10.92.0.1/24 dev mgmt0" in network.node_lines(Layout("x", 1), CONTROL)
