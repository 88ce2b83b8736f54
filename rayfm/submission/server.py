"""Ray's job server, and what its refusals mean."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from rayfm.config import CapacityError, ConfigError, RayfmError

DEFAULT = "http://127.0.0.1:8265"
"""Where a head's dashboard listens, on the machine itself or through a forwarded port."""

REACH_S = 10.0
"""Seconds for the first answer."""

_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.authentication.http_token_authentication",
)
"""Loggers of Ray's client, which tell of uploads and closed connections; what matters we say ourselves."""

_TOKEN = "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH=FILE or RAY_AUTH_TOKEN"


@dataclasses.dataclass(frozen=True)
class Server:
    """A job server that answers.

    Attributes:
        address: its URL.
        client: Ray's client, or one with its methods.
        version: of the cluster's Ray.
    """

    address: str
    client: Any
    version: str


def server_address(address: str | None = None) -> str:
    """The URL of the job server: ``address``, else that of the environment, else the usual one on this machine.

    Raises:
        ConfigError: it is no URL.
    """
    found = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if found is None:
        # In Ray's own words either a job server or a cluster; only the first is of use here.
        cluster = os.environ.get("RAY_ADDRESS", "")
        found = cluster if cluster.startswith(("http://", "https://")) else DEFAULT
    found = (found if "://" in found else f"http://{found}").rstrip("/")
    try:
        parts = urlsplit(found)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"--address {found}: give the URL of the dashboard, e.g. {DEFAULT}")
    return found


def connect(address: str | None = None) -> Server:
    """The job server at an address, after it has answered.

    Raises:
        ConfigError: it asks for a token and there is none, or a wrong one; or it runs another Ray.
        CapacityError: nobody answers, or somebody else does.
    """
    url = server_address(address)
    _reach(url)
    import ray
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    with asking(url), _only(url):
        client = JobSubmissionClient(url)
    version = str(getattr(client, "_server_ray_version", None) or "")
    check_version(version, ray.__version__, url)
    return Server(url, client, version)


def check_version(theirs: str, ours: str, address: str) -> None:
    """Raises ConfigError where the cluster runs another minor version of Ray than this machine."""
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise ConfigError(
            f"{address} runs Ray {theirs or 'of an unknown version'}, and here it is {ours}, which is what this rayfm "
            f"works with; start the cluster with ray=={ours}, or submit with the rayfm that fits its Ray"
        )


@contextlib.contextmanager
def asking(address: str) -> Iterator[None]:
    """What Ray's client raises within the block, as errors of ours.

    Raises:
        ConfigError: the token is missing or wrong.
        CapacityError: the server does not answer.
        RayfmError: it refuses.
    """
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        if "Authentication required" in str(error):
            raise ConfigError(f"{address} asks for a token and was sent none; set {_TOKEN}") from None
        if "Authentication failed" in str(error):
            raise ConfigError(
                f"{address} does not know the token; give the cluster's own: {_TOKEN}. Without the latter two, Ray "
                "reads ~/.ray/auth_token"
            ) from None
        # Before anything is sent: there is no token, or its file cannot be read.
        raise ConfigError(f"RAY_AUTH_MODE=token, and no token can be read; set {_TOKEN}") from None
    except (OSError, requests.exceptions.RequestException, aiohttp.ClientError) as error:
        raise CapacityError(f"{address} does not answer any more: {_line(error)}") from None
    except (RuntimeError, ValueError) as error:
        raise RayfmError(f"{address} refuses: {_line(error)}") from None


def _reach(url: str) -> None:
    """Raises CapacityError where no server of Ray's answers. Ray's client would wait without an end."""
    import requests

    try:
        reply = requests.get(f"{url}/api/version", timeout=REACH_S)
    except requests.exceptions.RequestException as error:
        why = "nobody listens there" if isinstance(error, requests.exceptions.ConnectionError) else _line(error)
        if isinstance(error, requests.exceptions.Timeout):
            why = f"no answer within {REACH_S:g} s"
        if isinstance(error, requests.exceptions.SSLError):
            why = _line(error)
        raise CapacityError(
            f"no Ray job server at {url}: {why}. Name the dashboard with --address; on Kubernetes first "
            "`kubectl port-forward service/NAME-head-svc 8265`; on this machine `ray start --head`"
        ) from None
    if reply.status_code in (401, 403):
        return  # it wants a token, which Ray's client sends
    if "ray_version" not in reply.text:
        raise CapacityError(
            f"no Ray job server at {url}: what answers there is none (status {reply.status_code}); name the dashboard, "
            "not the port of the cluster (6379) or of Ray Client (10001)"
        )


@contextlib.contextmanager
def _only(url: str) -> Iterator[None]:
    """Ray's client takes an address from the environment in favour of the one that it is given; here it does not."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _line(error: Exception) -> str:
    """What an error says, on one line: of a traceback, its last."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1].strip().rstrip(".") if "Traceback" in str(error) else " ".join(lines)[:300].rstrip(".")
