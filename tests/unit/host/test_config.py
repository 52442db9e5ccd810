"""The daemons' file: what is told, what is assumed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from godwit.host.config import AgentConfig, ConfigError, parse_rate

WHOLE = """
host = "host1"
[paths]
run = "/run/godwit"
images = "/images"
[store]
endpoints = ["https://10.92.0.1:7379"]
[tls]
dir = "/etc/godwit/tls"
[agent]
address = "10.92.0.11"
port = 7102
[migration]
address = "10.93.0.11"
subnet = "10.93.0.0/24"
rate = "1gbit"
[networks.lan]
bridge = "br-lan"
uplink = "lan0"
mtu = 1400
[qemu]
accelerator = "tcg"
[lab]
enabled = true
[cgroup]
root = "godwit/host1"
"""


def test_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(WHOLE)
    config = AgentConfig.load(path)
    assert config.host == "host1"
    assert config.paths.images == Path("/images")
    assert config.paths.state == Path("/var/lib/godwit")
    assert config.store.endpoints == ("https://10.92.0.1:7379",)
    assert config.agent.port == 7102
    assert config.migration.rate_bits == 10**9
    assert config.migration.tls
    assert config.networks["lan"].mtu == 1400
    assert config.lab.enabled
    assert config.qemu.image_locks
    assert not AgentConfig.parse({"host": "h"}).lab.enabled
    assert AgentConfig.parse({"host": "h"}).migration.rate_bits == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("port = 7102", 'port = "7102"'), "agent.port: a whole number"),
        (("port = 7102", "port = true"), "agent.port: a whole number"),
        (("enabled = true", "enabled = 1"), "lab.enabled: true or false"),
        (("mtu = 1400", "mtuu = 1400"), "networks.lan.mtuu: no such key"),
        (('bridge = "br-lan"', ""), "networks.lan: missing"),
        (('host = "host1"', ""), "file: missing"),
        (('images = "/images"', 'images = "images"'), "paths.images: an absolute path"),
        (('rate = "1gbit"', 'rate = "fast"'), "'fast' is not a rate"),
        (("10.93.0.0/24", "10.94.0.0/24"), "10.93.0.11 is not in"),
        (('["https://10.92.0.1:7379"]', "[7]"), "store.endpoints: a list of texts"),
        (('accelerator = "tcg"', 'accelerator = "xen"'), "qemu.accelerator"),
        (("[qemu]", "[storage]\nlongest_heal_s = 2\n[qemu]"), "storage.longest_heal_s"),
        (("[lab]", "[lab"), "agent.toml"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = tmp_path / "agent.toml"
    assert change[0] in WHOLE
    path.write_text(WHOLE.replace(*change))
    with pytest.raises(ConfigError) as caught:
        AgentConfig.load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml"):
        AgentConfig.load(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("text", "bits"), [("1gbit", 10**9), ("2.5Gbit", 25 * 10**8), ("64000bit", 64000)]
)
def test_rates(text: str, bits: int) -> None:
    assert parse_rate(text) == bits
