"""The lab's certificates: who has one for what, and whose CA it is of."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from godwit.lab import pki
from godwit.lab.layout import Layout
from godwit.wire.errors import IdentityUnusable
from godwit.wire.identity import Identity


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    class Group:
        gr_gid = 0

    monkeypatch.setattr("grp.getgrnam", lambda _: Group)
    layout = Layout("x", 3, state_root=tmp_path, store="etcd", managers=2)
    for node in layout.nodes:
        (layout.node_dir(node) / "etc").mkdir(parents=True)
    pki.make(layout)
    return layout


def who(layout: Layout, node: str, folder: str) -> str:
    return str(Identity.load(layout.node_dir(node) / "etc" / folder).peer)


def test_each_node_has_the_identities_of_its_daemons(made: Layout) -> None:
    for number, host in enumerate(made.host_names, 1):
        assert who(made, host, "tls") == f"host/{host}"
        assert who(made, host, "store-tls") == f"store/{host}"
        if number <= 2:
            assert who(made, host, "manager-tls") == f"manager/{host}"
            assert (made.node_dir(host) / "etc" / "tokens").stat().st_mode & 0o777 == 0o600
    for node, folder in (("control", "store-tls"), ("control", "tls"), ("host3", "manager-tls")):
        with pytest.raises(IdentityUnusable):
            who(made, node, folder)


def test_qemus_certificates_are_of_a_ca_that_no_daemon_trusts(made: Layout) -> None:
    folder = made.node_dir("host1") / "etc" / "migration-tls"
    cluster, streams = (made.pki / "ca.pem").read_bytes(), (folder / "ca-cert.pem").read_bytes()
    assert cluster != streams
    assert (
        streams == (made.node_dir("host2") / "etc" / "migration-tls" / "ca-cert.pem").read_bytes()
    )
    assert not _shakes_hands(folder, trusted=made.pki / "ca.pem")
    assert _shakes_hands(folder, trusted=folder / "ca-cert.pem")


def _shakes_hands(folder: Path, *, trusted: Path) -> bool:
    """Whether a server that trusts a CA lets the holder of these credentials in."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    server.load_verify_locations(trusted)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(folder / "ca-cert.pem")
    client.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(back, there)
    far = server.wrap_bio(there, back, server_side=True)
    try:
        for side in (near, far, near, far):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLError:
        return False
    return far.getpeercert() != {}
