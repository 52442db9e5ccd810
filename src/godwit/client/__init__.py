"""The Python SDK: everything the command line can do, for programs.

    from godwit.client import Client

    with Client() as client:
        task = client.vms.migrate("web", to="host2")
        print(client.result(client.wait(task)))

``AsyncClient`` is the same with ``await``. Which cluster is meant comes from the arguments, from
``GODWIT_URL``, ``GODWIT_TOKEN_FILE`` and ``GODWIT_CA_FILE``, or from the current context.
Errors are those of ``godwit.model.errors``. Importing this costs nothing until a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from godwit.client.api import AsyncClient
    from godwit.client.settings import Target
    from godwit.client.sync import Client

__all__ = ["AsyncClient", "Client", "Target"]

_PLACES = {"AsyncClient": "api", "Client": "sync", "Target": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
