"""Whom the store daemon lets in: certificates of the right role only."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from godwit.store.client import StoreClient
from godwit.store.errors import StoreError
from godwit.wire.ca import ClusterCa, issue, write_identity

from .conftest import client_context, running


@pytest.mark.parametrize(
    ("role", "enters"), [("host", True), ("manager", True), ("migration", False)]
)
async def test_only_some_roles_may_use_the_store(tmp_path: Path, role: str, enters: bool) -> None:
    authority = ClusterCa.create(cluster="test")
    for holder in ("store", role):
        write_identity(
            tmp_path / holder, issue(authority, role=holder, name="x", ips=["127.0.0.1"])
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = tmp_path / "store"
    argv = [sys.executable, "-m", "godwit.store.daemon.main", "--data", str(tmp_path / "data")]
    argv += ["--listen", f"tcp:127.0.0.1:{port}", "--cert", str(own / "cert.pem")]
    argv += ["--key", str(own / "key.pem"), "--ca", str(own / "ca.pem")]

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with running(argv, listens, stderr=subprocess.DEVNULL):
        store = StoreClient(
            [f"https://127.0.0.1:{port}"], ssl_context=client_context(tmp_path / role), timeout=3.0
        )
        try:
            if enters:
                assert await store.put("/godwit/a", b"1") > 1
            else:
                with pytest.raises(StoreError):
                    await store.put("/godwit/a", b"1")
        finally:
            await store.aclose()
