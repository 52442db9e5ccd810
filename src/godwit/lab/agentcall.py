"""Asks an agent from inside its own host, whatever is cut outside: one blocking HTTPS call.

The socket is made in the host's network namespace; the thread that asks stays where it is.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode, urlsplit

from godwit.host.netns import opened_netns, socket_in_netns
from godwit.model.errors import OutcomeUnknown, Unavailable, from_problem
from godwit.wire.identity import HOST, Identity
from godwit.wire.tls import ClientTls, Expect


def call(
    url: str,
    method: str,
    path: str,
    *,
    host: str,
    netns: str,
    identity: Path,
    body: Any = None,
    query: Mapping[str, str] | None = None,
    deadline_s: float = 10.0,
) -> Any:
    """The JSON a host's agent answers; what it refuses is raised as it was meant.

    ``identity`` is the directory of who asks. Unavailable when nothing was asked, OutcomeUnknown
    when no answer came within ``deadline_s``.
    """
    place = urlsplit(url)
    target = f"{path}?{urlencode(query)}" if query else path
    channel = _connected(place.hostname or "", place.port or 443, host, netns, identity)
    connection = http.client.HTTPConnection(place.hostname or "", place.port)
    connection.sock = channel
    try:
        channel.settimeout(deadline_s)
        text = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request(method, target, body=text, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise OutcomeUnknown(
            f"the agent of {host} was asked and did not answer: {error}",
            hint=f"godwit lab logs {host} agent",
        ) from error
    finally:
        connection.close()
    value = _parsed(content)
    if answer.status >= 400:
        raise from_problem(value if isinstance(value, dict) else {"title": f"{answer.reason}"})
    return value


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content or b"null")
    except ValueError:
        return None


def _connected(address: str, port: int, host: str, netns: str, identity: Path) -> ssl.SSLSocket:
    tls = ClientTls.for_daemon(Identity.load(identity), Expect(HOST, host))
    with opened_netns(netns) as descriptor:
        plain = socket_in_netns(descriptor)
    try:
        plain.settimeout(5.0)
        plain.connect((address, port))
        channel = tls.context.wrap_socket(plain, server_hostname=address)
        tls.verify(cast("ssl.SSLObject", channel), where=f"https://{address}:{port}")
        return channel
    except OSError as error:
        plain.close()
        raise Unavailable(
            f"the agent of {host} cannot be reached: {error.strerror or error}",
            hint=f"godwit lab logs {host} agent",
        ) from error
