"""Open a WebSocket to a peer with the TLS rules of this room. Imported only when needed."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, cast

from websockets.asyncio.client import ClientConnection, unix_connect
from websockets.asyncio.client import connect as ws_connect
from websockets.exceptions import InvalidHandshake, InvalidStatus

from godwit.wire.errors import PeerNotTrusted, PeerRefused, PeerUnreachable
from godwit.wire.problem import Problem
from godwit.wire.tls import ClientTls

_MESSAGE_LIMIT = 1024 * 1024


async def connect(
    uri: str,
    *,
    tls: ClientTls | None,
    unix: str | None,
    headers: Mapping[str, str],
    deadline_s: float,
) -> ClientConnection:
    """Connect, check who answers before the token is sent, and upgrade.

    Errors: PeerUnreachable, PeerNotTrusted, PeerRefused.
    """

    class Checked(ClientConnection):
        async def handshake(self, *args: Any, **kwargs: Any) -> None:
            if tls is not None:
                found = cast("ssl.SSLObject", self.transport.get_extra_info("ssl_object"))
                tls.verify(found, where=uri)
            await super().handshake(*args, **kwargs)

    options: dict[str, Any] = {
        "additional_headers": dict(headers),
        "compression": None,  # small console traffic: latency counts, not size
        "max_size": _MESSAGE_LIMIT,
        "open_timeout": deadline_s,
        "close_timeout": 2.0,
        "create_connection": Checked,
    }
    try:
        if unix is not None:
            return await unix_connect(unix, uri, **options)
        if tls is not None:
            options["ssl"] = tls.context
        return await ws_connect(uri, proxy=None, **options)
    except InvalidStatus as error:
        answer = error.response
        raise PeerRefused(
            Problem.from_answer(
                status=answer.status_code,
                content_type=answer.headers.get("content-type", ""),
                body=bytes(answer.body or b""),
            )
        ) from error
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", None) or error.reason or str(error)
        raise PeerNotTrusted(
            f"The certificate of {uri} is not accepted: {reason}.",
            hint="Check the CA file, the certificate's dates and this machine's clock.",
        ) from error
    except (OSError, InvalidHandshake) as error:
        raise PeerUnreachable(
            f"{uri} cannot be opened: {error}.",
            hint="Check that the daemon runs there and that the network is up.",
        ) from error
