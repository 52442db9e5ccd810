"""A bridge forgets what it learned on one port, and nothing else."""

from __future__ import annotations

import pytest

from godwit.host import links, netns
from godwit.host.ifctl import flush_learned, in_netns
from godwit.host.netns import opened_netns
from godwit.host.run import run

pytestmark = pytest.mark.system
SPACE = "gw-test-flush"
LEARNED, OTHER = "02:00:00:00:00:05", "02:00:00:00:00:06"


def _learned() -> str:
    return run(["bridge", "fdb", "show"], timeout=5, netns=SPACE).decode()


def test_flush_forgets_one_port() -> None:
    netns.create(SPACE)
    try:
        lines = [links.bridge("br0"), links.up("br0")]
        for port, peer in (("v0", "v1"), ("w0", "w1")):
            lines += [
                links.veth(port, peer),
                links.attach(port, "br0"),
                links.up(port),
                links.up(peer),
            ]
        links.apply(lines, netns=SPACE)
        for port, mac in (("v0", LEARNED), ("w0", OTHER)):
            entry = ["bridge", "fdb", "add", mac, "dev", port, "master", "dynamic"]
            run(entry, timeout=5, netns=SPACE)
        assert LEARNED in _learned()
        with opened_netns(SPACE) as space:
            in_netns(space, lambda: flush_learned("v0"))
            with pytest.raises(OSError, match="br0"):
                in_netns(space, lambda: flush_learned("br0"))
        assert LEARNED not in _learned()
        assert OTHER in _learned()
    finally:
        netns.delete(SPACE)
