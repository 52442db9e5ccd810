"""Names, places and addresses of labs, and the text of their files; all pure."""

from __future__ import annotations

import ipaddress
import json
import tomllib
from pathlib import Path

import pytest

from godwit.host.config import AgentConfig
from godwit.lab import configs, daemons, keeping, network
from godwit.lab.layout import (
    CLIENT,
    CONTROL,
    LAN,
    MAX_HOSTS,
    MGMT,
    NETS,
    Layout,
    checked_hosts,
    checked_managers,
    checked_name,
    host_number,
    net_named,
    state_root,
)
from godwit.manager.config import ManagerConfig
from godwit.model.errors import InvalidRequest
from godwit.store.api import MemberView, StoreStatus
from godwit.store.daemon.main import settings_from

BIG = Layout("a-lab-of-twenty-chars", MAX_HOSTS)


def test_every_address_is_given_once_and_lies_in_its_subnet() -> None:
    cables = BIG.all_cables()
    given = [cable.cidr for cable in cables if cable.cidr]
    assert len(set(given)) == len(given) == 2 + 4 * MAX_HOSTS
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
    assert agent.storage.longest_heal_s == configs.LONGEST_HEAL_S
    assert agent.store.endpoints == ("https://10.92.0.1:7379",)
    free = configs.agent_config(Layout("x", 1, ""), "host1")
    assert AgentConfig.parse(tomllib.loads(configs.toml(free))).migration.rate_bits == 0

    path = tmp_path / "manager.toml"
    path.write_text(configs.toml(configs.manager_config(layout, "control")))
    manager = ManagerConfig.load(path)
    assert manager.lab
    assert manager.store_endpoints == agent.store.endpoints

    path = tmp_path / "store.toml"
    path.write_text(configs.toml(configs.store_config(layout)))
    store = settings_from(["--config", str(path)])
    assert store.listen == ("tcp:10.92.0.1:7379", "unix:/run/godwit/store.sock")
    assert store.tls is not None


def test_a_host_is_told_no_other_hosts_things() -> None:
    text = configs.toml(configs.agent_config(Layout("x", 2), "host1"))
    assert "host2" not in text
    assert "10.92.0.12" not in text


def test_units_say_what_to_run() -> None:
    layout = Layout("x", 2)
    units = daemons.units(layout, "control", "/py") + daemons.units(layout, "host1", "/py")
    assert [unit.name for unit in units] == ["store", "manager", "guard", "agent"]
    read = json.loads(configs.units_file(units))["units"]
    assert read[1]["sockets"] == ["api"]
    assert all(unit["watchdog_s"] == 2.0 for unit in read)
    assert read[3]["argv"][:4] == ["/py", "-I", "-m", "godwit.agent.main"]


@pytest.mark.parametrize(
    ("hosts", "members"),
    [
        (1, ["host1"]),
        (2, ["host1", "host2", "control"]),
        (3, ["host1", "host2", "host3"]),
        (16, ["host1", "host2", "host3"]),
    ],
)
def test_etcd_runs_on_the_first_hosts(hosts: int, members: list[str]) -> None:
    layout = Layout("x", hosts, store="etcd")
    assert [member.name for member in layout.store_members] == members
    for node in layout.nodes:
        names = daemons.names(layout, node)
        assert ("etcd" in names) is (node in members)
        assert "store" not in names
        urls = layout.store_urls(node)
        assert sorted(urls) == sorted(member.client_url for member in layout.store_members)
        if node in members:
            assert urls[0] == f"https://{layout.mgmt_address(node)}:7379"
        if node != "control":
            assert layout.mgmt_address("host1") in configs.toml(configs.agent_config(layout, node))
    words = daemons.units(layout, members[-1], "/py")[0].argv
    assert f"--listen-client-urls https://{layout.mgmt_address(members[-1])}:7379" in " ".join(
        words
    )


def test_managers_run_on_the_first_hosts_or_beside_them() -> None:
    assert Layout("x", 3).manager_nodes == ("control",)
    layout = Layout("x", 3, store="etcd", managers=2)
    found = {node: daemons.names(layout, node) for node in layout.nodes}
    assert found == {
        "control": (),
        "host1": ("etcd", "guard", "agent", "manager"),
        "host2": ("etcd", "guard", "agent", "manager"),
        "host3": ("etcd", "guard", "agent"),
    }
    assert checked_managers(3, 3) == 3
    for wrong in (-1, 4):
        with pytest.raises(InvalidRequest):
            checked_managers(wrong, 3)


@pytest.mark.parametrize(
    ("leaders", "states", "words"),
    [
        ((1, 1, 1), ["leads", "follows", "follows"], "any one of them may be gone, 2 may not"),
        ((1, 1, None), ["leads", "follows", "away"], "away now: host3"),
        ((0, None, None), ["no leader", "away", "away"], "there is no leader now"),
    ],
)
def test_the_status_says_what_the_members_mean(
    leaders: tuple[int | None, ...], states: list[str], words: str
) -> None:
    layout = Layout("x", 3, store="etcd")
    views = [
        MemberView(m.client_url, None if led is None else StoreStatus(9, n, 1, led, 4), 3)
        for n, (m, led) in enumerate(zip(layout.store_members, leaders, strict=True), 1)
    ]
    rows = keeping.members_view(layout, views)
    assert [row["state"] for row in rows] == states
    assert words in keeping.quorum(layout, rows)
    pair = Layout("x", 2, store="etcd")
    assert "control (witness)" in keeping.quorum(pair, keeping.members_view(pair, ()))


def test_the_switch_plugs_every_cable_into_its_network() -> None:
    layout = Layout("x", 2)
    lines = network.switch_lines(layout)
    assert "link set dev host2-mig master br-mig" in lines
    assert "link set dev client-lan master br-lan" in lines
    assert sum(line.startswith("link add") and "type veth" in line for line in lines) == 12
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
