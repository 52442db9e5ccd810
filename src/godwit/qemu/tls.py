"""TLS of the migration stream: credentials objects, made at migration time over QMP.

They are made late because a VM is a server on its way in and a client on its way out, and because
a new certificate then holds from the next move on. Files (``ca-cert.pem``, ``server-*.pem``,
``client-*.pem``) are opened by QEMU as its own user; no secret passes through here.

QEMU makes Diffie-Hellman parameters for every server object unless ``dh-params.pem`` lies beside:
50-700 ms of each move, measured on 7.2 and 10.0, against 1.5 ms with the file. So the host puts
the well-known group ffdhe2048 (RFC 7919) there once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from godwit.host.files import write_durable

Role = Literal["server", "client"]

DH_PARAMS_FILE: Final = "dh-params.pem"
FFDHE2048: Final = """\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""


def ensure_dh_params(directory: Path) -> None:
    """Put the parameters beside the certificates, once; readable by all: they are public."""
    path = directory / DH_PARAMS_FILE
    if not path.exists():
        write_durable(path, FFDHE2048.encode(), mode=0o644)


def object_id(role: Role) -> str:
    """Id of the credentials object, for ``tls-creds`` of the migration parameters."""
    return f"migration-tls-{role}"


def credentials(role: Role, directory: Path) -> dict[str, object]:
    """Arguments of ``object-add``: the peer must show a certificate of the same authority."""
    return {
        "qom-type": "tls-creds-x509",
        "id": object_id(role),
        "dir": str(directory),
        "endpoint": role,
        "verify-peer": True,
    }
