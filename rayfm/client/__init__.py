"""Scoring and near-line labels from other programs.

``rayfm.client`` needs pyarrow and httpx (or grpcio), and neither torch nor Ray.

    >>> from rayfm.client import Client
    >>> with Client("http://127.0.0.1:8000", token="...") as client:  # doctest: +SKIP
    ...     reply = client.score("vm.direct.1", user={"user": 7}, candidates={"ad": ["a", "b"]})
    ...     reply.version, reply.predictions["click"]

What goes over the wire is in `rayfm.client.wire`, which the servers read too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rayfm.client.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    NotLabelled,
    Overloaded,
    Reject,
    ScoreError,
    ServerFault,
    Unauthorized,
    Unavailable,
)
from rayfm.client.retry import Retries

if TYPE_CHECKING:
    from rayfm.client.grpc import GrpcClient
    from rayfm.client.http import Client
    from rayfm.client.labels import Ticket, TicketState
    from rayfm.client.wire import Scored

_LAZY = {"Client": "http", "GrpcClient": "grpc", "Scored": "wire", "Ticket": "labels", "TicketState": "labels"}

__all__ = [
    "Client",
    "DeadlineExceeded",
    "GrpcClient",
    "InvalidRequest",
    "NotFound",
    "NotLabelled",
    "Overloaded",
    "Reject",
    "Retries",
    "ScoreError",
    "Scored",
    "ServerFault",
    "Ticket",
    "TicketState",
    "Unauthorized",
    "Unavailable",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
